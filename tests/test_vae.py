"""vae.py against diffusers' AutoencoderKL."""
import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from conftest import FACTS, assert_close, assert_same_gradients, count, randomize, seeded, shapes
from loading import load_pipeline, load_tiny_decoder
from vae import VAE, TinyDecoder, TinyDecoderConfig, VAEConfig
from weights import InputError, original_tiny_decoder

PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])


def config(levels: int = 4, **changes) -> dict:
    """A `vae/config.json` with the official structure and few channels."""
    return dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[8, 16, 24, 24][:levels], layers_per_block=2,
                down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
                norm_num_groups=4, act_fn="silu") | changes


def make_pair(config: dict, dtype: torch.dtype = torch.float32) -> tuple[VAE, AutoencoderKL]:
    """Ours and diffusers', with the same random weights."""
    theirs = randomize(AutoencoderKL(**config)).to(dtype)
    ours = VAE(VAEConfig.from_json(config)).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@PRECISIONS
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (27, 21)])
def test_encoder_equals_diffusers(size, dtype, tolerance):
    ours, theirs = make_pair(config(), dtype)
    x = torch.randn(2, 3, *size, generator=seeded(1)).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    (mean, std), posterior = ours.moments(x), theirs.encode(y).latent_dist
    assert_close(mean, posterior.mean, tolerance, "mean")
    assert_close(std, posterior.std, tolerance, "std")
    for a, b, _ in ((mean, std, x), (posterior.mean, posterior.std, y)):
        g = seeded(2)
        (a * torch.randn(a.shape, generator=g).to(dtype) + b * torch.randn(b.shape, generator=g).to(dtype)).sum().backward()
    assert_close(x.grad, y.grad, tolerance, "gradient of the pixels")
    assert_same_gradients(ours, theirs, tolerance)


@PRECISIONS
@pytest.mark.parametrize("levels, size", [(4, (4, 4)), (4, (2, 3)), (2, (4, 6))])
def test_decoder_equals_diffusers(levels, size, dtype, tolerance):
    ours, theirs = make_pair(config(levels), dtype)
    z = torch.randn(2, 4, *size, generator=seeded(1)).to(dtype).requires_grad_()
    w = z.detach().clone().requires_grad_()
    pictures, expected = ours.decode(z * 0.18215), theirs.decode(w).sample
    assert pictures.shape[-2:] == tuple(s * ours.factor for s in size) and ours.factor == 2 ** (levels - 1)
    assert_close(pictures, expected, tolerance, "pictures")
    for out in (pictures, expected):
        (out * torch.randn(out.shape, generator=seeded(2)).to(dtype)).sum().backward()
    assert_close(z.grad, w.grad, tolerance, "gradient of the latents")
    assert_same_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize("factor", [0.18215, 0.13025])
def test_encode_is_scaled_mean_or_sample(factor):
    ours, theirs = make_pair(config(scaling_factor=factor))
    x, noise = torch.randn(2, 3, 16, 16, generator=seeded(1)), torch.randn(2, 4, 2, 2, generator=seeded(2))
    posterior = theirs.encode(x).latent_dist
    assert_close(ours.encode(x), posterior.mode() * theirs.config.scaling_factor)
    assert_close(ours.encode(x, noise), (posterior.mean + posterior.std * noise) * theirs.config.scaling_factor)
    assert_close(ours.decode(noise), theirs.decode(noise / theirs.config.scaling_factor).sample)


def test_log_variance_is_clamped():
    ours, theirs = make_pair(config())
    with torch.no_grad():
        for model in (ours, theirs):
            model.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 1.0])
    x = torch.randn(1, 3, 16, 16, generator=seeded(1))
    std, expected = ours.moments(x)[1], theirs.encode(x).latent_dist.std
    assert torch.allclose(std, expected, rtol=1e-5) and torch.isfinite(std).all()


def test_strict_loading_into_diffusers():
    ours = randomize(VAE(VAEConfig.from_json(config())), seed=3)
    theirs = AutoencoderKL(**config())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert VAEConfig.from_json(dict(theirs.config)).scaling_factor == 0.18215      # the complete config is accepted
    z = torch.randn(1, 4, 4, 4, generator=seeded(1))
    assert_close(ours.decode(z * 0.18215), theirs.decode(z).sample)


def test_official_names_and_shapes():
    with torch.device("meta"):
        ours = VAE(VAEConfig.from_json(config(block_out_channels=[128, 256, 512, 512], norm_num_groups=32)))
    assert count(ours) == (248, 83_653_863) and ours.factor == 8
    assert ours.config == VAEConfig(block_out_channels=[128, 256, 512, 512])
    if not (FACTS / "keys.json").exists():
        pytest.skip("no key lists here; the counts were checked")
    assert shapes(ours) == dict(json.loads((FACTS / "keys.json").read_text())["vae15"])


@pytest.mark.parametrize("field, value", [
    ("act_fn", "relu"), ("shift_factor", 0.1), ("mid_block_add_attention", False), ("use_quant_conv", False),
    ("use_post_quant_conv", False), ("latents_mean", [0.0] * 4), ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
    ("up_block_types", ["AttnUpDecoderBlock2D"] * 4)])
def test_other_architectures_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        VAEConfig.from_json(config(**{field: value}))


def tiny_config(blocks=(3, 3, 3, 1), width: int = 64, **changes) -> dict:
    """A `config.json` of diffusers' AutoencoderTiny."""
    return dict(decoder_block_out_channels=[width] * len(blocks), num_decoder_blocks=list(blocks),
                encoder_block_out_channels=[width] * len(blocks), num_encoder_blocks=list(blocks)[::-1]) | changes


def make_tiny_pair(config: dict, dtype: torch.dtype = torch.float32) -> tuple[TinyDecoder, AutoencoderTiny]:
    """Our small decoder and diffusers' small autoencoder, with the same random weights."""
    theirs = randomize(AutoencoderTiny(**config)).to(dtype)
    ours = TinyDecoder(TinyDecoderConfig.from_json(dict(theirs.config))).to(dtype)
    ours.load_state_dict(original_tiny_decoder(theirs.state_dict()), strict=True)
    return ours, theirs


@PRECISIONS
@pytest.mark.parametrize("blocks, width, size", [((3, 3, 3, 1), 64, (3, 4)), ((2, 1), 8, (5, 4)), ((1, 2, 1), 6, (4, 4))])
def test_tiny_decoder_equals_diffusers(blocks, width, size, dtype, tolerance):
    ours, theirs = make_tiny_pair(tiny_config(blocks, width), dtype)
    z = (3 * torch.randn(2, 4, *size, generator=seeded(1))).to(dtype).requires_grad_()          # far enough to be clamped
    w = z.detach().clone().requires_grad_()
    pictures, expected = ours(z), theirs.decode(w).sample
    assert pictures.shape == (2, 3, *(s * ours.factor for s in size)) and ours.factor == 2 ** (len(blocks) - 1)
    assert_close(pictures, expected, tolerance, "pictures")
    for out in (pictures, expected):
        (out * torch.randn(out.shape, generator=seeded(2)).to(dtype)).sum().backward()
    assert_close(z.grad, w.grad, tolerance, "gradient of the latents")
    assert_same_gradients(ours, theirs.decoder.layers, tolerance, rename=lambda k: f"{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}")


def test_tiny_decoder_has_the_official_names_and_shapes():
    """All of AutoencoderTiny has 134 tensors and 2,445,063 parameters; ours is its decoder, as the original's Sequential counts it."""
    with torch.device("meta"):
        ours, theirs = TinyDecoder(TinyDecoderConfig()), AutoencoderTiny()
    assert count(theirs) == (134, 2_445_063) and count(ours) == (67, 1_222_531) == count(theirs.decoder)
    assert shapes(ours) == {k: list(v.shape) for k, v in original_tiny_decoder(theirs.state_dict()).items()}
    convs, blocks = (1, 7, 12, 17, 19), (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)                     # taesd_decoder.pth
    assert set(ours.state_dict()) == {f"{i}.weight" for i in convs} | {"1.bias", "19.bias"} | {
        f"{i}.conv.{j}.{kind}" for i in blocks for j in (0, 2, 4) for kind in ("weight", "bias")}
    assert TinyDecoderConfig.from_json(tiny_config()) == TinyDecoderConfig() == TinyDecoderConfig.from_json({})


def test_tiny_decoder_is_read_in_both_layouts(sd, tmp_path):
    """A folder as diffusers saves it, and the original's decoder alone, pickled or not: the same pictures."""
    pipe = load_pipeline(str(sd))
    theirs = randomize(AutoencoderTiny(**tiny_config((2, 1), 8)))
    theirs.save_pretrained(tmp_path / "tiny")
    original = {f"{int(k.split('.')[0]) + 1}.{k.split('.', 1)[1]}": v for k, v in theirs.decoder.layers.state_dict().items()}
    save_file(original, tmp_path / "tiny/taesd_decoder.safetensors")
    torch.save(original, tmp_path / "tiny/taesd_decoder.pth")
    z = torch.randn(2, 4, 8, 8, generator=seeded(1))
    for source in ("", "diffusion_pytorch_model.safetensors", "taesd_decoder.safetensors", "taesd_decoder.pth"):
        assert_close(load_tiny_decoder(str(tmp_path / "tiny" / source), pipe)(z), theirs.decode(z).sample)


def test_foreign_tiny_decoders_are_refused_in_one_line(sd, tmp_path):
    """Another factor, another number of channels, another architecture, the encoder, a whole VAE."""
    pipe = load_pipeline(str(sd))

    def refused(source, says):
        with pytest.raises(InputError, match=says) as caught:
            load_tiny_decoder(str(source), pipe)
        assert "\n" not in str(caught.value)

    def saved(name, **changes):
        AutoencoderTiny(**tiny_config((1, 1), 8, **changes)).save_pretrained(tmp_path / name)
        return tmp_path / name

    AutoencoderTiny(**tiny_config((1, 1, 1), 8)).save_pretrained(tmp_path / "four")
    refused(tmp_path / "four", f"4 pixels a side per latent position, but {sd} has 2")
    refused(saved("sixteen", latent_channels=16), "16 channels in a latent")
    refused(saved("scaled", scaling_factor=0.5), "scaling_factor=0.5 is not supported")
    refused(saved("smooth", act_fn="silu"), "act_fn='silu'")
    good = saved("good")
    layers = load_file(good / "diffusion_pytorch_model.safetensors")
    save_file(layers | {"extra": torch.zeros(1)}, good / "more.safetensors")
    refused(good / "more.safetensors", r"1 unexpected \(extra\)")
    save_file(AutoencoderTiny(**tiny_config((1, 1), 8)).encoder.layers.state_dict(), good / "taesd_encoder.safetensors")
    refused(good / "taesd_encoder.safetensors", "missing.*half of a TAESD")
    refused(sd / "vae", "_class_name='AutoencoderKL'")
    pipe.vae.config.block_out_channels = (8,) * 4
    save_file(load_file(sd / "vae/diffusion_pytorch_model.safetensors"), tmp_path / "vae.safetensors")
    refused(tmp_path / "vae.safetensors", "does not fit TinyDecoder.*a diffusers VAE")


@pytest.mark.parametrize("field, value", [
    ("act_fn", "silu"), ("upsample_fn", "bilinear"), ("upsampling_scaling_factor", 4), ("out_channels", 1), ("scaling_factor", 0.2),
    ("shift_factor", 0.1), ("_class_name", "AutoencoderKL"), ("decoder_block_out_channels", [64, 64, 64, 32]), ("num_decoder_blocks", [1] * 3)])
def test_other_tiny_architectures_are_refused(field, value):
    with pytest.raises(ValueError, match=field if field[0] != "n" else "decoder_block"):
        TinyDecoderConfig.from_json(tiny_config(**{field: value}))
