"""CLIP, and the step-aware preference model (SPM) that judges for SPO (paper, section 4.2).

One CLIP serves four roles, told apart only by configuration:

    SD text encoders   the text tower alone (CLIP-L; OpenCLIP bigG with a projection)
    PickScore          both towers (CLIP-H), fine-tuned on human preferences between clean pictures
    SPM                PickScore whose vision tower also gets the timestep, by adaptive layer norm
    step-blind SPM     the same training without the timestep (Table 5's "w/o step con.")

Parameter names equal the official files' (transformers layout; SPM files add the prefix `model.`).

Shapes: N texts or pictures, L tokens, D width, P width of the shared space.
"""
import functools
import math
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

MEAN = (0.48145466, 0.4578275, 0.40821073)      # pixel statistics that every CLIP was trained with
STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


@dataclass
class TowerConfig:
    """What shapes one transformer (`text_config`, `vision_config`), with transformers' defaults."""
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408                 # text only
    max_position_embeddings: int = 77       # text only
    eos_token_id: int | None = None         # text only; None: the largest id ends a prompt
    image_size: int = 224                   # vision only
    patch_size: int = 32                    # vision only

    @classmethod
    def from_json(cls, config: dict, **defaults) -> "TowerConfig":
        """Keep the known fields of a `config.json`.

        An end token of 2 is a mistake in old files, OpenAI's too: as in transformers it says
        nothing.
        """
        config = defaults | config
        end = config.pop("eos_token_id", None)
        if type(end) is int and end > 2:
            config["eos_token_id"] = end
        if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
            raise ValueError(f"CLIP config: hidden_act={config['hidden_act']!r} "
                             f"is none of {sorted(ACTIVATIONS)}")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


@dataclass
class CLIPConfig:
    """Which towers there are, the shared space's width, and whether vision gets the timestep."""
    text: TowerConfig = field(default_factory=TowerConfig)
    vision: TowerConfig | None = None
    projection_dim: int | None = None       # None: no projection, as in SD-1.5's text encoder
    step_aware: bool = False
    flow: bool = False                      # an SPM of a flow's predictions (ddim.told)

    @classmethod
    def from_json(cls, config: dict, step_aware: bool = False) -> "CLIPConfig":
        """From transformers: of a whole CLIP (`text_config` inside) or of a text encoder alone."""
        if "text_config" not in config:
            projected = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
            return cls(TowerConfig.from_json(config), None,
                       config["projection_dim"] if projected else None)
        vision = TowerConfig.from_json(config["vision_config"], hidden_size=768,
                                       intermediate_size=3072, num_attention_heads=12)
        return cls(TowerConfig.from_json(config["text_config"]), vision,
                   config.get("projection_dim", 512), step_aware, config.get("flow", False) is True)


def clip_h(step_aware: bool = False) -> CLIPConfig:
    """CLIP ViT-H/14: PickScore, HPSv2 and both official SPM files, which carry no configuration."""
    return CLIPConfig(TowerConfig(1024, 4096, 24, 16, "gelu"),
                      TowerConfig(1280, 5120, 32, 16, "gelu", patch_size=14), 1024, step_aware)


def clip_l() -> CLIPConfig:
    """CLIP ViT-L/14 as OpenAI released it, for the Aesthetic score and GenEval's colours."""
    return CLIPConfig(TowerConfig(768, 3072, 12, 12),
                      TowerConfig(1024, 4096, 24, 16, patch_size=14), 768)


def timestep_embedding(timestep: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of raw timesteps [N] in 0..999 -> [N, width], cosines first (reference [17])."""
    half = width // 2
    step = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[:, None] * torch.exp(-math.log(10_000) * step / half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention; `causal` for text."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} attention heads cannot share {width} channels")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)   # [N, heads, L, D / heads]
        return self.out_proj(h.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps with the checkpoint's own activation between them."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def _modulation(width: int, parts: int, gates: tuple[int, ...] = ()) -> nn.Sequential:
    """Time embedding -> `parts` vectors by SiLU and a linear map; zeros at first, gates ones."""
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    with torch.no_grad():
        for gate in gates:
            linear.bias[gate * width:(gate + 1) * width] = 1
    return nn.Sequential(nn.SiLU(), linear)


class Layer(nn.Module):
    """A pre-norm transformer layer; with adaLN the time embedding shifts, scales and gates it."""

    def __init__(self, config: TowerConfig, step_aware: bool):
        super().__init__()
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if step_aware:
            self.adaLN_modulation = _modulation(config.hidden_size, 6, gates=(2, 5))

    def forward(self, x: torch.Tensor, causal: bool = False,
                time: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [N, L, D] -> [N, L, D]; `time` [N, D] scales, shifts and gates (adaLN)."""
        if time is None:
            x = x + self.self_attn(self.layer_norm1(x), causal)
            return x + self.mlp(self.layer_norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.adaLN_modulation(time).unsqueeze(1).chunk(6, dim=-1))
        x = x + gate1 * self.self_attn(self.layer_norm1(x) * (1 + scale1) + shift1, causal)
        return x + gate2 * self.mlp(self.layer_norm2(x) * (1 + scale2) + shift2)


class Encoder(nn.Module):
    """The stack of layers; a module of its own only because the official names have it."""

    def __init__(self, config: TowerConfig, step_aware: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(config, step_aware) for _ in range(config.num_hidden_layers))


class TextEmbeddings(nn.Module):
    """Token plus position embedding."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextTower(nn.Module):
    """Causal transformer over token ids."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.end = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids [N, L] -> input of the last layer, normed output, the same at the first end token.

        Shapes [N, L, D], [N, L, D], [N, D]. SDXL conditions on the first, SD-1.5 on the second,
        scores use the third.
        """
        x = penultimate = self.embeddings(ids)
        for layer in self.encoder.layers:
            penultimate, x = x, layer(x, causal=True)
        last = self.final_layer_norm(x)
        # The end token's first place, padding or not. It has the largest id, unless tokens were
        # added after it; then the configuration tells it.
        if self.end is not None:
            ids = ids.masked_fill(ids == self.end, torch.iinfo(ids.dtype).max)
        return penultimate, last, last[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]


class VisionEmbeddings(nn.Module):
    """Patches, a class token in front, positions."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.class_embedding, std=0.02)
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)       # [N, L - 1, D]
        first = self.class_embedding.expand(len(pixels), 1, -1).to(patches.dtype)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """Vision transformer; if `step_aware`, the time embedding modulates its layers and output."""

    def __init__(self, config: TowerConfig, step_aware: bool):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # "layrnorm": the official spelling
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, step_aware)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if step_aware:
            self.adaLN_modulation = _modulation(config.hidden_size, 2)

    def forward(self, pixels: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised pixels [N, 3, S, S], time embedding [N, D] -> [N, D]."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x, time=time)
        x = self.post_layernorm(x[:, 0])
        if time is None:
            return x
        shift, scale = self.adaLN_modulation(time).chunk(2, dim=-1)
        return x * (1 + scale) + shift


class TimeEmbedder(nn.Module):
    """Timestep -> time embedding, as in DiT."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.normal_(self.mlp[2].weight, std=0.02)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        first = self.mlp[0]
        return self.mlp(timestep_embedding(timestep, first.in_features).to(first.weight.dtype))


class CLIP(nn.Module):
    """Text tower, and vision tower if the configuration has one."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        shared, text, vision = config.projection_dim, config.text, config.vision
        self.text_model = TextTower(text)
        if shared is not None:
            self.text_projection = nn.Linear(text.hidden_size, shared, bias=False)
        if vision is not None:
            self.vision_model = VisionTower(vision, config.step_aware)
            self.visual_projection = nn.Linear(vision.hidden_size, shared, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
            if config.step_aware:
                self.t_embedder = TimeEmbedder(vision.hidden_size)

    def text_features(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [N, L] -> unit vectors [N, P], fp32: f_CLIP-T of Eq. 3."""
        return F.normalize(self.text_projection(self.text_model(ids)[2]).float(), dim=-1)

    def image_features(self, pixels: torch.Tensor,
                       timestep: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised pixels [N, 3, S, S] and timesteps [N] in 0..999 -> unit vectors [N, P], fp32.

        This is f_CLIP-V of Eq. 3. A model that is not step-aware ignores the timestep; a step-aware
        one raises ValueError without it.
        """
        time = None
        if self.config.step_aware:
            if timestep is None:
                raise ValueError("this CLIP is step-aware: image_features needs the timestep")
            time = self.t_embedder(timestep)
        pooled = self.vision_model(pixels.to(self.visual_projection.weight.dtype), time)
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    def score(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """tau * <image, text> [N], the exponent of Eq. 3; about 20 for PickScore (tau = 100)."""
        return self.logit_scale.float().exp() * (image_features * text_features).sum(-1)


def make_step_aware(clip: CLIP, flow: bool = False) -> CLIP:
    """A new SPM that scores bit for bit as `clip` (PickScore), at every timestep (section 4.2)."""
    spm = CLIP(replace(clip.config, step_aware=True, flow=flow))
    spm.load_state_dict(clip.state_dict(), strict=False)        # adaLN and time embedder are new
    spm.to(clip.visual_projection.weight.device, clip.visual_projection.weight.dtype)
    spm.logit_scale.data = clip.logit_scale.data.clone()        # stays fp32 when the rest is not
    return spm


@functools.lru_cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """MEAN and STD [1, 3, 1, 1], once per device: a copy waits for all that a GPU was given."""
    return tuple(torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [N, 3, H, W] in [0, 1], by CLIP's statistics."""
    mean, std = _statistics(pixels.device)
    return (pixels - mean) / std


def preprocess_decoded(images: torch.Tensor, size: int, clamp_first: bool = False,
                       antialias: bool = False) -> torch.Tensor:
    """What the SPM sees: decoded pictures [N, 3, H, W] -> normalised pixels [N, 3, size, size].

    Pictures lie in about [-1, 1]. Shorter side to `size` by bicubic without anti-aliasing, centre
    crop, then clamp: differentiable and on the GPU, unlike PIL. SPM *training* in the official code
    clamps before resizing as well (`clamp_first`). With `antialias` it is what PickScore sees of a
    clean picture, up to PIL's rounding.
    """
    images = images.float()
    if clamp_first:
        images = images.clamp(-1, 1)
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        short = min(height, width)
        target = (int(height * size / short + 0.5), int(width * size / short + 0.5))
        images = F.interpolate(images, target, mode="bicubic", align_corners=False,
                               antialias=antialias)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        images = images[..., top:top + size, left:left + size]
    return _normalised((images / 2 + 0.5).clamp(0, 1))


def upright(image: Image.Image) -> Image.Image:
    """A picture as its EXIF turns it; damaged EXIF says nothing about the pixels."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:       # PIL raises what it likes
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as RGB, transparency over white, as transformers 5.23 has it (5.17 dropped it)."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def preprocess_pil(images: list[Image.Image], size: int) -> torch.Tensor:
    """What PickScore and its kin see: pictures -> normalised pixels [N, 3, size, size].

    RGB, shorter side to `size` by PIL's anti-aliased bicubic, centre crop.
    """
    batch = []
    for image in images:
        short = min(image.size)
        target = tuple(size if side == short else int(size * side / short) for side in image.size)
        image = to_rgb(image).resize(target, Image.Resampling.BICUBIC)
        left, top = (target[0] - size) // 2, (target[1] - size) // 2
        batch.append(np.asarray(image.crop((left, top, left + size, top + size))))
    return _normalised(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 255)


def preference_loss(win_scores: torch.Tensor, lose_scores: torch.Tensor,
                    label: torch.Tensor) -> torch.Tensor:
    """Eq. 3 as a cross entropy [N]; `label`: preference for the first, 1, 0 or 0.5 (tie)."""
    margin = win_scores - lose_scores           # log p / (1 - p), Eq. 3
    return -(label * F.logsigmoid(margin) + (1 - label) * F.logsigmoid(-margin))
