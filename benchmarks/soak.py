"""Two long tests on the tiny model: a run that is killed twenty times, and half an hour of flat memory and steady speed.

    python benchmarks/soak.py                   # both; about 40 minutes on 2 cores
    python benchmarks/soak.py --kills 0         # the second alone; the first keeps its last result (--minutes 0: the other way round)

Kills: SIGKILL at random moments of the same short training, started again until enough kills have fallen; every finished
run must have the LoRA, optimizer state and log of an undisturbed one, bit for bit. Long: one run is watched from outside
(resident memory as `ps` tells it) and ended with SIGTERM, after which it must have left cleanly. Its learning rate is
almost zero, so that every round is the same work. Writes benchmarks/results/soak.json; exit status 1 if a promise is broken.
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
SHORT = ["--rounds", "6", "--prompts_per_round", "8", "--save_every", "1", "--grid_every", "0"]
LONG = ["--rounds", "0", "--epochs", "1000000", "--prompts_per_round", "8", "--save_every", "25", "--grid_every", "100", "--lr", "1e-9"]
CLOCKS = ("seconds", "prompts_per_second", "eta_minutes")       # the only fields of a log line that may differ


def start(folder: Path, options: list[str]) -> subprocess.Popen:
    """spo_train.py in the background; what it says goes to FOLDER.txt."""
    with open(f"{folder}.txt", "a") as said:
        return subprocess.Popen([sys.executable, ROOT / "spo_train.py", "--out", folder, *options, "--device", "cpu"],
                                stdout=said, stderr=said)


def finish(process: subprocess.Popen, status: int = 0) -> None:
    """Wait for an orderly end."""
    if process.wait() != status:
        sys.exit(f"spo_train.py ended with status {process.returncode}; see the text beside its folder, {process.args[3]}")


def outcome(folder: Path) -> tuple:
    """Everything that must not depend on interruptions: both LoRA files, the last checkpoint, the log without its clocks."""
    files = [(folder / name).read_bytes() for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors")]
    state = torch.load(max(folder.glob("checkpoint-*.pt")), weights_only=True)
    numbers = [t.numpy().tobytes() for t in state["lora"]]
    numbers += [v.numpy().tobytes() for slot in state["optimizer"]["state"].values() for v in slot.values()]
    log = [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in open(folder / "log.jsonl")]
    return files, numbers, log


def kills(count: int, folder: Path) -> dict:
    """Kill the short training `count` times; how many runs that took, and whether each ended like the undisturbed one."""
    begin, rng = time.time(), random.Random(0)
    finish(start(folder / "undisturbed", SHORT))
    duration, reference = time.time() - begin, outcome(folder / "undisturbed")
    fallen, runs, equal, moments = 0, 0, 0, []
    while fallen < count:
        runs += 1
        while True:
            process = start(folder / f"killed-{runs}", SHORT)
            wait = rng.uniform(0.2, 1.1) * duration
            try:
                process.wait(wait if fallen < count else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                fallen += 1
                log = folder / f"killed-{runs}" / "log.jsonl"
                moments.append([round(wait, 2), len(log.read_text().splitlines()) if log.exists() else 0])
                print(f"kill {fallen}: after {wait:.1f} s, {moments[-1][1]} rounds in the log", flush=True)
                continue
            finish(process)
            break
        equal += outcome(folder / f"killed-{runs}") == reference
    return dict(date=str(datetime.date.today()), kills=fallen, runs=runs, runs_bit_identical=equal, seconds_undisturbed=round(duration, 1),
                seconds_and_rounds_at_kill=moments)


def resident(pid: int) -> float:
    """Resident memory of a process in MB."""
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout) / 1024


def long_run(minutes: float, folder: Path) -> dict:
    """One run watched for `minutes`: memory every 5 s, seconds per round; thirds of it compared by their medians."""
    process, begin, memory = start(folder, LONG), time.time(), []
    while time.time() - begin < minutes * 60 and process.poll() is None:
        time.sleep(5)
        memory.append(resident(process.pid))
    if process.poll() is not None:
        sys.exit(f"the long run ended by itself, with status {process.returncode}")
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    speed = [1 / r["prompts_per_second"] for r in rows]
    memory = memory[len(memory) // 10:]                         # without the start
    thirds = [[statistics.median(values[i * len(values) // 3:(i + 1) * len(values) // 3]) for i in range(3)] for values in (memory, speed)]
    saved = torch.load(max(folder.glob("checkpoint-*.pt")), weights_only=True)["step"]
    steps = max(25, len(speed) // 60)
    return dict(date=str(datetime.date.today()), minutes=minutes, rounds=len(rows), rounds_saved_on_sigterm=saved,
                memory_mb=[round(v, 1) for v in thirds[0]], seconds_per_prompt=[round(v, 4) for v in thirds[1]],
                memory_curve_mb=[round(v, 1) for v in memory[::max(1, len(memory) // 60)]],
                seconds_per_prompt_curve=[round(statistics.median(speed[i:i + 25]), 4) for i in range(0, len(speed), steps)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often to kill [20]")
    parser.add_argument("--minutes", type=float, default=30, help="how long the watched run lasts [30]")
    options = parser.parse_args()
    folder, path = Path(tempfile.mkdtemp(prefix="soak-")), ROOT / "benchmarks" / "results" / "soak.json"
    killed = kills(options.kills, folder) if options.kills else json.loads(path.read_text())["killed"]
    lasting = long_run(options.minutes, folder / "long") if options.minutes else json.loads(path.read_text())["long"]
    shutil.rmtree(folder)
    memory, speed = lasting["memory_mb"], lasting["seconds_per_prompt"]
    promises = {"every killed run ends bit-identical": killed["runs_bit_identical"] == killed["runs"],
                "memory grows by less than 2 % from the first third to the last": memory[2] < 1.02 * memory[0],
                "speed falls by less than 10 % from the first third to the last": speed[2] < 1.1 * speed[0],
                "SIGTERM saves the last round": lasting["rounds_saved_on_sigterm"] == lasting["rounds"]}
    record = dict(device=platform.processor() or platform.machine(), cores=os.cpu_count(),
                  torch=torch.__version__, python=platform.python_version(), promises=promises, killed=killed, long=lasting)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({k: v for k, v in lasting.items() if "curve" not in k}, indent=2))
    print("\n".join(f"{'holds ' if held else 'BROKEN'}  {text}" for text, held in promises.items()), path, sep="\n")
    sys.exit(not all(promises.values()))
