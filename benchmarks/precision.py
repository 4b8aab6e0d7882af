"""Does the judge name the same pair when it and the decoder compute in fewer bits?

    python benchmarks/precision.py          # 1,280 pools of the tiny model; a CLIP-H; 20 minutes

Pools are sampled in fp32 and judged again in each precision: how often does another pair come out,
and how often does a pair count that did not, or the other way round? The tiny judge has 0.6 million
weights, a CLIP-H has a thousand times as many: one with random weights says how much larger its
rounding errors are, relative to what tells candidates apart, and drawn numbers say how many pairs
that would change. TF32 products are imitated by rounding a linear layer's weights and inputs to ten
bits of mantissa. Writes benchmarks/results/precision.json.
"""
import copy
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from clip_spm import CLIP, clip_h, preprocess_decoded
from diffusion import encode_empty, encode_prompts, judge_features, negative
from loading import DTYPES, TINY, load_clip, load_pipeline
from prompt_sets import read_prompts
from spo_train import PRESETS, Batch, SPOConfig, choose_pair, load_judge, sample_pools
from training import generator, plain_parser, run_script, write_json
from vae import VAE

PROMPTS, CHUNK, PICTURES, DRAWN = 128, 32, 6, 200_000
KINDS = ("fp32", "tf32", "fp16", "bf16")
DECODERS = ("fp32", "fp16", "bf16")


def rounded(values: torch.Tensor) -> torch.Tensor:
    """fp32 numbers to the nearest of ten bits of mantissa, as TF32 products take them."""
    return (values.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def in_precision(clip: CLIP, kind: str) -> CLIP:
    """The CLIP's arithmetic in `kind`."""
    if kind != "tf32":
        return clip.to(DTYPES[kind])
    for module in clip.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, words: (rounded(words[0].contiguous()),))
    return clip


class Compared:
    """An observer of pools: the pairs and flags of every choice, beside those in fp32."""

    def __init__(self, vaes: dict[str, VAE], clips: dict[str, CLIP]):
        self.vaes, self.clips = vaes, clips
        self.texts: dict[str, torch.Tensor] = {}            # of the batch, in each precision
        self.pools = 0
        self.pairs, self.flags = Counter(), Counter()       # how many are other ones

    def __call__(self, pool, batch) -> None:
        self.pools += len(pool.scores)
        latents, shape = pool.x0.flatten(0, 1), pool.scores.shape
        timestep = torch.full((len(latents),), pool.t)
        for decoder, vae in self.vaes.items():
            pictures = vae.decode(latents.to(vae.quant_conv.weight.dtype)).float()
            for kind, clip in self.clips.items():
                pixels = preprocess_decoded(pictures, clip.config.vision.image_size)
                features = clip.image_features(pixels, timestep).unflatten(0, shape)
                scores = clip.score(features, self.texts[kind][:, None])
                win, lose, valid = choose_pair(scores, 0.1, "best-worst", pool.uniform[:, 1:])
                other = (win != pool.win) | (lose != pool.lose)
                self.pairs[decoder, kind] += int(other.sum())
                self.flags[decoder, kind] += int((valid != pool.valid).sum())


def tiny_model() -> dict:
    """{decoder, judge: share of pools with another pair, share of flags turned}."""
    config = SPOConfig(**PRESETS["tiny"])
    pipe = load_pipeline("tiny")
    judge, empty = load_judge(config, pipe), encode_empty(pipe)
    compared = Compared(
        {kind: load_pipeline("tiny", vae_dtype=DTYPES[kind]).vae for kind in DECODERS},
        {kind: in_precision(load_clip(str(TINY / "spm")), kind) for kind in KINDS})
    prompts = read_prompts(str(TINY / "train_prompts.txt"), PROMPTS)
    for begin in tqdm(range(0, PROMPTS, CHUNK), "pools"):
        part = prompts[begin:begin + CHUNK]
        cond = encode_prompts(pipe, part)
        compared.texts = {k: judge_features(pipe, clip, part) for k, clip in compared.clips.items()}
        batch = Batch(cond, negative(pipe, cond, empty), judge_features(pipe, judge.clip, part),
                      [generator(0, "precision", begin + i) for i in range(len(part))])
        sample_pools(pipe, judge, batch, config, [compared])
    n = compared.pools
    return dict(pools=n, choices={
        f"{decoder} decoder, {kind} judge": dict(pairs=compared.pairs[decoder, kind] / n,
                                                 flags=compared.flags[decoder, kind] / n)
        for decoder in DECODERS for kind in KINDS})


@torch.no_grad()
def large_judge() -> dict:
    """Of a CLIP-H of random weights: error of a picture's score over the spread of scores.

    `pairs`: of how many pools of four this changes best or worst, by DRAWN normal numbers.
    """
    torch.manual_seed(0)
    clip = CLIP(clip_h()).eval()
    pixels = torch.randn(PICTURES, 3, 224, 224)
    text = nn.functional.normalize(torch.randn(1, 1024), dim=-1)
    scores = {}
    for kind in tqdm(KINDS, "CLIP-H"):
        judge = in_precision(copy.deepcopy(clip), kind)
        features = torch.cat([judge.image_features(part) for part in pixels.split(2)])
        scores[kind] = (features * text).sum(-1).double()
    found = {}
    for kind in KINDS[1:]:
        error = scores[kind] - scores["fp32"]
        ratio = float((error - error.mean()).std() / scores["fp32"].std())
        true = torch.randn(DRAWN, 4)
        seen = true + ratio * torch.randn(DRAWN, 4)
        other = (true.argmax(1) != seen.argmax(1)) | (true.argmin(1) != seen.argmin(1))
        found[kind] = dict(error_over_spread=ratio, pairs=float(other.float().mean()))
    return found


def main() -> None:
    """Measure both, print, keep."""
    plain_parser(__doc__).parse_args()
    record = dict(date=time.strftime("%Y-%m-%d"), torch=torch.__version__, device="cpu",
                  tiny=tiny_model(), clip_h=large_judge())
    for name, row in record["tiny"]["choices"].items():
        print(f"{name:30} another pair {row['pairs']:6.2%}, flag turned {row['flags']:6.2%}")
    for name, row in record["clip_h"].items():
        print(f"CLIP-H {name:23} another pair {row['pairs']:6.2%}, "
              f"error {row['error_over_spread']:.5f} of the spread")
    write_json(ROOT / "benchmarks/results/precision.json", record)


if __name__ == "__main__":
    run_script(main)
