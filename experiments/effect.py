"""Does it work? The demo's SPO with three seeds, judged by ground truth on held-out prompts; and one run that goes on too long.

    python experiments/effect.py            # about 30 minutes on 2 cores; continues where it stopped

Writes experiments/results/effect.json and effect.md. Settings, seeds and prompts are fixed here, before any run. The project's own goal,
70 % of the distance closed and alignment down by at most one standard error in every seed, is read off twice: on the 256 pictures that
the demo draws, and on four times as many.
"""
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from loading import load_pipeline  # noqa: E402
from spo_train import PRESETS  # noqa: E402
from tiny import world  # noqa: E402

SEEDS, LONG = (0, 1, 2), (14, 20)
DEMO_ROUNDS = PRESETS["tiny"]["rounds"]
RUNS = ROOT / "runs/effect"


def call(*arguments: str) -> float:
    """Run one of the project's scripts; returns its seconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)
    return time.perf_counter() - begin


@torch.no_grad()
def ceiling(samples: int = 4) -> dict[str, float]:
    """The best pictures of the held-out captions, and what is left of them after the VAE."""
    pipe, (_, held) = load_pipeline("tiny"), world.split_captions()
    captions = held * samples
    ones = torch.ones(len(captions))
    images = world.render(captions, torch.Generator().manual_seed(7), ones, ones)
    again = torch.cat([pipe.vae.decode(pipe.vae.encode(part * 2 - 1)) for part in images.split(64)]) / 2 + 0.5
    return dict(best_real=float(world.aesthetics(images).mean()), best_through_vae=float(world.aesthetics(again).mean()),
                alignment_through_vae=float(world.alignment(again, captions).mean()))


def judged(folder: str, names: list[str], each: int, top: dict[str, float]) -> dict:
    """evaluate.py's results of the base and `names`, `each` pictures a held-out caption, with the share of the distance closed."""
    call("evaluate.py", "--lora", "base=", *names, "--out", str(RUNS / folder), "--images_per_prompt", str(each))
    results = json.loads((RUNS / folder / "results.json").read_text())
    base = results["results"]["base"]["aesthetics"]["mean"]
    for row in results["results"].values():
        row["closed"] = (row["aesthetics"]["mean"] - base) / (top["best_through_vae"] - base)
    return results


def goal(row: dict) -> str:
    """What a seed reaches of the goal, in words of the table."""
    a = row["alignment"]
    return (f"{100 * row['closed']:.0f} %, alignment {a['mean'] - a['difference']:.3f} to {a['mean']:.3f}, paired "
            f"{a['difference']:+.3f} ± {a['difference_standard_error']:.3f}")


def main() -> None:
    """Train, evaluate, and write the tables."""
    seconds = {}
    for seed in SEEDS:
        if not (RUNS / f"seed{seed}/checkpoint-{DEMO_ROUNDS:06d}.pt").exists():
            seconds[f"seed {seed}"] = call("spo_train.py", "--out", str(RUNS / f"seed{seed}"), "--seed", str(seed),
                                           "--rounds", str(DEMO_ROUNDS))
    for rounds in LONG:                 # the same run, continued: what over-optimisation looks like
        folder = RUNS / f"long{rounds}"
        if not (folder / f"checkpoint-{rounds:06d}.pt").exists():
            before = RUNS / ("seed0" if rounds == LONG[0] else f"long{LONG[LONG.index(rounds) - 1]}")
            subprocess.run(["cp", "-r", str(before), str(folder)], check=True)
            call("spo_train.py", "--out", str(folder), "--seed", "0", "--rounds", str(rounds))
    names, top = [f"seed{s}={RUNS}/seed{s}" for s in SEEDS], ceiling()
    results = judged("evaluation", [*names, *(f"rounds{r}={RUNS}/long{r}" for r in LONG)], 4, top)
    demo, rows = judged("demo", names, 1, top)["results"], results["results"]
    out = ROOT / "experiments/results"
    out.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    record = dict(date=time.strftime("%Y-%m-%d"), machine=machine, torch=torch.__version__, ceiling=top, training_seconds=seconds,
                  protocol=results["protocol"], results=rows, demo=demo)
    (out / "effect.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = ["| model | aesthetics (0..10) | better than base | distance closed | alignment (0..1) | "
             "paired change | PickScore |", "|---" * 7 + "|"]
    for name, row in rows.items():
        a, g = row["aesthetics"], row["alignment"]
        low, high = a["win_rate_interval"]
        against = [f"{100 * a['win_rate']:.1f} % ({100 * low:.1f} to {100 * high:.1f})", f"{100 * row['closed']:.0f} %",
                   f"{g['difference']:+.3f} ± {g['difference_standard_error']:.3f}"] if name != "base" else ["", "", ""]
        spread = {m: f"{row[m]['mean']:.{d}f} ± {row[m]['standard_error']:.{d}f}" for m, d in
                  (("aesthetics", 2), ("alignment", 3), ("pickscore", 2))}
        cells = [name.replace("seed", "SPO, seed ").replace("rounds", "seed 0, rounds: "), spread["aesthetics"], *against[:2],
                 spread["alignment"], against[2], spread["pickscore"]]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| goal, on | " + " | ".join(f"seed {s}" for s in SEEDS) + " |", "|---" * (1 + len(SEEDS)) + "|"]
    for pictures, found in (("the demo's 256 pictures", demo), ("1,024 pictures", rows)):
        lines.append(f"| {pictures} | " + " | ".join(goal(found[f"seed{s}"]) for s in SEEDS) + " |")
    lines += ["", f"Best real pictures {top['best_real']:.2f}; after the VAE {top['best_through_vae']:.2f} (the 100 % mark)."]
    (out / "effect.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
