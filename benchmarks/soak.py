"""Two long tests on tiny: a run that is killed twenty times; half an hour of memory and speed.

    python benchmarks/soak.py               # both; about 40 minutes on 2 cores
    python benchmarks/soak.py --kills 0     # the second alone; the first keeps its last result
    python benchmarks/soak.py --minutes 0   # the other way round

Kills: SIGKILL at random moments of the same short training, started again until enough kills have
fallen; every finished run must have the LoRA, optimizer state and log of an undisturbed one, bit
for bit. Long: one run is watched from outside (resident memory as `ps` tells it) and ended with
SIGTERM, after which it must have left cleanly. Its learning rate is almost zero: every round is the
same work. Writes benchmarks/results/soak.json; exit status 1 if a promise is broken.
"""
import argparse
import datetime
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/soak.json"
SHORT = "--rounds 6 --prompts_per_round 8 --save_every 1 --grid_every 0".split()
LONG = ("--rounds 0 --epochs 1000000 --prompts_per_round 8 --save_every 25 --grid_every 100 "
        "--lr 1e-9").split()
CLOCKS = ("seconds", "prompts_per_second", "eta_minutes")   # all that may differ in a line of a log


def start(folder: Path, options: list[str]) -> subprocess.Popen:
    """spo_train.py in the background; what it says goes to FOLDER.txt."""
    words = [ROOT / "spo_train.py", "--out", folder, *options, "--device", "cpu"]
    with open(f"{folder}.txt", "a") as said:
        return subprocess.Popen([sys.executable, *words], stdout=said, stderr=said)


def finish(process: subprocess.Popen, status: int = 0) -> None:
    """Wait for an orderly end."""
    if process.wait() != status:
        sys.exit(f"spo_train.py ended with status {process.returncode}; "
                 f"see the text beside its folder, {process.args[3]}")


def outcome(folder: Path) -> tuple:
    """What must not depend on interruptions: LoRA files, last checkpoint, log but its clocks."""
    files = [
        (folder / name).read_bytes()
        for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors")
    ]
    state = torch.load(max(folder.glob("checkpoint-*.pt")), weights_only=True)
    tensors = list(state["lora"])
    for slot in state["optimizer"]["state"].values():
        tensors += slot.values()
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    log = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    return files, [t.numpy().tobytes() for t in tensors], log


def kills(count: int, folder: Path) -> dict:
    """Kill the short training `count` times; did each run end like the undisturbed one?"""
    rng = random.Random(0)
    begin = time.time()
    finish(start(folder / "undisturbed", SHORT))
    duration = time.time() - begin
    reference = outcome(folder / "undisturbed")
    moments, equal = [], []
    while len(moments) < count:
        run = folder / f"killed-{len(equal) + 1}"
        process = start(run, SHORT)
        while process.returncode is None:
            wait = rng.uniform(0.2, 1.1) * duration
            try:
                process.wait(wait if len(moments) < count else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                log = run / "log.jsonl"
                rounds = len(log.read_text().splitlines()) if log.exists() else 0
                moments.append([round(wait, 2), rounds])
                print(f"kill {len(moments)}: after {wait:.1f} s, {rounds} rounds in the log",
                      flush=True)
                process = start(run, SHORT)
        finish(process)
        equal.append(outcome(run) == reference)
    return dict(
        date=str(datetime.date.today()), kills=len(moments), runs=len(equal),
        runs_bit_identical=sum(equal), seconds_undisturbed=round(duration, 1),
        seconds_and_rounds_at_kill=moments,
    )


def resident(pid: int) -> float:
    """Resident memory of a process in MB."""
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(said.stdout) / 1024


def thirds(values: list[float], digits: int) -> list[float]:
    """The median of each third."""
    cuts = [i * len(values) // 3 for i in range(4)]
    return [round(statistics.median(values[a:b]), digits) for a, b in zip(cuts, cuts[1:])]


def long_run(minutes: float, folder: Path) -> dict:
    """One run watched for `minutes`: memory every 5 s, seconds per prompt of each round."""
    process, begin = start(folder, LONG), time.time()
    memory = []
    while time.time() - begin < minutes * 60 and process.poll() is None:
        time.sleep(5)
        memory.append(resident(process.pid))
    if process.poll() is not None:
        sys.exit(f"the long run ended by itself, with status {process.returncode}")
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    speed = [1 / row["prompts_per_second"] for row in rows]
    memory = memory[len(memory) // 10:]                         # without the start
    saved = torch.load(max(folder.glob("checkpoint-*.pt")), weights_only=True)["step"]
    places = range(0, len(speed), max(25, len(speed) // 60))
    return dict(
        date=str(datetime.date.today()), minutes=minutes, rounds=len(rows),
        rounds_saved_on_sigterm=saved, memory_mb=thirds(memory, 1),
        seconds_per_prompt=thirds(speed, 4),
        memory_curve_mb=[round(v, 1) for v in memory[::max(1, len(memory) // 60)]],
        seconds_per_prompt_curve=[round(statistics.median(speed[i:i + 25]), 4) for i in places],
    )


def main() -> None:
    """Run what is asked for, check the promises, write both tests' results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how often to kill [20]")
    parser.add_argument("--minutes", type=float, default=30,
                        help="how long the watched run lasts [30]")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    last = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    killed = kills(options.kills, folder) if options.kills else last["killed"]
    lasting = long_run(options.minutes, folder / "long") if options.minutes else last["long"]
    shutil.rmtree(folder)
    memory, speed = lasting["memory_mb"], lasting["seconds_per_prompt"]
    third = "from the first third to the last"
    promises = {
        "every killed run ends bit-identical": killed["runs_bit_identical"] == killed["runs"],
        f"memory grows by less than 2 % {third}": memory[2] < 1.02 * memory[0],
        f"speed falls by less than 10 % {third}": speed[2] < 1.1 * speed[0],
        "SIGTERM saves the last round": lasting["rounds_saved_on_sigterm"] == lasting["rounds"],
    }
    record = dict(
        device=platform.processor() or platform.machine(), cores=os.cpu_count(),
        torch=torch.__version__, python=platform.python_version(), promises=promises,
        killed=killed, long=lasting,
    )
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({k: v for k, v in lasting.items() if "curve" not in k}, indent=2))
    lines = [f"{'holds ' if held else 'BROKEN'}  {text}" for text, held in promises.items()]
    print(*lines, RESULTS, sep="\n")
    sys.exit(not all(promises.values()))


if __name__ == "__main__":
    main()
