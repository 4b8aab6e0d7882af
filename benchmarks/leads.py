"""Leads to more speed that no card has judged yet: `bench.py --lead NAME` times one, off and on.

    lora.add(pipe.unet, rank)
    LEADS["qkv"](pipe)              # in place: modules of this pipeline get another forward
    compile_blocks(pipe.unet)       # most of them pay only in compiled code

Parameters, their names and the LoRA layers stay where they are, and what is computed stays the same
up to rounding (tests/test_leads.py). A lead goes into the program where a measurement says so, and
out of this file where one says no.

Shapes: N samples, C H W maps, L tokens.
"""
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ddim
import lora
from loading import Pipeline
from unet import Attention, ResnetBlock, TransformerBlock, UNet
from vae import Resample, enlarged

SMALL = 32          # samples up to which a call of the UNet gets a CUDA graph


def found(model: nn.Module, kind: type) -> list[nn.Module]:
    """The modules of a kind in a network."""
    return [module for module in model.modules() if isinstance(module, kind)]


def attend(attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           dot_product: Callable = F.scaled_dot_product_attention) -> torch.Tensor:
    """What follows on the projections, [N, L, C] each -> [N, L of q, C]."""
    q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attention.to_out[0](dot_product(q, k, v).transpose(1, 2).flatten(2))


# Norms

def norm_by_channel(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """nn.GroupNorm of a map [N, C, H, W]: one reading for sums by channel, one to scale and shift.

    Sums are of distances to a channel's first position: fp32 would lose a small variance beside a
    large mean. The norm does not depend on that position, so no gradient flows there.
    """
    groups = norm.num_groups, -1
    first = x[:, :, :1, :1].detach().float()
    away = x.float() - first
    mean, square = away.mean((2, 3)), away.square().mean((2, 3))                    # [N, C]
    means = (mean + first[:, :, 0, 0]).unflatten(1, groups)                 # [N, G, C / G]
    variances = (square - mean.square()).unflatten(1, groups)
    center = means.mean(2, keepdim=True)
    variance = (variances + (means - center).square()).mean(2, keepdim=True)
    scale = (variance + norm.eps).rsqrt() * norm.weight.unflatten(0, groups)
    shift = norm.bias.unflatten(0, groups) - center * scale
    scale, shift = (t.flatten(1)[:, :, None, None] for t in (scale, shift))
    return (x * scale + shift).to(x.dtype)


def groupnorm(pipe: Pipeline) -> None:
    """GroupNorm with sums by channel, which lie side by side in channels-last maps.

    Half of a compiled decode are norms and activations, at three times the time that their bytes
    need. SiLU follows in the same kernel, once compiled; so the norms of the compiled blocks are
    meant, and all of the decoder's.
    """
    for block in [*found(pipe.unet, ResnetBlock), pipe.vae.decoder]:
        for norm in found(block, nn.GroupNorm):
            norm.forward = MethodType(norm_by_channel, norm)


def enlarge(pipe: Pipeline) -> None:
    """The decoder's enlargements, each with the convolution after it, at 4 of 9 products.

    That saves 15 % of SD-1.5's decode in arithmetic. On a CPU the program has them so already.
    """
    for layer in found(pipe.vae.decoder, Resample):
        layer.forward = MethodType(lambda resample, x: enlarged(resample.conv, x), layer)


# Attention

def products(attention: Attention, names: tuple[str, ...], x: torch.Tensor) -> list[torch.Tensor]:
    """x [N, L, C] through several LoRA layers, at one product each for W, A and B."""
    layers = [attention.get_submodule(name) for name in names]
    y = F.linear(x, attention.joined)
    if layers[0].enabled:
        a = torch.cat([layer.lora_A.weight for layer in layers])
        b = torch.block_diag(*[layer.scaling * layer.lora_B.weight for layer in layers])
        y = y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return y.chunk(len(layers), -1)


def attend_self(attention: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Attention.forward where the context is x itself."""
    return attend(attention, *products(attention, ("to_q", "to_k", "to_v"), x))


def attend_text(attention: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Attention.forward where the context is another one."""
    return attend(attention, attention.to_q(x), *products(attention, ("to_k", "to_v"), context))


def qkv(pipe: Pipeline) -> None:
    """q, k, v and their LoRA terms as one product each (cross-attention: k, v): fewer, larger ones.

    The joined weights are copies (SD-1.5 0.1 GB, SDXL 1.3 GB in bf16). All of q, k, v need a LoRA.
    """
    for block in found(pipe.unet, TransformerBlock):
        for attention, names, forward in (
                (block.attn1, ("to_q", "to_k", "to_v"), attend_self),
                (block.attn2, ("to_k", "to_v"), attend_text)):
            joined = torch.cat([attention.get_submodule(name).weight for name in names])
            attention.register_buffer("joined", joined, persistent=False)
            attention.forward = MethodType(forward, attention)


@dataclass(frozen=True)
class WalkSchedule(ddim.Schedule):
    """A schedule that tells when a walk begins: then it is asked for the timesteps."""
    begin: Callable = None

    def timesteps(self, steps: int) -> list[int]:
        """As ever."""
        self.begin()
        return super().timesteps(steps)


def attend_kept(attention: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Attention.forward with the walk's keys and values, where they are kept.

    Candidates of one text lie together, so they ask as one longer row; nothing is repeated.
    """
    if attention.kept is None:
        return Attention.forward(attention, x, context)
    k, v = attention.kept                                                   # [texts, L, C]
    q = attention.to_q(x)
    return attend(attention, q.reshape(len(k), -1, q.shape[-1]), k, v).view(x.shape)


def text(pipe: Pipeline) -> None:
    """Cross-attention's keys and values computed once a walk, for all steps and candidates.

    They are 0.4 % of SD-1.5's and 0.8 % of SDXL's arithmetic. A walk is what follows on a question
    for the timesteps, its first call having one row a text and side of guidance, later calls a
    multiple; batches must be whole, since rows that fill up a small one are not told apart.

    Nothing is kept for training. There the LoRA on to_k and to_v changes at every step; only W x
    would last, of which a frozen W has no backward: 0.2 and 0.4 % of the arithmetic, against rows
    to be gathered (SD-1.5 3.8 MB, SDXL 26 MB a sample in bf16) in every forward.
    """
    attentions = [block.attn2 for block in found(pipe.unet, TransformerBlock)]
    layers = lora.layers(pipe.unet).values()

    def forget() -> None:
        for attention in attentions:
            attention.kept = None

    def forward(unet: UNet, latents: torch.Tensor, timestep: torch.Tensor,
                prompt_embeds: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
        walks = not torch.is_grad_enabled() and all(layer.enabled for layer in layers)
        kept = attentions[0].kept
        if not walks or kept and len(latents) % len(kept[0]):
            forget()
        if walks and attentions[0].kept is None:
            context = prompt_embeds.to(unet.conv_in.weight.dtype)
            for attention in attentions:
                attention.kept = attention.to_k(context), attention.to_v(context)
        return UNet.forward(unet, latents, timestep, prompt_embeds, *added)

    forget()
    for attention in attentions:
        attention.forward = MethodType(attend_kept, attention)
    pipe.unet.forward = MethodType(forward, pipe.unet)
    pipe.schedule = WalkSchedule(**vars(pipe.schedule), begin=forget)


def attend_by(pipe: Pipeline, first: list[SDPBackend], padded: bool = False) -> None:
    """All attentions by the backends `first`, where they can; `padded` to widths of 64 or 128.

    Zeros beside q and k change no product, those beside v come out as zeros and are cut off.
    """
    order = first + [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        width = q.shape[-1]
        if padded and width < 128:
            q, k, v = (F.pad(t, (0, -width % 64)) for t in (q, k, v))
        with sdpa_kernel(order, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, scale=width ** -0.5)[..., :width]

    def forward(attention: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        return attend(attention, q, k, v, dot_product)

    for attention in found(pipe.unet, Attention):
        attention.forward = MethodType(forward, attention)


def flash(pipe: Pipeline) -> None:
    """Attention by flash kernels: SD-1.5's head widths, 40 and 80, are odd for every kernel."""
    attend_by(pipe, [SDPBackend.FLASH_ATTENTION])


def cudnn(pipe: Pipeline) -> None:
    """Attention by cuDNN's kernels, written for Hopper; widths above its limit by the others."""
    attend_by(pipe, [SDPBackend.CUDNN_ATTENTION])


def efficient(pipe: Pipeline) -> None:
    """Attention by the memory-efficient kernels, which know many widths."""
    attend_by(pipe, [SDPBackend.EFFICIENT_ATTENTION])


def padded_flash(pipe: Pipeline) -> None:
    """Attention padded with zeros from widths of 40 and 80 to 64 and 128, by flash kernels."""
    attend_by(pipe, [SDPBackend.FLASH_ATTENTION], padded=True)


def padded_cudnn(pipe: Pipeline) -> None:
    """The same by cuDNN's."""
    attend_by(pipe, [SDPBackend.CUDNN_ATTENTION], padded=True)


# Compiling

def whole(pipe: Pipeline) -> None:
    """The UNet compiled as a whole: also what lies between the blocks; 186 against 202 ms.

    The cold start is longer, some minutes a shape. compile_blocks, called later, changes nothing.
    """
    pipe.unet.forward = torch.compile(pipe.unet.forward, dynamic=False)


def graphs(pipe: Pipeline) -> None:
    """The walk's small calls as CUDA graphs, which need no launches: at one latent a prompt.

    Training and its reference, LoRA off, run as ever. Weights that move are recorded anew, so
    `--parts` times it, not rounds that take turns.
    """
    layers, plain = lora.layers(pipe.unet).values(), pipe.unet.forward
    graphed = torch.compile(plain, mode="reduce-overhead", dynamic=False)

    def forward(unet: UNet, latents: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        walks = not torch.is_grad_enabled() and all(layer.enabled for layer in layers)
        if not walks or len(latents) > SMALL:
            return plain(latents, *inputs)
        torch.compiler.cudagraph_mark_step_begin()
        return graphed(latents, *inputs).clone()            # the next call overwrites it

    pipe.unet.forward = MethodType(forward, pipe.unet)


LEADS = {function.__name__: function for function in (          # what promises most comes first
    groupnorm, cudnn, padded_cudnn, qkv, enlarge, whole, graphs, padded_flash, flash, efficient,
    text)}


# Larger training batches: a setting, not a change of the pipeline

def bytes_per_pair(train: Callable[[int], object]) -> int:
    """What one pair more in a forward and backward takes of the card's memory, measured.

    `train(n)` does both for n pairs.
    """
    peaks = []
    for pairs in (1, 1, 2):                         # the first also allocates what stays
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(pairs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return peaks[2] - peaks[1]


def fitting_batch(free: int, per_pair: int, pairs: int) -> int:
    """--train_batch from free bytes, bytes of a pair, and a process's pairs an optimizer step.

    A tenth stays free. The parts that a step is cut into are as few as can be, then about equal;
    what is summed over them stays the same.
    """
    most = max(1, int(0.9 * free) // per_pair)
    parts = -(-pairs // most)
    return -(-pairs // parts)
