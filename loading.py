"""Putting networks together: from a folder in the diffusers layout, a hub id, or a single-file checkpoint.

    pipe = load_pipeline("tiny")            # or "sd15", "sdxl", a folder, a hub id, a .safetensors file

SD-1.5, SDXL and the embedded tiny model take the same path; only their configuration files differ.
"""
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import torch

import ddim
from clip_spm import CLIP, CLIPConfig, TowerConfig, clip_h, clip_l
from unet import UNet, UNetConfig
from vae import VAE, TinyDecoder, TinyDecoderConfig, VAEConfig
from weights import (
    InputError,
    clean,
    fetch,
    fetch_weights,
    find_weights,
    from_open_clip,
    is_sdxl,
    layout,
    load_strict,
    original_tiny_decoder,
    original_unet_name,
    original_vae_name,
    read_json,
    read_weights,
    rename,
    take,
    weight_file,
)

TINY = Path(__file__).resolve().parent / "tiny" / "model"
NAMES = {
    "tiny": str(TINY),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",      # the original repository is gone
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
SDXL_VAE = "madebyollin/sdxl-vae-fp16-fix"                      # SDXL's stock VAE overflows in half precision
TAESD = ("madebyollin/taesd", "madebyollin/taesdxl")             # small decoders of SD-1.5's and of SDXL's latents
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
FILES = ["model_index.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*", *(f"{part}/config.json" for part in PARTS)]    # and weights
SPMS = {name: f"SPO-Diffusion-Models/Step-Aware_Preference_Models/{file}_step-aware_preference_model.bin"
        for name, file in (("sd15", "sd-v1-5"), ("sdxl", "sdxl"))}
# Single files carry no configuration; these are the official ones.
SDXL_UNET = UNetConfig(
    sample_size=128, block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
SINGLE_UNETS = {"sd15": UNetConfig(), "sdxl": SDXL_UNET}
SPARE = ("first_stage_model.loss.", "first_stage_model.model_ema.", "cond_stage_model.transformer.text_projection.")     # left by training
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1)

NEGATIVE = {"": None, "zeros": True, "encoded": False}     # what --negative says, for load_pipeline


@dataclass
class Pipeline:
    """The parts of a text-to-image model. The UNet and the VAE live on `device`; everything is frozen."""
    name: str
    tokenizers: list
    text_encoders: list[CLIP]
    unet: UNet
    vae: VAE
    schedule: ddim.Schedule
    zero_negative: bool = False         # SDXL trains and samples with all-zero negative conditioning
    offload: bool = False               # the text encoders wait on the CPU until they are needed
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_sdxl(self) -> bool:
        """True if the UNet also wants pooled text and picture sizes."""
        return self.unet.config.addition_embed_type == "text_time"

    def side(self, resolution: int | None = None) -> int:
        """Side of a picture in pixels: `resolution`, or the model's own for 0 and None."""
        return resolution or self.unet.config.sample_size * self.vae.factor

    def check_resolution(self, resolution: int) -> None:
        """InputError for pictures that no whole number of latent positions makes; 0 is the model's own."""
        if resolution < 0 or resolution % self.vae.factor:
            raise InputError(f"--resolution {resolution}: must be a multiple of {self.vae.factor}, the VAE's reduction of {self.name}")

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of a latent, at the model's own resolution or for pictures of `resolution` pixels a side."""
        side = self.unet.config.sample_size if resolution is None else resolution // self.vae.factor
        return self.unet.config.in_channels, side, side


def vae_dtype(config: VAEConfig, unet: UNetConfig, dtype: torch.dtype) -> torch.dtype:
    """fp32 for a VAE that would overflow (`force_upcast`), decided before its weights are read: rounded ones stay rounded."""
    overflows = dtype == torch.float16 or unet.addition_embed_type == "text_time"       # SD-1.5's asks for it too once diffusers saved it
    return torch.float32 if config.force_upcast and overflows else dtype


def laid_out(vae: VAE) -> VAE:
    """Channels last on a CPU: all convolutions, about 1.8 times as fast. On a GPU it pays once compiled; a CPU's UNet gains nothing."""
    return vae.to(memory_format=torch.channels_last) if next(vae.parameters()).device.type == "cpu" else vae


def _component(cls, config_cls, folder: Path, dtype: torch.dtype, device: torch.device, unet: UNet | None = None):
    """One network from its folder: config.json gives the shape, the weight file the numbers. A VAE's dtype depends on its `unet`."""
    config = read_config(config_cls, folder / "config.json")
    module, path = build(cls, config, folder / "config.json"), weight_file(folder)
    load_strict(module, clean(read_weights(path)), path, vae_dtype(config, unet.config, dtype) if cls is VAE else dtype, device)
    return laid_out(module) if cls is VAE else module


def fetch_model(source: str) -> Path:
    """The folder of a model in the diffusers layout; from the hub only what is used, in one precision."""
    root = fetch(source, FILES)
    return fetch_weights(source, root, [part for part in PARTS if (root / part).is_dir()])


def fetch_part(source: str, part: str = "") -> Path:
    """The folder of one network: `part` of a whole model, or a folder or hub id that holds nothing else."""
    root = fetch(source, [f"{part}/config.json", "config.json"])
    part = part if (root / part).is_dir() else ""
    return fetch_weights(source, root, [part]) / part


@contextmanager
def blaming(path: Path):
    """What goes wrong inside is the fault of this configuration file: InputError of one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if type(error) is ValueError else f"not a configuration of this kind of network, {type(error).__name__}: "
        raise InputError(f"{path}: {kind}{(str(error).splitlines() or [''])[0][:200]}") from None


def fits(value, kind) -> bool:
    """Is this, from a configuration file, of a field's type, and a number of sensible size? Kinds may be dataclasses themselves."""
    if is_dataclass(kind):
        return isinstance(value, kind) and all(fits(getattr(value, n), k) for n, k in get_type_hints(kind).items())
    if isinstance(kind, UnionType):
        return any(fits(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and len(value) > 0 and all(fits(v, get_args(kind)[0]) for v in value)
    if kind in (int, float):
        return type(value) in (int, kind) and 0 < value < 100_000
    return isinstance(value, kind)


def read_config(cls, path: Path):
    """A network's shape from its config.json."""
    with blaming(path):
        config = cls.from_json(read_json(path))
        for name, kind in get_type_hints(cls).items():
            if not fits(value := getattr(config, name), kind):
                raise ValueError(f"{name}={value!r} is no value for this network")
    return config


def build(cls, config, path: Path):
    """A network on the meta device; InputError that names `path`, where its configuration is from, if there can be none of this shape."""
    with blaming(path), torch.device("meta"):
        return cls(config)


def load_clip(source: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
              config: CLIPConfig | None = None) -> CLIP:
    """A two-tower CLIP (PickScore, or an SPM if the file has adaLN weights) from a folder, hub id or weight file.

    The configuration is the `config.json` beside the weights, or `config` where there is none (official SPM files).
    """
    if source.rstrip("/") == SPMS["sdxl"].rpartition("/")[0] and not Path(source).exists():
        raise InputError(f"{source}: holds two models of 5.2 GB; say which: {' or '.join(SPMS.values())}")
    path = fetch_part(source)
    spms = sorted(path.glob("*step-aware_preference_model.bin")) if path.is_dir() and not find_weights(path) else []
    if len(spms) > 1:
        raise InputError(f"{source}: holds several models; say which: {', '.join(map(str, spms))}")
    file = path if path.is_file() else spms[0] if spms else weight_file(path)
    weights = clean(read_weights(file))
    step_aware = any("adaLN_modulation" in key for key in weights)
    beside = file.parent / "config.json"
    config = read_config(CLIPConfig, beside) if beside.is_file() else config or clip_h()
    clip = build(CLIP, replace(config, step_aware=step_aware), beside)
    return load_strict(clip, weights, file, dtype, device)


def load_tiny_decoder(source: str, pipe: Pipeline, dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """A small decoder for this model's latents: `taesd` (the official one for its kind), a folder, hub id or weight file.

    Weight files are diffusers' AutoencoderTiny, or the original's decoder; the shape is that of the `config.json` beside them, else
    the official one. Raises InputError where they are something else, or speak of other latents or pictures than `pipe`.
    """
    path = fetch_part({"taesd": TAESD[pipe.is_sdxl]}.get(source, source))
    file = path if path.is_file() else weight_file(path)
    beside = file.parent / "config.json"
    config = read_config(TinyDecoderConfig, beside) if beside.is_file() else TinyDecoderConfig()
    decoder = build(TinyDecoder, config, beside)
    for what, ours, theirs in (("channels in a latent", config.latent_channels, pipe.unet.config.in_channels),
                               ("pixels a side per latent position", decoder.factor, pipe.vae.factor)):
        if ours != theirs:
            raise InputError(f"{source}: a decoder with {ours} {what}, but {pipe.name} has {theirs}")
    load_strict(decoder, original_tiny_decoder(read_weights(file)), file, dtype, pipe.device)
    return decoder.to(memory_format=torch.channels_last)


def _tokenizer(folder: Path):
    """A CLIP tokenizer from its folder."""
    from transformers import CLIPTokenizer
    if not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder}: no tokenizer (tokenizer_config.json, vocab.json, merges.txt)")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer(["a word"])
    except Exception as error:          # whatever its readers, in two languages, make of broken files
        raise InputError(f"{folder}: broken tokenizer ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})") from None
    return tokenizer


def first_tokenizer(source: str, tokenizer: str = ""):
    """The first tokenizer of a model (as load_pipeline takes it, "" for none) alone; CLIP-H and CLIP-L share it."""
    single = not source or source.endswith((".safetensors", ".ckpt"))
    return _tokenizer(fetch(tokenizer or NAMES["sd15"] if single else NAMES.get(source, source), ["tokenizer/*"]) / "tokenizer")


def _single_file(path: Path, dtype: torch.dtype, device: torch.device, tokenizer: str, prediction_type: str,
                 shapes: dict | None = None, own_vae: bool = True) -> Pipeline:
    """A checkpoint in the original layout: SD-1.5 (`cond_stage_model`) or SDXL (`conditioner.embedders`).

    The file holds no configuration: the official shapes are assumed, or `shapes` (unet, vae, text encoders' configs).
    Without `own_vae` its VAE, if it has one, is passed over, and the pipeline has none yet.
    """
    weights = {k: v for k, v in read_weights(path).items() if not k.startswith(SPARE)}
    if not any(k.startswith("model.diffusion_model.") for k in weights):
        raise InputError(f"{path}: no model.diffusion_model.* tensors; not a Stable Diffusion checkpoint in the original layout; "
                         f"the file looks like {layout(weights)}")
    if own_vae and not any(k.startswith("first_stage_model.") for k in weights):
        raise InputError(f"{path}: has no VAE (first_stage_model.*); give one with --vae")
    sdxl = is_sdxl(weights)
    bigg = CLIPConfig(TowerConfig(1280, 5120, 32, 20, "gelu"), None, 1280)
    text_l = replace(clip_l(), vision=None, projection_dim=None)
    unet_config, vae_config, *texts = shapes or (
        SINGLE_UNETS["sdxl" if sdxl else "sd15"], VAEConfig(scaling_factor=0.13025, force_upcast=True) if sdxl else VAEConfig(),
        text_l, bigg)
    with torch.device("meta"):
        unet, vae, encoders = UNet(unet_config), VAE(vae_config), [CLIP(c) for c in texts[:1 + sdxl]]
    up = [kind.startswith("CrossAttn") for kind in unet_config.up_block_types]
    parts = [(unet, rename(unet, take(weights, "model.diffusion_model."),
                           lambda k: original_unet_name(k, unet_config.layers_per_block, up))),
             (vae, rename(vae, take(weights, "first_stage_model."), lambda k: original_vae_name(k, len(vae_config.block_out_channels)))),
             (encoders[0], take(weights, "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."))]
    if sdxl:
        second = from_open_clip(take(weights, "conditioner.embedders.1.model."))
        second.pop("logit_scale", None)
        parts.append((encoders[1], second))
    for module, tensors in parts:
        kind = vae_dtype(vae_config, unet_config, dtype) if module is vae else dtype
        if own_vae or module is not vae:
            load_strict(module, clean(tensors), path, kind, device, weights)
    vae = laid_out(vae) if own_vae else None
    home = fetch(tokenizer or NAMES["sdxl" if sdxl else "sd15"], ["tokenizer*/*"])
    tokenizers = [_tokenizer(home / name) for name in ("tokenizer", "tokenizer_2")[:1 + sdxl]]
    if "ztsnr" in weights:
        raise InputError(f"{path}: trained with a zero-terminal-SNR schedule, which is not supported")
    prediction_type = prediction_type or ("v_prediction" if "v_pred" in weights else "epsilon")     # a marker that some files carry
    schedule = ddim.Schedule.from_json(dict(SCHEDULER, prediction_type=prediction_type))
    return Pipeline(str(path), tokenizers, encoders, unet, vae, schedule, zero_negative=sdxl, device=device)


def original_names(unet: UNet) -> dict[str, str]:
    """The UNet's parameter names -> those in a single file (`model.diffusion_model.` left out)."""
    layers, up = unet.config.layers_per_block, unet.config.up_attentions
    return {key: original_unet_name(key, layers, up) for key in unet.state_dict()}


def _folder(source: str, root: Path, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """A checkpoint in the diffusers layout."""
    index = read_json(root / "model_index.json")
    with blaming(root / "scheduler/scheduler_config.json"):
        schedule = ddim.Schedule.from_json(read_json(root / "scheduler/scheduler_config.json"))
    names = ("", "_2") if "text_encoder_2" in index else ("",)
    tokenizers = [_tokenizer(root / f"tokenizer{n}") for n in names]
    encoders = [_component(CLIP, CLIPConfig, root / f"text_encoder{n}", dtype, device) for n in names]
    unet = _component(UNet, UNetConfig, root / "unet", dtype, device)
    return Pipeline(source, tokenizers, encoders, unet, _component(VAE, VAEConfig, root / "vae", dtype, device, unet), schedule,
                    bool(index.get("force_zeros_for_empty_prompt", len(names) > 1)), device)         # diffusers' default for SDXL


def load_pipeline(source: str = "tiny", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                  unet: str | None = None, vae: str | None = None, prediction_type: str = "", tokenizer: str = "",
                  zero_negative: bool | None = None) -> Pipeline:
    """Load a model by name (`tiny`, `sd15`, `sdxl`), folder or hub id in the diffusers layout, or single-file checkpoint.

    `unet` and `vae` replace those parts by the ones of another folder or hub id (a full fine-tune; SDXL's fp16-safe VAE).
    `prediction_type` (epsilon, v_prediction) and `tokenizer` (a folder or hub id with `tokenizer/`) are for single files,
    which carry neither. `zero_negative` says whether guidance's other side is all zero (None: as the model was trained).
    SDXL's stock VAE stays fp32 (`force_upcast`). Raises InputError where a file is missing or does not fit.
    """
    device, name = torch.device(device), NAMES.get(source, source)
    if name.endswith((".safetensors", ".ckpt")):
        pipe = _single_file(fetch(name, []), dtype, device, tokenizer, prediction_type, own_vae=not vae)
    else:
        pipe = _folder(source, fetch_model(name), dtype, device)
        if prediction_type:
            pipe.schedule = replace(pipe.schedule, prediction_type=prediction_type)
    if zero_negative is not None:
        pipe.zero_negative = zero_negative
    if unet:
        pipe.unet = _component(UNet, UNetConfig, fetch_part(unet, "unet"), dtype, device)
    if vae:
        pipe.vae = _component(VAE, VAEConfig, fetch_part(vae, "vae"), dtype, device, pipe.unet)
    wants = pipe.unet.config
    pooled = (pipe.text_encoders[-1].config.projection_dim or 0) + 6 * (wants.addition_time_embed_dim or 0)
    for what, ours, theirs in (("channels of a latent", wants.in_channels, pipe.vae.config.latent_channels),
                               ("numbers a token", wants.cross_attention_dim, sum(e.config.text.hidden_size for e in pipe.text_encoders)),
                               ("numbers of pooled text and sizes", wants.projection_class_embeddings_input_dim or pooled, pooled)):
        if ours != theirs:
            raise InputError(f"{source}: the UNet wants {ours} {what}, the other parts have {theirs}; it is another model's, or inpaints")
    return pipe
