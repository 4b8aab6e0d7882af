"""The autoencoder of Stable Diffusion, pictures to latents and back: one class for every model.

SPO decodes the predicted clean latent of every candidate so that the step-aware preference model
can look at a picture; training that model needs the encoder too (paper, section 4.2). Parameter
names equal the official files' (`vae/diffusion_pytorch_model.safetensors`), so loading is a strict
`load_state_dict`. At the end: TAESD's decoder, a far smaller one that may stand in for the large.

Shapes: N pictures, 3 x H x W pixels in [-1, 1]; latents N, C, H / f, W / f, f = 2 ** (levels - 1).
"""
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class VAEConfig:
    """The fields of `vae/config.json` that shape the network."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215      # SD-1.5's file leaves it out; SDXL's says 0.13025
    force_upcast: bool = False           # SDXL's stock weights overflow in half precision

    @classmethod
    def from_json(cls, config: dict) -> "VAEConfig":
        """Keep a `config.json`'s known fields; ValueError where it asks for another network."""
        _insist("vae config", config, dict(
            act_fn="silu", shift_factor=None, latents_mean=None, latents_std=None,
            mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True))
        for key, wanted in (("down_block_types", "DownEncoderBlock2D"),
                            ("up_block_types", "UpDecoderBlock2D")):
            if set(config.get(key, ())) - {wanted}:
                raise ValueError(
                    f"vae config: {key}={config[key]!r} is not supported, only {wanted!r}")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


def _insist(what: str, config: dict, values: dict) -> None:
    """ValueError for a field of a configuration that is there and has not its one value."""
    for key, wanted in values.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{what}: {key}={config[key]!r} is not supported, only {wanted!r}")


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU, around which the input is added back."""

    def __init__(self, inner: int, outer: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inner, eps=1e-6)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outer, eps=1e-6)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all positions of the coarsest map."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)      # [N, H*W, C]
        q, k, v = (proj(tokens).unsqueeze(1) for proj in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + tokens.transpose(1, 2).reshape(n, c, h, w)


class Resample(nn.Module):
    """Halve or double the side of a map with one 3x3 convolution."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.up:
            return self.conv(F.pad(x, (0, 1, 0, 1)))    # padded on the right and below only
        if x.device.type == "cpu":
            return enlarged(self.conv, x)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def enlarged(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """`conv` of the map at twice its size, as one transposed convolution: 4 of 9 products.

    Each pixel becomes four alike, so the taps that see it are added up beforehand.
    """
    taps = F.avg_pool2d(conv.weight, 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(x, taps.flip(2, 3).transpose(0, 1), conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """One resolution: a few residual blocks, then a change of size unless it is the last level."""

    def __init__(self, inner: int, outer: int, layers: int, groups: int,
                 down: bool = False, up: bool = False):
        super().__init__()
        inners = [inner] + [outer] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(width, outer, groups) for width in inners)
        self.downsamplers = nn.ModuleList([Resample(outer, up=False)] if down else [])
        self.upsamplers = nn.ModuleList([Resample(outer, up=True)] if up else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the coarsest resolution."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pictures [N, 3, H, W] -> mean and log-variance of the latents [N, 2 * C, H / f, W / f]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, groups,
                  down=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [N, C, H / f, W / f] -> pictures [N, 3, H, W]; one more residual block a level."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups,
                  up=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class VAE(nn.Module):
    """Encoder and decoder with the two 1x1 convolutions between them.

    `encode` and `decode` have *scaled* latents, as the UNet sees them: raw latent x scaling_factor.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures in [-1, 1] -> (mean, std) of the unscaled latents, [N, C, H / f, W / f] each."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Pictures in [-1, 1] -> scaled latents: the mean or, with noise of its shape, a sample."""
        mean, std = self.moments(images)
        return (mean if noise is None else mean + std * noise) * self.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [N, C, h, w] -> pictures [N, 3, h * f, w * f], about [-1, 1], no clamp."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side: 8 for SD-1.5, SDXL and tiny."""
        return 2 ** (len(self.config.block_out_channels) - 1)


@dataclass
class TinyDecoderConfig:
    """What shapes the decoder of a TAESD, the small autoencoder; as it stands the official one."""
    latent_channels: int = 4
    width: int = 64
    blocks: tuple[int, ...] = (3, 3, 3, 1)      # residual blocks per resolution, coarsest first

    @classmethod
    def from_json(cls, config: dict) -> "TinyDecoderConfig":
        """From diffusers' AutoencoderTiny; ValueError where it asks for another network."""
        _insist("tiny autoencoder config", config, dict(
            _class_name="AutoencoderTiny", act_fn="relu", upsample_fn="nearest", out_channels=3,
            upsampling_scaling_factor=2, scaling_factor=1.0, shift_factor=0.0))
        widths = config.get("decoder_block_out_channels", (64,) * 4)
        blocks = config.get("num_decoder_blocks", (3, 3, 3, 1))
        if len(set(widths)) != 1 or len(widths) != len(blocks):
            raise ValueError(f"tiny autoencoder config: decoder_block_out_channels={widths!r} "
                             "is not supported, only one width throughout")
        return cls(config.get("latent_channels", 4), widths[0], tuple(blocks))


class SoftClamp(nn.Module):
    """Latents into -3..3, smoothly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class TinyBlock(nn.Module):
    """Three 3x3 convolutions, around which the input is added back."""

    def __init__(self, width: int):
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Sequential):
    """The decoder of a TAESD, named as in `taesd_decoder.pth`: 1.2 M parameters instead of 50 M."""

    def __init__(self, config: TinyDecoderConfig):
        width, last = config.width, len(config.blocks) - 1
        layers = [SoftClamp(), nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for i, count in enumerate(config.blocks):
            layers += [TinyBlock(width) for _ in range(count)]
            if i < last:
                layers += [nn.Upsample(scale_factor=2),
                           nn.Conv2d(width, width, 3, padding=1, bias=False)]
        super().__init__(*layers, nn.Conv2d(width, 3, 3, padding=1))
        self.config = config

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [N, C, h, w] -> pictures [N, 3, h * f, w * f], about [-1, 1], no clamp."""
        return 2 * super().forward(latents) - 1         # the weights' pictures lie in [0, 1]

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side: 8 for the official ones."""
        return 2 ** (len(self.config.blocks) - 1)
