"""The goal at 80 %: how many rounds, and is a mean of LoRAs better than the last one?

    python experiments/further.py            # half an hour on one core, after overoptimization.py
    python experiments/further.py --render   # the tables again, from results/further.json

Candidates are read off the three runs of overoptimization.py, which are the demo's but longer: the
LoRA after N rounds, or the mean of the last three that were kept, two rounds apart (of the products
B A). The rule was written before any was judged: on 512 pictures of training captions, of those
that close at least SAFE in every seed the one whose alignment, in the mean of the seeds, falls
least; if none does, the one that closes most in its worst seed. The held-out captions are asked
once, for that one alone: 1,024 pictures a seed. The goal is effect.py's with 80 % for 70.
"""
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import needs  # noqa: F401
import torch

import alignment
import effect
import lora
import overoptimization
import tables
from evaluate import compare
from loading import load_pipeline
from training import plain_parser, read_json, run_script, write_json
from weights import InputError, read_weights

SEEDS = overoptimization.SEEDS
CANDIDATES = {f"{rounds} rounds, mean of {count}": (rounds, count)
              for rounds in (10, 12, 14, 16) for count in (1, 3)}
SAFE, CLOSED = 0.82, 0.80
PICTURES, GUIDANCE = 512, 3
RUNS, RECORD = ROOT / "runs/further", ROOT / "experiments/results/further.json"
NAME = "pytorch_lora_weights.safetensors"


def candidate(seed: int, rounds: int, count: int) -> Path:
    """The LoRA after so many rounds, or the mean of the last `count` that were kept."""
    kept = overoptimization.RUNS / f"seed{seed}/loras"
    files = [kept / f"{rounds - overoptimization.EVERY * i:05d}" / NAME for i in range(count)]
    for file in files:
        if not file.exists():
            raise InputError(f"{file}: not there; run experiments/overoptimization.py first")
    out = RUNS / f"seed{seed}-{rounds}-{count}.safetensors"
    parts = [read_weights(file) for file in files]
    mean = {}
    for key in parts[0]:
        if ".lora_A." in key:           # a mean of products, as one of a larger rank
            mean[key] = torch.cat([part[key] for part in parts])
        else:
            mean[key] = torch.cat([part[key] / count for part in parts], 1)
    RUNS.mkdir(parents=True, exist_ok=True)
    lora.save(mean, out, {})
    return out


def choose(found: dict[str, dict]) -> str:
    """The candidate that the rule takes, of {name: {seed: figures}}."""
    worst = {name: min(row["closed"] for row in rows.values()) for name, rows in found.items()}
    safe = [name for name in found if worst[name] >= SAFE]
    if not safe:
        return max(worst, key=worst.get)
    return max(safe, key=lambda name: tables.average(
        [row["alignment"]["difference"] for row in found[name].values()]))


def measure() -> None:
    """Judge every candidate on training captions, the chosen one on the held-out ones."""
    record = read_json(RECORD) if RECORD.exists() else dict(found={})
    pipe, whole = load_pipeline("tiny"), alignment.distance()
    base = None
    for name, (rounds, count) in CANDIDATES.items():
        rows = record["found"].setdefault(name, {})
        for seed in [s for s in SEEDS if str(s) not in rows]:
            base = base or alignment.judged(pipe, "", GUIDANCE, PICTURES)
            file = candidate(seed, rounds, count)
            scores = alignment.judged(pipe, str(file), GUIDANCE, PICTURES)
            row = {metric: compare(scores[metric], base[metric]) for metric in scores}
            rows[str(seed)] = dict(row, closed=row["aesthetics"]["difference"] / whole)
            write_json(RECORD, record)
    chosen = choose(record["found"])
    if record.get("chosen") != chosen:
        rounds, count = CANDIDATES[chosen]
        names = [f"seed{s}={candidate(s, rounds, count)}" for s in SEEDS]
        top = read_json(effect.RESULTS / "effect.json")["ceiling"]
        held = effect.judged(f"further {rounds} {count}", names, 4, top)["results"]
        write_json(RECORD, record | dict(
            chosen=chosen, held=held, date=time.strftime("%Y-%m-%d"), torch=torch.__version__))


def markdown(record: dict) -> str:
    """The candidates on training captions, and what the chosen one reaches of the goal."""
    rows = [["training captions: closed, change in alignment", *(f"seed {s}" for s in SEEDS)]]
    for name, seeds in record["found"].items():
        rows.append([f"**{name}**" if name == record["chosen"] else name, *(
            f"{100 * row['closed']:.0f} %, {100 * row['alignment']['difference']:+.1f} points"
            for row in seeds.values())])
    goals = [effect.goal(record["held"][f"seed{s}"], CLOSED) for s in SEEDS]
    return "\n".join([*effect.table(*rows),
                      *effect.table([f"held out, seed {s}" for s in SEEDS], goals)])


def main() -> None:
    """Measure, unless only the tables are wanted; print them."""
    parser = plain_parser(__doc__)
    parser.add_argument("--render", action="store_true", help="only print the tables again")
    if not parser.parse_args().render:
        measure()
    record = read_json(RECORD)
    if "chosen" not in record:
        raise InputError(f"{RECORD}: not all is judged yet; run experiments/further.py "
                         "without --render")
    print(markdown(record))


if __name__ == "__main__":
    run_script(main)
