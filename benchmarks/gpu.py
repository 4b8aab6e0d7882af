"""Everything that a GPU can tell, in one command that can be stopped and started: `make gpu`.

    python benchmarks/gpu.py                            # nine minutes of the list, best first
    python benchmarks/gpu.py --plan                     # the list, and what is held already
    python benchmarks/gpu.py --dry                      # the whole list on a CPU, minuscule models
    python benchmarks/gpu.py --only "round sd15"        # entries whose names begin so
    python benchmarks/gpu.py --tables                   # only the tables, of every card measured

Each entry runs the real commands in processes of their own, under a limit of time and memory, on
random weights in the official layout that are made here. What it found is written to
OUT/gpu_CARD.json before the next one starts, also if it was cut short. An entry is not run again
for a card and versions (torch, transformers, CUDA) that hold it. At the end the tables are printed
and written into benchmarks/README.md. Needs no more than the runtime; what needs development
packages is left out, and named.
"""
import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch

import bench
from gpu_tables import write_tables
from loading import TINY
from training import run_script, write_json
from weights import InputError, read_json

RESULTS = ROOT / "benchmarks/results"
README = ROOT / "benchmarks/README.md"
RESERVE = 10            # seconds for the tables, at the end
# Runs a script with less of the card: CAPPED GIGABYTES SCRIPT OPTIONS.
CAPPED = """import os, runpy, sys, torch
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(sys.argv[1]) * 1e9 / total))
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")"""


# An entry at work

class Cut(Exception):
    """An entry ended before it was done; the message says why."""


@dataclass
class Place:
    """Where an entry works: a folder, what it has found, its limits, and a way to run commands."""
    folder: Path                        # of the whole command, with the checkpoints
    name: str
    end: float                          # on time.monotonic()'s clock
    ram: float                          # bytes that its processes may take together
    dry: bool = False
    found: dict = field(default_factory=dict)

    @property
    def said(self) -> Path:
        """What its commands have printed."""
        return self.folder / "said" / f"{self.name.replace(' ', '_')}.txt"

    @property
    def runs(self) -> Path:
        """A folder that goes when the entry ends."""
        return self.folder / "entry"

    def model(self, kind: str) -> Path:
        """A random checkpoint, made now if it is not there."""
        folder = self.folder / ("small" if self.dry else "models") / kind
        if not folder.exists():
            begin = time.monotonic()
            small = ["--small"] if self.dry else []
            self.must(ROOT / "benchmarks/random_models.py", kind, folder, *small)
            self.found[f"making {kind}, s"] = round(time.monotonic() - begin, 1)
        return folder

    def must(self, *words, **how) -> None:
        """Run a script; Cut unless it ends well."""
        status = self.run(*words, **how)
        if status:
            raise Cut(f"{Path(words[0]).name} ended with status {status}")

    def run(self, *words, cap_gb: float = 0, watch: Callable | None = None) -> int:
        """Run a Python script -> its exit status; Cut if it passes a limit.

        `cap_gb`: of the card's memory that its allocator may take. `watch(process)` is called a few
        times a second.
        """
        head = ["-c", CAPPED, cap_gb] if cap_gb else []
        command = [sys.executable, *map(str, [*head, *words])]
        self.said.parent.mkdir(parents=True, exist_ok=True)
        hidden = dict(CUDA_VISIBLE_DEVICES="") if self.dry else {}
        env = os.environ | hidden | dict(
            HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1",
            TORCHINDUCTOR_CACHE_DIR=str((self.folder / "compiled").resolve()))
        with open(self.said, "a") as text:
            text.write(f"$ {' '.join(map(str, words))}\n")
            text.flush()
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=text, stderr=text,
                                       start_new_session=True)
        weigh = 0.0                                     # when its memory is looked at next
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now > self.end:
                    raise Cut("its time was over")
                if now > weigh and memory_of(process.pid) > self.ram:
                    raise Cut(f"took more than {self.ram / 1e9:.1f} GB of the machine's memory")
                weigh = now + 1 if now > weigh else weigh
                if watch:
                    watch(process)
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode


def memory_of(pid: int) -> int:
    """Bytes of its own that a process and its descendants hold; 0 where there is no /proc."""
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, ValueError):
            text = status.read_text()
            number = int(status.parent.name)
            parents[number] = int(re.search(r"PPid:\s+(\d+)", text)[1])
            sizes[number] = sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", text))) * 1024
    family, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in family} - family
        family, grown = family | more, bool(more)
    return sum(sizes.get(number, 0) for number in family)


def rows_of(folder: Path) -> list[dict]:
    """A run's log so far."""
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


# What is measured

def spo_words(place: Place, model: str, prompts: int, *more) -> list:
    """spo_train.py on a random checkpoint, every pair valid, so that a round has all its work."""
    folder = place.model(model)
    words = [ROOT / "spo_train.py", "--model", folder, "--spm", place.model("judge"),
             "--prompts", TINY / "train_prompts.txt", "--threshold", -1, "--grid_every", 0,
             "--prompts_per_round", prompts, "--out", place.runs]
    words += ["--vae", folder] if model == "sdxl" else []
    return words + (["--dtype", "fp32", "--steps", 6] if place.dry else []) + list(more)


def trained(place: Place, model: str, prompts: int) -> None:
    """A round and a part of the next, SIGTERM, and the same command again."""
    words, since = spo_words(place, model, prompts), []

    def interrupt(process: subprocess.Popen) -> None:
        if rows_of(place.runs) and not since:
            since.append(time.monotonic())
            process.terminate()

    begin = time.monotonic()
    # A rehearsal's round takes a moment: with so many, the signal is never too late.
    stopped = place.run(*words, "--rounds", 500 if place.dry else 2, watch=interrupt)
    middle = time.monotonic()
    log = rows_of(place.runs)
    place.found |= dict(
        model=model, prompts_a_round=prompts, log=log, status_when_stopped=stopped,
        seconds_to_stop=round(middle - since[0], 2) if since else None,
        seconds=[round(middle - begin, 1)])
    if stopped != 128 + signal.SIGTERM:
        raise Cut(f"spo_train.py, stopped by SIGTERM, ended with status {stopped}, not 143")
    place.must(*words, "--rounds", len(log) + 1 if place.dry else 2)
    place.found["seconds"].append(round(time.monotonic() - middle, 1))
    place.found["log"] = rows_of(place.runs)
    for name, pattern in (("checkpoint", "checkpoint-*.pt"), ("lora", "*.safetensors")):
        sizes = [file.stat().st_size for file in place.runs.glob(pattern)]
        place.found[f"{name}_bytes"] = max(sizes)
    if place.found["log"][:len(log)] != log or len(place.found["log"]) <= len(log):
        raise Cut("the resumed run did not go on where it was stopped")


def setting(place: Place, model: str, prompts: int, options: str, cap_gb: float) -> None:
    """Two rounds of spo_train.py with these options; the second, warm, counts."""
    place.found |= dict(model=model, options=options, cap_gb=cap_gb or None)
    words = spo_words(place, model, prompts, "--rounds", 2, *options.split())
    status = place.run(*words, cap_gb=cap_gb)
    place.found["fits"] = status == 0
    if status and "error: out of memory" not in place.said.read_text():
        raise Cut(f"spo_train.py ended with status {status}")
    if status == 0:
        row = rows_of(place.runs)[-1]
        place.found |= dict(seconds_per_prompt=1 / row["prompts_per_second"],
                            phases={k: v / prompts for k, v in row["seconds"].items()},
                            peak_memory_gb=row.get("peak_memory_gb"))


def compared(place: Place, model: str, prompts: int, sides: tuple[str, ...], lead: str) -> None:
    """bench.py: whole rounds, the sides taking turns. What it has measured so far is kept."""
    place.runs.mkdir(parents=True, exist_ok=True)
    file, more = place.runs / "bench.json", ["--lead", lead] if lead else []
    if place.dry:
        model, prompts, sides = "tiny", 2, tuple({"official", "eager"} & set(sides)) or ("eager",)
        more += ["--repeats", 1]
    try:
        place.must(ROOT / "benchmarks/bench.py", "--model", model, "--prompts", prompts,
                   "--out", file, *more, "--sides", *sides)
    finally:
        if file.exists():
            place.found["bench"] = read_json(file)


def judged(place: Place) -> None:
    """Twenty steps of spm_train.py, SD-1.5, sixteen pairs a step."""
    words = ["--model", place.model("sd15"), "--pickscore", place.model("pickscore"),
             "--pairs", place.model("pairs"), "--out", place.runs, "--validation", 8]
    size = ["--steps", 2, "--batch", 4, "--dtype", "fp32"] if place.dry else [
        "--steps", 20, "--batch", 16]
    try:
        place.must(ROOT / "spm_train.py", *words, *size)
    finally:
        rows = rows_of(place.runs)
        if rows[1:]:
            place.found |= dict(
                steps=len(rows), last=rows[-1], peak_memory_gb=rows[-1].get("peak_memory_gb"),
                pairs_per_second=statistics.median(r["pairs_per_second"] for r in rows[1:]))
    place.found["checkpoint_bytes"] = max(
        f.stat().st_size for f in place.runs.glob("checkpoint-*.pt"))


def evaluated(place: Place, model: str, pictures: int, batch: int) -> None:
    """evaluate.py with PickScore: how fast pictures appear, from their files' times."""
    folder = place.model(model)
    words = ["--model", folder, "--prompts", TINY / "held_out_prompts.txt", "--limit", pictures,
             "--metrics", f"pickscore={place.model('pickscore')}", "--batch", batch,
             "--out", place.runs, *(["--vae", folder] if model == "sdxl" else []),
             *(["--dtype", "fp32", "--steps", 2] if place.dry else [])]
    begin = time.monotonic()
    place.must(ROOT / "evaluate.py", *words)
    times = sorted(f.stat().st_mtime for f in (place.runs / "images").rglob("*.png"))
    drawing = max(times[-1] - times[batch - 1], 1e-3)       # the first batch is warm-up
    place.found |= dict(model=model, pictures=pictures, batch=batch,
                        pictures_per_second=(len(times) - batch) / drawing,
                        seconds=round(time.monotonic() - begin, 1))


def tested(place: Place) -> None:
    """The tests that run on a GPU where there is one."""
    pytest = place.runs.parent / "run_pytest.py"        # a script, for `run`
    pytest.write_text("import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))\n")
    try:
        place.must(pytest, "-p", "no:cacheprovider", "-k", "on_a_gpu or never_waits",
                   *(ROOT / "tests" / f"test_{name}.py" for name in (
                       "distributed", "spo", "baselines")))
    finally:
        text = place.said.read_text()
        place.found |= {word: int(n) for n, word in re.findall(
            r"(\d+) (passed|failed|skipped|error)", text.rpartition("\n$ ")[2])}


# The list

@dataclass
class Entry:
    """One thing to measure."""
    name: str
    what: str
    seconds: int                        # expected on an H100, checkpoints included
    measure: Callable[[Place], None]
    gb: float = 0                       # of the card, at least
    disk: float = 16                    # GB free in the work folder
    needs: tuple[str, ...] = ()         # packages without which it is left out
    side: str = ""                      # what alone is left out without diffusers and peft


SETTINGS = (        # model, prompts a round, name, options, cap in GB, expected seconds
    ("sdxl", 1, "low in 24 GB", "--memory low", 24, 80),
    ("sd15", 4, "low in 10 GB", "--memory low", 10, 60),
    ("sd15", 10, "normal", "--memory normal", 0, 70),
    ("sdxl", 2, "normal", "--memory normal", 0, 85),
    ("sdxl", 2, "checkpointing", "--memory normal --checkpointing", 0, 95),
    ("sd15", 10, "checkpointing", "--memory normal --checkpointing", 0, 75),
    ("sd15", 10, "train_batch 40", "--memory normal --train_batch 40", 0, 70),
)


def entries() -> list[Entry]:
    """In order of worth."""
    ours = ("official", "eager", "compiled")
    out = [
        Entry(f"spo {model}", "spo_train.py: a round, SIGTERM in the second, resumed", seconds,
              partial(trained, model=model, prompts=prompts), gb)
        for model, prompts, seconds, gb in (("sdxl", 2, 130, 60), ("sd15", 10, 95, 30))]
    out += [
        Entry(f"round {model}", "whole rounds in turns: official, eager, compiled", seconds,
              partial(compared, model=model, prompts=prompts, sides=sides, lead=""), 70, 2,
              side="official")
        for model, prompts, sides, seconds in (
            ("sd15", 6, (*ours, "taesd"), 320), ("sdxl", 2, ours, 420))]
    out += [
        Entry(f"setting {model} {name}", f"spo_train.py {options}", seconds,
              partial(setting, model=model, prompts=prompts, options=options, cap_gb=cap),
              cap or 30)
        for model, prompts, name, options, cap, seconds in SETTINGS]
    out += [
        Entry(f"lead {name}", (function.__doc__ or name).splitlines()[0], 240,
              partial(compared, model="sd15", prompts=6, sides=("compiled",), lead=name), 30, 2)
        for name, function in (bench.LEADS | dict(batch=bench.fitted)).items()]
    tests = ("pytest", "diffusers", "peft", "xdist", "hypothesis")
    return out + [
        Entry("spm sd15", "spm_train.py: twenty steps of 16 pairs", 150, judged, 60, 46),
        Entry("evaluate sd15", "evaluate.py: 48 pictures with PickScore", 60,
              partial(evaluated, model="sd15", pictures=48, batch=16), 20),
        Entry("evaluate sdxl", "evaluate.py: 12 pictures with PickScore", 80,
              partial(evaluated, model="sdxl", pictures=12, batch=4), 40),
        Entry("tests", "the tests that wait for a GPU", 120, tested, needs=tests),
    ]


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if not find_spec(name)]


def without(entry: Entry) -> list[str]:
    """What of it is left out here for want of packages."""
    return [entry.side] if entry.side and missing(("diffusers", "peft")) else []


def obstacle(entry: Entry, card: dict, work: Path) -> str:
    """Why it cannot be measured here, or ""."""
    if lacking := missing(entry.needs):
        return f"needs {', '.join(lacking)} (requirements-dev.txt)"
    if entry.gb > card["memory_gb"]:
        return f"needs a card of {entry.gb:.0f} GB"
    free = shutil.disk_usage(next(p for p in (work, *work.parents) if p.exists())).free / 1e9
    if entry.disk > free and not card["dry"]:
        return f"needs {entry.disk:.0f} GB of disk in {work}, {free:.0f} are free"
    return ""


# The records

def this_card(dry: bool) -> dict:
    """What results are kept by: the card and the versions."""
    versions = dict(torch=torch.__version__, transformers=version("transformers"),
                    cuda=torch.version.cuda or "none")
    if dry or not torch.cuda.is_available():
        return dict(card="dry CPU" if dry else "none", memory_gb=80, versions=versions, dry=dry)
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    return dict(card=torch.cuda.get_device_name(), memory_gb=memory, versions=versions, dry=dry)


def commit() -> str:
    """The commit that is measured, if git knows."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                              capture_output=True)
        return done.stdout.strip() or "unknown"
    return "unknown"


def same(record: dict, entry: Entry, card: dict) -> bool:
    """Is this record of that entry, and of these versions?"""
    return record["name"] == entry.name and record["versions"] == card["versions"]


def is_held(records: list[dict], entry: Entry, card: dict) -> bool:
    """Is it measured, with all that can be measured here?"""
    return any(same(r, entry, card) and r["state"] == "done"
               and set(r["left_out"]) <= set(without(entry)) for r in records)


def keep(records: list[dict], new: dict) -> list[dict]:
    """The records with the new one, which takes an earlier one's place unless it found less."""
    def worth(record: dict) -> tuple:
        return record["state"] == "done", -len(record["left_out"]), len(record["found"])

    rivals = [r for r in records if (r["name"], r["versions"]) == (new["name"], new["versions"])]
    if any(worth(rival) > worth(new) for rival in rivals):
        return records
    return [r for r in records if r not in rivals] + [new]


def measured(entry: Entry, place: Place, card: dict) -> dict:
    """Measure an entry -> its record, whatever happens."""
    begin, state, error = time.monotonic(), "done", ""
    place.said.unlink(missing_ok=True)
    shutil.rmtree(place.runs, ignore_errors=True)
    try:
        entry.measure(place)
    except (Exception, KeyboardInterrupt) as problem:       # none may cost what others have found
        state = "stopped" if isinstance(problem, Cut | KeyboardInterrupt) else "failed"
        error = f"{type(problem).__name__}: {problem}"
    shutil.rmtree(place.runs, ignore_errors=True)
    record = dict(
        name=entry.name, what=entry.what, state=state, versions=card["versions"],
        date=datetime.date.today().isoformat(), commit=commit(), python=platform.python_version(),
        seconds=round(time.monotonic() - begin, 1), left_out=without(entry), found=place.found)
    if error:
        said = place.said.read_text()[-1500:] if place.said.exists() else ""
        record |= dict(error=error, said=said)
    return record


# The command

def plan(queue: list[Entry], results: dict, card: dict, work: Path) -> None:
    """Print the list; nothing runs."""
    total = 0
    for entry in queue:
        problem = obstacle(entry, card, work)
        if is_held(results["records"], entry, card):
            state = "held"
        elif problem:
            state = f"left out: {problem}"
        else:
            state, total = "to do", total + entry.seconds
            state += "".join(f", without {part} (requirements-dev.txt)" for part in without(entry))
        print(f"{entry.name:28} {entry.seconds:4} s  {entry.what}; {state}")
    print(f"{card['card']}: {total} s to do, expected on an H100")


def available() -> float:
    """Bytes of the machine's memory that are free; all that can be said where there is no /proc."""
    with contextlib.suppress(OSError, TypeError):
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024
    return float("inf")


def work_down(queue: list[Entry], results: dict, path: Path, card: dict,
              given: argparse.Namespace) -> None:
    """Measure what is not held and fits into the time, and write after each."""
    end, work = time.monotonic() + 60 * given.minutes - RESERVE, given.work.resolve()
    ram = 0.9 * available()
    tried = {r["name"] for r in results["records"] if r["state"] != "done"}
    for entry in sorted(queue, key=lambda e: e.name in tried):      # what failed before comes last
        left = end - time.monotonic()
        problem = obstacle(entry, card, work)
        if is_held(results["records"], entry, card) and not given.again:
            problem = "held"
        elif not problem and not given.dry and entry.seconds > left:
            problem = f"takes about {entry.seconds} s, {max(left, 0):.0f} are left; next time"
        if problem or left <= 0:
            print(f"{entry.name}: {problem or 'next time'}", flush=True)
            continue
        for part in without(entry):
            print(f"{entry.name}: {part} left out (requirements-dev.txt)", flush=True)
        limit = min(end, time.monotonic() + max(60, 3 * entry.seconds))
        record = measured(entry, Place(work, entry.name, limit, ram, given.dry), card)
        results["records"] = keep(results["records"], record)
        write_json(path, results)
        print(f"{entry.name}: {record['state']}, {record['seconds']:.0f} s"
              f"{', ' + record['error'] if 'error' in record else ''}", flush=True)
        if record.get("error", "").startswith("KeyboardInterrupt"):
            break


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="ends by itself within so many")
    parser.add_argument("--out", type=Path, help="folder of gpu_CARD.json, which goes on from the "
                        "one in benchmarks/results [that one; with --dry a folder in --work]")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/gpu", help="folder for "
                        "checkpoints (14 GB), compiled code and what the commands say [runs/gpu]")
    parser.add_argument("--only", nargs="+", default=[""], help="entries whose names begin so")
    parser.add_argument("--again", action="store_true", help="also entries that are held already")
    parser.add_argument("--plan", action="store_true", help="print the list, and run nothing")
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU, minuscule models")
    parser.add_argument("--tables", action="store_true", help="only print and write the tables")
    return parser.parse_args()


def main() -> None:
    """Do what the command line says."""
    given = options()
    card, work = this_card(given.dry), given.work
    out = given.out or (work / "dry" if given.dry else RESULTS)
    page = README if out.resolve() == RESULTS else None
    if given.tables:
        return write_tables(out, page)
    if card["card"] == "none" and not given.plan:
        raise InputError("no CUDA GPU here; --dry rehearses the list on a CPU, --plan prints it")
    path = out / f"gpu_{re.sub('[^a-z0-9]+', '_', card['card'].lower())}.json"
    before = next((p for p in (path, RESULTS / path.name) if p.exists()), None)
    results = read_json(before) if before else dict(
        card=card["card"], memory_gb=card["memory_gb"], records=[])
    queue = [e for e in entries() if e.name.startswith(tuple(given.only))]
    if not queue:
        raise InputError(f"--only {' '.join(given.only)}: no entry's name begins so; see --plan")
    if given.plan:
        return plan(queue, results, card, work)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work_down(queue, results, path, card, given)
    write_tables(out, page)
    print(path)
    undone = [e.name for e in queue
              if not is_held(results["records"], e, card) and not obstacle(e, card, work)]
    if given.dry and undone:            # of a rehearsal nothing else would be seen
        raise InputError(f"rehearsed, but not to the end: {', '.join(undone)}; what they said lies "
                         f"in {work / 'said'}")


if __name__ == "__main__":
    run_script(main)
