"""SPO of a flow-matching model, which the paper holds for impossible (section 4.6): does it work?

    python experiments/flow.py              # all: about two hours on one core
    python experiments/flow.py tune         # only the settings; also: arms, judges
    python experiments/flow.py render       # tables of docs/flow.md and picture, from the JSON

Everything is fixed here before it is run; failures stay in. `--model tiny-flow`, three seeds; every
run goes on until it has had the evaluations of the network that the demo of tiny has in its nine
rounds, and the first LoRA at or above them is judged: 256 held-out captions, four pictures each,
by ground truth, as experiments/effect.py judges the demo.

Both methods are tuned alike: TUNED's settings one after the other, seed 100, the highest mean
PickScore on 128 training captions wins. PickScore is what a real user has; ground truth decides
nothing. Continues where it stopped: what results/flow.json holds is not run again.
"""
import fcntl
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import needs  # noqa: F401
import torch

import effect
import figures
from effect import table
from judges import COUNT, SEED, records
from loading import TINY, load_clip
from prompt_sets import read_prompts
from spm_train import print_table
from tables import RATE_SEED, SEEDS, average, half_width, interval, put, reach, train_until
from tiny.build import judge_table
from training import permutation, plain_parser, read_json, run_script, write_json, write_text

EVALUATIONS = 22_760                # of the demo: tiny, seed 0, nine rounds
RUNS, RESULTS = ROOT / "runs/flow", ROOT / "experiments/results"
PAGE = ROOT / "docs/flow.md"
SPO = dict(model="tiny-flow")
# Flow-GRPO trains on trajectories of fewer steps than pictures have ("denoising reduction").
GRPO = dict(model="tiny-flow", script="baselines.py", method="flow-grpo", k=4, steps=10,
            prompts_per_round=8, pairs_per_step=12)    # as many samples an update as SPO
TUNED = {       # method -> what it starts from; each setting's values, the first is the start's
    "SPO": (SPO, dict(lr=(4e-4, 1e-4, 1.6e-3), beta=(100.0, 10.0, 1000.0))),
    # 6.4e-3 came after it was seen that its best of three lay at the end.
    "Flow-GRPO": (GRPO, dict(lr=(4e-4, 1e-4, 1.6e-3, 6.4e-3), clip_range=(1e-2, 1e-3, 1e-1))),
}
ARMS = {        # method, and options that differ from its tuned ones
    "SPO": ("SPO", {}),
    "eta 0.5": ("SPO", dict(eta=0.5)),
    # Where tiny's pools open, in signal-to-noise ratio: t = 501..951 of diffusion.
    "pools at tiny's noise": ("SPO", dict(t_min=619, t_max=917)),
    "MSPO, j = 2": ("SPO", dict(j=2)),
    "Flow-GRPO": ("Flow-GRPO", {}),
}


def train(name: str, options: dict, seed: int) -> tuple[Path, dict]:
    """Run until the budget is spent -> the LoRA of the first round at or above it, that round."""
    folder = RUNS / f"{name.replace(' ', '-').replace(',', '').replace('=', '')}-seed{seed}"
    log = train_until(folder, options | dict(seed=seed), dict(evaluations=EVALUATIONS))
    row = reach(log, "evaluations", EVALUATIONS)
    return folder / f"loras/{row['round']:05d}", row


def judged(folder: str, loras: dict[str, Path], *words: str) -> dict:
    """evaluate.py's results of the base and some LoRAs, in runs/flow/FOLDER."""
    out = RUNS / folder
    named = [f"{name}={path}" for name, path in loras.items()]
    effect.call("evaluate.py", "--model", "tiny-flow", "--lora", "base=", *named, "--out", str(out),
                *words)
    return read_json(out / "results.json")


def kept() -> dict:
    """What results/flow.json holds."""
    path = RESULTS / "flow.json"
    return read_json(path) if path.exists() else {}


def keep(part: str, value):
    """Put a value into results/flow.json; returns it."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(RUNS / "lock", "wb") as lock:             # several processes may share the work
        fcntl.flock(lock, fcntl.LOCK_EX)
        about = dict(date=time.strftime("%Y-%m-%d"), torch=torch.__version__,
                     evaluations=EVALUATIONS, device="cpu")
        held = kept()
        if isinstance(held.get(part), dict):
            value = held[part] | value
        write_json(RESULTS / "flow.json", held | {part: value, "about": about})
    return value


def tune(method: str) -> dict:
    """The method's options: its start, with the best value of each of its settings."""
    start, settings = TUNED[method]
    known = kept().get("tuned", {}).get(method)
    if known:
        return start | known["chosen"]
    captions = read_prompts(str(TINY / "train_prompts.txt"))
    file = RUNS / "choice.txt"
    RUNS.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(captions[i] + "\n"
                             for i in permutation(len(captions), "choice")[:128]))
    chosen = {name: values[0] for name, values in settings.items()}
    scores = {}

    def score(tried: dict) -> float:
        words = " ".join(f"{key} {number:g}" for key, number in tried.items())
        if words not in scores:
            lora, _ = train(f"{method} {words}", start | tried, RATE_SEED)
            results = judged(f"choice/{method} {words}", dict(tried=lora), "--prompts", str(file),
                             "--metrics", "pickscore", "--seed", "10000")
            scores[words] = results["results"]["tried"]["pickscore"]["mean"]
        return scores[words]

    for name, values in settings.items():
        chosen = max([chosen | {name: value} for value in values], key=score)
    keep("tuned", {method: dict(chosen=chosen, pickscore=scores)})
    return start | chosen


def measure(arm: str, seeds: tuple[int, ...]) -> None:
    """Train an arm with these seeds, and judge them beside the base."""
    known = kept().get("arms", {}).get(arm, {})
    method, options = ARMS[arm]
    runs = {str(seed): train(arm, tune(method) | options, seed) for seed in seeds
            if str(seed) not in known}
    if not runs:
        return
    short = "".join(filter(str.isalnum, arm))
    names = {f"{short}-{seed}": lora for seed, (lora, _) in runs.items()}
    found = judged(f"evaluation {method}", names, "--images_per_prompt", "4")   # one base for all
    base = found["results"].pop("base")
    top = kept().get("ceiling") or keep("ceiling", effect.ceiling())
    for name, row in found["results"].items():
        seed = name.rpartition("-")[2]
        gained = row["aesthetics"]["mean"] - base["aesthetics"]["mean"]
        at = runs[seed][1]
        known[seed] = row | dict(
            closed=gained / (top["best_through_vae"] - base["aesthetics"]["mean"]),
            rounds=at["round"], evaluations=at["evaluations"])
    keep("arms", {arm: known})
    keep("base", dict(results=base, protocol=found["protocol"]))


def judges(extra: dict[str, str]) -> None:
    """How often the judges order a pair as labelled, by the flow model's predictions of x0."""
    sources = {"PickScore": TINY / "pickscore", "SPM": TINY / "spm", **extra}
    models = {name: load_clip(str(source)) for name, source in sources.items()}
    table = judge_table("tiny-flow", models, COUNT, SEED)
    print_table(table)
    keep("judges", records(table))


def row_of(name: str, seeds: list[dict]) -> list[str]:
    """An arm's row of the table: means over seeds, with 95 % intervals."""
    closed = [100 * row["closed"] for row in seeds]
    half = half_width(closed)
    spread = "" if half is None else f" ± {half:.0f}"
    beauty = [row["aesthetics"] for row in seeds]
    return [
        name, f"{average([b['mean'] for b in beauty]):.2f}",
        f"{100 * average([b['win_rate'] for b in beauty]):.1f} %",
        f"{average(closed):.0f}{spread}",
        interval([row["alignment"]["difference"] for row in seeds]),
        interval([row["pickscore"]["difference"] for row in seeds]),
        ", ".join(str(row["rounds"]) for row in seeds)]


def of_tiny() -> list[dict]:
    """The demo's three seeds, from results/effect.json."""
    found = read_json(RESULTS / "effect.json")["results"]
    return [found[f"seed{seed}"] | dict(rounds=effect.DEMO_ROUNDS) for seed in SEEDS]


def render(results: dict) -> str:
    """The tables, as Markdown; what has not been run is left out."""
    arms = {arm: list(results["arms"][arm].values()) for arm in ARMS if arm in results["arms"]}
    base = results["base"]["results"]
    lines = table(
        ["model", "aesthetics", "better than base", "% of the distance closed",
         "alignment, paired change", "PickScore, gain", "rounds"],
        ["tiny-flow, base", f"{base['aesthetics']['mean']:.2f}", "", "", "", "", ""],
        *(row_of(f"tiny-flow, {arm}", seeds) for arm, seeds in arms.items()),
        row_of("tiny (diffusion), SPO: the demo", of_tiny()))
    lines += table(
        ["tuned, seed 100", "chosen", "mean PickScore on 128 training captions"],
        *([method, ", ".join(f"{k} {v:g}" for k, v in found["chosen"].items()),
           "; ".join(f"{words}: {score:.2f}" for words, score in found["pickscore"].items())]
          for method, found in results["tuned"].items()))
    judges = results.get("judges", {})
    if judges:
        lines += table(
            ["judge's accuracy at t =", *next(iter(judges.values()))],
            *([name, *(f"{at['accuracy']:.3f} ({at['difference']:+.3f} ± "
                       f"{at['difference_standard_error']:.3f})" for at in row.values())]
              for name, row in judges.items()))
    return "\n".join(lines)


def draw(results: dict) -> str:
    """The arms' gains as a picture."""
    def arm(name: str, seeds: list[dict]) -> tuple:
        values = [row["aesthetics"]["difference"] for row in seeds]
        return name, values, half_width(values)

    flow = [arm(name, list(results["arms"][name].values())) for name in ARMS
            if name in results["arms"]]
    demo = arm("the demo", of_tiny())
    groups = {"rectified flow (tiny-flow)": flow, "diffusion (tiny)": [demo]}
    return figures.draw_arms(
        "Does SPO work on a flow-matching model?", groups, average(demo[1]),
        "gain in aesthetics (0..10) over the base, at equal evaluations",
        ["Circles: seeds. Bar: 95 % interval of their mean. 256 held-out captions, four pictures "
         "each.", "Dashed: the demo, diffusion's tiny model with the same judge."])


def main() -> None:
    """Measure what is asked for and not there yet; write table and picture."""
    parser = plain_parser(__doc__)
    parser.add_argument("parts", nargs="*", default=["judges", "tune", "arms"],
                        help="judges, tune, arms, render; or the name of an arm or method")
    parser.add_argument("--spm", nargs="*", default=[], metavar="NAME=SOURCE",
                        help="judges beside the shipped ones")
    given = parser.parse_args()
    if "judges" in given.parts:
        judges(dict(word.split("=", 1) for word in given.spm))
    for method in TUNED:
        if "tune" in given.parts or f"tune {method}" in given.parts:
            tune(method)
    for arm in ARMS:
        if "arms" in given.parts or arm in given.parts:
            measure(arm, SEEDS)
    results = kept()
    if {"arms", "tuned"} <= results.keys():
        text = render(results)
        put(PAGE, "<!-- results: flow.py render -->", "<!-- end of results -->", text)
        write_text(RESULTS / "flow.svg", draw(results))
        print(text)


if __name__ == "__main__":
    run_script(main)
