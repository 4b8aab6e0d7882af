"""metrics.py: every scorer against its reference on random weights in the original layout, and what each does to a picture."""
import copy
import hashlib
import json
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import metrics
from clip_spm import MEAN, STD, CLIPConfig, TowerConfig, preprocess_pil
from conftest import FACTS, assert_close, randomize, seeded
from loading import TINY, first_tokenizer
from helpers import TEXT
from metrics import head, load_metric, metric_sources, open_clip_text, preprocess_bytes, preprocess_floats
from weights import InputError, load_strict, read_weights, take

CPU = torch.device("cpu")
HEADS = FACTS.parent / "data/aesthetic"
TOKENIZER = FACTS.parent / "official/stable-diffusion-v1-5"
PROMPTS = FACTS.parent / "data/prompts"
TEXTS = ["a red circle", "two blue squares", "a green cross above a yellow triangle"]


def picture(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise in any mode of PIL."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


PICTURES = [picture("RGB", 40, 50, 1), picture("RGB", 31, 28, 2), picture("RGB", 33, 33, 3)]


# What is done to a picture

MODES = pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
SIZES = pytest.mark.parametrize("size", [(28, 28), (31, 28), (28, 59), (90, 67), (67, 90), (5, 3), (1, 1), (300, 20)])


def torchvision_steps(image: Image.Image, size: int) -> Image.Image:
    """Resize(size, BICUBIC) and CenterCrop(size) on a PIL picture, by torchvision's documentation."""
    w, h = image.size
    image = image.resize((size, int(size * h / w)) if w <= h else (int(size * w / h), size), Image.BICUBIC)
    top, left = int(round((image.height - size) / 2.0)), int(round((image.width - size) / 2.0))
    return image.crop((left, top, left + size, top + size))


def normalised(array) -> torch.Tensor:
    """HWC in [0, 1] -> [1, 3, H, W] by CLIP's statistics."""
    return torch.from_numpy(((np.asarray(array, dtype=np.float64) - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32))


@MODES
@SIZES
def test_bytes_equal_torchvision_on_pil(mode, size):
    image = picture(mode, *size)
    want = normalised(np.asarray(torchvision_steps(image, 28).convert("RGB")) / 255)
    assert_close(preprocess_bytes([image], 28), want, 1e-6)


@MODES
@SIZES
def test_floats_equal_pils_float_bicubic(mode, size):
    """PIL resizes mode F without rounding: the same kernel, another implementation (torch's kernel weights are fp32)."""
    image = picture(mode, *size).convert("RGB")
    want = [np.asarray(torchvision_steps(Image.fromarray(np.asarray(image)[..., c].astype(np.float32) / 255, "F"), 28)) for c in range(3)]
    assert_close(preprocess_floats([picture(mode, *size)], 28), normalised(np.stack(want, -1)), 1e-4)


def test_the_three_ways_differ_where_they_should():
    """In the crop's rounding, in transparency, and in rounding to bytes."""
    odd = picture("RGB", 31, 28)                # three columns too many: transformers cuts one on the left, torchvision two
    assert torch.equal(preprocess_bytes([odd], 28)[..., :-1], preprocess_pil([odd], 28)[..., 1:])
    clear = picture("RGBA", 28, 28)
    assert_close(preprocess_bytes([clear], 28), preprocess_bytes([clear.convert("RGB")], 28))
    assert (preprocess_pil([clear], 28) - preprocess_bytes([clear], 28)).abs().max() > 0.5
    shrunk = picture("RGB", 60, 60).point(lambda v: 64 + v // 2)
    gap = (preprocess_bytes([shrunk], 28) - preprocess_floats([shrunk], 28)).abs()
    assert 1e-4 < gap.max() < 0.02              # two roundings to bytes, over the standard deviation
    edges = Image.fromarray(np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((2, 2))).astype(np.uint8) * 255).convert("RGB")
    assert preprocess_floats([edges], 28).max() > preprocess_bytes([edges], 28).max() + 0.01        # overshoot is not clamped


@pytest.mark.parametrize("prepare", [preprocess_pil, preprocess_bytes, preprocess_floats])
def test_exif_rotation_is_not_applied(prepare, tmp_path):
    """None of the packages turns pictures."""
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURES[0].save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").getexif()[0x0112] == 6
    assert torch.equal(prepare([Image.open(tmp_path / "turned.png")], 28), prepare([PICTURES[0]], 28))


# CLIP-based scorers

@pytest.fixture(scope="module")
def tokenizer():
    """The tiny model's: 579 tokens, 16 at most."""
    return first_tokenizer("tiny")


def test_pickscore_equals_transformers(pickscore, tokenizer):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    model = CLIPModel.from_pretrained(pickscore)
    pixels = torch.cat([CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})(p, return_tensors="pt").pixel_values
                        for p in PICTURES])
    ids = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        want = model(input_ids=ids, pixel_values=pixels).logits_per_image.diag()
    metric = load_metric(f"pickscore={pickscore}", "sd15", tokenizer, CPU)
    assert_close(metric.score(PICTURES, TEXTS), want, 1e-5)
    assert want.std() > 0.1 and "PickScore v1: exp(logit scale) x cosine" in metric.formula


@pytest.fixture(scope="module")
def open_clip():
    """open_clip, whose transforms (unused here) import torchvision."""
    names = [n for n in ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms", "torchvision.transforms.functional")
             if n not in sys.modules]
    sys.modules.update({n: MagicMock(__spec__=None) for n in names})
    try:
        return pytest.importorskip("open_clip")
    finally:
        for n in names:
            del sys.modules[n]


HPS = CLIPConfig(TowerConfig(32, 128, 2, 2, "gelu", vocab_size=579, max_position_embeddings=16),
                 TowerConfig(64, 256, 3, 4, "gelu", image_size=28, patch_size=7), 24)


@pytest.fixture
def hps(open_clip, tmp_path):
    """(a random model of open_clip's, its file as the official ones are: fp16-less pickle with `state_dict`)."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    model = randomize(CLIP(embed_dim=24, vision_cfg=CLIPVisionCfg(layers=3, width=64, head_width=16, patch_size=7, image_size=28),
                           text_cfg=CLIPTextCfg(context_length=16, vocab_size=579, width=32, heads=2, layers=2)), 3).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "hps.pt")
    return model, tmp_path / "hps.pt"


def test_hpsv2_equals_open_clip(hps, tokenizer):
    model, file = hps
    with torch.no_grad():
        image = model.encode_image(preprocess_floats(PICTURES, 28), normalize=True)
        text = model.encode_text(tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt").input_ids, normalize=True)
    metric = metrics.hpsv2("hpsv2", str(file), tokenizer, CPU, HPS)
    assert_close(metric.score(PICTURES, TEXTS), 100 * (image * text).sum(-1), 1e-5)
    assert "v2.1" in metric.formula and "v2.0" in metrics.hpsv2("hpsv2.0", str(file), tokenizer, CPU, HPS).formula


def test_hpsv2_of_the_other_version_is_refused(hps, tokenizer, monkeypatch):
    monkeypatch.setitem(metrics.OFFICIAL, "hpsv2.0", hashlib.sha256(hps[1].read_bytes()).hexdigest()[:8])
    assert metrics.hpsv2("hpsv2.0", str(hps[1]), tokenizer, CPU, HPS).name == "hpsv2.0"
    with pytest.raises(InputError, match="weights of another metric, write --metrics hpsv2.0="):
        metrics.hpsv2("hpsv2", str(hps[1]), tokenizer, CPU, HPS)


def test_hpsv2_loads_strictly(hps, tokenizer, tmp_path):
    weights = hps[0].state_dict()
    del weights["visual.transformer.resblocks.1.attn.in_proj_weight"]
    torch.save(weights, tmp_path / "less.pt")
    with pytest.raises(InputError, match="3 missing .*self_attn"):
        metrics.hpsv2("hpsv2", str(tmp_path / "less.pt"), tokenizer, CPU, HPS)
    with pytest.raises(InputError, match="does not fit CLIP|wrong shape"):
        load_metric(f"hpsv2={hps[1]}", "tiny", tokenizer, CPU)      # not CLIP-H


@pytest.mark.skipif(not TOKENIZER.exists(), reason="needs the official tokenizer")
def test_prompts_reach_clip_as_open_clip_has_them(open_clip):
    official, theirs = first_tokenizer(str(TOKENIZER)), open_clip.get_tokenizer("ViT-H-14")
    texts = ["a “red” ‘circle’", "fish &amp; chips", "fish &amp;amp; chips", "  A\n lot   of SPACE ", "ｆｕｌｌ　ｗｉｄｔｈ，！", "cafe\u0301", "naïve façade", "x " * 200]
    for name, read in (("spo_4k_training_prompts.json", lambda t: [r["caption"] for r in json.loads(t)]),
                       ("PartiPrompts.tsv", lambda t: [line.split("\t")[0] for line in t.split("\n")[1:] if line])):
        texts += read((PROMPTS / name).read_text(encoding="utf-8")) if (PROMPTS / name).exists() else []
    ours = official([open_clip_text(t) for t in texts], padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    want = theirs(texts)
    want = torch.where(want == 0, torch.tensor(49407), want)            # open_clip pads with 0, which is "!" as well
    ours = torch.where(ours == 0, torch.tensor(49407), ours)
    assert [t for t, a, b in zip(texts, ours, want) if not torch.equal(a, b)] == []


def test_a_foreign_tokenizer_is_refused(pickscore):
    if not TOKENIZER.exists():
        pytest.skip("needs the official tokenizer")
    with pytest.raises(InputError, match="49408 tokens, the metric's CLIP 579"):
        load_metric(f"pickscore={pickscore}", "sd15", first_tokenizer(str(TOKENIZER)), CPU).score(PICTURES, TEXTS)


# Aesthetic

@pytest.fixture(scope="module")
def clip_l(tmp_path_factory):
    """A random CLIP whose features are 768 wide, as transformers saves it; quick_gelu as OpenAI's."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    text = CLIPTextConfig(hidden_size=12, intermediate_size=24, num_hidden_layers=1, hidden_act="quick_gelu", projection_dim=768, **TEXT)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu",
                              image_size=28, patch_size=7, projection_dim=768)
    folder = tmp_path_factory.mktemp("clip")
    randomize(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768)), 9).save_pretrained(folder)
    return folder


def unit_features(folder) -> torch.Tensor:
    """The pictures' unit vectors, by transformers."""
    from transformers import CLIPModel
    with torch.no_grad():
        return F.normalize(CLIPModel.from_pretrained(folder).get_image_features(pixel_values=preprocess_bytes(PICTURES, 28)).pooler_output, dim=-1)


@pytest.mark.parametrize("prefix", ["layers.", ""])
def test_aesthetic_v2_by_hand(clip_l, prefix, tmp_path):
    weights = {prefix + k: v for k, v in randomize(head(), 4).state_dict().items()}
    save_file(weights, tmp_path / "head.safetensors")
    x = unit_features(clip_l)
    for i in (0, 2, 4, 6, 7):
        x = x @ weights[f"{prefix}{i}.weight"].T + weights[f"{prefix}{i}.bias"]
    metric = load_metric(f"aesthetic-v2={tmp_path / 'head.safetensors'},{clip_l}", "sd15", None, CPU)
    assert_close(metric.score(PICTURES, TEXTS), x[:, 0], 1e-5)
    assert "V2" in metric.formula and x.std() > 1e-3


def test_aesthetic_v1_by_hand(clip_l, tmp_path):
    weights = dict(weight=torch.randn(1, 768, generator=seeded(1)), bias=torch.tensor([3.5]))
    torch.save(weights, tmp_path / "v1.pth")
    metric = load_metric(f"aesthetic-v1={tmp_path / 'v1.pth'},{clip_l}", "sd15", None, CPU)
    assert_close(metric.score(PICTURES, TEXTS), unit_features(clip_l) @ weights["weight"][0] + 3.5, 1e-5)


def test_only_the_official_head_is_called_so(clip_l, tmp_path, monkeypatch):
    """ava+logos' linear head has the same shape; its file is named instead. Heads with ReLUs are refused by name."""
    file = tmp_path / "ava+logos-l14-linearMSE.pth"
    torch.save({f"layers.{k}": v for k, v in head().state_dict().items()}, file)
    load = lambda: load_metric(f"aesthetic-v2={file},{clip_l}", "sd15", None, CPU)  # noqa: E731
    assert "sac+logos" not in load().formula and "V2's shape of head, ava+logos-l14-linearMSE.pth (not the official file)" in load().formula
    monkeypatch.setitem(metrics.OFFICIAL, "aesthetic-v2", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    assert "LAION-Aesthetics V2, sac+logos+ava1 MLP on" in load().formula
    places = {0: (1024, 768), 3: (128, 1024), 6: (64, 128), 9: (16, 64), 11: (1, 16)}
    torch.save({f"layers.{i}.{k}": torch.zeros(s) for i, (o, n) in places.items() for k, s in (("weight", (o, n)), ("bias", (o,)))}, file)
    with pytest.raises(InputError, match="a head with ReLUs, as ava.logos-l14-reluMSE.pth"):
        load()


@pytest.mark.skipif(not HEADS.exists(), reason="needs LAION's head files")
def test_real_aesthetic_heads(clip_l):
    """Norm and bias of what the official heads amount to, and the scorers on them."""
    v2, v1 = HEADS / "sac+logos+ava1-l14-linearMSE.pth", HEADS / "sa_0_4_vit_l_14_linear.pth"
    judge = load_strict(head(), take(read_weights(v2), "layers."), v2)
    with torch.no_grad():
        bias = judge(torch.zeros(1, 768))
        rows = (judge(torch.eye(768)) - bias)[:, 0]
    assert float(bias) == pytest.approx(5.23665, abs=1e-5) and float(rows.norm()) == pytest.approx(17.9956, abs=1e-4)
    linear = read_weights(v1)
    assert float(linear["bias"]) == pytest.approx(3.52937, abs=1e-5) and float(linear["weight"].norm()) == pytest.approx(28.444, abs=1e-3)
    x = unit_features(clip_l)
    for name, file, want in (("aesthetic-v2", v2, x @ rows + bias[0]), ("aesthetic-v1", v1, x @ linear["weight"][0] + linear["bias"])):
        metric = load_metric(f"{name}={file},{clip_l}", "sd15", None, CPU)
        assert_close(metric.score(PICTURES, TEXTS), want, 1e-5)
        assert metric.formula.startswith(f"LAION-Aesthetics V{name[-1]}, ")


# ImageReward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "square", "##s", "green", "cross"]
EYE, READER, LAYERS = 128, 768, 2


def reward_weights() -> dict[str, torch.Tensor]:
    """ImageReward.pt's names at reduced width: pictures of 48, patches of 16, with the parts that go unused."""
    block, out = {"norm1": EYE, "norm2": EYE}, {}
    shapes = {"cls_token": (1, 1, EYE), "pos_embed": (1, 10, EYE), "patch_embed.proj.weight": (EYE, 3, 16, 16), "patch_embed.proj.bias": (EYE,),
              "norm.weight": (EYE,), "norm.bias": (EYE,)}
    for i in range(LAYERS):
        for name, width in block.items():
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
        for name, (o, n) in {"attn.qkv": (3 * EYE, EYE), "attn.proj": (EYE, EYE), "mlp.fc1": (96, EYE), "mlp.fc2": (EYE, 96)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": (o, n), f"blocks.{i}.{name}.bias": (o,)}
    out |= {f"blip.visual_encoder.{k}": v for k, v in shapes.items()}
    shapes = {"embeddings.word_embeddings.weight": (len(WORDS), READER), "embeddings.position_embeddings.weight": (40, READER),
              "embeddings.LayerNorm.weight": (READER,), "embeddings.LayerNorm.bias": (READER,)}
    for i in range(LAYERS):
        stem = f"encoder.layer.{i}."
        for part, n in (("attention", READER), ("crossattention", EYE)):
            linear = {"self.query": (READER, READER), "self.key": (READER, n), "self.value": (READER, n), "output.dense": (READER, READER)}
            for name, shape in linear.items():
                shapes |= {f"{stem}{part}.{name}.weight": shape, f"{stem}{part}.{name}.bias": shape[:1]}
            shapes |= {f"{stem}{part}.output.LayerNorm.{w}": (READER,) for w in ("weight", "bias")}
        shapes |= {f"{stem}intermediate.dense.weight": (64, READER), f"{stem}intermediate.dense.bias": (64,),
                   f"{stem}output.dense.weight": (READER, 64), f"{stem}output.dense.bias": (READER,),
                   f"{stem}output.LayerNorm.weight": (READER,), f"{stem}output.LayerNorm.bias": (READER,)}
    out |= {f"blip.text_encoder.{k}": v for k, v in shapes.items()}
    for name, (o, n) in {"blip.vision_proj": (256, EYE), "blip.text_proj": (256, READER), "mlp.layers.0": (1024, READER),
                         "mlp.layers.2": (128, 1024), "mlp.layers.4": (64, 128), "mlp.layers.6": (16, 64), "mlp.layers.7": (1, 16)}.items():
        out |= {f"{name}.weight": (o, n), f"{name}.bias": (o,)}
    random = seeded(6)
    weights = {k: torch.randn(shape, generator=random) / (shape[-1] ** 0.5 if len(shape) > 1 and "embed" not in k else 2) for k, shape in out.items()}
    for k in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):        # so small that the norm's epsilon is felt
        weights[f"blip.visual_encoder.{k}"] *= 0.01
    weights["mlp.layers.7.weight"] *= 30
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return weights


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Plain attention of one sample, [L, D], heads of 64."""
    out = []
    for h in range(0, q.shape[1], 64):
        logits = q[:, h:h + 64] @ k[:, h:h + 64].T / 8
        out.append((logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1) @ v[:, h:h + 64])
    return torch.cat(out, 1)


def blip_by_hand(weights: dict[str, torch.Tensor], pixels: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """ImageReward of one picture [3, 48, 48] and one unpadded prompt, in plain torch, fp64."""
    w = {k: v.double() for k, v in weights.items()}
    lin = lambda name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    norm = lambda name, x, eps: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)  # noqa: E731
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    patches = pixels.double().unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(9, -1)
    x = patches @ w[v + "patch_embed.proj.weight"].flatten(1).T + w[v + "patch_embed.proj.bias"]
    x = torch.cat([w[v + "cls_token"][0], x]) + w[v + "pos_embed"][0]
    for i in range(LAYERS):
        b = f"{v}blocks.{i}."
        x = x + lin(b + "attn.proj", attend(*lin(b + "attn.qkv", norm(b + "norm1", x, 1e-6)).chunk(3, -1)))
        x = x + lin(b + "mlp.fc2", F.gelu(lin(b + "mlp.fc1", norm(b + "norm2", x, 1e-6))))
    seen = norm(v + "norm", x, 1e-6)
    y = w[t + "embeddings.word_embeddings.weight"][ids] + w[t + "embeddings.position_embeddings.weight"][:len(ids)]
    y = norm(t + "embeddings.LayerNorm", y, 1e-12)
    for i in range(LAYERS):
        b = f"{t}encoder.layer.{i}."
        for part, other in (("attention", None), ("crossattention", seen)):
            o = y if other is None else other
            mixed = attend(lin(f"{b}{part}.self.query", y), lin(f"{b}{part}.self.key", o), lin(f"{b}{part}.self.value", o))
            y = norm(f"{b}{part}.output.LayerNorm", y + lin(f"{b}{part}.output.dense", mixed), 1e-12)
        y = norm(b + "output.LayerNorm", y + lin(b + "output.dense", F.gelu(lin(b + "intermediate.dense", y))), 1e-12)
    z = y[0]
    for i in (0, 2, 4, 6, 7):
        z = lin(f"mlp.layers.{i}", z)
    return (z[0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def reward(tmp_path):
    """(weights, metric) of a random ImageReward."""
    weights = reward_weights()
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return weights, load_metric(f"imagereward={tmp_path / 'ImageReward.pt'},{tmp_path}", "sd15", None, CPU)


def test_imagereward_by_hand(reward):
    weights, metric = reward
    texts, ids = ["a red circle", "Two blue squares", "green " * 50], [[2, 5, 6, 7, 3], [2, 8, 9, 10, 11, 3], [2] + [12] * 33 + [3]]
    want = torch.stack([blip_by_hand(weights, p, i) for p, i in zip(preprocess_bytes(PICTURES, 48), ids)])
    assert_close(metric.score(PICTURES, texts), want.float(), 1e-5)
    assert want.std() > 0.01 and "v1.0" in metric.formula


def test_imagereward_depends_on_all_it_should(reward):
    _, metric = reward
    base = metric.score(PICTURES[:1], ["a red circle"])
    assert abs(metric.score(PICTURES[1:2], ["a red circle"]) - base) > 1e-3 and abs(metric.score(PICTURES[:1], ["a blue circle"]) - base) > 1e-4


@pytest.mark.parametrize("gone", ["blip.visual_encoder.blocks.1.attn.proj.bias", "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
                                  "mlp.layers.6.bias", "blip.visual_encoder.cls_token"])
def test_imagereward_loads_strictly(gone, tmp_path):
    weights = reward_weights()
    del weights[gone]
    torch.save(weights, tmp_path / "IR.pt")
    with pytest.raises(InputError, match="1 missing"):
        load_metric(f"imagereward={tmp_path / 'IR.pt'},{tmp_path}", "sd15", None, CPU)


def test_other_files_are_refused_as_imagereward(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="not ImageReward's own file"):
        load_metric(f"imagereward={tmp_path / 'a.pt'}", "sd15", None, CPU)


@pytest.mark.parametrize("words, says", [
    (None, "knows no words, only"), (WORDS[:5], "knows no words, only 5 special tokens"), ([*WORDS, "more"], "15 tokens, ImageReward's BERT 14"),
    ([*WORDS[:5], "a"], "6 tokens, ImageReward's BERT 14")])
def test_imagereward_wants_its_own_words(reward, tmp_path, words, says):
    """An empty folder's tokenizer would read every word as [UNK]."""
    (tmp_path / "bert").mkdir()
    if words:
        (tmp_path / "bert/vocab.txt").write_text("\n".join(words))
    with pytest.raises(InputError, match=says):
        load_metric(f"imagereward={tmp_path / 'ImageReward.pt'},{tmp_path / 'bert'}", "sd15", None, CPU)


def test_broken_tokenizers_are_one_line(reward, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/vocab.txt").write_bytes(b"\xff\xfe\0")
    (tmp_path / "bad/tokenizer.json").write_text("{")
    for word in (f"imagereward={tmp_path / 'ImageReward.pt'},{tmp_path / 'bad'}", f"hpsv2={tmp_path / 'ImageReward.pt'},{tmp_path / 'bad'}"):
        with pytest.raises(InputError, match="bad: broken tokenizer") as caught:
            load_metric(word, "sd15", None, CPU)
        assert "\n" not in str(caught.value)


# Words of the command line

def test_metric_words():
    assert metric_sources("hpsv2") == ("hpsv2", ["xswu/HPSv2/HPS_v2.1_compressed.pt", ""])
    assert metric_sources("hpsv2.0")[1][0].endswith("HPS_v2_compressed.pt")
    assert metric_sources("aesthetic-v2=F")[1] == ["F", "openai/clip-vit-large-patch14"]
    for word, says in (("beauty", "unknown metric 'beauty'"), ("alignment=x", "takes no sources"), ("aesthetic-v1", "aesthetic-v1=FILE"),
                       ("pickscore=a,b", "takes 1 source")):
        with pytest.raises(InputError, match=says):
            metric_sources(word)


def test_fingerprint_changes_with_the_weights(pickscore, tokenizer):
    one, again = (load_metric(f"pickscore={pickscore}", "sd15", tokenizer, CPU).weights for _ in "ab")
    assert one == again != load_metric("pickscore", "tiny", tokenizer, CPU).weights and TINY.exists()


def test_fingerprint_feels_the_last_bit():
    linear = torch.nn.Linear(300, 300)
    before = metrics.fingerprint(linear)
    with torch.no_grad():
        linear.weight[7, 7] = torch.nextafter(linear.weight[7, 7], torch.tensor(9.0))
    assert metrics.fingerprint(linear) != before


def test_the_tokenizer_belongs_to_a_metrics_identity(reward, tmp_path):
    """By its words, not by where they lie."""
    (tmp_path / "other").mkdir()
    for words, same in ((WORDS, True), ([*WORDS[:5], *WORDS[:4:-1]], False)):
        (tmp_path / "other/vocab.txt").write_text("\n".join(words))
        other = load_metric(f"imagereward={tmp_path / 'ImageReward.pt'},{tmp_path / 'other'}", "sd15", None, CPU)
        assert (other.weights == reward[1].weights) == same


def turned(tokenizer):
    """The same tokens, two words' ids exchanged."""
    changed = copy.deepcopy(tokenizer)
    state = json.loads(changed.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    one, two = sorted(k for k in vocabulary if not k.startswith("<|"))[:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    changed._tokenizer = type(changed.backend_tokenizer).from_str(json.dumps(state))
    return changed


def test_the_models_tokenizer_belongs_to_it_too(pickscore, hps, tokenizer):
    for metric in (lambda t: load_metric(f"pickscore={pickscore}", "sd15", t, CPU), lambda t: metrics.hpsv2("hpsv2", str(hps[1]), t, CPU, HPS)):
        assert metric(tokenizer).weights == metric(copy.deepcopy(tokenizer)).weights != metric(turned(tokenizer)).weights
