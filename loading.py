"""Putting networks together: from a folder in the diffusers layout, a hub id, or a single file.

    pipe = load_pipeline("tiny")        # or "sd15", "sdxl", a folder, a hub id, a .safetensors file

SD-1.5, SDXL and the embedded tiny model take the same path; only their configuration files differ.
"""
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import torch
from torch.overrides import TorchFunctionMode

import ddim
from calls import Calls
from clip_spm import CLIP, CLIPConfig, TowerConfig, clip_h, clip_l
from unet import UNet, UNetConfig
from vae import VAE, TinyDecoder, TinyDecoderConfig, VAEConfig
from weights import (
    InputError,
    clean,
    fetch,
    fetch_weights,
    find_weights,
    first_line,
    from_open_clip,
    is_sdxl,
    layout,
    load_strict,
    original_tiny_decoder,
    original_unet_name,
    original_vae_name,
    preset_of,
    read_header,
    read_json,
    read_weights,
    rename,
    take,
    weight_file,
)

TINY = Path(__file__).resolve().parent / "tiny" / "model"
NAMES = {
    "tiny": str(TINY),
    "tiny-flow": str(TINY.parent / "flow"),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",      # the original repository is gone
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
SDXL_VAE = "madebyollin/sdxl-vae-fp16-fix"      # SDXL's stock VAE overflows in half precision
TAESD = ("madebyollin/taesd", "madebyollin/taesdxl")    # small decoders, SD-1.5's and SDXL's
SPM_HOME = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
SPMS = {"sd15": f"{SPM_HOME}/sd-v1-5_step-aware_preference_model.bin",
        "sdxl": f"{SPM_HOME}/sdxl_step-aware_preference_model.bin"}
JUDGES = {preset: {"spm": spm, "pickscore": "yuvalkirstain/PickScore_v1"}       # for load_clip
          for preset, spm in SPMS.items()} | {
    tiny: {"spm": f"{TINY}/spm", "step-blind": f"{TINY}/spm_step_blind",
           "pickscore": f"{TINY}/pickscore"} for tiny in ("tiny", "tiny-flow")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SINGLE = (".safetensors", ".ckpt")      # how single-file checkpoints end
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
FILES = ["model_index.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*",
         *(f"{part}/config.json" for part in PARTS)]        # of a folder, besides weights

# Single files carry no configuration; these are the official ones.
SDXL_UNET = UNetConfig(
    sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816)
SINGLE_UNETS = {"sd15": UNetConfig(), "sdxl": SDXL_UNET}
TEXT_L = replace(clip_l(), vision=None, projection_dim=None)
TEXT_G = CLIPConfig(TowerConfig(1280, 5120, 32, 20, "gelu"), None, 1280)
SINGLE_PARTS = {"sd15": (VAEConfig(), TEXT_L),
                "sdxl": (VAEConfig(scaling_factor=0.13025, force_upcast=True), TEXT_L, TEXT_G)}
TEXTS = {"sd15": ("cond_stage_model.transformer.",),        # where its text encoders are
         "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")}
SPARE = ("cond_stage_model.transformer.text_projection.",   # left in a file by training
         "conditioner.embedders.1.model.logit_scale")
MOST_LAYERS = 1000      # of a network; SD-1.5 and SDXL have less than a tenth


@dataclass
class Pipeline:
    """The parts of a text-to-image model, all frozen; the UNet and the VAE are on `device`."""
    name: str
    tokenizers: list
    text_encoders: list[CLIP]
    unet: UNet
    vae: VAE
    schedule: ddim.Schedule
    zero_negative: bool = False     # SDXL trains and samples with all-zero negative conditioning
    offload: bool = False           # the text encoders wait on the CPU until they are needed
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    calls: Calls = field(default_factory=Calls)         # what the UNet is asked for: counted, timed

    @property
    def is_sdxl(self) -> bool:
        """True if the UNet also wants pooled text and picture sizes."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def identity(self) -> tuple:
        """What its pictures depend on."""
        return (self.unet, self.vae, *self.text_encoders, *self.tokenizers, self.schedule,
                self.zero_negative)

    def side(self, resolution: int | None = None) -> int:
        """Side of a picture in pixels: `resolution`, or the model's own for 0 and None."""
        return resolution or self.unet.config.sample_size * self.vae.factor

    def check_resolution(self, resolution: int) -> None:
        """InputError for pictures that no whole number of latent positions makes; 0 is fine."""
        if resolution < 0 or resolution % self.vae.factor:
            raise InputError(f"--resolution {resolution}: must be a multiple of "
                             f"{self.vae.factor}, the VAE's reduction of {self.name}")

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of a latent, for pictures of `resolution` pixels a side or the model's own."""
        side = self.unet.config.sample_size if resolution is None else resolution // self.vae.factor
        return self.unet.config.in_channels, side, side


def safe_dtype(config: VAEConfig, unet: UNetConfig, dtype: torch.dtype,
               wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of a VAE in a model of `dtype`: `wanted`, or fp32 where that would overflow.

    If none is wanted, fp16 in the place of bf16: as fast, with an eighth of its rounding, and the
    judge sees the difference (benchmarks/precision.py). Decided before weights are read: rounded
    ones stay rounded. `force_upcast` is said of SDXL's stock VAE, which overflows in both, and of
    SD-1.5's once diffusers has saved it, which would do so in fp16 alone.
    """
    if wanted is None:
        wanted = torch.float16 if dtype == torch.bfloat16 and not config.force_upcast else dtype
    overflows = wanted == torch.float16 or unet.addition_embed_type == "text_time"
    return torch.float32 if config.force_upcast and overflows else wanted


def _planned(cls, config_cls, path: Path, own=None):
    """A network of its configuration's shape, without numbers yet, and its weight file.

    `path`: a folder or weight file. The configuration is the `config.json` beside the weights; if
    there is none, or it speaks of something else than the file, it is `own`.
    """
    file = weight_file(path)
    beside = file.parent / "config.json"
    if own and not (beside.is_file() and (path.is_dir() or "latent_channels" in read_json(beside))):
        return build(cls, own, file), file
    return build(cls, read_config(config_cls, beside), beside), file


def _fill_vae(vae: VAE, weights: dict, file: Path, dtype: torch.dtype,
              device: torch.device) -> None:
    """Numbers for a planned VAE, in diffusers' layout or the original, alone or in a checkpoint.

    Channels last on a CPU, where all of it is convolutions: about 1.8 times as fast. On a GPU that
    is faster only once compiled; for a CPU's UNet it makes no difference.
    """
    levels = len(vae.config.block_out_channels)
    tensors = rename(vae, take(weights, "first_stage_model.") or weights,
                     lambda key: original_vae_name(key, levels))
    load_strict(vae, clean(tensors), file, dtype, device, weights)
    if device.type == "cpu":
        vae.to(memory_format=torch.channels_last)


def fetch_model(source: str) -> Path:
    """The folder or single file of a model, by name, path or hub id; of the hub's what is used."""
    source = NAMES.get(source, source)
    root = fetch(source, FILES)
    return fetch_weights(source, root, [part for part in PARTS if (root / part).is_dir()])


def part_of(root: Path, part: str) -> Path:
    """The folder of a part of a model: another model's if model_index.json says so (`shared`)."""
    index = root / "model_index.json"
    if (root / part).is_dir() or not index.is_file():
        return root / part
    with blaming(index):
        return root / read_json(index).get("shared", "") / part


def fetch_part(source: str, part: str = "") -> Path:
    """The folder of one network: `part` of a whole model, or all of a folder or hub id.

    A whole model may also be one of NAMES.
    """
    source = NAMES.get(source, source) if part else source
    root = fetch(source, [f"{part}/config.json", "config.json"])
    folder = part_of(root, part)
    if part and folder.is_dir():
        return fetch_weights(source, folder.parent, [part]) / part
    return fetch_weights(source, root, [""])


@contextmanager
def option(name: str):
    """What goes wrong inside is told with the option that named the source."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--{name} {error}") from None


def resolve(config) -> None:
    """Fetch, or find, all that a run's options name, before the first weight is read.

    Reading SDXL takes a minute, after which nobody wants to hear of a mistyped path. Options that
    `config` lacks count as empty. Raises InputError that names the option.
    """
    find = dict(model=fetch_model,
                tokenizer=lambda source: _tokenizer(fetch(source, ["tokenizer*/*"]) / "tokenizer"),
                vae=lambda source: weight_file(fetch_part(source, "vae")),
                decoder=lambda source: weight_file(fetch_part(
                    TAESD[config.preset == "sdxl"] if source == "taesd" else source)),
                spm=clip_file, reward=clip_file, pickscore=clip_file)
    given = {name: getattr(config, name, "") for name in find}
    if hasattr(config, "judge") and not config.spm:
        given["spm"] = judge_source(config.model, config.preset, config.judge)
    if config.model.endswith(".safetensors") and os.path.exists(config.model):
        given["tokenizer"] = config.tokenizer or NAMES[preset_of(config.model)]
    for name in filter(given.get, find):
        with option(name):
            find[name](given[name])


@contextmanager
def blaming(path: Path):
    """What goes wrong inside is the fault of this configuration file: InputError of one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        raise InputError(f"{path}: not a configuration of what is known here "
                         f"({type(error).__name__}: {first_line(error, 200)})") from None


def fits(value, kind) -> bool:
    """Is this, from a configuration file, of a field's type, and a number of sensible size?"""
    if isinstance(kind, UnionType):
        return any(fits(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and len(value) > 0 and all(
            fits(v, get_args(kind)[0]) for v in value)
    if kind in (int, float):
        return type(value) in (int, kind) and 0 < value < 100_000
    return isinstance(value, kind)


def read_config(cls, path: Path):
    """A network's shape from its config.json."""
    with blaming(path):
        config = cls.from_json(read_json(path))
        for part in filter(is_dataclass, (config, *vars(config).values())):
            check_fields(part)
    return config


def check_fields(config) -> None:
    """ValueError for values that do not fit, and for more than MOST_LAYERS layers.

    Those would take hours or all memory to build. They are what the fields that count layers,
    blocks and levels amount to.
    """
    for name, kind in get_type_hints(type(config)).items():
        if not fits(getattr(config, name), kind):
            raise ValueError(f"{name}={getattr(config, name)!r} is no value for this network")
    counts = {k: v for k, v in vars(config).items() if "layers" in k or k == "blocks"}
    levels = len(getattr(config, "block_out_channels", "1"))
    layers = levels * math.prod(v if isinstance(v, int) else sum(v) for v in counts.values())
    if layers > MOST_LAYERS:
        raise ValueError(f"{', '.join(f'{k}={v!r}' for k, v in counts.items())} at {levels} "
                         f"levels: {layers:,} layers, no such network has {MOST_LAYERS:,}")


class Undrawn(TorchFunctionMode):
    """Leaves out normal_: on the meta device torch would load its compiler for it, seconds long."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Any other function runs as it is."""
        return None if function is torch.nn.init.normal_ else function(*args, **(kwargs or {}))


def build(cls, config, path: Path):
    """A network on the meta device; InputError if none can have the shape that `path` says."""
    with blaming(path), torch.device("meta"), Undrawn():
        return cls(config)


def clip_file(source: str) -> Path:
    """The weight file of a CLIP: itself, or in a folder, hub id or run folder of spm_train.py."""
    if source.rstrip("/") == SPM_HOME and not Path(source).exists():
        raise InputError(f"{source}: holds two models of 5.2 GB; "
                         f"say which: {' or '.join(SPMS.values())}")
    path = fetch_part(source)
    spms = sorted(path.glob("*step-aware_preference_model.bin"))
    file = find_weights(path) or find_weights(path / "spm")
    if file is None and len(spms) > 1:
        raise InputError(f"{source}: holds several models; say which: {', '.join(map(str, spms))}")
    return file or weight_file(spms[0] if spms else path)


def load_clip(source: str, dtype: torch.dtype = torch.float32,
              device: torch.device | str = "cpu", config: CLIPConfig | None = None,
              step_aware: bool | None = None) -> CLIP:
    """A two-tower CLIP (PickScore, or an SPM if the file has adaLN weights).

    From a folder, hub id or weight file. The configuration is the `config.json` beside the weights,
    or `config` where there is none (official SPM files). InputError for a text encoder and, if
    `step_aware` says which is wanted, for an SPM in PickScore's place or the reverse.
    """
    file = clip_file(source)
    weights = clean(read_weights(file, source))
    knows = any("adaLN_modulation" in key for key in weights)
    beside = file.parent / "config.json"
    config = read_config(CLIPConfig, beside) if beside.is_file() else config or clip_h()
    if config.vision is None:
        raise InputError(f"{source}: a text encoder, without eyes; a CLIP that sees pictures is "
                         "wanted, as PickScore or an SPM")
    if step_aware not in (None, knows):
        raise InputError(f"{source}: is {'an SPM, which is' if knows else 'not'} step-aware; "
                         f"{'an SPM' if step_aware else 'PickScore or another CLIP'} is wanted")
    return load_strict(build(CLIP, replace(config, step_aware=knows), beside), weights, file,
                       dtype, device)


def load_judging(named: str, source: str, dtype: torch.dtype, pipe: Pipeline,
                 step_aware: bool) -> CLIP:
    """A CLIP to judge the pictures of `pipe`, whose words it must know; `named` by this option."""
    with option(named):
        clip = load_clip(source, dtype, pipe.device, step_aware=step_aware)
    check_vocabulary(pipe.tokenizers[0], clip.config.text.vocab_size, f"--{named} {source}")
    return clip


def judge_source(model: str, preset: str, judge: str) -> str:
    """Where the weights of a model's own judge are: spm, step-blind or pickscore.

    Raises InputError where there are none.
    """
    preset = preset or preset_of(model)
    if judge not in JUDGES[preset]:
        raise InputError(f"--judge {judge} with --preset {preset}: "
                         "say with --spm where its weights are")
    return JUDGES[preset][judge]


def load_tiny_decoder(source: str, pipe: Pipeline,
                      dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """A small decoder for this model's latents: `taesd` (the official one), folder, hub id or file.

    Weight files are diffusers' AutoencoderTiny, or the original's decoder; the shape is that of the
    `config.json` beside them, else the official one. Raises InputError where they are something
    else, or speak of other latents or pictures than `pipe`.
    """
    decoder, file = _planned(
        TinyDecoder, TinyDecoderConfig,
        fetch_part(TAESD[pipe.is_sdxl] if source == "taesd" else source), TinyDecoderConfig())
    for what, ours, theirs in (
            ("channels in a latent", decoder.config.latent_channels, pipe.unet.config.in_channels),
            ("pixels a side per latent position", decoder.factor, pipe.vae.factor)):
        if ours != theirs:
            raise InputError(
                f"{source}: a decoder with {ours} {what}, but {pipe.name} has {theirs}")
    load_strict(decoder, original_tiny_decoder(read_weights(file, "decoder")), file, dtype,
                pipe.device)
    return decoder.to(memory_format=torch.channels_last)


def _tokenizer(folder: Path):
    """A CLIP tokenizer from its folder."""
    from transformers import CLIPTokenizer
    names = [path.name for path in folder.glob("*")]
    if "tokenizer_config.json" not in names or "tokenizer.json" not in names and not (
            "vocab.json" in names and "merges.txt" in names):
        raise InputError(f"{folder}: no tokenizer (tokenizer_config.json, vocab.json, merges.txt)")
    return read_tokenizer(CLIPTokenizer, folder)


def read_tokenizer(cls, folder: Path):
    """A tokenizer of one of transformers' classes; InputError where its files are broken."""
    try:
        tokenizer = cls.from_pretrained(folder)
        tokenizer(["a word"])
    except Exception as error:      # its readers, in two languages, raise anything
        raise InputError(f"{folder}: broken tokenizer "
                         f"({type(error).__name__}: {first_line(error, 120)})") from None
    return tokenizer


def _tokenizers(root: Path, encoders: list[CLIP]) -> list:
    """A model's tokenizers, each held against its text encoder."""
    tokenizers = [_tokenizer(part_of(root, f"tokenizer{n}")) for n, _ in zip(("", "_2"), encoders)]
    for tokenizer, encoder in zip(tokenizers, encoders):
        check_vocabulary(tokenizer, encoder.config.text.vocab_size, "its text encoder")
    return tokenizers


def check_vocabulary(tokenizer, size: int, network: str) -> None:
    """InputError unless a tokenizer's ids are those that a network has `size` embeddings for.

    A few embeddings may lie idle: of added tokens that this tokenizer lacks, BERT's in ImageReward.
    `network` names it in the message.
    """
    vocabulary = tokenizer.get_vocab()
    ids = set(vocabulary.values())
    if len(ids) <= len(set(tokenizer.all_special_ids)):
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer knows no words, only "
                         f"{len(ids)} special tokens; its vocabulary is missing")
    words = [token[:-4] for token in vocabulary if re.fullmatch("[a-z]{4,}</w>", token)][:99]
    if words and min(map(len, tokenizer(words).input_ids)) > 3:         # begin, the word, end
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer spells every word, as "
                         f"{words[0]!r}, letter by letter; its merges (merges.txt) are missing")
    if max(ids) >= size or len(ids) < size - size // 100 - 2:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has {len(ids)} tokens, "
                         f"{network} {size}: they belong to different models")


def read_schedule(folder: Path, prediction_type: str = "") -> ddim.Schedule:
    """The noise schedule of a model's folder; a `prediction_type` wins over what it says."""
    path = folder / "scheduler/scheduler_config.json"
    with blaming(path):
        said = dict(prediction_type=prediction_type) if prediction_type else {}
        return ddim.Schedule.from_json(read_json(path) | said)


def check_schedule(folder: Path, pipe: "Pipeline") -> None:
    """InputError where the scheduler in `folder`, if there is one, means other noise than `pipe`'s.

    For the folder of a UNet that is to take the place of the pipeline's own.
    """
    if not (folder / "scheduler/scheduler_config.json").is_file():
        return
    ours, theirs = pipe.schedule, read_schedule(folder)
    same = ours.flow or theirs.flow or torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    if not same or ours.prediction_type != theirs.prediction_type:
        raise InputError(f"{folder}: made for {theirs.prediction_type}"
                         f"{'' if same else ' and other betas'}, {pipe.name} for "
                         f"{ours.prediction_type}; evaluate it as a --model of its own")


def first_tokenizer(source: str, tokenizer: str = ""):
    """The first tokenizer of a model (as load_pipeline takes it, "" for none) alone.

    CLIP-H and CLIP-L share it.
    """
    single = not source or source.endswith(SINGLE)
    home = (tokenizer or NAMES["sd15"]) if single else NAMES.get(source, source)
    return _tokenizer(part_of(fetch(home, ["tokenizer/*", "model_index.json"]), "tokenizer"))


def original_names(unet: UNet) -> dict[str, str]:
    """The UNet's parameter names -> those in a single file (`model.diffusion_model.` left out)."""
    up = ["Attn" in kind for kind in unet.config.up_block_types]
    return {key: original_unet_name(key, unet.config.layers_per_block, up)
            for key in unet.state_dict()}


def marked_prediction(path: Path, weights: dict[str, torch.Tensor]) -> str:
    """What a single file says that its UNet predicts: epsilon where it says nothing.

    By a tensor (`v_pred`), its header (`modelspec`), or the `.yaml` beside it, as A1111 has it.
    """
    header, beside = read_header(path), path.with_suffix(".yaml")
    lines = beside.read_text("utf-8", "replace") if beside.is_file() else ""
    found = re.search(r"^[^#\n]*\bparameterization['\"]?:\s*['\"]?(\w+)", lines, re.MULTILINE)
    said = ("v" if "v_pred" in weights else header.get("modelspec.prediction_type")
            or header.get("modelspec.predict_key") or (found[1] if found else "eps"))
    return dict(eps="epsilon", v="v_prediction").get(said, said)


def _single_file(path: Path, dtype: torch.dtype, device: torch.device, tokenizer: str,
                 prediction_type: str, shapes: tuple = (), own_vae: bool = True,
                 vae_dtype: torch.dtype | None = None) -> Pipeline:
    """A checkpoint in the original layout: SD-1.5 (`cond_stage_model`) or SDXL (`conditioner`).

    The file holds no configuration: the official shapes are assumed, or `shapes` (of unet, vae and
    text encoders). Without `own_vae` its VAE, if it has one, is passed over, and the pipeline has
    none yet.
    """
    weights = {k: v for k, v in read_weights(path, path.name).items() if not k.startswith(SPARE)}
    foreign = [key for key in weights if key.startswith(("edm_", "ztsnr"))]
    faults = {
        "no model.diffusion_model.* tensors; not a Stable Diffusion checkpoint in the original "
        f"layout; the file looks like {layout(weights)}":
            not any(key.startswith("model.diffusion_model.") for key in weights),
        "has no VAE (first_stage_model.*); give one with --vae":
            own_vae and not any(key.startswith("first_stage_model.") for key in weights),
        "trained with another noise process (EDM, or a zero-terminal-SNR schedule), not supported; "
        f"the file says so by {', '.join(foreign)}": foreign}
    for fault, there in faults.items():
        if there:
            raise InputError(f"{path}: {fault}")
    with blaming(path):
        schedule = ddim.Schedule.from_json(ddim.STABLE_DIFFUSION | dict(
            prediction_type=prediction_type or marked_prediction(path, weights)))
    kind = "sdxl" if is_sdxl(weights) else "sd15"
    of_unet, of_vae, *of_texts = shapes or (SINGLE_UNETS[kind], *SINGLE_PARTS[kind])
    unet, vae = build(UNet, of_unet, path), build(VAE, of_vae, path)
    encoders = [build(CLIP, config, path) for config in of_texts]

    tensors = rename(unet, take(weights, "model.diffusion_model."), original_names(unet).get)
    load_strict(unet, tensors, path, dtype, device, weights)
    if own_vae:
        _fill_vae(vae, weights, path, safe_dtype(of_vae, of_unet, dtype, vae_dtype), device)
    for encoder, place in zip(encoders, TEXTS[kind]):
        tensors = clean(from_open_clip(take(weights, place)))   # other names stay as they are
        load_strict(encoder, tensors, path, dtype, device, weights)
    tokenizers = _tokenizers(fetch(tokenizer or NAMES[kind], ["tokenizer*/*"]), encoders)
    return Pipeline(str(path), tokenizers, encoders, unet, vae if own_vae else None, schedule,
                    zero_negative=kind == "sdxl", device=device)


def _folder(source: str, root: Path, dtype: torch.dtype, device: torch.device,
            prediction_type: str, other: dict[str, Path],
            vae_dtype: torch.dtype | None) -> Pipeline:
    """A checkpoint in the diffusers layout; `other`: where its UNet or VAE is instead.

    All parts are planned, and held against each other, before the numbers of one are read.
    """
    index = read_json(root / "model_index.json")
    names = ("", "_2") if "text_encoder_2" in index else ("",)
    texts = [_planned(CLIP, CLIPConfig, part_of(root, f"text_encoder{n}")) for n in names]
    unet, unet_file = _planned(UNet, UNetConfig, other.get("unet", root / "unet"))
    vae, vae_file = _planned(VAE, VAEConfig, part_of(root, "vae"))
    if "vae" in other:
        vae, vae_file = _planned(VAE, VAEConfig, other["vae"], vae.config)
    schedule = read_schedule(root, prediction_type)
    encoders = [clip for clip, _ in texts]
    pipe = Pipeline(
        source, _tokenizers(root, encoders), encoders, unet, vae, schedule, device=device,
        # diffusers' default
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", len(names) > 1)))
    _check_fit(pipe, source)
    for n, (clip, file) in zip(names, texts):
        load_strict(clip, clean(read_weights(file, f"text_encoder{n}")), file, dtype, device)
    load_strict(unet, clean(read_weights(unet_file, "unet")), unet_file, dtype, device)
    _fill_vae(vae, read_weights(vae_file, "vae"), vae_file,
              safe_dtype(vae.config, unet.config, dtype, vae_dtype), device)
    return pipe


def load_pipeline(source: str = "tiny", dtype: torch.dtype = torch.float32,
                  device: torch.device | str = "cpu", unet: str | None = None,
                  vae: str | None = None, prediction_type: str = "", tokenizer: str = "",
                  vae_dtype: torch.dtype | None = None) -> Pipeline:
    """Load a model by name (a key of NAMES), folder, hub id or single-file checkpoint.

    Folders and hub repositories are in the diffusers layout. `unet` and `vae` replace those parts
    by the ones of another name, folder, hub id or file (a full fine-tune; SDXL's fp16-safe VAE).
    `prediction_type` (epsilon, v_prediction) wins over what the model says. `tokenizer` (a folder
    or hub id with `tokenizer/`) is for single files, which carry none. `vae_dtype`: the VAE's own,
    see safe_dtype; SDXL's stock VAE stays fp32. Raises InputError where a file is missing or does
    not fit.
    """
    device = torch.device(device)
    root = fetch_model(source)
    other = {part: fetch_part(place, part) for part, place in (("unet", unet), ("vae", vae))
             if place}
    if NAMES.get(source, source).endswith(SINGLE):
        pipe = _single_file(root, dtype, device, tokenizer, prediction_type, own_vae=not vae,
                            vae_dtype=vae_dtype)
        if unet:
            pipe.unet, file = _planned(UNet, UNetConfig, other["unet"])
            load_strict(pipe.unet, clean(read_weights(file, "unet")), file, dtype, device)
        if vae:
            own = SINGLE_PARTS["sdxl" if pipe.is_sdxl else "sd15"][0]
            pipe.vae, file = _planned(VAE, VAEConfig, other["vae"], own)
            _fill_vae(pipe.vae, read_weights(file, "vae"), file,
                      safe_dtype(pipe.vae.config, pipe.unet.config, dtype, vae_dtype), device)
        _check_fit(pipe, source)
    else:
        pipe = _folder(source, root, dtype, device, prediction_type, other, vae_dtype)
    return pipe


def _check_fit(pipe: Pipeline, source: str) -> None:
    """InputError where the UNet's inputs are not what the other parts make."""
    wants, texts = pipe.unet.config, [encoder.config for encoder in pipe.text_encoders]
    pooled = (texts[-1].projection_dim or 0) + 6 * (wants.addition_time_embed_dim or 0)
    for what, ours, theirs in (
            ("channels of a latent", wants.in_channels, pipe.vae.config.latent_channels),
            ("numbers a token", wants.cross_attention_dim, sum(t.text.hidden_size for t in texts)),
            ("numbers of pooled text and sizes",
             wants.projection_class_embeddings_input_dim or pooled, pooled)):
        if ours != theirs:
            raise InputError(f"{source}: the UNet wants {ours} {what}, the other parts have "
                             f"{theirs}; it is another model's, or inpaints")
