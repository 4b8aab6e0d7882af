"""A text-to-image model in use: prompt encoding, classifier-free guidance, decoding, generation.

    images = generate(load_pipeline("tiny"), ["a red circle"], seeds=[0])

Shapes: N samples, C H W latent, L tokens, D width of the conditioning, P width of the pooled text.
"""
import functools
import sys
import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import ddim
from clip_spm import CLIP
from loading import Pipeline
from weights import main_process


@dataclass
class Conditioning:
    """What the UNet is told about N samples."""
    prompt_embeds: torch.Tensor             # [N, L, D]
    pooled: torch.Tensor | None = None      # [N, P], SDXL
    time_ids: torch.Tensor | None = None    # [N, 6], SDXL: original h, w, crop y, x, target h, w

    def map(self, function) -> "Conditioning":
        """Apply a function to every tensor: indexing, moving, repeating."""
        return Conditioning(*(None if t is None else function(t) for t in vars(self).values()))

    def __getitem__(self, rows) -> "Conditioning":
        """Some of the samples: an index, a slice."""
        return self.map(lambda t: t[rows])

    def repeat(self, k: int) -> "Conditioning":
        """Every sample k times in a row."""
        return self.map(lambda t: t.repeat_interleave(k, 0))

    @staticmethod
    def cat(parts: list["Conditioning"]) -> "Conditioning":
        """Stack several along N."""
        return Conditioning(*(None if tensors[0] is None else torch.cat(tensors)
                              for tensors in zip(*(vars(part).values() for part in parts))))


@contextmanager
def on_device(module: torch.nn.Module, device: torch.device, offload: bool):
    """With `offload`, `module` is on `device` inside the block and on the CPU after it."""
    if offload:
        module.to(device)
    yield
    if offload:
        module.to("cpu")


@torch.no_grad()
def encode_prompts(pipe: Pipeline, prompts: list[str],
                   resolution: int | None = None) -> Conditioning:
    """Texts -> Conditioning for N = len(prompts), as the original pipelines encode them.

    SD-1.5: the normed output of the one encoder. SDXL: the inputs of both encoders' last layers
    side by side, the second's projected end token as `pooled`, and (side, side, 0, 0, side, side)
    as `time_ids`.
    """
    prompts = [repaired(prompt) for prompt in prompts]
    embeds = []
    pooled = None
    for tokenizer, encoder in zip(pipe.tokenizers, pipe.text_encoders):
        ids = tokenize(tokenizer, prompts, encoder).to(pipe.device)
        with on_device(encoder, pipe.device, pipe.offload):
            penultimate, last, end = encoder.text_model(ids)
            if pipe.is_sdxl and encoder.config.projection_dim:
                pooled = encoder.text_projection(end)
        embeds.append(penultimate if pipe.is_sdxl else last)
    cond = Conditioning(torch.cat(embeds, dim=-1), pooled)
    if pipe.is_sdxl:
        side = pipe.side(resolution)
        cond.time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts),
                                     dtype=torch.float32, device=pipe.device)
    return cond


def repaired(prompt: str) -> str:
    """A prompt as the official code's slow tokenizers have it: by ftfy, if that is installed.

    Curly quotes, full-width signs and HTML entities become plain. Judges read what was written.
    """
    if prompt.isascii() and prompt.isprintable() and "&" not in prompt:
        return prompt                   # ftfy changes nothing here
    try:
        from ftfy import fix_text
    except ImportError:
        _miss_ftfy()
        return prompt
    return fix_text(prompt)


@functools.cache
def _miss_ftfy() -> None:
    """Say it once."""
    if main_process():
        tqdm.write("warning: prompts with curly quotes, full-width signs or HTML entities get "
                   "other tokens than in the official code, which repairs them; pip install ftfy",
                   file=sys.stderr)


def tokenize(tokenizer, texts: list[str], clip: CLIP) -> torch.Tensor:
    """Token ids [N, L] at the length that a CLIP's text tower reads."""
    return torch.tensor(tokenizer(texts, padding="max_length", truncation=True,
                                  max_length=clip.config.text.max_position_embeddings).input_ids)


@torch.no_grad()
def judge_features(pipe: Pipeline, judge: CLIP, prompts: list[str]) -> torch.Tensor:
    """The judge's text features [N, P]. All CLIPs share one vocabulary; padding does not matter."""
    with on_device(judge.text_model, pipe.device, pipe.offload):
        return judge.text_features(tokenize(pipe.tokenizers[0], prompts, judge).to(pipe.device))


def negative(pipe: Pipeline, conditioning: Conditioning,
             encoded: Conditioning | None = None) -> Conditioning:
    """The unconditional side of guidance for one Conditioning: zeros, or "" encoded (N = 1)."""
    if encoded is None:
        other = conditioning.map(torch.zeros_like)
    else:
        n = len(conditioning.prompt_embeds)
        other = encoded.map(lambda t: t.expand(n, *t.shape[1:]))
    return replace(other, time_ids=conditioning.time_ids)


def encode_empty(pipe: Pipeline) -> Conditioning | None:
    """"" encoded (N = 1), or None where the model's negative conditioning is all zero."""
    return None if pipe.zero_negative else encode_prompts(pipe, [""])


def guided_noise(pipe: Pipeline, latents: torch.Tensor, timestep: torch.Tensor | float,
                 cond: Conditioning, uncond: Conditioning | None,
                 guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance: one forward of the UNet over [unconditional; conditional].

    Latents [N, C, H, W] at `timestep`, one number or [N] -> noise_pred [N, C, H, W], fp32. With
    `uncond` None or guidance_scale 1 only the conditional half is computed.
    """
    n = len(latents)
    if not isinstance(timestep, torch.Tensor):  # filled on the device: a copy would wait for it
        timestep = torch.full((n,), timestep, device=latents.device)
    fill = pipe.calls.fill
    latents, timestep, cond = fill(latents), fill(timestep), cond.map(fill)
    guided = uncond is not None and guidance_scale != 1
    if guided:
        cond = Conditioning.cat([uncond.map(fill), cond])
        latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
    pipe.calls.count(len(latents))
    out = pipe.unet(latents, timestep, cond.prompt_embeds, cond.pooled, cond.time_ids).float()
    if guided:
        unconditional, conditional = out.chunk(2)
        out = unconditional + guidance_scale * (conditional - unconditional)
    return out[:n]


@torch.no_grad()
def decode(pipe: Pipeline, latents: torch.Tensor, chunk: int = 16) -> torch.Tensor:
    """Scaled latents [N, C, h, w] -> pictures [N, 3, H, W] in about [-1, 1], fp32."""
    dtype = pipe.vae.post_quant_conv.weight.dtype
    return torch.cat([pipe.vae.decode(part.to(dtype)).float() for part in latents.split(chunk)])


@torch.no_grad()
def generate_latents(pipe: Pipeline, prompts: list[str], seeds: list[int], steps: int = 20,
                     guidance_scale: float = 5.0, eta: float = 0.0,
                     resolution: int | None = None) -> torch.Tensor:
    """DDIM from noise to clean latents [N, C, h, w]: eta 0 deterministic, eta 1 SPO's sampler."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = pipe.latent_shape(resolution)

    def draw() -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(pipe.device)

    latents = draw()
    cond = encode_prompts(pipe, prompts, resolution)
    uncond = negative(pipe, cond, encode_empty(pipe))
    schedule = pipe.schedule
    for t, previous in schedule.previous(steps).items():
        noise_pred = guided_noise(pipe, latents, t, cond, uncond, guidance_scale)
        mean, std = ddim.step_gaussian(schedule, latents, noise_pred, t, previous, eta)
        latents = mean + std * draw() if eta > 0 else mean
    return latents


def generate(pipe: Pipeline, prompts: list[str], seeds: list[int], batch: int = 16,
             **settings) -> torch.Tensor:
    """Pictures [N, 3, H, W] in [0, 1], fp32, on the CPU; `settings` are generate_latents'."""
    images = []
    for i in range(0, len(prompts), batch):
        latents = generate_latents(pipe, prompts[i:i + batch], seeds[i:i + batch], **settings)
        images.append((decode(pipe, latents, batch) / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Pictures [N, 3, H, W] in [0, 1] -> PIL."""
    pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().cpu()
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def label(text: str, width: int, size: int) -> Image.Image:
    """A text, black on white, `width` pixels wide, at most six lines of letters `size` high."""
    font = ImageFont.load_default(size)
    lines = textwrap.wrap(text, max(1, int(width / font.getlength("n"))), max_lines=6,
                          placeholder="…") or [""]
    out = Image.new("RGB", (width, round(1.4 * size) * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(out).text((0, round(1.4 * size) * i), line, "black", font)
    return out


def grid(images: torch.Tensor, columns: int, gap: int = 4, names: Sequence[str] = (),
         captions: Sequence[str] = ()) -> Image.Image:
    """Pictures [N, 3, H, W] in [0, 1] side by side on white, row by row.

    `names`: of the rows, at their left. `captions`: of the first pictures, above them.
    """
    height, width = images.shape[2:]
    size = max(10, width // 28)
    left = gap + (max(64, width // 4) if names else 0)
    heads = [label(caption, width, size) for caption in captions]
    tops, bottom = [], gap
    for begin in range(0, len(images), columns):
        tops.append(bottom + max((h.height for h in heads[begin:begin + columns]), default=0))
        bottom = tops[-1] + height + gap
    canvas = Image.new("RGB", (left + columns * (width + gap), bottom), "white")
    for name, top in zip(names, tops):
        canvas.paste(label(name, left - 2 * gap, size), (gap, top))
    for i, image in enumerate(to_pil(images)):
        x, y = left + i % columns * (width + gap), tops[i // columns]
        canvas.paste(image, (x, y))
        if i < len(heads):
            canvas.paste(heads[i], (x, y - heads[i].height))
    return canvas
