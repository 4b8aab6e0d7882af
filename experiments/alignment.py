"""What SPO's gain in beauty costs in alignment, and whether another recipe makes it cheaper.

    python experiments/alignment.py                 # all arms, each about 7 minutes on one core
    python experiments/alignment.py --arms demo     # one of them

Continues where it stopped. One training seed each, by ground truth. The pictures are of training
captions with noise of their own, so that nothing is chosen on the held-out ones: DDIM, 20 steps,
eta 0, the same noise for all arms. Writes results/alignment.json and prints the table. The distance
is the held-out captions' own (experiments/effect.py). Rounds: of 7 and 9 (10 and 14 where pools are
fewer) the first that closed two thirds on the first 128 pictures, else the last.
"""
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import needs  # noqa: F401
import torch

from diffusion import generate
from evaluate import compare, wear
from loading import Pipeline, load_pipeline
from tiny import world
from training import permutation, plain_parser, read_json, run_script, write_json

RUNS, RESULTS = ROOT / "runs/alignment", ROOT / "experiments/results/alignment.json"
SEED = 2                        # of the demo's seeds, it gains most and loses most
NOISE, PICTURES = 50_000_000, 1024
LAYERS = "{0}.to_q,{0}.to_k,{0}.to_v,{0}.to_out.0"
ARMS = {            # name: (rounds, guidance of the pictures, options that differ from the demo's)
    "demo": (9, 3, {}),
    "demo, drawn at guidance 2": (9, 2, {}),
    "demo, drawn at guidance 4": (9, 4, {}),
    "beta 10, pools at 501..751": (10, 3, dict(beta=10, t_max=751)),
    "beta 10, pools at 501..701": (14, 3, dict(beta=10, t_max=701)),
    "beta 10, LoRA on self-attention only": (9, 3, dict(beta=10, targets=LAYERS.format("attn1"))),
    "beta 10, LoRA on cross-attention only": (9, 3, dict(beta=10, targets=LAYERS.format("attn2"))),
    "beta 10, threshold 0.3": (9, 3, dict(beta=10, threshold=0.3)),
    "beta 10, k = 8": (7, 3, dict(beta=10, k=8)),
}


def trained(rounds: int, options: dict) -> Path:
    """The run folder of an arm, which is trained if it is not there yet."""
    name = "_".join([str(rounds), *(f"{k}-{str(v).split(',')[0]}" for k, v in options.items())])
    folder = RUNS / name
    if not (folder / f"checkpoint-{rounds:06d}.pt").exists():
        options = dict(options, seed=SEED, rounds=rounds, grid_every=0, out=folder)
        words = [word for k, v in options.items() for word in (f"--{k}", str(v))]
        subprocess.run([sys.executable, "spo_train.py", *words], check=True, cwd=ROOT)
    return folder


@torch.no_grad()
def judged(pipe: Pipeline, lora: str, guidance: float,
           pictures: int = PICTURES) -> dict[str, list[float]]:
    """Aesthetics and alignment of each picture with a LoRA, or without one if it is empty."""
    train, _ = world.split_captions()
    order = permutation(len(train), "arms")
    captions = [train[order[i % len(train)]] for i in range(pictures)]
    out = dict(aesthetics=[], alignment=[])
    wear(pipe, lora)
    for first in range(0, pictures, 64):
        part = captions[first:first + 64]
        seeds = [NOISE + first + i for i in range(len(part))]
        images = generate(pipe, [c.text for c in part], seeds, 64, guidance_scale=guidance)
        images = (images * 255).round() / 255                   # as PNG files would hold them
        out["aesthetics"] += world.aesthetics(images).tolist()
        out["alignment"] += world.alignment(images, part).tolist()
    return out


def distance() -> float:
    """From the base to the best pictures in aesthetics: held-out captions, drawn at guidance 3."""
    effect = read_json(RESULTS.with_name("effect.json"))
    return effect["ceiling"]["best_through_vae"] - effect["results"]["base"]["aesthetics"]["mean"]


def table(arms: dict[str, dict]) -> str:
    """The arms that have been measured, as Markdown."""
    whole = distance()
    lines = [
        "| one training seed | aesthetics | distance closed | alignment, paired |",
        "|---|---|---|---|",
    ]
    for name in [name for name in ARMS if name in arms]:
        beauty, change = arms[name]["aesthetics"], arms[name]["alignment"]
        before = beauty["mean"] - beauty["difference"]
        closed = f"{beauty['difference'] / whole:.0%}" if arms[name]["guidance"] == 3 else ""
        lines.append(
            f"| {name} | {before:.2f} to {beauty['mean']:.2f} | {closed} | "
            f"{change['difference']:+.3f} ± {change['difference_standard_error']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train and judge what is not there yet."""
    parser = plain_parser(__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    given = parser.parse_args()
    pipe = load_pipeline("tiny")
    record = dict(torch=torch.__version__, seed=SEED, pictures=PICTURES, arms={})
    if RESULTS.exists():
        record = read_json(RESULTS)
    base = {}
    for name in [name for name in given.arms if name not in record["arms"]]:
        rounds, guidance, options = ARMS[name]
        lora = trained(rounds, options) / "pytorch_lora_weights.safetensors"
        if guidance not in base:
            base[guidance] = judged(pipe, "", guidance)
        found = judged(pipe, str(lora), guidance)
        record["arms"][name] = dict(
            date=time.strftime("%Y-%m-%d"), rounds=rounds, guidance=guidance, options=options,
            **{metric: compare(found[metric], base[guidance][metric]) for metric in found},
        )
        write_json(RESULTS, record)
    print(table(record["arms"]))


if __name__ == "__main__":
    run_script(main)
