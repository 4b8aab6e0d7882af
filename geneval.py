"""GenEval (Ghosh et al. 2023): does the picture show what the prompt lists?

A detector finds objects; the rules ask for objects, counts, colours and relations. 553 prompts, 4
pictures each; a picture is right or wrong; the score is the unweighted mean of six tags' accuracy.
Rules and thresholds are the original's. The detector is transformers' Mask2Former Swin-S with
Meta's COCO weights; the original runs OpenMMLab's training of the same network, so numbers are
close kin, not the same. `export` lays pictures out in the original's own folders, for its scorer.

The metadata, one object a line: tag, prompt, include [{class, count, color?, position?}], exclude
[{class, count}]; position is [relation, index in include].

Shapes: Q queries, D width of CLIP's vectors, h w a mask's side in the network, H W the picture's.
"""
import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from clip_spm import CLIP, upright
from loading import check_vocabulary, load_clip
from metrics import DETECTOR, Metric, picture_vectors, preprocess_bytes, rgb, text_vectors
from prompt_sets import CLASSES, COLOURS, MOST
from training import fingerprint, write_text
from weights import InputError, fetch, first_line

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9        # of the detector's score
SLACK = 0.1             # share of both sizes by which two objects may be off without a relation


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
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    sure = sorted((f for f in found if f.score > least), key=lambda f: -f.score)
    return {f.name: [g for g in sure if g.name == f.name][:MOST] for f in sure}


def relations(a: Found, b: Found) -> set[str]:
    """Where `a` lies, seen from `b`: left of, right of, above, below.

    Two hold at a diagonal, none when the objects nearly coincide. The distance of the centres
    counts less SLACK x both sizes, per axis; it must be over one half of the whole distance.
    """
    a, b = np.array(a.box).reshape(2, 2), np.array(b.box).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    slack = SLACK * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    beyond = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    return {name for name, holds in (("left of", dx < -0.5), ("right of", dx > 0.5),
                                     ("above", dy < -0.5), ("below", dy > 0.5)) if holds}


def judge(objects: dict[str, list[Found]], row: dict,
          colours: Callable[[str, list[Found]], list[str]]) -> bool:
    """Whether a picture's objects (of `keep`) fulfil one line of the metadata.

    `colours(class, objects)` names their colours. Of every wanted class the best `count` must be
    there, all in the wanted colour, every one in the relation to every object of the group it
    refers to (which must itself be right), and no excluded count may be reached.
    """
    groups: list[list[Found] | None] = []
    for want in row.get("include", []):
        group = objects.get(want["class"], [])[:want["count"]]
        right = len(group) == want["count"]
        if right and "color" in want:
            right = colours(want["class"], group).count(want["color"]) >= want["count"]
        if right and "position" in want:
            relation, other = want["position"]
            right = groups[other] is not None and all(
                relation in relations(a, b) for a in group for b in groups[other])
        groups.append(group if right else None)
    return None not in groups and all(
        len(objects.get(no["class"], [])) < no["count"] for no in row.get("exclude", []))


# The detector

def instances(class_logits: torch.Tensor, mask_logits: torch.Tensor, inner: tuple[int, int],
              padded: tuple[int, int], size: tuple[int, int]) -> list[Found]:
    """Mask2Former's outputs [Q, 81], [Q, h, w] -> objects that may pass THRESHOLD.

    As mmdet has it: the 100 best (query, class), score = class probability x mean mask probability
    inside the mask, masks enlarged to the network's `padded` input, cut to the picture in it
    (`inner`), enlarged to the picture (`size`: H, W), cut at 0.
    """
    probability = class_logits.softmax(-1)[:, :-1]                  # [Q, 80], the last is "nothing"
    best, index = probability.flatten().topk(min(100, probability.numel()))
    out = []
    for p, i in zip(best.tolist(), index.tolist()):
        if p <= THRESHOLD:              # the score below is no larger
            break
        query, label = divmod(i, probability.shape[1])
        mask = F.interpolate(mask_logits[None, None, query], padded, mode="bilinear")
        mask = F.interpolate(mask[..., :inner[0], :inner[1]], size, mode="bilinear")[0, 0]
        inside = mask > 0
        if inside.any():
            ys, xs = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
            box = float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
            out.append(Found(CLASSES[label], p * float(mask[inside].sigmoid().mean()), box,
                             inside.cpu().numpy()))
    return out


@torch.no_grad()
def detect(model, image: Image.Image, device: torch.device) -> list[Found]:
    """Objects of one picture: scaled into 800 x 1333, ImageNet statistics, padded to 32s."""
    scale = min(800 / min(image.size), 1333 / max(image.size))
    inner = tuple(int(side * scale + 0.5) for side in image.size[::-1])
    padded = tuple(-(-side // 32) * 32 for side in inner)
    pixels = F.interpolate(rgb(image).float().to(device), inner, mode="bilinear")
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1)
                 for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    pixels = F.pad((pixels - mean) / std, (0, padded[1] - inner[1], 0, padded[0] - inner[0]))
    out = model(pixel_values=pixels)
    return instances(out.class_queries_logits[0].float(), out.masks_queries_logits[0].float(),
                     inner, padded, image.size[::-1])


def load_detector(source: str, device: torch.device):
    """transformers' Mask2Former from a folder or hub id, 80 classes, every weight present."""
    from transformers import Mask2FormerForUniversalSegmentation
    folder = fetch(source, DETECTOR)
    try:
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: no Mask2Former in transformers' layout "
                         f"({first_line(error, 120)})") from None
    if info["missing_keys"] or model.config.num_labels != len(CLASSES):
        raise InputError(f"{folder}: lacks {len(info['missing_keys'])} weights or has not COCO's "
                         f"80 classes ({model.config.num_labels})")
    return model.to(device).eval().requires_grad_(False)


# Colours

def colour_words(clip: CLIP, tokenizer, name: str) -> torch.Tensor:
    """Unit text vectors [10, D] of COLOURS for a class: three templates, averaged, normalised."""
    check_vocabulary(tokenizer, clip.config.text.vocab_size, "the metric's CLIP")
    texts = [f"a photo of a {what}" for c in COLOURS
             for what in (f"{c} {name}", f"{c}-colored {name}", f"{c} object")]
    return F.normalize(text_vectors(clip, tokenizer, texts).unflatten(0, (-1, 3)).mean(1), dim=-1)


def name_colours(clip: CLIP, words: torch.Tensor, image: Image.Image,
                 group: list[Found]) -> list[str]:
    """The colour of each object: all but its mask painted grey, cut to its box, nearest of `words`.

    `words`: [10, D] as colour_words has them.
    """
    image = image.convert("RGB")
    grey = Image.new("RGB", image.size, "#999")
    crops = [(image if f.mask is None else Image.composite(image, grey, Image.fromarray(f.mask)))
             .crop(f.box) for f in group]
    seen = picture_vectors(clip, preprocess_bytes, crops)
    return [COLOURS[i] for i in (seen @ words.T).argmax(1).tolist()]


# The metric

def geneval(source: str, clip_source: str, rows: list[dict], tokenizer,
            device: torch.device) -> Metric:
    """GenEval as a metric: 1 where a picture is right, 0 where it is wrong."""
    model = load_detector(source, device)
    clip = load_clip(clip_source, torch.float32, device, step_aware=False)
    by_prompt = {row["prompt"]: row for row in rows}
    words = functools.cache(functools.partial(colour_words, clip, tokenizer))       # of a class

    def right(image: Image.Image, prompt: str) -> bool:
        if prompt not in by_prompt:
            raise InputError(f"geneval: {prompt!r} is not in the metadata")
        row = by_prompt[prompt]
        image = upright(image)
        return judge(keep(detect(model, image, device), row["tag"]), row,
                     lambda name, group: name_colours(clip, words(name), image, group))

    # A wrong CLIP fails here.
    name_colours(clip, words(CLASSES[0]), Image.new("RGB", (8, 8)),
                 [Found(CLASSES[0], 1, (0, 0, 8, 8))])
    return Metric(
        "geneval", f"GenEval's rules, detector {source} (not the original's weights), "
                   f"colours {clip_source}",
        lambda images, prompts: torch.tensor([float(right(i, p)) for i, p in zip(images, prompts)]),
        fingerprint(model, clip, tokenizer, rows))


def export(rows: list[dict], pictures: list[Path], folder: Path) -> None:
    """Pictures as 00000/metadata.jsonl and 00000/samples/0000.png, linked or copied.

    There are equally many of each row, in its order. An earlier export's folders go first: the
    original scorer counts whatever it finds.
    """
    for old in folder.glob("[0-9]" * 5):
        if (old / "metadata.jsonl").exists():
            shutil.rmtree(old)
    each = len(pictures) // len(rows)
    for i, path in enumerate(pictures):
        home = folder / f"{i // each:05d}"
        (home / "samples").mkdir(parents=True, exist_ok=True)
        if i % each == 0:
            write_text(home / "metadata.jsonl", json.dumps(rows[i // each]))
        target = home / "samples" / f"{i % each:04d}.png"
        if path.suffix == ".png":
            try:
                os.link(path, target)
                continue
            except OSError:             # another file system
                pass
        # A PNG keeps neither the turn nor CMYK.
        upright(Image.open(path)).convert("RGB").save(target)
