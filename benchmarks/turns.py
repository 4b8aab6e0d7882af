"""The demo's training and evaluation, in another checkout and in this one, in turns.

    git worktree add ../before COMMIT && ln -s $PWD/.venv ../before/
    python benchmarks/turns.py ../before --runs 5

Whole processes, as `make demo` starts them. Prints the median of each side's seconds: on the clock,
and of computing (one thread, where other work keeps the clock from telling much), and how far the
LoRAs and scores lie apart. Needs no more than the runtime.
"""
import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from weights import read_json, read_weights


def run(checkout: Path, *words) -> tuple[float, float]:
    """A command in a checkout -> seconds on the clock, and of computing."""
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *map(str, words)], cwd=checkout, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (time.monotonic() - begin,
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def apart(old: Path, new: Path) -> str:
    """How far two runs' results lie apart, in words."""
    name = "pytorch_lora_weights.safetensors"
    loras = [read_weights(folder / name) for folder in (old, new)]
    weights = max(float((loras[1][key] - value).abs().max()) for key, value in loras[0].items())
    scores = [read_json(folder / "evaluation/results.json")["results"] for folder in (old, new)]
    means = max(abs(scores[1][model][metric]["mean"] - values["mean"])
                for model, row in scores[0].items() for metric, values in row.items())
    return f"largest difference of a LoRA's numbers {weights:.1e}, of a mean score {means:.1e}"


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--runs", type=int, default=5, help="of each command and side [5]")
    parser.add_argument("--threads", type=int, default=0, help="of each process [torch's own]")
    given = parser.parse_args()
    if given.threads:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
    work = Path(tempfile.mkdtemp())
    sides = dict(before=given.before.resolve(), now=ROOT)
    seconds = {(what, side): [] for what in ("training", "evaluation") for side in sides}
    for _ in range(given.runs):
        for side, checkout in sides.items():
            out = work / side
            shutil.rmtree(out, ignore_errors=True)
            seconds["training", side].append(run(checkout, "spo_train.py", "--out", out))
            seconds["evaluation", side].append(run(
                checkout, "evaluate.py", "--lora", "base=", f"spo={out}", "--curves", f"spo={out}",
                "--out", out / "evaluation"))
            for what in ("training", "evaluation"):
                clock, computing = seconds[what, side][-1]
                print(f"{what} {side}: {clock:.1f} s, computing {computing:.1f} s", flush=True)
    threads = given.threads or torch.get_num_threads()
    print(f"\n| {threads} threads | before | now | faster | computing, before | now | faster |")
    print("|---" * 7 + "|")
    for what in ("training", "evaluation"):
        (a, c), (b, d) = ([statistics.median(column) for column in zip(*seconds[what, side])]
                          for side in sides)
        print(f"| {what} | {a:.1f} s | {b:.1f} s | {a / b:.2f} x | {c:.1f} s | {d:.1f} s "
              f"| {c / d:.2f} x |")
    print(apart(work / "before", work / "now"))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
