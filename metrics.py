"""What pictures are scored by. Every metric names its version and formula, for comparison.

    aesthetics, alignment   the tiny world's ground truth, read from the pixels (tiny/world.py)
    pickscore               PickScore v1: exp(logit scale) x cosine of CLIP-H's picture and text
                            features (tiny: its own)
    hpsv2, hpsv2.0          HPS v2.1 and v2.0: 100 x cosine, CLIP-H; the paper's range is v2.1's
    imagereward             ImageReward v1.0: BLIP reads the prompt while looking at the picture;
                            normalised
    aesthetic-v2            LAION-Aesthetics V2 (sac+logos+ava1): five linear layers on CLIP-L's
                            unit picture vector
    aesthetic-v1            LAION-Aesthetics V1: one linear layer on the same vector
    geneval                 share of pictures that show what the prompt lists (geneval.py)

Official weights come from the hub; `name=SOURCE[,SECOND]` takes them from elsewhere (SECOND: the
tokenizer for hpsv2 and imagereward, CLIP-L for the others). All run in fp32. Pictures are prepared
as each metric's own package does: transformers' way, torchvision's on PIL pictures, or its way on
floats. The three differ in rounding, in where transparency goes, and the last in not rounding to
bytes after resizing.

Shapes: N pictures, a list of PIL pictures; S a tower's side, L tokens, D width of its features.
"""
import html
import importlib.util
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from clip_spm import CLIP, MEAN, STD, CLIPConfig, clip_h, preprocess_pil
from loading import TINY, build, check_vocabulary, clip_file, load_clip, option, read_tokenizer
from training import fingerprint, sha256
from weights import (
    InputError,
    fetch,
    from_open_clip,
    load_strict,
    preset_of,
    read_weights,
    rename,
    take,
)

CLIP_L = "openai/clip-vit-large-patch14"
SOURCES = {         # where each metric's weights live, and what else it needs
    "aesthetics": (), "alignment": (),
    "pickscore": ("yuvalkirstain/PickScore_v1",),
    "hpsv2": ("xswu/HPSv2/HPS_v2.1_compressed.pt", ""),
    "hpsv2.0": ("xswu/HPSv2/HPS_v2_compressed.pt", ""),
    "imagereward": ("THUDM/ImageReward/ImageReward.pt", "google-bert/bert-base-uncased"),
    "aesthetic-v2": ("trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth", CLIP_L),
    "aesthetic-v1": ("", CLIP_L),
    "geneval": ("facebook/mask2former-swin-small-coco-instance", CLIP_L),
}
# How the SHA-256 of the official files begins. Others may fit as well, and mean something else.
OFFICIAL = {"hpsv2.0": "07cb0d20", "hpsv2": "c57a38fb", "aesthetic-v2": "21dd590f",
            "aesthetic-v1": "2cd4e60f"}
UNKNOWN = " (not the official file)"
OWN = str(TINY / "pickscore")
WITH_TOKENIZER = {"pickscore", "hpsv2", "hpsv2.0", "geneval"}   # of the model in question


@dataclass
class Metric:
    """A name, what the number is, (pictures, prompts) -> scores [N], fingerprint of the weights."""
    name: str
    formula: str
    score: Callable[[list[Image.Image], list[str]], torch.Tensor]
    weights: str = ""


def metric_sources(word: str, model: str = "") -> tuple[str, list[str]]:
    """`name` or `name=SOURCE[,SECOND]` -> (name, sources), defaults filled in: tiny has its own.

    Raises InputError for an unknown name or too many sources.
    """
    name, _, given = word.partition("=")
    if name not in SOURCES:
        raise InputError(f"unknown metric {name!r}; choose from {', '.join(SOURCES)}")
    given = given.split(",") if given else []
    if len(given) > len(SOURCES[name]):
        raise InputError(f"--metrics {word}: {name} takes {len(SOURCES[name]) or 'no'} "
                         f"source{'s' * (len(SOURCES[name]) != 1)}")
    sources = [*given, *SOURCES[name][len(given):]]
    if word == "pickscore" and preset_of(model).startswith("tiny"):
        sources = [OWN]
    if name == "aesthetic-v1" and not sources[0]:
        raise InputError("aesthetic-v1: its head is not on the hub; get sa_0_4_vit_l_14_linear.pth "
                         "from the GitHub repository LAION-AI/aesthetic-predictor and write "
                         "--metrics aesthetic-v1=FILE")
    return name, sources


# Finding what they name

WORDS = ["vocab.json", "merges.txt", "vocab.txt", "tokenizer*.json"]        # a tokenizer's files
DETECTOR = ["config.json", "model.safetensors", "pytorch_model.bin"]
PATTERNS = {            # what is fetched of a metric's first SOURCES; the others are CLIPs
    "hpsv2": ([], WORDS), "hpsv2.0": ([], WORDS), "imagereward": ([], WORDS),
    "aesthetic-v2": ([],), "aesthetic-v1": ([],), "geneval": (DETECTOR,)}


def find_metric(name: str, sources: list[str]) -> None:
    """Find, or fetch, what a metric is made of, before anything is loaded; else InputError."""
    if name == "geneval" and importlib.util.find_spec("scipy") is None:
        raise InputError("--metrics geneval: its detector needs scipy; pip install scipy")
    with option("metrics"):
        for source, patterns in zip_longest(sources, PATTERNS.get(name, ())):
            if patterns is None:
                clip_file(source)
            elif source:
                fetch(source, patterns)


def is_official(file: Path, name: str) -> bool:
    """Is this a metric's official file? InputError where it is that of another one."""
    begin = sha256(file)[:8]
    whose = next((n for n, official in OFFICIAL.items() if begin == official), "")
    if whose not in ("", name):
        raise InputError(f"{file}: these are the weights of another metric, "
                         f"write --metrics {whose}={file}")
    return whose == name


# What is done to a picture and to a prompt

def torchvision_size(sides: tuple[int, int], size: int) -> tuple[tuple, tuple]:
    """(target sides, offsets of the centre crop) as torchvision rounds them: the crop's to even."""
    target = tuple(size if s == min(sides) else int(size * s / min(sides)) for s in sides)
    return target, tuple(round((s - size) / 2) for s in target)


def rgb(image: Image.Image) -> torch.Tensor:
    """A picture -> uint8 [1, 3, H, W]; transparency is dropped."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """[N, 3, S, S] in [0, 1] by CLIP's statistics."""
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def preprocess_bytes(images: list[Image.Image], size: int) -> torch.Tensor:
    """PIL bicubic, centre crop, *then* RGB -> [N, 3, S, S]: OpenAI's `clip.load`, ImageReward.

    The order matters for what is not RGB: palettes are resized by nearest neighbour, transparency
    is dropped.
    """
    batch = []
    for image in images:
        target, (left, top) = torchvision_size(image.size, size)
        batch.append(rgb(image.resize(target, Image.Resampling.BICUBIC).crop(
            (left, top, left + size, top + size))))
    return normalise(torch.cat(batch).float() / 255)


def preprocess_floats(images: list[Image.Image], size: int) -> torch.Tensor:
    """RGB, to floats, anti-aliased bicubic unrounded, centre crop -> [N, 3, S, S]: HPSv2.

    The package would hand RGBA to the model as four channels; here transparency is dropped.
    """
    batch = []
    for image in images:
        (width, height), (left, top) = torchvision_size(image.size, size)
        pixels = rgb(image).float() / 255
        if image.size != (width, height):
            pixels = nn.functional.interpolate(pixels, (height, width), mode="bicubic",
                                               align_corners=False, antialias=True)
        batch.append(pixels[..., top:top + size, left:left + size])
    return normalise(torch.cat(batch))


PLAIN = str.maketrans(
    dict.fromkeys("‘’‚‛", "'") | dict.fromkeys("“”„‟", '"') | {"\u3000": " "}
    | {chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)})


def open_clip_text(text: str) -> str:
    """open_clip's text before BPE: HTML entities twice, plain quotes and full-width letters, NFC.

    It runs ftfy, of which this is the part that prompts need: no repair of wrongly decoded text
    (mojibake), no removal of control characters, no taking apart of ligatures. On 5,632 prompts of
    SPO and PartiPrompts all agree.
    """
    text = html.unescape(html.unescape(text)).translate(PLAIN)
    return " ".join(unicodedata.normalize("NFC", text).split())


@torch.no_grad()
def picture_vectors(clip: CLIP, prepare: Callable, images: list[Image.Image]) -> torch.Tensor:
    """Pictures, prepared by one of the three ways -> CLIP's unit vectors [N, D]."""
    return clip.image_features(
        prepare(images, clip.config.vision.image_size).to(clip.logit_scale.device))


@torch.no_grad()
def text_vectors(clip: CLIP, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Prompts -> CLIP's unit vectors [N, D]."""
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                    max_length=clip.config.text.max_position_embeddings).input_ids
    return clip.text_features(ids.to(clip.logit_scale.device))


# The metrics

def world_metric(name: str) -> Metric:
    """Ground truth of the tiny world; prompts outside it raise InputError."""
    from tiny import world
    captions = {c.text: c for c in world.all_captions()}

    def pixels(images: list[Image.Image]) -> list[torch.Tensor]:
        """In order, neighbours of one size together: [N, 3, S, S] in [0, 1] each."""
        out = []
        for (width, height), group in groupby(images, lambda image: image.size):
            if width != height:
                raise InputError(f"{name}: a picture of {width} x {height}; the tiny world's are "
                                 "square")
            out.append(torch.cat([rgb(image) for image in group]) / 255)
        return out

    def aligned(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        unknown = [p for p in prompts if p not in captions]
        if unknown:
            raise InputError(f"alignment: {unknown[0]!r} is no caption of the tiny world "
                             "(see tiny/model/held_out_prompts.txt)")
        wanted = iter([captions[p] for p in prompts])
        return torch.cat([world.alignment(part, [next(wanted) for _ in part])
                          for part in pixels(images)])

    if name == "alignment":
        return Metric(name, "share of pictures that show exactly what the caption says, "
                            "read from pixels (0..1)", aligned)
    return Metric(name, "10 x mean(vividness, cleanliness) read from pixels (0..10)",
                  lambda images, _: torch.cat([world.aesthetics(p) for p in pixels(images)]))


def pickscore(source: str, tokenizer, device: torch.device) -> Metric:
    """PickScore from a folder or hub id; prompts are tokenized as they are, as in its own code."""
    clip = load_clip(source, torch.float32, device, step_aware=False)
    check_vocabulary(tokenizer, clip.config.text.vocab_size, "the metric's CLIP")

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return clip.score(picture_vectors(clip, preprocess_pil, images),
                          text_vectors(clip, tokenizer, prompts)).cpu()

    what, place = (("the tiny model's PickScore", "tiny/model/pickscore") if source == OWN else
                   ("PickScore v1", source))
    return Metric("pickscore", f"{what}: exp(logit scale) x cosine, {place}", score,
                  fingerprint(clip, tokenizer))


def hpsv2(name: str, source: str, tokenizer, device: torch.device,
          config: CLIPConfig | None = None) -> Metric:
    """HPSv2 from a weight file in open_clip's layout, prompts as in open_clip_text.

    `config` is CLIP-H's unless given. InputError for the other version's official file: both load,
    and their numbers do not compare.
    """
    file = fetch(source, [])
    clip = build(CLIP, config or clip_h(), file)
    load_strict(clip, from_open_clip(read_weights(file)), file, torch.float32, device)
    told = "" if is_official(file, name) else UNKNOWN
    check_vocabulary(tokenizer, clip.config.text.vocab_size, "the metric's CLIP")

    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        read = text_vectors(clip, tokenizer, [open_clip_text(p) for p in prompts])
        return 100 * (picture_vectors(clip, preprocess_floats, images) * read).sum(-1).cpu()

    return Metric(name, f"HPS {'v2.0' if name == 'hpsv2.0' else 'v2.1'}: 100 x cosine, "
                        f"{source}{told}", score, fingerprint(clip, tokenizer))


def head() -> nn.Sequential:
    """D -> 1024 -> 128 -> 64 -> 16 -> 1 of ImageReward and Aesthetic V2, linear throughout.

    The dropout only counts the indices of the original's layers.
    """
    drop = nn.Dropout(0)
    return nn.Sequential(nn.Linear(768, 1024), drop, nn.Linear(1024, 128), drop,
                         nn.Linear(128, 64), drop, nn.Linear(64, 16), nn.Linear(16, 1))


def aesthetic(name: str, source: str, clip_source: str, device: torch.device) -> Metric:
    """LAION's aesthetic score: head file `source` on CLIP-L's picture vector, normalised first.

    LAION has published other heads of the same shape. InputError for those with ReLUs.
    """
    clip = load_clip(clip_source, torch.float32, device, step_aware=False)
    file = fetch(source, [])
    weights = read_weights(file)
    if {"9.weight", "layers.9.weight"} & weights.keys():
        raise InputError(f"{file}: a head with ReLUs, as ava+logos-l14-reluMSE.pth; V2's has none, "
                         "sac+logos+ava1-l14-linearMSE.pth")
    what, judge = (("V1, linear", nn.Linear(768, 1)) if name == "aesthetic-v1" else
                   ("V2, sac+logos+ava1 MLP", head()))
    load_strict(judge, take(weights, "layers.") or weights, file, torch.float32, device)
    if not is_official(file, name):
        what = f"{what[:2]}'s shape of head, {file.name}{UNKNOWN},"

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return judge(picture_vectors(clip, preprocess_bytes, images))[:, 0].cpu()

    return Metric(name, f"LAION-Aesthetics {what} on the unit vector of {clip_source}, {source}",
                  score, fingerprint(clip, judge))


REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072       # of ImageReward


def blip_vision_name(key: str) -> str:
    """A parameter of transformers' BlipVisionModel as the original BLIP (timm's ViT) calls it."""
    for ours, theirs in (
            ("embeddings.class_embedding", "cls_token"), ("encoder.layers.", "blocks."),
            ("embeddings.position_embedding", "pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("layer_norm", "norm"), ("self_attn.projection", "attn.proj"), ("self_attn.", "attn."),
            ("post_norm", "norm"), ("post_layernorm", "norm")):
        key = key.replace(ours, theirs)
    return key


def depth(weights: dict[str, torch.Tensor], stem: str) -> int:
    """The number of layers `stem`0.*, `stem`1.*, ...; ValueError if there are none."""
    return 1 + max(int(k.removeprefix(stem).split(".")[0]) for k in weights if k.startswith(stem))


def blip(eye: dict[str, torch.Tensor], bert: dict[str, torch.Tensor]) -> list[nn.Module]:
    """[ViT, BERT that attends to it] of the weights' shapes, heads 64 wide; not loaded yet.

    Raises KeyError, IndexError or ValueError where the weights are not BLIP's.
    """
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    width, _, _, patch = eye["patch_embed.proj.weight"].shape
    vocabulary, text_width = bert["embeddings.word_embeddings.weight"].shape
    return [
        BlipVisionModel(BlipVisionConfig(
            hidden_size=width, intermediate_size=eye["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=depth(eye, "blocks."), num_attention_heads=width // 64,
            image_size=patch * math.isqrt(eye["pos_embed"].shape[1] - 1), patch_size=patch,
            hidden_act="gelu", layer_norm_eps=1e-6)),
        BlipTextModel(BlipTextConfig(
            vocab_size=vocabulary, hidden_size=text_width, encoder_hidden_size=width,
            intermediate_size=bert["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=depth(bert, "encoder.layer."), num_attention_heads=text_width // 64,
            max_position_embeddings=bert["embeddings.position_embeddings.weight"].shape[0],
            layer_norm_eps=1e-12, bos_token_id=None, eos_token_id=None, sep_token_id=None),
            add_pooling_layer=False)]


def imagereward(source: str, tokenizer_source: str, device: torch.device) -> Metric:
    """ImageReward from its own file: BLIP ViT-L/16, a BERT that attends to it, a head on token 0.

    The file's unused contrastive projections are left aside.
    """
    from transformers import BertTokenizer
    file = fetch(source, [])
    weights = read_weights(file)
    eye, bert = take(weights, "blip.visual_encoder."), take(weights, "blip.text_encoder.")
    bert.pop("embeddings.position_ids", None)
    try:
        vision, text = blip(eye, bert)
    except (KeyError, IndexError, ValueError):
        raise InputError(f"{file}: not ImageReward's own file "
                         "(blip.visual_encoder.*, blip.text_encoder.*, mlp.*)") from None
    judge = head()
    for network, part in ((vision, rename(vision, eye, blip_vision_name)), (text, bert),
                          (judge, take(weights, "mlp.layers."))):
        load_strict(network, part, file, torch.float32).to(device)
    tokenizer = read_tokenizer(BertTokenizer, fetch(tokenizer_source, WORDS))
    check_vocabulary(tokenizer, text.config.vocab_size, "ImageReward's BERT")

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Rewards [N]: BERT reads the prompt while it attends to what the ViT has seen."""
        pixels = preprocess_bytes(images, vision.config.image_size).to(device)
        seen = vision(pixel_values=pixels).last_hidden_state                        # [N, L, D]
        words = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                          max_length=35).to(device)
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=device)
        read = text(input_ids=words.input_ids, attention_mask=words.attention_mask,
                    encoder_hidden_states=seen, encoder_attention_mask=everywhere, is_decoder=False)
        return ((judge(read.last_hidden_state[:, 0])[:, 0] - REWARD_MEAN) / REWARD_STD).cpu()

    return Metric("imagereward",
                  f"ImageReward v1.0: (MLP - {REWARD_MEAN:.4f}) / {REWARD_STD:.4f}, {source}",
                  score, fingerprint(vision, text, judge, tokenizer))


def load_metric(word: str, model: str, tokenizer, device: torch.device) -> Metric:
    """A metric by name (or name=SOURCE); `tokenizer`: the first of `model`, which drew."""
    name, sources = metric_sources(word, model)
    if name in ("aesthetics", "alignment"):
        return world_metric(name)
    if name == "pickscore":
        return pickscore(sources[0], tokenizer, device)
    if name.startswith("aesthetic-"):
        return aesthetic(name, *sources, device)
    if name != "imagereward" and sources[1]:
        from transformers import CLIPTokenizer
        tokenizer = read_tokenizer(CLIPTokenizer, fetch(sources[1], WORDS))
    return (imagereward(*sources, device) if name == "imagereward" else
            hpsv2(name, sources[0], tokenizer, device))
