"""The denoising UNet of SD-1.5 and SDXL: one class, driven by the checkpoint's own `unet/config.json`.

This is epsilon_theta(x_t, t, c) of the paper, the only network that SPO trains (through LoRA on its attentions).
Parameter names equal the official files' (`unet/diffusion_pytorch_model.safetensors`: 686 tensors for
SD-1.5, 1680 for SDXL), so loading is a strict `load_state_dict`.

    SD-1.5   four levels 320-640-1280-1280, one transformer block per attention, conditions on 77 x 768
    SDXL     three levels 320-640-1280, up to ten blocks, 77 x 2048, plus pooled text and picture-size embeddings

Shapes: N samples, C H W latent, L tokens, D width of the conditioning, T width of the time embedding.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class UNetConfig:
    """The fields of `unet/config.json` that shape the network, SD-1.5's values by default."""
    sample_size: int = 64                                  # latent side that the model was trained at
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8          # misnomer kept by the files: the *number* of heads
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False                    # SDXL: linear maps where SD-1.5 has 1x1 convolutions
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    addition_embed_type: str | None = None                 # SDXL: "text_time"
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_json(cls, config: dict) -> "UNetConfig":
        """Keep the known fields of a `config.json`; raise ValueError where it asks for another architecture."""
        plain = dict(act_fn="silu", freq_shift=0, flip_sin_to_cos=True, center_input_sample=False, downsample_padding=1,
                     mid_block_scale_factor=1, dual_cross_attention=False, only_cross_attention=False,
                     class_embed_type=None, num_class_embeds=None, encoder_hid_dim=None, time_embedding_type="positional",
                     resnet_time_scale_shift="default", num_attention_heads=None, time_cond_proj_dim=None,
                     conv_in_kernel=3, conv_out_kernel=3, attention_type="default", mid_block_type="UNetMidBlock2DCrossAttn",
                     upcast_attention=None, time_embedding_dim=None, timestep_post_act=None, time_embedding_act_fn=None,
                     resnet_skip_time_act=False, resnet_out_scale_factor=1, cross_attention_norm=None,
                     mid_block_only_cross_attention=None, encoder_hid_dim_type=None, class_embeddings_concat=False,
                     reverse_transformer_layers_per_block=None)
        for key, wanted in plain.items():
            if config.get(key, wanted) not in (wanted, False if wanted is None else wanted):
                raise ValueError(f"unet config: {key}={config[key]!r} is not supported, only {wanted!r}")
        for key in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
            if not isinstance(config.get(key, 1), int):
                raise ValueError(f"unet config: {key}={config[key]!r} is not supported, only one number for all levels")
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise ValueError(f"unet config: addition_embed_type={config['addition_embed_type']!r} is not supported")
        for kind in (*config.get("down_block_types", ()), *config.get("up_block_types", ())):
            if kind not in ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"):
                raise ValueError(f"unet config: block type {kind!r} is not supported")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def per_level(self, value: int | tuple[int, ...]) -> list[int]:
        """Spread a field that may be one number for all levels."""
        return [value] * len(self.block_out_channels) if isinstance(value, int) else list(value)


def sinusoids(values: torch.Tensor, width: int) -> torch.Tensor:
    """[N] numbers -> [N, width], cosines first, fp32."""
    half = width // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angle = values.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedding(nn.Module):
    """Two linear maps with SiLU between them."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inner, outer), nn.Linear(outer, outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions; the time embedding is added between them."""

    def __init__(self, inner: int, outer: int, time_width: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, inner, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, outer)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, outer, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of the latent's positions to themselves or to the prompt's tokens."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} attention heads cannot share {width} channels")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)                # [N, heads, H*W or L, width / heads]
                   for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A linear map of which one half gates the other through GELU."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.proj = nn.Linear(inner, 2 * outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; `net.1` is the place of a dropout in the official files."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each pre-normed and added back."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, heads, width)
        self.attn2 = Attention(width, heads, context_width)
        self.ff = FeedForward(width)

    def forward(self, x: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), prompt_embeds)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A map as a sequence of positions through a few transformer blocks, added back to the map."""

    def __init__(self, width: int, heads: int, depth: int, config: UNetConfig):
        super().__init__()
        self.linear = config.use_linear_projection
        project = nn.Linear if self.linear else (lambda a, b: nn.Conv2d(a, b, 1))
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.proj_in = project(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, config.cross_attention_dim) for _ in range(depth))
        self.proj_out = project(width, width)

    def forward(self, x: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Map [N, C, H, W] and prompt_embeds [N, L, D] -> map [N, C, H, W]."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)                                            # [N, H*W, C]
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, prompt_embeds)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, (height, width))                         # [N, C, H, W]
        return x + (h if self.linear else self.proj_out(h))


class Resample(nn.Module):
    """One 3x3 convolution that halves a map, or that follows an enlargement."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Block(nn.Module):
    """One level of the UNet, down, middle or up: residual blocks, each followed by a transformer where there is one."""

    def __init__(self, inners: list[int], outer: int, time_width: int, config: UNetConfig,
                 attentions: int = 0, heads: int = 1, depth: int = 1, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(inner, outer, time_width, config) for inner in inners)
        self.attentions = nn.ModuleList(Transformer(outer, heads, depth, config) for _ in range(attentions))
        self.downsamplers = nn.ModuleList([Resample(outer, 2)] if down else [])
        self.upsamplers = nn.ModuleList([Resample(outer, 1)] if up else [])


class UNet(nn.Module):
    """epsilon_theta: predicts the noise (or v, as the schedule says) in a latent."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False      # trade a second forward for memory: recompute activations in the backward
        widths, layers, time_width = config.block_out_channels, config.layers_per_block, 4 * config.block_out_channels[0]
        heads, depths = config.per_level(config.attention_head_dim), config.per_level(config.transformer_layers_per_block)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time_width)
        if config.addition_embed_type == "text_time":
            self.add_embedding = Embedding(config.projection_class_embeddings_input_dim, time_width)

        # Every tensor that the way down leaves behind is taken up, last first, by a residual block on the way up.
        self.down_blocks, skips = nn.ModuleList(), [widths[0]]
        for i, kind in enumerate(config.down_block_types):
            last = i == len(widths) - 1
            inners = [widths[max(i - 1, 0)]] + [widths[i]] * (layers - 1)
            self.down_blocks.append(Block(inners, widths[i], time_width, config, layers * kind.startswith("CrossAttn"),
                                          heads[i], depths[i], down=not last))
            skips += [widths[i]] * (layers + (not last))
        self.mid_block = Block([widths[-1]] * 2, widths[-1], time_width, config, 1, heads[-1], depths[-1])
        self.up_blocks, width = nn.ModuleList(), widths[-1]
        for i, kind in enumerate(config.up_block_types):
            level = len(widths) - 1 - i
            inners = []
            for _ in range(layers + 1):
                inners.append(width + skips.pop())
                width = widths[level]
            self.up_blocks.append(Block(inners, width, time_width, config, (layers + 1) * kind.startswith("CrossAttn"),
                                        heads[level], depths[level], up=level > 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def embed_time(self, timestep: torch.Tensor, pooled: torch.Tensor | None, time_ids: torch.Tensor | None) -> torch.Tensor:
        """Timestep [N], pooled text [N, P] and picture sizes [N, 6] (both SDXL only) -> time embedding [N, T]."""
        time = self.time_embedding(sinusoids(timestep, self.config.block_out_channels[0]))
        if self.config.addition_embed_type == "text_time":
            if pooled is None or time_ids is None:
                raise ValueError("this UNet is SDXL-shaped: forward needs `pooled` and `time_ids`")
            sizes = sinusoids(time_ids.flatten(), self.config.addition_time_embed_dim).view(len(time_ids), -1)
            time = time + self.add_embedding(torch.cat([pooled, sizes], dim=1))
        return time

    def _layer(self, block: Block, i: int, x: torch.Tensor, time: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """The i-th residual block of a level and the transformer after it."""
        recompute = self.checkpointing and torch.is_grad_enabled()
        run = (lambda module, *inputs: checkpoint(module, *inputs, use_reentrant=False)) if recompute else \
            (lambda module, *inputs: module(*inputs))
        x = run(block.resnets[i], x, time)
        return run(block.attentions[i], x, prompt_embeds) if i < len(block.attentions) else x

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor,
                pooled: torch.Tensor | None = None, time_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Predict the noise in `latents`.

        latents [N, C, H, W]; timestep [N] or one number, 0..999; prompt_embeds [N, L, D]; SDXL also pooled [N, P]
        and time_ids [N, 6] (original h, w, crop top, left, target h, w in pixels) -> noise_pred [N, C, H, W].
        """
        timestep = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
        time = self.embed_time(timestep, pooled, time_ids)
        x = self.conv_in(latents.to(self.conv_in.weight.dtype))
        prompt_embeds = prompt_embeds.to(x.dtype)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self._layer(block, i, x, time, prompt_embeds)
                skips.append(x)
            for downsampler in block.downsamplers:
                x = downsampler(x)
                skips.append(x)
        x = self._layer(self.mid_block, 0, x, time, prompt_embeds)
        x = self._layer(self.mid_block, 1, x, time, prompt_embeds)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = self._layer(block, i, torch.cat([x, skips.pop()], dim=1), time, prompt_embeds)
            for upsampler in block.upsamplers:      # to the size of what waits there, odd sizes included
                x = upsampler(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def compile_blocks(unet: UNet) -> None:
    """torch.compile the blocks that repeat, in place: once per shape, and not once per place as in the whole network.

    `with torch.compiler.set_stance("force_eager")` runs them as they were, for shapes that are not worth it. On a GPU convolutions want
    their channels last, which eager norms would pay for.
    """
    if next(unet.parameters()).is_cuda:
        unet.to(memory_format=torch.channels_last)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024     # each shape counts as one
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, TransformerBlock)):
            module.forward = torch.compile(module.forward, dynamic=False)
