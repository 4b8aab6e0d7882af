"""Going on too long: 40 rounds of the demo, three seeds. Which logged number announces the harm?

    python experiments/overoptimization.py            # an hour on one busy core; or --seeds 0
    python experiments/overoptimization.py --render   # table and picture again, from the JSON

Continues where it stopped. Every second round's LoRA is judged by ground truth on the 256 held-out
captions, same noise for all. The log is what a user has; the rule below was written before the
runs. (Of seed 0 the truth at 14 and 20 rounds was known, and that `ratio_win` climbs to 1.02.)

Harm begins at the first of two judged rounds in a row that show alignment at least HARM below the
base's, or aesthetics at least LOSS below their best so far. An alarm goes off at the first round
    "no new best"   whose last PATIENCE values are all below the best before them;
    "above"         whose last three values have a mean above the bound.
An alarm is in time if it goes off at most LEAD rounds before the harm and not after it. A signal
announces the harm if its alarm is in time with every seed; the first is that of the longest mean
lead. Where a seed meets no harm, no alarm is in time.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import needs  # noqa: F401
import torch

import figures
import tables
from training import last_step, plain_parser, read_json, run_script, write_json, write_text

SEEDS, ROUNDS, EVERY = (0, 1, 2), 40, 2
HARM, LOSS = 0.02, 0.1              # of alignment (0..1), of aesthetics (0..10)
PATIENCE, LEAD = 5, 10              # rounds
RUNS, RESULTS = ROOT / "runs/overoptimization", ROOT / "experiments/results"
RECORD = RESULTS / "overoptimization.json"
FIELDS = ("validation_score", "validation_pickscore", "score", "score_gap", "margin", "ratio_win",
          "ratio_lose", "clipped", "lora_norm", "grad_norm", "valid_share")
DRAWN = {"validation_score": "validation_score: the judge, fixed prompts",
         "validation_pickscore": "validation_pickscore: fixed prompts",
         "score": "score: the judge, candidates", "ratio_win": "ratio_win: policy / reference"}
SIGNALS = {                 # field -> the bound of "above"; None: "no new best"
    "validation_score": None, "validation_pickscore": None, "score": None,
    "ratio_win": 1.02, "ratio_lose": 1.02,
    "margin": 0.01,         # 1 / beta
    "clipped": 0.01,
}


def alarm(values: list[float], bound: float | None) -> int | None:
    """The round (the first is 1) in which a signal's alarm goes off, if it does."""
    for done in range(1, len(values) + 1):
        if bound is not None:
            off = done >= 3 and sum(values[done - 3:done]) / 3 > bound
        else:
            off = done > PATIENCE and max(values[done - PATIENCE:done]) < max(
                values[:done - PATIENCE])
        if off:
            return done
    return None


def harm(truth: dict[str, dict], base: dict[str, float]) -> int | None:
    """The round in which harm begins, from {round: {metric: mean}}."""
    best, before = base["aesthetics"], None
    for step in sorted(map(int, truth)):
        row = truth[str(step)]
        best = max(best, row["aesthetics"])
        bad = (row["alignment"] <= base["alignment"] - HARM
               or row["aesthetics"] <= best - LOSS)
        if bad and before:
            return before
        before = step if bad else None
    return None


def measure(seeds: list[int]) -> None:
    """Train, judge every second round, and keep the figures of each seed when it is done."""
    record = read_json(RECORD) if RECORD.exists() else dict(seeds={})
    for seed in [s for s in seeds if str(s) not in record["seeds"]]:
        folder = RUNS / f"seed{seed}"
        if last_step(folder) < ROUNDS:
            words = dict(out=folder, seed=seed, rounds=ROUNDS, snapshot_every=EVERY, grid_every=1)
            given = [word for k, v in words.items() for word in (f"--{k}", str(v))]
            subprocess.run([sys.executable, "spo_train.py", *given], check=True, cwd=ROOT)
        judge = tables.Judge()

        def means(lora: Path | None) -> dict[str, float]:
            return {m: round(tables.average(v), 4) for m, v in judge(lora).items()}

        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        record["seeds"][str(seed)] = dict(
            log={name: [row[name] for row in rows] for name in FIELDS},
            truth={str(n): means(folder / f"loras/{n:05d}")
                   for n in range(EVERY, ROUNDS + 1, EVERY)},
        )
        record |= dict(base=means(None), date=time.strftime("%Y-%m-%d"), torch=torch.__version__,
                       captions=256)
        write_json(RECORD, record)


def told(off: int | None, begins: int | None) -> str:
    """An alarm against the harm of the same seed, in words of the table."""
    if off is None:
        return "silent"
    if begins is None:
        return f"{off}: false alarm"
    if off > begins:
        return f"{off}: too late"
    return f"{off}: in time" if begins - off <= LEAD else f"{off}: too early"


def render(record: dict) -> str:
    """When harm begins, when each signal's alarm goes off, and which is the first, as Markdown."""
    seeds = record["seeds"]
    begins = {s: harm(run["truth"], record["base"]) for s, run in seeds.items()}
    rows = [["**harm begins**", "", *(str(b or "never") for b in begins.values())]]
    kept = [run["log"]["validation_score"] for run in seeds.values()]
    rows.append(["`best/`: highest `validation_score`", "asked afterwards, no part of the rule",
                 *(str(1 + values.index(max(values))) for values in kept)])
    leads = {}
    for name, bound in SIGNALS.items():
        off = {s: alarm(run["log"][name], bound) for s, run in seeds.items()}
        words = [told(off[s], begins[s]) for s in seeds]
        if all(word.endswith("in time") for word in words):
            leads[name] = sum(begins[s] - off[s] for s in seeds) / len(seeds)
        rule = f"no new best for {PATIENCE} rounds" if bound is None else f"above {bound:g}"
        rows.append([f"`{name}`", rule, *words])
    header = ["round of", "alarm", *(f"seed {s}" for s in seeds)]
    lines = tables.markdown("Which logged number announces the harm?", header, rows)
    first = max(leads, key=leads.get, default=None)
    if len(seeds) < len(SEEDS):
        lines.append(f"\nToo few seeds for a verdict ({len(seeds)} of {len(SEEDS)}).")
    elif first:
        lines.append(f"\nFirst, and in time with every seed: `{first}`, on average "
                     f"{leads[first]:.0f} rounds before the harm.")
    else:
        lines.append("\nNo signal is in time with every seed.")
    return "\n".join(lines[1:]) + "\n"


def picture(record: dict) -> str:
    """Truth above, below it four logged numbers, over rounds."""
    seeds, panels = record["seeds"], []
    for metric, name in (("aesthetics", "true aesthetics (0..10)"),
                         ("alignment", "true alignment (share of pictures)")):
        lines = {s: [(0, record["base"][metric]), *((int(n), row[metric])
                     for n, row in run["truth"].items())] for s, run in seeds.items()}
        panels.append((name, lines, {}))
    for field, name in DRAWN.items():
        lines = {s: list(enumerate(run["log"][field], 1)) for s, run in seeds.items()}
        alarms = {s: alarm(run["log"][field], SIGNALS[field]) for s, run in seeds.items()}
        panels.append((name, lines, {s: at for s, at in alarms.items() if at}))
    begins = {s: harm(run["truth"], record["base"]) for s, run in seeds.items()}
    return figures.draw_panels(
        "Going on too long: does a logged number announce the harm?", panels, begins,
        [f"Dashed: harm begins. Alignment is {100 * HARM:.0f} points below the base's, or "
         f"aesthetics {LOSS:g} below their best,", "in two judged rounds in a row. Dots: a "
         f"number's alarm goes off. It had no new best for {PATIENCE} rounds;",
         f"ratio_win was above {SIGNALS['ratio_win']:g} (mean of three rounds). Truth: 256 "
         "held-out captions, every second round."])


def main() -> None:
    """Measure, unless only the table is wanted; write it from what is kept."""
    parser = plain_parser(__doc__)
    parser.add_argument("--render", action="store_true", help="only write the table again")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    given = parser.parse_args()
    if not given.render:
        measure(given.seeds)
    record = read_json(RECORD)
    text = render(record)
    write_text(RESULTS / "overoptimization.md", text)
    write_text(RESULTS / "overoptimization.svg", picture(record))
    print(text, end="")


if __name__ == "__main__":
    run_script(main)
