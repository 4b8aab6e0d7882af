"""unet.py against diffusers' UNet2DConditionModel."""
import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from conftest import FACTS, assert_close, assert_same_gradients, count, randomize, sd15_shaped, sdxl_shaped, seeded, shapes
from unet import UNet, UNetConfig

SD15_FULL = dict(block_out_channels=[320, 640, 1280, 1280], attention_head_dim=8, cross_attention_dim=768,
                 norm_num_groups=32, sample_size=64)
SDXL_FULL = dict(block_out_channels=[320, 640, 1280], attention_head_dim=[5, 10, 20], cross_attention_dim=2048,
                 transformer_layers_per_block=[1, 2, 10], addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816, norm_num_groups=32, sample_size=128)
SHAPED = {"sd15": sd15_shaped, "sdxl": sdxl_shaped}
PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])


def make_pair(config: dict, dtype: torch.dtype = torch.float32) -> tuple[UNet, UNet2DConditionModel]:
    """Ours and diffusers', with the same random weights."""
    theirs = randomize(UNet2DConditionModel(**config)).to(dtype)
    ours = UNet(UNetConfig.from_json(config)).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def make_inputs(config: dict, height: int, width: int, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of our forward: two samples at different timesteps, with gradients wanted where there are any."""
    g = seeded(1)
    inputs = dict(latents=torch.randn(2, 4, height, width, generator=g).to(dtype).requires_grad_(),
                  timestep=torch.tensor([951, 1]),
                  prompt_embeds=torch.randn(2, 7, config["cross_attention_dim"], generator=g).to(dtype).requires_grad_())
    if config.get("addition_embed_type"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs |= dict(pooled=torch.randn(2, pooled, generator=g).to(dtype).requires_grad_(),
                       time_ids=torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024], [768, 1152, 16, 32, 896, 640]]))
    return inputs


def run_theirs(model: UNet2DConditionModel, inputs: dict) -> torch.Tensor:
    """diffusers' forward with our arguments."""
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]} if "pooled" in inputs else None
    return model(inputs["latents"], inputs["timestep"], inputs["prompt_embeds"], added_cond_kwargs=added).sample


@PRECISIONS
@pytest.mark.parametrize("config, size", [
    (sd15_shaped(), (16, 16)), (sd15_shaped(), (13, 9)), (sdxl_shaped(), (8, 8)), (sdxl_shaped(), (7, 10)),
    (sdxl_shaped(transformer_layers_per_block=[1, 2, 10]), (8, 8)), (sd15_shaped(attention_head_dim=[1, 2, 4, 4]), (16, 16)),
], ids=["sd15", "sd15-odd", "sdxl", "sdxl-odd", "sdxl-depth10", "sd15-heads-per-level"])
def test_forward_and_gradients_equal_diffusers(config, size, dtype, tolerance):
    ours, theirs = make_pair(config, dtype)
    inputs = make_inputs(config, *size, dtype)
    wanted = {k: v for k, v in inputs.items() if v.requires_grad}
    out, expected = ours(**inputs), run_theirs(theirs, inputs)
    assert_close(out, expected, tolerance, "noise_pred")

    weight = torch.randn(out.shape, generator=seeded(2)).to(dtype)
    grads = {}
    for name, result in (("ours", out), ("theirs", expected)):
        (result * weight).sum().backward()
        grads[name] = {k: v.grad.clone() for k, v in wanted.items()}
        for v in wanted.values():
            v.grad = None
    for k in wanted:
        assert_close(grads["ours"][k], grads["theirs"][k], tolerance, f"gradient of {k}")
        assert grads["ours"][k].abs().max() > 1e-3
    assert_same_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize("shape", SHAPED)
def test_checkpointing_changes_nothing(shape):
    config = SHAPED[shape]()
    ours = randomize(UNet(UNetConfig.from_json(config)))
    results = []
    for ours.checkpointing in (False, True):
        inputs = make_inputs(config, 8, 8)
        ours.zero_grad()
        out = ours(**inputs)
        out.square().sum().backward()
        results.append([out.detach(), inputs["latents"].grad, inputs["prompt_embeds"].grad] + [p.grad for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_recomputes_in_the_backward():
    ours = randomize(UNet(UNetConfig.from_json(sd15_shaped())))
    ours.checkpointing, calls = True, []
    ours.mid_block.attentions[0].register_forward_pre_hook(lambda *_: calls.append(1))
    out = ours(**make_inputs(sd15_shaped(), 8, 8))
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("shape", SHAPED)
def test_strict_loading_both_ways(shape):
    config = SHAPED[shape]()
    ours = randomize(UNet(UNetConfig.from_json(config)), seed=3)
    theirs = UNet2DConditionModel(**config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = make_inputs(config, 8, 8)
    assert_close(ours(**inputs), run_theirs(theirs, inputs))
    again = UNet(UNetConfig.from_json(dict(theirs.config)))     # from the complete config that diffusers writes
    again.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(again(**inputs), ours(**inputs))


def test_timestep_may_be_one_number():
    ours = randomize(UNet(UNetConfig.from_json(sd15_shaped())))
    inputs = make_inputs(sd15_shaped(), 8, 8) | dict(timestep=torch.tensor([501, 501]))
    for one in (501, torch.tensor(501), torch.tensor([501])):
        assert torch.equal(ours(**inputs), ours(**(inputs | dict(timestep=one))))


def test_samples_of_a_batch_do_not_mix():
    ours = randomize(UNet(UNetConfig.from_json(sdxl_shaped())))
    inputs = make_inputs(sdxl_shaped(), 8, 8)
    assert_close(ours(**inputs)[1:], ours(**{k: v[1:] for k, v in inputs.items()}))


@pytest.mark.parametrize("name, config, tensors, parameters", [
    ("unet15", sd15_shaped(**SD15_FULL), 686, 859_520_964), ("unetxl", sdxl_shaped(**SDXL_FULL), 1680, 2_567_463_684)])
def test_official_names_and_shapes(name, config, tensors, parameters):
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_json(config))
    assert count(ours) == (tensors, parameters)
    if not (FACTS / "keys.json").exists():
        pytest.skip("no key lists here; the counts were checked")
    assert shapes(ours) == dict(json.loads((FACTS / "keys.json").read_text())[name])


def test_defaults_are_sd15():
    assert UNetConfig() == UNetConfig.from_json({k: tuple(v) if isinstance(v, list) else v
                                                 for k, v in sd15_shaped(**SD15_FULL).items()})


@pytest.mark.parametrize("field, value", [
    ("act_fn", "gelu"), ("class_embed_type", "timestep"), ("resnet_time_scale_shift", "scale_shift"), ("freq_shift", 1),
    ("flip_sin_to_cos", False), ("only_cross_attention", True), ("dual_cross_attention", True), ("center_input_sample", True),
    ("time_embedding_type", "fourier"), ("encoder_hid_dim", 64), ("conv_in_kernel", 1), ("mid_block_type", "UNetMidBlock2D"),
    ("downsample_padding", 0), ("mid_block_scale_factor", 2), ("num_class_embeds", 10), ("time_cond_proj_dim", 256),
    ("addition_embed_type", "image"), ("down_block_types", ["AttnDownBlock2D"] * 4), ("attention_type", "gated"),
    ("resnet_skip_time_act", True), ("resnet_out_scale_factor", 2.0), ("cross_attention_norm", "layer_norm"),
    ("mid_block_only_cross_attention", True), ("time_embedding_act_fn", "silu"), ("encoder_hid_dim_type", "text_proj"),
    ("class_embeddings_concat", True), ("reverse_transformer_layers_per_block", [[1], [1], [1], [1]]),
    ("layers_per_block", [1, 2, 2, 2]), ("cross_attention_dim", [12, 12, 12, 12]), ("norm_num_groups", None),
])
def test_other_architectures_are_refused(field, value):
    with pytest.raises(ValueError, match=field.replace("down_block_types", "block type")):
        UNetConfig.from_json(sd15_shaped(**{field: value}))


def test_sdxl_needs_its_conditions():
    ours = UNet(UNetConfig.from_json(sdxl_shaped()))
    inputs = make_inputs(sdxl_shaped(), 8, 8)
    with pytest.raises(ValueError, match="pooled"):
        ours(inputs["latents"], 1, inputs["prompt_embeds"])


@pytest.mark.slow
@pytest.mark.parametrize("config", [sd15_shaped(**SD15_FULL), sdxl_shaped(**SDXL_FULL)], ids=["sd15", "sdxl"])
@torch.no_grad()
def test_full_size_forward_equals_diffusers(config):
    with torch.device("meta"):
        ours, theirs = UNet(UNetConfig.from_json(config)), UNet2DConditionModel(**config)
    weights = randomize(ours.to_empty(device="cpu")).state_dict()
    theirs.load_state_dict(weights, strict=True, assign=True)        # one copy in memory serves both
    inputs = make_inputs(config, 8, 8)
    assert_close(ours(**inputs), run_theirs(theirs, inputs))
