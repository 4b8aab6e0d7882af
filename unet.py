"""The denoising UNet of SD-1.5 and SDXL: one class, shaped by the checkpoint's `unet/config.json`.

This is epsilon_theta(x_t, t, c) of the paper (Eq. 2), the only network that SPO trains (through
LoRA on its attentions, section 5.1). Parameter names equal the official files'
(`unet/diffusion_pytorch_model.safetensors`: 686 tensors for SD-1.5, 1680 for SDXL), so loading is
a strict `load_state_dict`.

    SD-1.5   levels of 320-640-1280-1280 channels, one transformer block per attention, prompts
             of 77 x 768 numbers
    SDXL     levels of 320-640-1280, up to ten blocks, prompts of 77 x 2048, and the pooled text
             and the picture's size in the time embedding

Shapes: N samples, C H W latent, L tokens, D width of the conditioning, P width of the pooled text,
T width of the time embedding.
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
    sample_size: int = 64                       # latent side that the model was trained at
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8           # a misnomer: the *number* of heads
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False         # SDXL: linear maps, SD-1.5: 1x1 convolutions
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    addition_embed_type: str | None = None      # SDXL: "text_time"
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_json(cls, config: dict) -> "UNetConfig":
        """Keep a `config.json`'s known fields; ValueError where it asks for another network."""
        for key, wanted in FIXED.items():
            if config.get(key, wanted) not in (wanted, False if wanted is None else wanted):
                raise ValueError(
                    f"unet config: {key}={config[key]!r} is not supported, only {wanted!r}")
        for key in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
            if not isinstance(config.get(key, 1), int):
                raise ValueError(f"unet config: {key}={config[key]!r} is not one number")
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise ValueError("unet config: addition_embed_type="
                             f"{config['addition_embed_type']!r} is not supported")
        for kind in (*config.get("down_block_types", ()), *config.get("up_block_types", ())):
            if kind.removeprefix("CrossAttn") not in ("DownBlock2D", "UpBlock2D"):
                raise ValueError(f"unet config: block type {kind!r} is not supported")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def sizes(self, level: int) -> tuple[int, ...]:
        """Channels of a level, heads and blocks of its transformers (one number is for all)."""
        sizes = self.block_out_channels, self.attention_head_dim, self.transformer_layers_per_block
        return tuple(s if isinstance(s, int) else s[level] for s in sizes)


# What diffusers' other UNets vary and these do not; a field that should be null may also be false.
FIXED = dict(
    act_fn="silu", freq_shift=0, flip_sin_to_cos=True, center_input_sample=False,
    conv_in_kernel=3, conv_out_kernel=3, downsample_padding=1, num_attention_heads=None,
    time_embedding_type="positional", time_embedding_dim=None, time_embedding_act_fn=None,
    timestep_post_act=None, time_cond_proj_dim=None, resnet_time_scale_shift="default",
    resnet_skip_time_act=False, resnet_out_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn",
    mid_block_scale_factor=1, mid_block_only_cross_attention=None, only_cross_attention=False,
    dual_cross_attention=False, cross_attention_norm=None, attention_type="default",
    upcast_attention=None, class_embed_type=None, num_class_embeds=None,
    class_embeddings_concat=False, encoder_hid_dim=None, encoder_hid_dim_type=None,
    reverse_transformer_layers_per_block=None)


def sinusoids(values: torch.Tensor, width: int) -> torch.Tensor:
    """[N] numbers -> [N, width], cosines first, fp32."""
    half = width // 2
    step = torch.arange(half, dtype=torch.float32, device=values.device)
    angle = values.float()[:, None] * torch.exp(-math.log(10_000) * step / half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedding(nn.Module):
    """Two linear maps with SiLU between them."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inner, outer), nn.Linear(outer, outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, the time embedding added between them, the input added at the end."""

    def __init__(self, config: UNetConfig, inner: int, outer: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, inner, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], outer)
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
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)             # [N, heads, H*W, width / heads]
        return self.to_out[0](h.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A linear map of which one half gates the other through GELU."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.proj = nn.Linear(inner, 2 * outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; `net.1` is a dropout in the official files."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

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

    def __init__(self, config: UNetConfig, width: int, heads: int, depth: int):
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
        h = h.flatten(2).transpose(1, 2)                        # [N, H*W, C]
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, prompt_embeds)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, (height, width))     # [N, C, H, W]
        return x + (h if self.linear else self.proj_out(h))


class Resample(nn.Module):
    """One 3x3 convolution that halves a map, or that follows an enlargement."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Block(nn.Module):
    """One level of the UNet: residual blocks, each followed by a transformer where there is one.

    `inners` are the channels that the residual blocks take in. A UNet's forward runs the parts: the
    maps that it keeps and concatenates come between them.
    """

    def __init__(self, config: UNetConfig, level: int, inners: list[int], attentions: int,
                 down: bool = False, up: bool = False):
        super().__init__()
        width, heads, depth = config.sizes(level)
        self.resnets = nn.ModuleList(ResnetBlock(config, inner, width) for inner in inners)
        self.attentions = nn.ModuleList(
            Transformer(config, width, heads, depth) for _ in range(attentions))
        self.downsamplers = nn.ModuleList([Resample(width, 2)] if down else [])
        self.upsamplers = nn.ModuleList([Resample(width, 1)] if up else [])


class UNet(nn.Module):
    """epsilon_theta: predicts the noise (or v, as the schedule says) in a latent."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False      # less memory: the backward recomputes the activations
        widths, layers = config.block_out_channels, config.layers_per_block
        last, time_width = len(widths) - 1, 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time_width)
        if config.addition_embed_type == "text_time":
            self.add_embedding = Embedding(config.projection_class_embeddings_input_dim, time_width)

        skips = [widths[0]]             # channels of the maps that the way down leaves behind
        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(config.down_block_types):
            inners = [skips[-1]] + [widths[level]] * (layers - 1)
            self.down_blocks.append(Block(
                config, level, inners, layers if "Attn" in kind else 0, down=level < last))
            skips += [widths[level]] * (layers + (level < last))
        self.mid_block = Block(config, -1, [widths[-1]] * 2, 1)
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            level = last - i
            arriving = [widths[min(level + 1, last)]] + [widths[level]] * layers
            inners = [width + skips.pop() for width in arriving]    # the last map left, first
            self.up_blocks.append(Block(
                config, level, inners, layers + 1 if "Attn" in kind else 0, up=level > 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def embed_time(self, timestep: torch.Tensor, pooled: torch.Tensor | None,
                   time_ids: torch.Tensor | None) -> torch.Tensor:
        """Timesteps [N]; for SDXL pooled text [N, P], sizes [N, 6] -> time embedding [N, T]."""
        time = self.time_embedding(sinusoids(timestep, self.config.block_out_channels[0]))
        if self.config.addition_embed_type != "text_time":
            return time
        if pooled is None or time_ids is None:
            raise ValueError("this UNet is SDXL-shaped: forward needs `pooled` and `time_ids`")
        sizes = sinusoids(time_ids.flatten(), self.config.addition_time_embed_dim)
        return time + self.add_embedding(torch.cat([pooled, sizes.view(len(pooled), -1)], dim=1))

    def _run(self, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The module's output; with `checkpointing` the backward recomputes what is inside."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def _layer(self, block: Block, i: int, x: torch.Tensor, time: torch.Tensor,
               prompt_embeds: torch.Tensor) -> torch.Tensor:
        """The i-th residual block of a level and the transformer after it."""
        x = self._run(block.resnets[i], x, time)
        return self._run(block.attentions[i], x, prompt_embeds) if i < len(block.attentions) else x

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor,
                pooled: torch.Tensor | None = None,
                time_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Predict the noise in `latents`.

        latents [N, C, H, W]; timestep [N] or one number, 0..1000; prompt_embeds [N, L, D]; for SDXL
        also pooled [N, P] and time_ids [N, 6] (pixels: original h, w, crop top, left, target h, w)
        -> noise_pred [N, C, H, W].
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
        for i in range(len(self.mid_block.resnets)):
            x = self._layer(self.mid_block, i, x, time, prompt_embeds)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = self._layer(block, i, torch.cat([x, skips.pop()], dim=1), time, prompt_embeds)
            for upsampler in block.upsamplers:      # to the size of the next skip: sides may be odd
                x = upsampler(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def compile_blocks(unet: UNet) -> None:
    """torch.compile the blocks that repeat, in place: once per shape, not once per place.

    Within `torch.compiler.set_stance("force_eager")` they run as they were, for shapes that are not
    worth compiling. On a GPU convolutions are fastest with channels last, eager norms slower.
    """
    if next(unet.parameters()).is_cuda:
        unet.to(memory_format=torch.channels_last)
    # Each shape counts as a recompilation.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, TransformerBlock)):
            module.forward = torch.compile(module.forward, dynamic=False)
