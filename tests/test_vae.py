"""vae.py against diffusers' AutoencoderKL."""
import json

import pytest
import torch
from diffusers import AutoencoderKL

from conftest import FACTS, assert_close, assert_same_gradients, count, randomize, seeded, shapes
from vae import VAE, VAEConfig

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
@pytest.mark.parametrize("levels, size", [(4, (4, 4)), (4, (3, 5)), (2, (4, 6))])
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
