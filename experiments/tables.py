"""The paper's tables at small scale: every run is fixed here before it is run; failures stay in.

    python experiments/tables.py 1              # 1 to 3 (rivals, GenEval); or 4 ... 9, "more"
    python experiments/tables.py all            # sized for a night on two cores
    python experiments/tables.py all --seeds 1  # one seed: several processes can share the work
    python experiments/tables.py tune           # TUNING: ten runs for every method, three hours
    python experiments/tables.py --again "k = 2" 0      # one arm's seed from nothing: the same?
    python experiments/tables.py render         # tables and pictures, from what has been run

Continues where it stopped: what results/tables.json holds is not run again. Take an entry out of it
to have it measured anew.

Every arm is compared at equal network evaluations *and* at equal optimizer updates: it runs until
it has had both budgets, and the first LoRA at or above each is judged, by ground truth, on the 256
held-out captions, same noise for all. An evaluation is one sample through the UNet, guidance's two
sides counted apart, three where a backward follows.

Learning rates of the methods in Table 1: each of RATES, seed 100; the highest mean PickScore on 128
training captions with other noise, at the budget of evaluations, wins, for every method alike. If
the best lies at an end, the next one in that direction is tried too, at most two. PickScore is what
a real user has; ground truth decides nothing.

The table "tuned" goes further: every method has ten runs over three settings, one after the other,
judged in the same way. Beta, clip range and timestep range start from the authors' own.
"""
import fcntl
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import needs  # noqa: F401
import torch

import evaluate
import figures
from diffusion import decode, generate_latents, to_pil
from loading import TINY, load_pipeline
from metrics import load_metric
from prompt_sets import read_prompts
from spo_train import PRESETS
from tiny import world
from training import permutation, plain_parser, refuse, run_script, write_json, write_text

SEEDS = (0, 1, 2)
UPDATES, EVALUATIONS, MOST_ROUNDS = 60, 25_000, 60
RATES, RATE_SEED = (1e-4, 4e-4, 1.6e-3), 100
CURVE = (0.25, 0.5)                 # Table 1 is also judged at these shares of the evaluations
RUNS, RESULTS = ROOT / "runs/tables", ROOT / "experiments/results/tables.json"
PAGE = ROOT / "experiments/README.md"
METRICS = ("aesthetics", "alignment", "pickscore")
FIGURES = ("mean", "difference", "difference_standard_error", "win_rate")
OFFLINE = dict(script="baselines.py", prompts_per_round=192, count=8000)

METHODS = {
    "spo": dict(),
    "ddpo": dict(script="baselines.py", method="ddpo"),
    "d3po": dict(script="baselines.py", method="d3po"),
    "diffusion-dpo": dict(OFFLINE, method="diffusion-dpo"),
    "mapo": dict(OFFLINE, method="mapo"),
}
# Written before any of these runs: where a method starts, then what is tried, setting by setting.
# The best of the first row is kept while the second row is tried, and so on; ten runs each.
FOUR_RATES = [dict(lr=lr) for lr in (1e-4, 4e-4, 1.6e-3, 6.4e-3)]
MINIBATCHES = [dict(pairs_per_step=n) for n in (12, 48, 96)]           # all start from tiny's 24
TUNING = {
    "spo": (dict(beta=10.0, t_min=0, t_max=751), [
        FOUR_RATES,
        [dict(t_min=0, t_max=999), dict(t_min=251, t_max=751), dict(t_min=501, t_max=951)],
        [dict(beta=beta) for beta in (1.0, 100.0, 1000.0)],
    ]),
    "ddpo": (dict(lr=4e-4), [
        [dict(clip_range=c) for c in (1e-4, 1e-3, 1e-2, 1e-1)],
        [dict(lr=lr) for lr in (1e-4, 1.6e-3, 6.4e-3)], MINIBATCHES,
    ]),
    "d3po": (dict(beta=0.1), [
        FOUR_RATES, [dict(beta=beta) for beta in (1.0, 10.0, 100.0)], MINIBATCHES,
    ]),
    "diffusion-dpo": (dict(beta=5e3), [
        FOUR_RATES, [dict(beta=beta) for beta in (5e2, 5e4, 5e5)], MINIBATCHES,
    ]),
    "mapo": (dict(beta=0.1), [
        [dict(lr=lr) for lr in (1e-5, 1e-4, 4e-4, 1.6e-3)],
        [dict(beta=beta) for beta in (0.01, 1.0, 10.0)], MINIBATCHES,
    ]),
}
RANGES = ((0, 250), (0, 500), (0, 750), (0, 1000), (250, 750), (500, 750), (250, 500))
ARMS = {            # options that differ from the demo's
    "as the demo": dict(),
    "start from winner": dict(continue_from="win"), "start from loser": dict(continue_from="lose"),
    "SPM without step": dict(judge="step-blind"), "PickScore": dict(judge="pickscore"),
    **{f"k = {k}": dict(k=k) for k in (2, 6, 8, 16)},
    **{f"j = {j}": dict(j=j) for j in (2, 3, 4, 5, 6)},
    **{f"t {a}-{b}": dict(t_min=a and a + 1, t_max=min(b + 1, 999)) for a, b in RANGES},
    "random pair": dict(pair="random"),
    "no clamp": dict(clamp=0.0),
    "threshold 0": dict(threshold=0.0), "threshold 0.3": dict(threshold=0.3),
    "beta 10": dict(beta=10.0), "beta 1000": dict(beta=1000.0),
    "guidance 1": dict(guidance_scale=1.0), "guidance 5": dict(guidance_scale=5.0),
    # The sum over a latent's 256 numbers is 256 times the mean: these are beta 10 and clamp 0.1.
    "sum log-probability": dict(beta=2560.0, clamp=0.0004),
}
PAPER = ("PickScore", "HPSv2.1", "ImageReward", "Aesthetic")
SPO = (21.43, 26.45, 0.1712, 5.887)
TABLES = {          # title, arms, and the paper's own figures (SD-1.5; Table 7: SDXL)
    "1": ("Tables 1 and 2: SPO and its rivals", list(METHODS), {
        "base": (20.53, 23.79, -0.1628, 5.365),
        "ddpo": (21.06, 24.91, 0.0817, 5.591),
        "d3po": (20.76, 23.97, -0.1235, 5.527),
        "diffusion-dpo": (20.98, 25.05, 0.1115, 5.505),
        "spo": SPO,
    }),
    "tuned": (
        "Tables 1 and 2 again: ten tuning runs for every method",
        [f"{method} tuned" for method in METHODS], {},
    ),
    "4": (
        "Table 4: what the next step starts from",
        ["as the demo", "start from winner", "start from loser"], {
            "start from winner": (17.87, 11.31, -2.2692, 3.963),
            "start from loser": (19.36, 18.63, -1.3743, 5.338),
            "as the demo": SPO,
        },
    ),
    "5": ("Table 5: who judges", ["as the demo", "SPM without step", "PickScore"], {
        "as the demo": SPO,
        "SPM without step": (21.19, 25.84, 0.1365, 5.678),
        "PickScore": (20.28, 23.09, -0.2982, 5.410),
    }),
    "6": (
        "Table 6: candidates in a pool",
        ["k = 2", "as the demo", "k = 6", "k = 8", "k = 16"], {},
    ),
    "7": (
        "Table 7: MSPO's inner steps",
        ["as the demo", *(f"j = {j}" for j in (2, 3, 4, 5, 6))], {
            "as the demo": (22.85, 31.37, 1.0071, 6.359),
            "j = 2": (22.84, 31.17, 1.0118, 6.268),
            "j = 3": (22.94, 31.55, 1.0847, 6.380),
            "j = 4": (23.06, 31.80, 1.0803, 6.364),
            "j = 5": (23.03, 31.23, 0.9656, 6.423),
            "j = 6": (22.95, 30.57, 0.9770, 6.390),
        },
    ),
    "8": ("Table 8: timestep range", ["as the demo", *(f"t {a}-{b}" for a, b in RANGES)], {
        "t 0-250": (20.61, 23.34, -0.1823, 5.413),
        "t 0-500": (20.69, 25.67, 0.0810, 5.399),
        "t 0-750": SPO,
        "t 0-1000": (19.77, 22.72, -0.4529, 5.111),
        "t 250-750": (21.19, 26.23, 0.2658, 5.581),
        "t 500-750": (20.43, 24.91, -0.1553, 5.582),
        "t 250-500": (20.60, 25.60, 0.1037, 5.336),
    }),
    "9": ("Table 9: which pair", ["as the demo", "random pair"], {
        "as the demo": SPO,
        "random pair": (21.21, 26.51, 0.1656, 5.796),
    }),
    "more": (
        "Beyond the paper",
        ["as the demo", "no clamp", "threshold 0", "threshold 0.3", "beta 10", "beta 1000",
         "sum log-probability", "guidance 1", "guidance 5"], {},
    ),
}


# What the paper says, as orders of two arms: (table, better, worse). The rule of the verdicts below
# was written on 2026-11-28, before any arm but Table 1's had its third seed.
DEMO = "as the demo"
CLAIMS = [
    *(("1", "spo", rival) for rival in ("ddpo", "d3po", "diffusion-dpo", "mapo")),
    *(("tuned", "spo tuned", f"{rival} tuned")
      for rival in ("ddpo", "d3po", "diffusion-dpo", "mapo")),
    ("4", DEMO, "start from winner"), ("4", DEMO, "start from loser"),
    ("5", DEMO, "SPM without step"), ("5", DEMO, "PickScore"),
    ("5", "SPM without step", "PickScore"),
    ("6", DEMO, "k = 2"), ("6", DEMO, "k = 16"),
    ("7", "j = 4", DEMO),
    *(("8", "t 0-750", f"t {a}-{b}") for a, b in RANGES if (a, b) != (0, 750)),
    ("9", DEMO, "random pair"),
]
STUDENT = {2: 12.71, 3: 4.303}      # seeds -> standard errors in half of a 95 % interval
TIE = 0.1           # points of aesthetics, a twentieth of the demo's gain, that are no difference


def read_log(folder: Path) -> list[dict]:
    """The run's rounds so far, with cumulative `updates` and `evaluations`, and seconds."""
    path = folder / "log.jsonl"
    total = dict(updates=0, evaluations=0, seconds=0.0)
    out = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        row = json.loads(line)
        total = dict(
            updates=total["updates"] + row["updates"],
            evaluations=total["evaluations"] + row["evaluations"],
            seconds=total["seconds"] + sum(row["seconds"].values()),
        )
        out.append(dict(total, round=row["round"], score=row["score"]))
    return out


def train(name: str, options: dict, seed: int) -> Path:
    """Run until both budgets are spent; returns the run folder."""
    folder = RUNS / f"{name.replace(' ', '-').replace('=', '')}-seed{seed}"
    train_until(folder, options | dict(seed=seed), dict(updates=UPDATES, evaluations=EVALUATIONS))
    return folder


def train_until(folder: Path, options: dict, budgets: dict[str, int]) -> list[dict]:
    """Run until the log's cumulative fields have reached `budgets`; returns the log.

    MOST_ROUNDS end it too: some arms find next to no pairs.
    """
    fixed = dict(out=folder, rounds=3, snapshot_every=1, grid_every=0, save_every=5)
    options = fixed | options
    script = options.pop("script", "spo_train.py")
    while True:
        log = read_log(folder)
        if log:
            share = min(log[-1][what] / amount for what, amount in budgets.items())
            if share >= 1 or len(log) >= MOST_ROUNDS:
                return log
            enough = max(len(log) + 1, math.ceil(len(log) / max(share, 0.02)))
            options["rounds"] = min(enough, MOST_ROUNDS)
        words = [word for k, v in options.items() for word in (f"--{k}", str(v))]
        subprocess.run([sys.executable, script, *words], check=True, cwd=ROOT)


def reach(log: list[dict], what: str, amount: float) -> dict:
    """The first round whose cumulative `what` is at least `amount`; the last one if none is."""
    return next((row for row in log if row[what] >= amount), log[-1])


class Judge:
    """Draws with a LoRA, reads the truth from the pictures, and keeps it beside the LoRA."""

    def __init__(self):
        self.pipe = load_pipeline("tiny")
        self.captions = {c.text: c for c in world.all_captions()}
        _, held = world.split_captions()
        single, count, relation = (
            [c.text for c in held if c.kind == kind] for kind in ("single", "count", "relation")
        )
        train = read_prompts(str(TINY / "train_prompts.txt"))
        self.sets = {       # name: prompts, first noise seed
            "held": (read_prompts(str(TINY / "held_out_prompts.txt")), 0),
            "choice": ([train[i] for i in permutation(len(train), "choice")[:128]], 10_000),
            "geneval": (single * 16 + count * 8 + relation[:128:2], 20_000),
        }
        self.metrics = [
            load_metric(name, "tiny", self.pipe.tokenizers[0], torch.device("cpu"))
            for name in METRICS
        ]

    def __call__(self, lora_folder: Path | None, which: str = "held") -> dict[str, list[float]]:
        """{metric: a score per picture}, of the GenEval set {tag: ...} too; `None`: the base."""
        path = (lora_folder or RUNS / "base") / f"{which}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        source = str(lora_folder / "pytorch_lora_weights.safetensors") if lora_folder else ""
        evaluate.wear(self.pipe, source)
        prompts, seed = self.sets[which]
        out: dict[str, list] = {}
        for begin in range(0, len(prompts), 64):
            part = prompts[begin:begin + 64]
            seeds = [seed + begin + i for i in range(len(part))]
            latents = generate_latents(self.pipe, part, seeds, 20, 3.0, 0.0)
            images = (decode(self.pipe, latents, 64) / 2 + 0.5).clamp(0, 1)
            pictures = to_pil(images)
            for metric in self.metrics:
                out.setdefault(metric.name, []).extend(metric.score(pictures, part).tolist())
            if which == "geneval":
                for things, text in zip(world.find_things(images), part):
                    for tag, right in world.geneval(things, self.captions[text]).items():
                        out.setdefault(tag, []).append(float(right))
        write_json(path, out)
        return out


def choice_score(run: str, options: dict, judge: Judge) -> float:
    """Mean PickScore on training captions, at the budget of evaluations: what choices go by."""
    folder = train(run, options, RATE_SEED)
    row = reach(read_log(folder), "evaluations", EVALUATIONS)
    return average(judge(folder / f"loras/{row['round']:05d}", "choice")["pickscore"])


def tune(method: str, judge: Judge) -> dict:
    """The method's settings by the search that TUNING states; every score is kept."""
    def score(options: dict) -> float:
        name = " ".join(f"{key}={value:g}" for key, value in sorted(options.items()))
        known = kept("tuning", method, "pickscore", name)
        if known is None:
            options = METHODS[method] | options
            known = round(choice_score(f"{method} {name}", options, judge), 4)
            keep(["tuning", method, "pickscore", name], known)
        return known

    best, rows = TUNING[method]
    for row in rows:
        before = [best] if row is not rows[0] else []
        best = max([*before, *(best | change for change in row)], key=score)
    keep(["tuning", method, "chosen"], best)
    return best


def options_of(name: str) -> dict:
    """An arm's options that differ from the demo's; a method's are known once it was tuned."""
    method = name.removesuffix(" tuned")
    if name in METHODS:
        return METHODS[name] | dict(lr=kept("rates", name, "chosen"))
    return ARMS[name] if name in ARMS else METHODS[method] | kept("tuning", method, "chosen")


def choose_rate(method: str, judge: Judge) -> float:
    """The method's learning rate by the stated procedure."""
    known = kept("rates", method)
    if known:
        return known["chosen"]
    scores, rates = {}, list(RATES)
    for rate in rates:                  # grows below
        options = dict(METHODS[method], lr=rate)
        scores[rate] = choice_score(f"{method} rate {rate:g}", options, judge)
        best = max(scores, key=scores.get)
        if len(scores) == len(rates) < 5 and best in (min(rates), max(rates)):
            rates.append(best * 4 if best == max(rates) else best / 4)
    keep(["rates", method], dict(
        chosen=best, pickscore={f"{rate:g}": round(score, 4) for rate, score in scores.items()}
    ))
    return best


def kept(*path: str):
    """What results/tables.json holds at a path of keys, or None."""
    place = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for key in path:
        place = place.get(key, {})
    return place or None


def keep(path: list[str], value) -> None:
    """Put a value into results/tables.json at a path of keys."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(RUNS / "lock", "wb") as lock:              # several processes may share the work
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = kept() or {}
        place = results
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
        results["about"] = dict(
            date=time.strftime("%Y-%m-%d"), torch=torch.__version__, updates=UPDATES,
            evaluations=EVALUATIONS, captions=256, device="cpu",
        )
        write_json(RESULTS, results)


def tag_means(scores: dict[str, list[float]]) -> dict[str, float]:
    """Of a reading of the GenEval set: the share of pictures that are right, by tag."""
    return {tag: round(average(v), 4) for tag, v in scores.items() if tag not in METRICS}


def reading(folder: Path, judge: Judge, shares: tuple[float, ...] = ()) -> dict:
    """What a run's LoRAs show at both budgets: {point: its round, its figures by metric}.

    With `shares` also at these of the evaluations, and on the GenEval set.
    """
    log, base = read_log(folder), judge(None)
    points = {
        "updates": reach(log, "updates", UPDATES),
        "evaluations": reach(log, "evaluations", EVALUATIONS),
        **{f"evaluations x {s:g}": reach(log, "evaluations", s * EVALUATIONS) for s in shares},
    }
    loras = {point: folder / f"loras/{row['round']:05d}" for point, row in points.items()}
    record = {}
    for point, row in points.items():
        scores = judge(loras[point])
        compared = {m: evaluate.compare(scores[m], base[m], 1) for m in METRICS}
        record[point] = dict(row, **{
            m: {k: round(found[k], 4) for k in FIGURES} for m, found in compared.items()
        })
    if shares:
        record["geneval"] = tag_means(judge(loras["evaluations"], "geneval"))
    return record


def measure(
    name: str, run: str, options: dict, seed: int, judge: Judge, shares: tuple[float, ...] = ()
) -> None:
    """Train one arm with one seed, judge it, and keep the figures, unless they are there."""
    if not kept("arms", name, str(seed)):
        keep(["arms", name, str(seed)], reading(train(run, options, seed), judge, shares))


def again(name: str, seed: str) -> None:
    """Train an arm's seed from nothing once more, and keep whether the figures are the same."""
    first = kept("arms", name, seed)
    if not first:
        refuse(f"{name}, seed {seed}: not measured yet; run its table first")
    folder = train(f"{name} again", options_of(name), int(seed))
    record = reading(folder, Judge(), CURVE if "geneval" in first else ())
    untimed = [{point: {k: v for k, v in row.items() if k != "seconds"}
                for point, row in found.items()} for found in (first, record)]
    keep(["again", name, seed], dict(
        same=untimed[0] == untimed[1], date=time.strftime("%Y-%m-%d"), torch=torch.__version__,
        figures=record,
    ))


def disagreement(judge: Judge, count: int = 4000) -> None:
    """The claim's premise: how often generic labels contradict beauty."""
    images, captions, labels = world.preference_pairs(count, seed=77)
    flat = images.flatten(0, 1).float() / 255
    asked = [judge.captions[c] for c in captions for _ in range(2)]
    beauty = torch.cat([world.aesthetics(part) for part in flat.split(256)]).view(-1, 2)
    aligned = world.alignment(flat, asked).view(-1, 2)
    against = ((beauty[:, 0] > beauty[:, 1]).float() != labels).float()
    differ = aligned[:, 0] != aligned[:, 1]
    keep(["labels"], dict(
        pairs=count, against_aesthetics=float(against.mean()),
        pairs_that_differ_in_alignment=float(differ.float().mean()),
        against_aesthetics_there=float(against[differ].mean()),
        against_aesthetics_elsewhere=float(against[~differ].mean()),
    ))


def interval(values: list[float]) -> str:
    """Mean over seeds with a 95 % interval by Student's t (3 seeds: 4.30 standard errors)."""
    n, mean = len(values), average(values)
    if n < 2:
        return f"{mean:+.3f} (1 seed)"
    text = f"{mean:+.3f} ± {STUDENT[n] * standard_error(values):.3f}"
    return text if n == len(SEEDS) else f"{text} ({n} seeds)"


def standard_error(values: list[float]) -> float:
    """Of the mean of two or more values."""
    n, mean = len(values), average(values)
    return (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5


def verdict(better: dict[str, dict], worse: dict[str, dict]) -> dict:
    """Does the order of two arms hold here? Of their {seed: points}: paired over three seeds.

    The difference of their gains in aesthetics at equal evaluations, its 95 % interval by Student's
    t, and the two-sided p-value. The whole interval within TIE of 0: a tie; else above 0:
    reproduced; below 0: the reverse holds; else undecidable.
    """
    seeds = sorted(better.keys() & worse.keys())
    if len(seeds) < len(SEEDS):
        return dict(verdict="too few seeds", seeds=len(seeds))
    gains = [[arm[s]["evaluations"]["aesthetics"]["difference"] for s in seeds]
             for arm in (better, worse)]
    differences = [a - b for a, b in zip(*gains)]
    mean, error = average(differences), standard_error(differences)
    low, high = mean - STUDENT[3] * error, mean + STUDENT[3] * error
    t = abs(mean) / error if error else math.inf
    p = 1 - 1 / math.sqrt(1 + 2 / t ** 2) if t else 1.0             # whose tails have this form
    word = "undecidable"
    if -TIE < low and high < TIE:
        word = "tie"
    elif low > 0:
        word = "reproduced"
    elif high < 0:
        word = "the reverse"
    return dict(verdict=word, difference=mean, low=low, high=high, p=p)


def holm(values: list[float]) -> list[bool]:
    """Which of several p-values stay below .05 when all are asked together (Holm's steps)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    holds, sure = [False] * len(values), True
    for place, i in enumerate(order):
        sure = sure and values[i] <= 0.05 / (len(values) - place)
        holds[i] = sure
    return holds


def render_verdicts(results: dict) -> list[str]:
    """The claims, one a row; below, what asking so many at once means."""
    arms = results.get("arms", {})
    found = [verdict(arms.get(a, {}), arms.get(b, {})) for _, a, b in CLAIMS]
    together = iter(holm([f["p"] for f in found if "p" in f]))
    rows = []
    for (table, a, b), f in zip(CLAIMS, found):
        if "p" not in f:
            rows.append([table, f"{a} > {b}", "", f"{f['verdict']} ({f['seeds']} of {len(SEEDS)})"])
            continue
        mark = " *" if next(together) else ""
        rows.append([table, f"{a} > {b}",
                     f"{f['difference']:+.2f} ({f['low']:+.2f} to {f['high']:+.2f})",
                     f["verdict"] + mark])
    lines = markdown("Verdicts: the paper's orders in true aesthetics, at equal evaluations",
                     ["table", "the paper's order", "difference, 95 % interval", "here"], rows)
    asked = sum("p" in f for f in found)
    lines.append(f"\nOf {asked} claims asked at 95 %, about {asked / 20:.1f} would come out "
                 "decided by chance. Those marked * hold when all are asked together (Holm, 5 %).")
    return lines


def markdown(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """A headed Markdown table; short rows are filled up."""
    full = [[*row, *[""] * (len(header) - len(row))] for row in [header, *rows]]
    first, *others = ["| " + " | ".join(row) + " |" for row in full]
    return [f"\n### {title}\n", first, "|---" * len(header) + "|", *others]


def average(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def gain(rows: list[dict], metric: str) -> float:
    """Mean over seeds of the gain over the base, at one point of their curves."""
    return average([row[metric]["difference"] for row in rows])


def cells(seeds: dict[str, dict]) -> list[str]:
    """An arm's figures: at equal evaluations, at equal updates, what it had of the other budget."""
    at, also = ([seeds[s][point] for s in sorted(seeds)] for point in ("evaluations", "updates"))
    updates = average([row["updates"] for row in at])
    evaluations = average([row["evaluations"] for row in also])
    return [
        *(interval([row[m]["difference"] for row in at]) for m in METRICS),
        *(interval([row[m]["difference"] for row in also]) for m in METRICS[:2]),
        f"{updates:.0f} / {evaluations:,.0f}",
    ]


def render() -> str:
    """All tables as Markdown, from results/tables.json; what has not been run says so."""
    results = kept() or {}
    arms = {name: cells(seeds) for name, seeds in results.get("arms", {}).items()}
    if "base" in results:
        arms["base"] = [f"{results['base'][m]:.3f}" for m in METRICS] + [""] * 3
    header = [
        "arm", "aesthetics", "alignment", "PickScore", "aesthetics, equal updates",
        "alignment, equal updates", "updates / evaluations",
    ]
    lines = render_verdicts(results)
    for number, (title, names, paper) in TABLES.items():
        rows = []
        for name in ["base", *names] if number == "1" else names:
            theirs = [", ".join(map(str, paper[name]))] if name in paper else []
            rows.append([name, *arms.get(name, ["not measured"] + [""] * 5), *theirs])
        last = ["paper: " + ", ".join(PAPER)] if paper else []
        lines += markdown(title, header + last, rows)
        if number == "1":
            lines += render_more(results)
        if number == "tuned":
            lines += render_tuning(results)
    for name, seeds in results.get("again", {}).items():
        for seed, found in seeds.items():
            same = "the same figures" if found["same"] else "other figures"
            lines.append(f"\nRun again from nothing: {name}, seed {seed}: {same} "
                         f"({found['date']}, torch {found['torch']}).")
    return "\n".join(lines) + "\n"


def render_tuning(results: dict) -> list[str]:
    """What every method tried and chose."""
    rows = []
    for method, found in results.get("tuning", {}).items():
        tried = "; ".join(f"{name}: {score:.3f}" for name, score in found["pickscore"].items())
        chosen = found.get("chosen", {})
        words = " ".join(f"{key}={value:g}" for key, value in sorted(chosen.items()))
        rows.append([method, words or "not done", tried])
    return markdown("Ten tuning runs: mean PickScore on 128 training captions",
                    ["method", "chosen", "tried"], rows)


def put(page: Path, begin: str, end: str, words: str) -> None:
    """Words into a page, between two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    write_text(page, f"{before}{begin}\n\n{words.strip()}\n\n{end}{after}")


def render_more(results: dict) -> list[str]:
    """What belongs to Table 1: learning rates, curves, GenEval, what a gain is made of."""
    arms = results.get("arms", {})
    arms = {name: list(arms[name].values()) for name in METHODS if name in arms}
    rows = []
    for name, row in results.get("rates", {}).items():
        tried = sorted((float(rate), score) for rate, score in row["pickscore"].items())
        text = ", ".join(f"{rate:g}: {score:.3f}" for rate, score in tried)
        rows.append([name, f"{row['chosen']:g}", text])
    lines = markdown(
        "Table 1, learning rates: mean PickScore on 128 training captions",
        ["method", "chosen", "tried"], rows,
    )
    points = {**{f"evaluations x {s:g}": s for s in CURVE}, "evaluations": 1}
    rows = []
    for name, seeds in arms.items():
        at = [[seed[point] for seed in seeds] for point in points]
        pairs = [f"{gain(p, 'aesthetics'):+.3f} / {gain(p, 'alignment'):+.3f}" for p in at]
        rows.append([name, *pairs])
    lines += markdown(
        "Table 1, learning curves: gain in aesthetics / alignment",
        ["method", *(f"{100 * s:.0f} % of the evaluations" for s in points.values())], rows,
    )
    lines += render_geneval(results, arms)
    rows = []
    for name, seeds in arms.items():
        at = [seed["evaluations"] for seed in seeds]
        beauty, aligned = gain(at, "aesthetics") * 0.5 / 0.6, gain(at, "alignment") * 10 / 0.6
        rows.append([name, f"{beauty:+.2f}", f"{aligned:+.2f}"])
    lines += markdown(
        "The claim: what a gain in this world's preference is made of",
        ["method", "from aesthetics", "from alignment"], rows,
    )
    lines.append("\nIn log-odds of being liked better than the base's picture, "
                 "(10 x alignment + 0.5 x aesthetics) / 0.6.")
    if "labels" in results:
        share = {key: f"{100 * value:.0f} %" for key, value in results["labels"].items()}
        lines.append(
            f"Of {results['labels']['pairs']:,} generic labels {share['against_aesthetics']} "
            "prefer the less beautiful picture: "
            f"{share['against_aesthetics_there']} where only one of the two shows what the caption "
            f"says ({share['pairs_that_differ_in_alignment']} of the pairs), "
            f"{share['against_aesthetics_elsewhere']} elsewhere."
        )
    return lines


def render_geneval(results: dict, arms: dict[str, list[dict]]) -> list[str]:
    """Table 3: of the base and the methods, the share of pictures that are right, by tag."""
    tags = ("single", "two", "counting", "colours", "position", "binding")
    readings = {"base": [results["base geneval"]] if "base geneval" in results else []}
    readings |= {name: [seed["geneval"] for seed in seeds] for name, seeds in arms.items()}
    rows = []
    for name, reads in readings.items():
        values = [average([read[tag] for read in reads]) for tag in tags if reads]
        figures = [f"{v:.3f}" for v in [*values, average(values)]] if reads else ["not measured"]
        rows.append([name, *figures])
    title = "Table 3: this world's GenEval, read from the pixels"
    return markdown(title, ["model", *tags, "mean"], rows)


def half_width(values: list[float]) -> float | None:
    """Half of the 95 % interval of three seeds' mean; None with fewer."""
    if len(values) < len(SEEDS):
        return None
    return STUDENT[len(values)] * standard_error(values)


def gains_of(arms: dict, name: str, metric: str = "aesthetics") -> list[float]:
    """The gains of an arm's seeds at equal evaluations; [] where none was run."""
    seeds = arms.get(name, {})
    return [seeds[s]["evaluations"][metric]["difference"] for s in sorted(seeds)]


def pictures(results: dict) -> dict[str, str]:
    """{file name: SVG} of the findings, from what results/tables.json holds."""
    arms = results.get("arms", {})
    if not arms:
        return {}

    def noise(metric: str) -> float:
        errors = [seed["evaluations"][metric]["difference_standard_error"]
                  for seeds in arms.values() for seed in seeds.values()]
        return 1.96 * average(errors or [0.0])

    bars = "Bars are 95 % intervals over three training seeds (Student's t)."
    lacking = any(len(seeds) < len(SEEDS) for seeds in arms.values())
    few = "Without a bar: fewer than three seeds yet. " if lacking else ""
    shares = [f"evaluations x {s:g}" for s in CURVE] + ["evaluations"]
    lines = {}
    for method in [m for m in METHODS if m in arms]:
        lines[method] = [(0.0, 0.0, None)]
        for share in shares:
            at = [seed[share] for seed in arms[method].values()]
            gains = [row["aesthetics"]["difference"] for row in at]
            evaluations = average([row["evaluations"] for row in at])
            lines[method].append((evaluations, average(gains), half_width(gains)))
    rows = {title: [(name, gains_of(arms, name), half_width(gains_of(arms, name)))
                    for name in names]
            for number, (title, names, _) in TABLES.items()
            if number != "1" and arms.keys() & set(names)}
    plane, seen = {}, {"spo"} if DEMO in arms else set()        # the same run under two names
    for title, names, _ in TABLES.values():
        new = [name for name in names if name in arms and name not in seen]
        seen.update(new)
        if not new:
            continue
        plane[title.split(":")[0]] = [
            (name, average(gains_of(arms, name)), 100 * average(gains_of(arms, name, "alignment")))
            for name in new]
    axis = "gain in true aesthetics over the base model (points of 0..10)"
    return {
        "curves.svg": figures.draw_curves(
            "How much beauty does each method gain for its budget? (Table 1)", lines,
            ("network evaluations spent (samples through the UNet)", axis),
            [bars, "Judged on 256 held-out captions. Every method's learning rate was tuned."]),
        "arms.svg": figures.draw_arms(
            "Which choices matter? Every arm at equal network evaluations", rows,
            average(gains_of(arms, DEMO) or [0.0]), axis,
            [f"{bars} Hollow: one seed. Filled: the mean of three.",
             "Verdicts compare arms seed by seed, so bars that overlap are no verdict.",
             f"{few}Dashed: the mean of \"{DEMO}\"."]),
        "alignment.svg": figures.draw_plane(
            "Does beauty cost alignment? All arms at equal network evaluations", plane,
            (axis, "change in pictures that show their caption (percentage points)"),
            ["A point is an arm's mean over its seeds, judged on 256 pictures: one picture is 0.4 "
             "points of alignment.", "Of one seed the pictures' own noise (95 %) is about "
             f"± {noise('aesthetics'):.2f} in aesthetics and ± {100 * noise('alignment'):.1f} "
             "points in alignment.", "Where arms crowd, not every one is named."], DEMO),
    }


def run(wanted: list[str], seeds: list[int], methods: list[str]) -> None:
    """Measure what is not there yet: the base, the labels, the rates, and the `wanted` tables."""
    judge = Judge()
    base = judge(None)
    keep(["base"], {m: round(average(base[m]), 4) for m in METRICS})
    keep(["base geneval"], tag_means(judge(None, "geneval")))
    if not kept("labels"):
        disagreement(judge)
    if {"1", "rates"} & set(wanted):
        for method in methods:
            choose_rate(method, judge)
    if {"tuned", "tune"} & set(wanted):
        for method in methods:
            tune(method, judge)
    for table in [table for table in wanted if table in TABLES]:
        names = TABLES[table][1]
        rivals = table in ("1", "tuned")
        if rivals:
            names = [name for name in names if name.removesuffix(" tuned") in methods]
        for seed in seeds:
            for name in names:
                options = options_of(name)
                same = name == "spo" and options["lr"] == PRESETS["tiny"]["lr"]
                run_name = DEMO if same else name
                measure(name, run_name, options, seed, judge, CURVE if rivals else ())


def main() -> None:
    """Run the tables that the command line names, then render all."""
    parser = plain_parser(__doc__)
    methods = list(METHODS)
    parser.add_argument("tables", nargs="*", metavar="TABLE",
                        help=", ".join([*TABLES, "rates", "tune", "all", "render"]))
    parser.add_argument("--again", nargs=2, metavar=("ARM", "SEED"), help="from nothing: the same?")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods,
                        help="of the tables 1 and tuned")
    given = parser.parse_args()
    wanted = list(TABLES) if "all" in given.tables else given.tables
    strange = set(wanted) - {*TABLES, "rates", "tune", "render"}
    if strange or not (wanted or given.again):
        refuse(f"{' '.join(strange) or 'no table'}: name tables among {', '.join(TABLES)}, rates, "
               "tune, all, render")
    if given.again:
        again(*given.again)
    elif "render" not in wanted:
        run(wanted, given.seeds, given.methods)
    text = render()
    write_text(RESULTS.parent / "tables.md", text)
    verdicts = "\n".join(render_verdicts(kept() or {})[1:])         # the page has its own heading
    put(PAGE, "<!-- verdicts: tables.py render -->", "<!-- end of verdicts -->", verdicts)
    for name, picture in pictures(kept() or {}).items():
        write_text(RESULTS.parent / name, picture)
    print(text)


if __name__ == "__main__":
    run_script(main)
