"""clip_spm.py against transformers' CLIP; the step-aware parts against a re-computation from raw weights."""
import json

import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_spm import (CLIP, MEAN, STD, CLIPConfig, TowerConfig, clip_h, clip_l, make_step_aware, preference_loss,
                      preprocess_decoded, preprocess_pil, timestep_embedding)
from conftest import FACTS, assert_close, assert_same_gradients, count, randomize, seeded, shapes

PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
ACTS = pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
END = 59                                                    # the largest id, as in the real vocabulary
IDS = torch.tensor([[58, 5, 7, 9, END, END, END, END, END], [58, 0, 3, END, 0, 0, 0, 0, 0], [58, 4, 2, 1, 6, 8, 3, 2, END]])


def text_config(act: str, **changes) -> dict:
    """A small text tower's `config.json`."""
    return dict(hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, hidden_act=act, vocab_size=60,
                max_position_embeddings=9, projection_dim=10, eos_token_id=2, bos_token_id=0, pad_token_id=1) | changes


def clip_config(act: str = "gelu") -> dict:
    """A small whole CLIP's `config.json`."""
    vision = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3, hidden_act=act,
                  image_size=28, patch_size=7)
    return dict(text_config=text_config(act), vision_config=vision, projection_dim=10)


def pixels(n: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random normalised pixels."""
    return torch.randn(n, 3, 28, 28, generator=seeded(1)).to(dtype)


def make_pair(act: str = "gelu", dtype: torch.dtype = torch.float32) -> tuple[CLIP, CLIPModel]:
    """Ours and transformers' whole CLIP, with the same random weights."""
    theirs = randomize(CLIPModel(transformers.CLIPConfig(**clip_config(act)))).to(dtype)
    ours = CLIP(CLIPConfig.from_json(theirs.config.to_dict())).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@PRECISIONS
@ACTS
def test_text_tower_equals_transformers(act, dtype, tolerance):
    theirs = randomize(CLIPTextModel(transformers.CLIPTextConfig(**text_config(act)))).to(dtype)
    ours = CLIP(CLIPConfig.from_json(text_config(act) | {"architectures": ["CLIPTextModel"]})).to(dtype)
    ours.load_state_dict({f"text_model.{k}": v for k, v in theirs.state_dict().items()}, strict=True)
    expected = theirs(IDS, output_hidden_states=True)
    penultimate, last, pooled = ours.text_model(IDS)
    assert_close(penultimate, expected.hidden_states[-2], tolerance, "hidden_states[-2]")
    assert_close(last, expected.last_hidden_state, tolerance, "last_hidden_state")
    assert_close(pooled, expected.pooler_output, tolerance, "pooled")
    for out in ((penultimate, last, pooled), (expected.hidden_states[-2], expected.last_hidden_state, expected.pooler_output)):
        g = seeded(2)
        sum((o * torch.randn(o.shape, generator=g).to(dtype)).sum() for o in out).backward()
    assert_same_gradients(ours, theirs, tolerance, rename=lambda k: k.removeprefix("text_model."))


@ACTS
@pytest.mark.parametrize("eos", [2, END])       # old configs say 2 and mean "the largest id"
def test_text_encoder_with_projection_equals_transformers(act, eos):
    config = text_config(act, eos_token_id=eos)
    theirs = randomize(CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)))
    ours = CLIP(CLIPConfig.from_json(config | {"architectures": ["CLIPTextModelWithProjection"]}))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = theirs(IDS, output_hidden_states=True)
    penultimate, _, pooled = ours.text_model(IDS)
    assert_close(penultimate, expected.hidden_states[-2])
    assert_close(ours.text_projection(pooled), expected.text_embeds)


def test_text_is_causal_and_short_prompts_need_no_padding():
    ours, _ = make_pair()
    assert_close(ours.text_model(IDS[1:2, :4])[2], ours.text_model(IDS[1:2])[2])


@PRECISIONS
@ACTS
def test_vision_tower_equals_transformers(act, dtype, tolerance):
    ours, theirs = make_pair(act, dtype)
    x, y = pixels(dtype=dtype).requires_grad_(), pixels(dtype=dtype).requires_grad_()
    out, expected = ours.vision_model(x), theirs.vision_model(y).pooler_output
    assert_close(out, expected, tolerance)
    weight = torch.randn(out.shape, generator=seeded(2)).to(dtype)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close(x.grad, y.grad, tolerance, "gradient of the pixels")
    assert_same_gradients(ours, theirs, tolerance)


@ACTS
def test_scores_equal_transformers(act):
    ours, theirs = make_pair(act)
    expected = theirs(input_ids=IDS, pixel_values=pixels())
    image, text = ours.image_features(pixels()), ours.text_features(IDS)
    assert_close(image, expected.image_embeds)
    assert_close(text, expected.text_embeds)
    scores = ours.score(image, text)
    assert_close(scores, expected.logits_per_image.diagonal())
    scores.square().sum().backward()
    expected.logits_per_image.diagonal().square().sum().backward()
    assert_same_gradients(ours, theirs)
    assert float(ours.logit_scale.grad.abs()) > 1e-3


def test_strict_loading_into_transformers():
    ours = randomize(CLIP(CLIPConfig.from_json(clip_config())), seed=3)
    theirs = CLIPModel(transformers.CLIPConfig(**clip_config()))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_close(ours.image_features(pixels()), theirs(input_ids=IDS, pixel_values=pixels()).image_embeds)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act"):
        TowerConfig.from_json(text_config("relu"))


SD15_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408,
                 max_position_embeddings=77, projection_dim=768, architectures=["CLIPTextModel"])
BIG_G_TEXT = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, vocab_size=49408,
                  max_position_embeddings=77, projection_dim=1280, hidden_act="gelu", architectures=["CLIPTextModelWithProjection"])


@pytest.mark.parametrize("config, expected, keys", [
    (CLIPConfig.from_json(SD15_TEXT), (196, 123_060_480), "te15"), (CLIPConfig.from_json(BIG_G_TEXT), (517, 694_659_840), "texl2"),
    (clip_l(), (590, 427_616_513), None), (clip_h(), (910, 986_109_441), "clip_h"), (clip_h(step_aware=True), (980, 1_306_176_001), None),
], ids=["clip-l-text", "bigg-text", "clip-l", "clip-h", "spm"])
def test_official_names_and_shapes(config, expected, keys):
    with torch.device("meta"):
        ours = CLIP(config)
    assert count(ours) == expected
    if keys is None:
        return
    if not (FACTS / "keys.json").exists():
        pytest.skip("no key lists here; the counts were checked")
    listed = json.loads((FACTS / "clip_h_keys.json").read_text()) if keys == "clip_h" else \
        json.loads((FACTS / "keys.json").read_text())[keys]
    listed = {k if keys == "clip_h" or k.startswith("text_") else f"text_model.{k}": v for k, v in listed}
    assert shapes(ours) == listed


def test_official_spm_names():
    with torch.device("meta"):
        plain, spm = shapes(CLIP(clip_h())), shapes(CLIP(clip_h(step_aware=True)))
    new = {f"t_embedder.mlp.{i}.{p}": s for i, w in ((0, 256), (2, 1280)) for p, s in (("weight", [1280, w]), ("bias", [1280]))}
    for place, parts in [("", 2)] + [(f"encoder.layers.{i}.", 6) for i in range(32)]:
        new[f"vision_model.{place}adaLN_modulation.1.weight"] = [parts * 1280, 1280]
        new[f"vision_model.{place}adaLN_modulation.1.bias"] = [parts * 1280]
    assert spm == plain | new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fresh_spm_scores_bit_for_bit_as_clip(dtype):
    clip = make_pair()[0].to(dtype)
    spm = make_step_aware(clip)
    assert spm.config.step_aware and not clip.config.step_aware and spm.logit_scale.dtype == dtype
    expected = clip.score(clip.image_features(pixels()), clip.text_features(IDS))
    for t in (0, 1, 51, 500, 951, 999):
        assert torch.equal(spm.score(spm.image_features(pixels(), torch.full((3,), t)), spm.text_features(IDS)), expected)


@torch.no_grad()
def test_spm_depends_on_the_timestep_once_adaln_has_moved():
    clip = make_pair()[0]
    for part in ("encoder.layers.0.adaLN_modulation", "encoder.layers.1.adaLN_modulation", "adaLN_modulation"):
        spm = make_step_aware(clip)
        weight = spm.vision_model.get_submodule(part)[1].weight
        weight.copy_(5 * torch.randn(weight.shape, generator=seeded(4)))        # the rest of the model is random, too
        early, late = (spm.image_features(pixels(), torch.full((3,), t)) for t in (951, 1))
        assert (early - late).abs().max() > 1e-2
        assert (early - clip.image_features(pixels())).abs().max() > 1e-2


def test_fresh_spm_learns_to_use_the_timestep():
    spm = make_step_aware(make_pair()[0])
    spm.image_features(pixels(), torch.tensor([951, 501, 1]))[:, 0].sum().backward()
    for module in (spm.vision_model, *spm.vision_model.encoder.layers):
        assert module.adaLN_modulation[1].weight.grad.abs().max() > 1e-6


def test_timestep_is_required_or_ignored():
    clip = make_pair()[0]
    assert torch.equal(clip.image_features(pixels(), torch.tensor([1, 2, 3])), clip.image_features(pixels()))
    with pytest.raises(ValueError, match="timestep"):
        make_step_aware(clip).image_features(pixels())


def test_samples_of_a_batch_do_not_mix():
    spm = randomize(CLIP(CLIPConfig.from_json(clip_config(), step_aware=True)))
    t = torch.tensor([951, 501, 1])
    together = spm.image_features(pixels(), t)
    for i in range(3):
        assert_close(together[i:i + 1], spm.image_features(pixels()[i:i + 1], t[i:i + 1]))


def spm_by_hand(w: dict[str, torch.Tensor], x: torch.Tensor, t: list[int]) -> torch.Tensor:
    """Projected features of the step-aware vision tower from raw weights, written after the official code's description."""
    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def silu(value):
        return value / (1 + (-value).exp())

    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    out = []
    for picture, ti in zip(x, t, strict=True):
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([(ti * frequencies).cos(), (ti * frequencies).sin()]))))
        patches = [(picture[:, 7 * r:7 * r + 7, 7 * s:7 * s + 7] * w["vision_model.embeddings.patch_embedding.weight"]).sum((1, 2, 3))
                   for r in range(4) for s in range(4)]
        h = torch.stack([w["vision_model.embeddings.class_embedding"], *patches]) + w["vision_model.embeddings.position_embedding.weight"]
        h = norm("vision_model.pre_layrnorm", h)
        for i in range(2):
            p = f"vision_model.encoder.layers.{i}"
            m = linear(f"{p}.adaLN_modulation.1", silu(c))
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (m[24 * j:24 * j + 24] for j in range(6))
            y = norm(f"{p}.layer_norm1", h) * (1 + scale_msa) + shift_msa
            q, k, v = (linear(f"{p}.self_attn.{n}_proj", y) for n in "qkv")
            heads = [((q[:, s] @ k[:, s].T) / 8 ** 0.5).softmax(-1) @ v[:, s] for s in (slice(0, 8), slice(8, 16), slice(16, 24))]
            h = h + gate_msa * linear(f"{p}.self_attn.out_proj", torch.cat(heads, -1))
            y = linear(f"{p}.mlp.fc1", norm(f"{p}.layer_norm2", h) * (1 + scale_mlp) + shift_mlp)
            h = h + gate_mlp * linear(f"{p}.mlp.fc2", y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)))
        m = linear("vision_model.adaLN_modulation.1", silu(c))
        out.append((norm("vision_model.post_layernorm", h[0]) * (1 + m[24:]) + m[:24]) @ w["visual_projection.weight"].T)
    return torch.stack(out)


def test_adaln_equals_a_computation_by_hand():
    spm = randomize(CLIP(CLIPConfig.from_json(clip_config(), step_aware=True)))
    t = [951, 301, 1]
    expected = spm_by_hand({k: v.double() for k, v in spm.state_dict().items()}, pixels().double(), t)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    assert_close(spm.image_features(pixels(), torch.tensor(t)).double(), expected)


def test_timestep_embedding_by_hand():
    t = torch.tensor([0, 1, 500, 999])
    frequency = 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = t.double()[:, None] * frequency
    assert_close(timestep_embedding(t, 256).double(), torch.cat([angle.cos(), angle.sin()], 1), 1e-4)   # fp32 angles up to 999


def noise_picture(mode: str, width: int, height: int) -> Image.Image:
    """A random picture of a PIL mode, opaque in part only where the mode can say so."""
    values = torch.randint(0, 256, (height, width, 4), generator=seeded(width), dtype=torch.uint8).numpy()
    if mode == "P-transparent":
        picture = Image.fromarray(values[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE)
        picture.info["transparency"] = 0
        return picture
    return Image.fromarray(values).convert(mode) if mode in ("RGBA", "LA") else Image.fromarray(values[..., :3]).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "P-transparent", "L", "LA", "1", "CMYK"])
@pytest.mark.parametrize("size", [(28, 28), (61, 97), (200, 33), (5, 3), (1, 1), (28, 45), (45, 28)])
def test_preprocess_pil_equals_transformers(mode, size):
    picture = noise_picture(mode, *size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    nothing = processor(Image.new("RGBA", (28, 28), (0, 0, 0, 0)), return_tensors="pt").pixel_values
    if picture.has_transparency_data and float(nothing.max()) < 0:
        pytest.skip("this version of transformers drops transparency, later ones lay it over white")
    assert_close(preprocess_pil([picture], 28), processor(picture, return_tensors="pt").pixel_values)


def test_preprocess_pil_stacks_pictures_of_different_sizes():
    pictures = [noise_picture("RGB", 40, 50), noise_picture("L", 30, 29)]
    batch = preprocess_pil(pictures, 28)
    assert batch.shape == (2, 3, 28, 28) and batch.dtype == torch.float32
    assert torch.equal(batch[1:], preprocess_pil(pictures[1:], 28))


def cubic_matrix(inner: int, outer: int) -> torch.Tensor:
    """Bicubic resampling (Keys, a = -0.75, edges repeated, no anti-aliasing) as a matrix [outer, inner]."""
    def kernel(d):
        d = abs(d)
        return 1.25 * d ** 3 - 2.25 * d ** 2 + 1 if d <= 1 else -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4) if d < 2 else 0.0
    matrix = torch.zeros(outer, inner, dtype=torch.float64)
    for i in range(outer):
        centre = (i + 0.5) * inner / outer - 0.5
        for j in range(int(centre // 1) - 1, int(centre // 1) + 3):
            matrix[i, min(max(j, 0), inner - 1)] += kernel(centre - j)
    return matrix


@pytest.mark.parametrize("clamp_first", [False, True])
@pytest.mark.parametrize("height, width, target", [
    (70, 70, (28, 28)), (48, 81, (28, 47)), (81, 48, (47, 28)), (20, 20, (28, 28)), (28, 28, (28, 28))])
def test_preprocess_decoded_by_hand(height, width, target, clamp_first):
    images = 0.9 * torch.randn(2, 3, height, width, generator=seeded(1))        # a good part lies outside [-1, 1]
    expected = images.double().clamp(-1, 1) if clamp_first else images.double()
    expected = cubic_matrix(height, target[0]) @ expected @ cubic_matrix(width, target[1]).T
    top, left = (target[0] - 28) // 2, (target[1] - 28) // 2
    expected = (expected[..., top:top + 28, left:left + 28] / 2 + 0.5).clamp(0, 1)
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert_close(preprocess_decoded(images, 28, clamp_first).double(), expected)


def test_preprocess_decoded_is_differentiable_and_fp32():
    images = torch.zeros(1, 3, 56, 56, dtype=torch.bfloat16, requires_grad=True)
    out = preprocess_decoded(images, 28)
    assert out.dtype == torch.float32 and out.shape == (1, 3, 28, 28)
    out.sum().backward()
    assert images.grad.abs().sum() > 0


def test_preference_loss_by_hand():
    win, lose = torch.tensor([21.0, 19.5, 20.0, 120.0, 0.0]), torch.tensor([20.0, 20.5, 20.0, 0.0, 120.0])
    p = torch.stack([win, lose], dim=1).double().softmax(dim=1)
    for label in (1.0, 0.0, 0.5):
        share = torch.full((5,), label)
        expected = -(label * p[:, 0].log() + (1 - label) * p[:, 1].log())
        assert_close(preference_loss(win, lose, share).double(), expected, 1e-6)
    assert preference_loss(win[2:3], lose[2:3], torch.tensor([0.5])).item() == pytest.approx(0.6931472)
    mixed = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0])
    swapped = preference_loss(lose, win, 1 - mixed)
    assert_close(preference_loss(win, lose, mixed), swapped)


def test_preference_loss_gradient():
    win, lose = torch.tensor([21.0, 19.0, 20.0], requires_grad=True), torch.tensor([20.0, 20.0, 20.0])
    share = torch.tensor([1.0, 0.0, 0.5])
    preference_loss(win, lose, share).sum().backward()
    assert_close(win.grad, torch.sigmoid(win.detach() - lose) - share, 1e-6)
