"""What pictures are scored by. Every metric names its version and formula, since numbers without them do not compare.

    aesthetics, alignment   the tiny world's ground truth, read from the pixels (tiny/world.py)
    pickscore               PickScore v1: exp(logit scale) x cosine of CLIP-H's picture and text features (tiny: its own)
    hpsv2, hpsv2.0          HPS v2.1 and v2.0: 100 x cosine, CLIP-H; the paper's range fits v2.1 only
    imagereward             ImageReward v1.0: BLIP reads the prompt while looking at the picture; normalised
    aesthetic-v2            LAION-Aesthetics V2 (sac+logos+ava1): five linear layers on CLIP-L's unit picture vector
    aesthetic-v1            LAION-Aesthetics V1: one linear layer on the same vector
    geneval                 share of pictures that show what the prompt lists (geneval.py)

Official weights come from the hub; `name=SOURCE[,SECOND]` takes them from elsewhere (SECOND: the tokenizer for hpsv2 and
imagereward, CLIP-L for the others). All run in fp32. Each prepares its pictures as its own package does: transformers'
way, torchvision's on PIL pictures, or torchvision's on floats; they differ in rounding, in where transparency goes, and HPSv2 in
not rounding to bytes after resizing.

Shapes: N pictures, a list of PIL pictures; S side of a tower's input, D width of its features.
"""
import hashlib
import html
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from clip_spm import CLIP, MEAN, STD, CLIPConfig, clip_h, preprocess_pil
from loading import TINY, load_clip
from weights import InputError, fetch, from_open_clip, load_strict, preset_of, read_weights, take

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
HPS_FILES = {"hpsv2.0": "07cb0d20", "hpsv2": "c57a38fb"}                # how the SHA-256 of the official weights begins
WITH_TOKENIZER = {"pickscore", "hpsv2", "hpsv2.0", "geneval"}         # CLIP's, that of the model in question


@dataclass
class Metric:
    """A name, what the number is, the function (pictures, prompts) -> scores [N], and a fingerprint of its weights."""
    name: str
    formula: str
    score: Callable[[list[Image.Image], list[str]], torch.Tensor]
    weights: str = ""


def metric_sources(word: str) -> tuple[str, list[str]]:
    """`name` or `name=SOURCE[,SECOND]` -> (name, sources), defaults filled in; InputError for an unknown name."""
    name, _, given = word.partition("=")
    if name not in SOURCES:
        raise InputError(f"unknown metric {name!r}; choose from {', '.join(SOURCES)}")
    given = given.split(",") if given else []
    if len(given) > len(SOURCES[name]):
        raise InputError(f"--metrics {word}: {name} takes {len(SOURCES[name]) or 'no'} source{'s' * (len(SOURCES[name]) != 1)}")
    sources = given + list(SOURCES[name][len(given):])
    if name == "aesthetic-v1" and not sources[0]:
        raise InputError("aesthetic-v1: its head is not on the hub; get sa_0_4_vit_l_14_linear.pth from the GitHub repository "
                         "LAION-AI/aesthetic-predictor and write --metrics aesthetic-v1=FILE")
    return name, sources


def fingerprint(*modules: nn.Module) -> str:
    """A few hexadecimal digits that change when weights do; pictures and scores kept from an earlier run are trusted by it.

    The bits are summed as integers: exact, so the same on every device and with any number of threads.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [int(v.view(kinds[v.element_size()]).sum(dtype=torch.int64)) for m in modules for v in m.state_dict().values()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:12]


def torchvision_size(image_size: tuple[int, int], size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(target sides, offsets of the centre crop) as torchvision rounds them; its crop goes to the *even* neighbour."""
    target = tuple(size if side == min(image_size) else int(size * side / min(image_size)) for side in image_size)
    return target, tuple(round((side - size) / 2) for side in target)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """[N, 3, S, S] in [0, 1] by CLIP's statistics."""
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def preprocess_bytes(images: list[Image.Image], size: int) -> torch.Tensor:
    """OpenAI's `clip.load` (Aesthetic), open_clip and ImageReward: PIL bicubic, centre crop, *then* RGB -> [N, 3, S, S].

    The order matters for what is not RGB: palettes are resized by nearest neighbour, transparency is dropped.
    """
    batch = []
    for image in images:
        target, (left, top) = torchvision_size(image.size, size)
        image = image.resize(target, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)).convert("RGB")
        batch.append(torch.from_numpy(np.asarray(image).copy()))
    return normalise(torch.stack(batch).permute(0, 3, 1, 2).float() / 255)


def preprocess_floats(images: list[Image.Image], size: int) -> torch.Tensor:
    """HPSv2: RGB, to floats, anti-aliased bicubic without rounding or clamping, centre crop -> [N, 3, S, S].

    The package would hand RGBA to the model as four channels; here transparency is dropped.
    """
    batch = []
    for image in images:
        (width, height), (left, top) = torchvision_size(image.size, size)
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None].float() / 255
        if image.size != (width, height):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
        batch.append(pixels[..., top:top + size, left:left + size])
    return normalise(torch.cat(batch))


QUOTES = str.maketrans({"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "\u3000": " "}
                       | {chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)})


def open_clip_text(text: str) -> str:
    """What open_clip's tokenizer does before BPE: HTML entities twice, plain quotes and full-width letters, NFC.

    It runs ftfy, of which this is the part that prompts need: no repair of wrongly decoded text (mojibake), no removal of control
    characters, no taking apart of ligatures. On 5,632 prompts of SPO and PartiPrompts all agree.
    """
    return " ".join(unicodedata.normalize("NFC", html.unescape(html.unescape(text)).translate(QUOTES)).split())


def text_ids(tokenizer, clip: CLIP, prompts: list[str]) -> torch.Tensor:
    """Prompts -> ids [N, L]; InputError where the tokenizer is another model's."""
    if len(tokenizer) != clip.config.text.vocab_size:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the metric's CLIP {clip.config.text.vocab_size}: "
                         "they belong to different models")
    return torch.tensor(tokenizer(prompts, padding="max_length", truncation=True,
                                  max_length=clip.config.text.max_position_embeddings).input_ids)


def world_metric(name: str) -> Metric:
    """Ground truth of the tiny world; prompts outside it raise InputError."""
    from tiny import world
    captions = {c.text: c for c in world.all_captions()}

    def pixels(image: Image.Image) -> torch.Tensor:
        if image.width != image.height:
            raise InputError(f"{name}: a picture of {image.width} x {image.height}; the tiny world's are square")
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None] / 255

    def aligned(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        unknown = next((p for p in prompts if p not in captions), None)
        if unknown is not None:
            raise InputError(f"alignment: {unknown!r} is no caption of the tiny world (see tiny/model/held_out_prompts.txt)")
        return torch.cat([world.alignment(pixels(i), [captions[p]]) for i, p in zip(images, prompts)])

    if name == "alignment":
        return Metric(name, "share of pictures that show exactly what the caption says, read from pixels (0..1)", aligned)
    return Metric(name, "10 x mean(vividness, cleanliness) read from pixels (0..10)",
                  lambda images, _: torch.cat([world.aesthetics(pixels(i)) for i in images]))


def pickscore(source: str, tokenizer, device: torch.device) -> Metric:
    """PickScore from a folder or hub id; prompts go to the tokenizer as they are, as in its own code."""
    clip = load_clip(source, torch.float32, device)

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pixels = preprocess_pil(images, clip.config.vision.image_size).to(device)
        return clip.score(clip.image_features(pixels), clip.text_features(text_ids(tokenizer, clip, prompts).to(device))).cpu()

    return Metric("pickscore", f"PickScore v1: exp(logit scale) x cosine, {source}", score, fingerprint(clip))


def hpsv2(name: str, source: str, tokenizer, device: torch.device, config: CLIPConfig | None = None) -> Metric:
    """HPSv2 from a weight file in open_clip's layout, prompts as in open_clip_text; `config` is CLIP-H's unless given.

    InputError for the other version's official file: both load, and their numbers do not compare.
    """
    file, other = fetch(source, []), "hpsv2" if name == "hpsv2.0" else "hpsv2.0"
    with open(file, "rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest().startswith(HPS_FILES[other]):
            raise InputError(f"{source}: these are the weights of the other version, write --metrics {other}={source}")
    with torch.device("meta"):
        clip = CLIP(config or clip_h())
    load_strict(clip, from_open_clip(read_weights(file)), file, torch.float32, device)

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        ids = text_ids(tokenizer, clip, [open_clip_text(p) for p in prompts])
        pixels = preprocess_floats(images, clip.config.vision.image_size)
        return 100 * (clip.image_features(pixels.to(device)) * clip.text_features(ids.to(device))).sum(-1).cpu()

    return Metric(name, f"HPS {'v2.0' if name == 'hpsv2.0' else 'v2.1'}: 100 x cosine, {source}", score, fingerprint(clip))


def head() -> nn.Sequential:
    """D -> 1024 -> 128 -> 64 -> 16 -> 1 of ImageReward and Aesthetic V2: linear throughout, dropout only counts the indices."""
    drop = nn.Dropout(0)
    return nn.Sequential(nn.Linear(768, 1024), drop, nn.Linear(1024, 128), drop, nn.Linear(128, 64), drop, nn.Linear(64, 16),
                         nn.Linear(16, 1))


def aesthetic(name: str, source: str, clip_source: str, device: torch.device) -> Metric:
    """LAION's aesthetic score: head file `source` on the unit picture vector of CLIP-L (which must be normalised first)."""
    clip, file = load_clip(clip_source, torch.float32, device), fetch(source, [])
    weights = read_weights(file)
    judge = nn.Linear(768, 1) if name == "aesthetic-v1" else head()
    load_strict(judge, weights if name == "aesthetic-v1" else take(weights, "layers.") or weights, file, torch.float32, device)

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return judge(clip.image_features(preprocess_bytes(images, clip.config.vision.image_size).to(device)))[:, 0].cpu()

    what = "V1, linear" if name == "aesthetic-v1" else "V2, sac+logos+ava1 MLP"
    return Metric(name, f"LAION-Aesthetics {what} on the unit vector of {clip_source}, {source}", score, fingerprint(clip, judge))


REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072       # of ImageReward's training data
REWARD_TOKENS = 35


def blip_vision_name(key: str) -> str:
    """A parameter of transformers' BlipVisionModel as the original BLIP (timm's ViT) calls it."""
    for ours, theirs in (("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
                         ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers.", "blocks."), ("layer_norm", "norm"),
                         ("self_attn.projection", "attn.proj"), ("self_attn.", "attn."), ("post_norm", "norm"), ("post_layernorm", "norm")):
        key = key.replace(ours, theirs)
    return key


def imagereward(source: str, tokenizer_source: str, device: torch.device) -> Metric:
    """ImageReward from its own file: BLIP ViT-L/16 and a BERT that attends to it, head on the first token, normalised.

    The shapes are read off the file (heads are 64 wide). Its unused contrastive projections are left aside.
    """
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    file = fetch(source, [])
    weights = read_weights(file)
    eye, bert = take(weights, "blip.visual_encoder."), take(weights, "blip.text_encoder.")
    bert.pop("embeddings.position_ids", None)
    try:
        width, patch = eye["patch_embed.proj.weight"].shape[0], eye["patch_embed.proj.weight"].shape[-1]
        size = patch * math.isqrt(eye["pos_embed"].shape[1] - 1)
        depth = lambda part, stem: 1 + max(int(k.split(".")[stem]) for k in part if k.startswith(("blocks.", "encoder.layer.")))  # noqa: E731
        vision = BlipVisionModel(BlipVisionConfig(
            hidden_size=width, intermediate_size=eye["blocks.0.mlp.fc1.weight"].shape[0], num_hidden_layers=depth(eye, 1),
            num_attention_heads=width // 64, image_size=size, patch_size=patch, hidden_act="gelu", layer_norm_eps=1e-6))
        vocabulary, text_width = bert["embeddings.word_embeddings.weight"].shape
        text = BlipTextModel(BlipTextConfig(
            vocab_size=vocabulary, hidden_size=text_width, encoder_hidden_size=width, num_hidden_layers=depth(bert, 2),
            num_attention_heads=text_width // 64, intermediate_size=bert["encoder.layer.0.intermediate.dense.weight"].shape[0],
            max_position_embeddings=bert["embeddings.position_embeddings.weight"].shape[0], layer_norm_eps=1e-12,
            bos_token_id=None, eos_token_id=None, sep_token_id=None), add_pooling_layer=False)
    except (KeyError, IndexError, ValueError):
        raise InputError(f"{file}: not ImageReward's own file (blip.visual_encoder.*, blip.text_encoder.*, mlp.*)") from None
    judge = head()
    names = {blip_vision_name(k): k for k in vision.state_dict()}
    load_strict(vision, {names.get(k, k): v for k, v in eye.items()}, file, torch.float32)
    load_strict(text, bert, file, torch.float32)
    load_strict(judge, take(weights, "mlp.layers."), file, torch.float32)
    vision, text, judge = vision.to(device), text.to(device), judge.to(device)
    tokenizer = BertTokenizer.from_pretrained(fetch(tokenizer_source, ["vocab.txt", "tokenizer*.json"]))

    @torch.no_grad()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        seen = vision(pixel_values=preprocess_bytes(images, size).to(device)).last_hidden_state             # [N, L, D]
        words = tokenizer(prompts, padding="max_length", truncation=True, max_length=REWARD_TOKENS, return_tensors="pt").to(device)
        read = text(input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen,
                    encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device), is_decoder=False)
        return ((judge(read.last_hidden_state[:, 0])[:, 0] - REWARD_MEAN) / REWARD_STD).cpu()

    return Metric("imagereward", f"ImageReward v1.0: (MLP - {REWARD_MEAN:.4f}) / {REWARD_STD:.4f}, {source}", score,
                  fingerprint(vision, text, judge))


def load_metric(word: str, model: str, tokenizer, device: torch.device) -> Metric:
    """A metric by name (or name=SOURCE) for pictures of `model`, whose first tokenizer CLIP-H shares."""
    name, sources = metric_sources(word)
    metric = _load_metric(word, name, sources, model, tokenizer, device)
    if name in ("hpsv2", "hpsv2.0", "imagereward"):         # the tokenizer is part of what scores
        metric.weights += " " + sources[1]
    return metric


def _load_metric(word: str, name: str, sources: list[str], model: str, tokenizer, device: torch.device) -> Metric:
    if name in ("aesthetics", "alignment"):
        return world_metric(name)
    if name == "pickscore":
        own = preset_of(model) == "tiny" and "=" not in word
        metric = pickscore(str(TINY / "pickscore") if own else sources[0], tokenizer, device)
        if own:
            metric.formula = metric.formula.replace("PickScore v1", "the tiny model's PickScore").replace(str(TINY.parent), "tiny")
        return metric
    if name.startswith("hpsv2"):
        if sources[1]:
            from transformers import CLIPTokenizer
            tokenizer = CLIPTokenizer.from_pretrained(fetch(sources[1], ["vocab.json", "merges.txt", "tokenizer*.json"]))
        return hpsv2(name, sources[0], tokenizer, device)
    return imagereward(*sources, device) if name == "imagereward" else aesthetic(name, *sources, device)
