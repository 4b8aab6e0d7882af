"""What pictures are scored by. Every metric names its version and formula, since numbers without them do not compare.

    aesthetics, alignment   the tiny world's ground truth, read from the pixels (tiny/world.py)
    pickscore               exp(logit scale) x cosine of CLIP-H's picture and text features (PickScore v1; tiny: its own)

Shapes: N pictures [N, 3, H, W] in [0, 1].
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clip_spm import preprocess_pil
from diffusion import TINY, load_clip, to_pil
from weights import InputError


@dataclass
class Metric:
    """A name, what the number is, and the function (pictures, prompts) -> scores [N]."""
    name: str
    formula: str
    score: Callable[[torch.Tensor, list[str]], torch.Tensor]


def world_metric(name: str) -> Metric:
    """Ground truth of the tiny world; prompts outside it raise InputError."""
    from tiny import world
    captions = {c.text: c for c in world.all_captions()}

    def aligned(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        unknown = next((p for p in prompts if p not in captions), None)
        if unknown is not None:
            raise InputError(f"alignment: {unknown!r} is no caption of the tiny world (see tiny/model/held_out_prompts.txt)")
        return world.alignment(images, [captions[p] for p in prompts])

    if name == "alignment":
        return Metric(name, "share of pictures that show exactly what the caption says, read from pixels (0..1)", aligned)
    return Metric(name, "10 x mean(vividness, cleanliness) read from pixels (0..10)", lambda images, _: world.aesthetics(images))


def pickscore(source: str, tokenizer, device: torch.device) -> Metric:
    """PickScore from a folder or hub id, in fp32."""
    clip = load_clip(source, torch.float32, device)

    @torch.no_grad()
    def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        ids = tokenizer(prompts, padding="max_length", truncation=True,
                        max_length=clip.config.text.max_position_embeddings).input_ids
        pixels = preprocess_pil(to_pil(images), clip.config.vision.image_size).to(device)
        return clip.score(clip.image_features(pixels), clip.text_features(torch.tensor(ids, device=device))).cpu()

    return Metric("pickscore", f"exp(logit scale) x cosine, {source}", score)


def load_metric(name: str, model: str, tokenizer, device: torch.device) -> Metric:
    """A metric by name for pictures of `model`; InputError for an unknown one."""
    if name in ("aesthetics", "alignment"):
        return world_metric(name)
    if name == "pickscore":
        metric = pickscore(str(TINY / "pickscore") if model == "tiny" else "yuvalkirstain/PickScore_v1", tokenizer, device)
        metric.formula = metric.formula.replace(str(TINY.parent), "tiny")
        return metric
    raise InputError(f"unknown metric {name!r}; choose from aesthetics, alignment (tiny world), pickscore")
