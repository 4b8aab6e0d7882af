"""GenEval: does the picture show what the prompt lists? Objects, counts, colours and relations, by a detector (Ghosh et al. 2023).

553 prompts, 4 pictures each; a picture is right or wrong; the score is the unweighted mean of six tags' accuracies.
Rules and thresholds are the original's. The detector is transformers' Mask2Former Swin-S with Meta's COCO weights; the
original runs OpenMMLab's training of the same network, so numbers are close kin, not the same. `export` lays pictures
out in the original's own folders, for its own scorer.

The metadata, one object a line: tag, prompt, include [{class, count, color?, position? [relation, index]}], exclude [{class, count}].

Shapes: Q queries, h w a mask's side inside the network, H W the picture's.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from clip_spm import CLIP
from loading import load_clip
from metrics import Metric, fingerprint, preprocess_bytes, text_ids
from training import write_atomic
from weights import InputError, fetch

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO's 80 classes in the detector's order. Three names are GenEval's own, so classes are matched by place, never by name.
CLASSES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush""".replace("\n", " ").split(", ")
THRESHOLD, COUNTING_THRESHOLD, MOST = 0.3, 0.9, 16      # of the detector's score; objects of one class at most
SLACK = 0.1                                             # share of both sizes by which two objects may be off without a relation


@dataclass
class Found:
    """One detected object."""
    name: str
    score: float
    box: tuple[float, float, float, float]              # left, top, right, bottom in pixels, y down
    mask: np.ndarray | None = None                      # [H, W] bool


# The rules: pure functions on detections

def keep(found: list[Found], tag: str) -> dict[str, list[Found]]:
    """Class -> its objects above the tag's threshold, best first."""
    least, out = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD, {}
    for f in sorted(found, key=lambda f: -f.score):
        if f.score > least and len(out.setdefault(f.name, [])) < MOST:
            out[f.name].append(f)
    return out


def relations(a: Found, b: Found) -> set[str]:
    """Where `a` lies, seen from `b`: left of, right of, above, below; two at a diagonal, none when they nearly coincide.

    The distance of the centres counts less SLACK x both sizes, per axis, as a share of the whole distance; over one half.
    """
    a, b = np.array(a.box).reshape(2, 2), np.array(b.box).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    left = np.maximum(np.abs(offset) - SLACK * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])), 0) * np.sign(offset)
    if (np.abs(left) < 1e-3).all():
        return set()
    dx, dy = left / np.linalg.norm(offset)
    return {name for name, holds in (("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5)) if holds}


def judge(objects: dict[str, list[Found]], row: dict, colours: Callable[[str, list[Found]], list[str]]) -> bool:
    """Whether the objects of a picture fulfil one line of the metadata; `colours(class, objects)` names their colours.

    Of every wanted class the best `count` must be there, all in the wanted colour, every one in the relation to every
    object of the group it refers to (which must itself be right), and no excluded count may be reached.
    """
    groups: list[list[Found] | None] = []
    for want in row.get("include", []):
        group = objects.get(want["class"], [])[:want["count"]]
        right = len(group) == want["count"]
        if right and "color" in want:
            right = colours(want["class"], group).count(want["color"]) >= want["count"]
        if right and "position" in want:
            relation, other = want["position"]
            right = groups[other] is not None and all(relation in relations(a, b) for a in group for b in groups[other])
        groups.append(group if right else None)
    return None not in groups and all(len(objects.get(no["class"], [])) < no["count"] for no in row.get("exclude", []))


# The detector

def instances(class_logits: torch.Tensor, mask_logits: torch.Tensor, inner: tuple[int, int], padded: tuple[int, int],
              size: tuple[int, int]) -> list[Found]:
    """Mask2Former's outputs [Q, 81], [Q, h, w] -> objects whose score may pass THRESHOLD, in a picture of `size` (H, W).

    As mmdet has it: the 100 best (query, class), score = class probability x mean mask probability inside the mask,
    masks enlarged to the network's `padded` input, cut to the picture in it (`inner`), enlarged to the picture, cut at 0.
    """
    probability = class_logits.softmax(-1)[:, :-1]                                      # [Q, 80], the last is "nothing"
    best, index = probability.flatten().topk(min(100, probability.numel()))
    out = []
    for p, i in zip(best.tolist(), index.tolist()):
        if p <= THRESHOLD:              # the product below is no larger
            break
        query, label = divmod(i, probability.shape[1])
        mask = F.interpolate(mask_logits[None, None, query], padded, mode="bilinear", align_corners=False)
        mask = F.interpolate(mask[..., :inner[0], :inner[1]], size, mode="bilinear", align_corners=False)[0, 0]
        inside = mask > 0
        if inside.any():
            ys, xs = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
            box = float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
            out.append(Found(CLASSES[label], p * float(mask[inside].sigmoid().mean()), box, inside.cpu().numpy()))
    return out


@torch.no_grad()
def detect(model, image: Image.Image, device: torch.device, short: int = 800, long: int = 1333) -> list[Found]:
    """Objects of one picture: scaled into 800 x 1333, ImageNet statistics, padded to a multiple of 32."""
    scale = min(short / min(image.size), long / max(image.size))
    inner = tuple(int(side * scale + 0.5) for side in image.size[::-1])
    padded = tuple(-(-side // 32) * 32 for side in inner)
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None].float().to(device)
    pixels = F.interpolate(pixels, inner, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    pixels = F.pad((pixels - mean) / std, (0, padded[1] - inner[1], 0, padded[0] - inner[0]))
    out = model(pixel_values=pixels)
    return instances(out.class_queries_logits[0].float(), out.masks_queries_logits[0].float(), inner, padded, image.size[::-1])


def load_detector(source: str, device: torch.device):
    """transformers' Mask2Former from a folder or hub id, 80 classes, every weight present."""
    from transformers import Mask2FormerForUniversalSegmentation
    folder = fetch(source, ["config.json", "model.safetensors", "pytorch_model.bin"])
    try:
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: no Mask2Former in transformers' layout ({str(error).splitlines()[0][:120]})") from None
    if info["missing_keys"] or model.config.num_labels != len(CLASSES):
        raise InputError(f"{folder}: lacks {len(info['missing_keys'])} weights or has not COCO's 80 classes ({model.config.num_labels})")
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def colour_words(clip: CLIP, tokenizer, name: str) -> torch.Tensor:
    """Unit text vectors [10, P] of COLOURS for a class: three templates, averaged, normalised again."""
    device = clip.logit_scale.device
    texts = [text for c in COLOURS for text in (f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object")]
    return F.normalize(clip.text_features(text_ids(tokenizer, clip, texts).to(device)).unflatten(0, (-1, 3)).mean(1), dim=-1)


@torch.no_grad()
def name_colours(clip: CLIP, words: torch.Tensor, image: Image.Image, group: list[Found]) -> list[str]:
    """The colour of each object: all but its mask painted grey, cut to its box, nearest of `words` [10, P]."""
    image = image.convert("RGB")
    grey = Image.new("RGB", image.size, "#999")
    crops = [(Image.composite(image, grey, Image.fromarray(f.mask)) if f.mask is not None else image).crop(f.box) for f in group]
    seen = clip.image_features(preprocess_bytes(crops, clip.config.vision.image_size).to(words.device))
    return [COLOURS[i] for i in (seen @ words.T).argmax(1).tolist()]


def geneval(source: str, clip_source: str, rows: list[dict], tokenizer, device: torch.device) -> Metric:
    """GenEval as a metric: 1 where a picture is right, 0 where it is wrong."""
    model, clip = load_detector(source, device), load_clip(clip_source, torch.float32, device)
    by_prompt, words = {row["prompt"]: row for row in rows}, {CLASSES[0]: colour_words(clip, tokenizer, CLASSES[0])}
    name_colours(clip, words[CLASSES[0]], Image.new("RGB", (8, 8)), [Found(CLASSES[0], 1, (0, 0, 8, 8))])     # a wrong CLIP fails here

    def right(image: Image.Image, prompt: str) -> bool:
        """Does the picture fulfil what the metadata asks of its prompt?"""
        if prompt not in by_prompt:
            raise InputError(f"geneval: {prompt!r} is not in the metadata")
        row, image = by_prompt[prompt], ImageOps.exif_transpose(image)

        def colours(name: str, group: list[Found]) -> list[str]:
            if name not in words:
                words[name] = colour_words(clip, tokenizer, name)
            return name_colours(clip, words[name], image, group)
        return judge(keep(detect(model, image, device), row["tag"]), row, colours)

    return Metric("geneval", f"GenEval's rules, detector {source} (not the original's weights), colours {clip_source}",
                  lambda images, prompts: torch.tensor([float(right(i, p)) for i, p in zip(images, prompts)]),
                  f"{fingerprint(model, clip)} {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]}")


def export(rows: list[dict], pictures: list[Path], folder: Path) -> None:
    """Pictures (equally many of each row, in its order) as 00000/metadata.jsonl and 00000/samples/0000.png, linked or copied.

    An earlier export's folders go first: the original scorer counts whatever it finds.
    """
    for old in folder.glob("[0-9]" * 5):
        if (old / "metadata.jsonl").exists():
            shutil.rmtree(old)
    each = len(pictures) // len(rows)
    for i, path in enumerate(pictures):
        home = folder / f"{i // each:05d}"
        (home / "samples").mkdir(parents=True, exist_ok=True)
        if i % each == 0:
            write_atomic(home / "metadata.jsonl", lambda p: p.write_text(json.dumps(rows[i // each])))
        target = home / "samples" / f"{i % each:04d}.png"
        if path.suffix == ".png":
            try:
                os.link(path, target)
                continue
            except OSError:             # another file system
                pass
        ImageOps.exif_transpose(Image.open(path)).convert("RGB").save(target)       # a PNG keeps neither the turn nor CMYK
