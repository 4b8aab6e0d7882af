"""What SPO's gain in beauty costs in alignment, and whether another recipe makes it cheaper: one training seed each, by ground truth.

    python experiments/alignment.py                     # all arms, about 7 minutes each on one core; continues where it stopped
    python experiments/alignment.py --arms demo         # one of them

Training captions with noise of their own, so that nothing is chosen on the held-out ones; DDIM, 20 steps, eta 0, the same pictures for
all arms. Writes results/alignment.json and prints the table. The distance is the held-out captions' own (experiments/effect.py).
Rounds: of 7 and 9 (10 and 14 where pools are fewer) the first that closed two thirds on the first 128 pictures, else the last.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from diffusion import generate  # noqa: E402
from loading import load_pipeline  # noqa: E402
from evaluate import compare, wear  # noqa: E402
from tiny import world  # noqa: E402
from training import permutation, read_json, run_script, write_json  # noqa: E402

RUNS, RESULTS = ROOT / "runs/alignment", ROOT / "experiments/results/alignment.json"
SEED, NOISE, PICTURES = 2, 50_000_000, 1024         # seed 2 of the demo gains most and loses most
ATTENTION = "{0}.to_q,{0}.to_k,{0}.to_v,{0}.to_out.0"
ARMS = {            # name: (rounds, guidance of the pictures judged, options that differ from the demo's)
    "demo": (9, 3, {}), "demo, drawn at guidance 2": (9, 2, {}), "demo, drawn at guidance 4": (9, 4, {}),
    "beta 10, pools at 501..751": (10, 3, dict(beta=10, t_max=751)),
    "beta 10, pools at 501..701": (14, 3, dict(beta=10, t_max=701)),
    "beta 10, LoRA on self-attention only": (9, 3, dict(beta=10, targets=ATTENTION.format("attn1"))),
    "beta 10, LoRA on cross-attention only": (9, 3, dict(beta=10, targets=ATTENTION.format("attn2"))),
    "beta 10, threshold 0.3": (9, 3, dict(beta=10, threshold=0.3)),
    "beta 10, k = 8": (7, 3, dict(beta=10, k=8)),
}


@torch.no_grad()
def judged(pipe, lora: str, guidance: float) -> dict[str, list[float]]:
    """Aesthetics and alignment of each picture with a LoRA, or without one if it is empty."""
    train, _ = world.split_captions()
    order = permutation(len(train), "arms")
    captions, out = [train[order[i % len(train)]] for i in range(PICTURES)], dict(aesthetics=[], alignment=[])
    wear(pipe, lora)
    for first in range(0, PICTURES, 64):
        part = captions[first:first + 64]
        images = generate(pipe, [c.text for c in part], [NOISE + first + i for i in range(len(part))], 64, guidance_scale=guidance)
        images = (images * 255).round() / 255                   # as PNG files would hold them
        out["aesthetics"] += world.aesthetics(images).tolist()
        out["alignment"] += world.alignment(images, part).tolist()
    return out


def main() -> None:
    """Train and judge what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    given = parser.parse_args()
    pipe, base = load_pipeline("tiny"), {}
    record = read_json(RESULTS) if RESULTS.exists() else dict(torch=torch.__version__, seed=SEED, pictures=PICTURES, arms={})
    for name in given.arms:
        rounds, guidance, options = ARMS[name]
        if name in record["arms"]:
            continue
        folder = RUNS / "_".join([str(rounds), *(f"{k}-{str(v).split(',')[0]}" for k, v in options.items())])
        if not (folder / f"checkpoint-{rounds:06d}.pt").exists():
            words = [word for k, v in options.items() for word in (f"--{k}", str(v))]
            subprocess.run([sys.executable, "spo_train.py", *words, "--seed", str(SEED), "--rounds", str(rounds), "--grid_every", "0",
                            "--out", str(folder)], check=True, cwd=ROOT)
        base[guidance] = base.get(guidance) or judged(pipe, "", guidance)
        found = judged(pipe, str(folder / "pytorch_lora_weights.safetensors"), guidance)
        rows = {m: compare(found[m], base[guidance][m]) for m in found}
        record["arms"][name] = dict(date=time.strftime("%Y-%m-%d"), rounds=rounds, guidance=guidance, options=options, **rows)
        write_json(RESULTS, record)
    effect = read_json(RESULTS.with_name("effect.json"))
    distance = effect["ceiling"]["best_through_vae"] - effect["results"]["base"]["aesthetics"]["mean"]
    print("| one training seed | aesthetics | distance closed | alignment, paired |\n|---|---|---|---|")
    for name, row in ((name, record["arms"][name]) for name in ARMS if name in record["arms"]):
        beauty, change = row["aesthetics"], row["alignment"]
        closed = f"{beauty['difference'] / distance:.0%}" if row["guidance"] == 3 else ""          # the distance is one at guidance 3
        print(f"| {name} | {beauty['mean'] - beauty['difference']:.2f} to {beauty['mean']:.2f} | {closed} | "
              f"{change['difference']:+.3f} ± {change['difference_standard_error']:.3f} |")


if __name__ == "__main__":
    run_script(main)
