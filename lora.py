"""Low-rank adaptation of the UNet's attentions: W x + (alpha / rank) B A x, W frozen (section 5.1).

The same network is policy and reference: with LoRA switched off the UNet is bit for bit the base
model, so SPO needs no second copy for p_ref (Eq. 4). A is Gaussian, B zero, alpha = rank, on to_q,
to_k, to_v and to_out.0.

    python lora.py convert IN OUT.safetensors --model sdxl --format diffusers|kohya
    python lora.py merge IN OUT_FOLDER --model sdxl                 # a checkpoint, the LoRA inside
    python lora.py merge IN OUT.safetensors --model MY.safetensors --scale 0.7
                                                # IN: a LoRA file, or the folder of a run or adapter

Files in four formats are read; the first and the last are written:
    A  diffusers, peft  unet.<module>.lora_A.weight / lora_B.weight; peft's own (adapter_model):
                        base_model.model.<module>..., the strength in adapter_config.json
    B  official SPO     unet.<module>.lora.down.weight / lora.up.weight
    C  old diffusers    unet.<attention>.processor.to_q_lora.down.weight / up
    D  kohya (ComfyUI,  lora_unet_<module>.lora_down.weight / lora_up.weight / alpha; dots of the
       A1111)           module as underscores, also in the original layout's names,
                        input_blocks_4_1_...
"""
import needs  # noqa: F401
import argparse
import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import loading
from training import plain_parser, run_script, write_atomic, write_json, writing
from unet import UNet, UNetConfig
from weights import (
    PEFT,
    InputError,
    clean,
    fetch,
    is_sdxl,
    load_strict,
    original_module_names,
    read_header,
    read_json,
    read_weights,
    rename,
    take,
    weight_file,
)

ORIGINAL = "model.diffusion_model."      # where the UNet is in a single-file checkpoint
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin")
SIDES = {"lora_A.weight": "A", "lora.down.weight": "A", "lora_down.weight": "A",
         "lora_B.weight": "B", "lora.up.weight": "B", "lora_up.weight": "B", "alpha": "alpha"}
REFUSED = {             # beginnings of keys -> why
    (PEFT, f"unet.{PEFT}"):
        "has peft's prefix; how strong the LoRA is stands in the adapter_config.json that peft "
        "saves beside it: put it there",
    ("transformer_blocks", "down_blocks", "mid_block", "up_blocks"):
        "has no `unet.` prefix; diffusers would load this file as a no-op. Rename its keys to "
        "`unet.<module>.lora_A.weight` and `.lora_B.weight`, and add `unet.<module>.alpha` if that "
        "is not the rank",
    ("text_encoder", "lora_te"): "belongs to a text encoder; only LoRAs of the UNet are supported",
}


class LoRALinear(nn.Module):
    """A frozen linear map with a trainable low-rank term, in fp32 beside a weight of any dtype.

    It takes over the weight of the map that it replaces, so the base parameter keeps its name, and
    its own are `<module>.lora_A.weight` [rank, in], `<module>.lora_B.weight` [out, rank]: peft's.
    Over a convolution, A is one with its kernel and B a 1x1 one, as peft and kohya have them.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.base = (base,)             # in a tuple: no submodule, whose names would change
        kind = dict(bias=False, device="meta", dtype=torch.float32)     # draws nothing
        outer, inner = base.weight.shape[:2]
        if isinstance(base, nn.Conv2d):
            self.lora_A = nn.Conv2d(inner, rank, base.kernel_size, base.stride, base.padding,
                                    **kind)
            self.lora_B = nn.Conv2d(rank, outer, 1, **kind)
        else:
            self.lora_A = nn.Linear(inner, rank, **kind)
            self.lora_B = nn.Linear(rank, outer, **kind)
        for layer in (self.lora_A, self.lora_B):        # (`to_empty` would import sympy)
            layer.weight = nn.Parameter(torch.empty(
                layer.weight.shape, dtype=torch.float32, device=base.weight.device))
        start = torch.randn(self.lora_A.weight.shape, generator=generator or torch.Generator())
        self.lora_A.weight.data.copy_(start / rank)     # drawn on the CPU: the same on every device
        nn.init.zeros_(self.lora_B.weight)
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's output and, while enabled, the update's."""
        a, b = self.lora_A.weight, self.lora_B.weight
        # One product instead of three, but never in a bf16 weight: rounding would eat the update.
        if self.enabled and self.weight.dtype == torch.float32 and not torch.is_grad_enabled():
            update = self.scaling * (b.flatten(1) @ a.flatten(1)).view_as(self.weight)
            return _apply(self.lora_A, x, self.weight + update, self.bias)
        y = _apply(self.lora_A, x, self.weight, self.bias)
        if not self.enabled:
            return y
        low = _apply(self.lora_A, x, a.to(x.dtype))
        return y + self.scaling * _apply(self.lora_B, low, b.to(x.dtype))


def _apply(like: nn.Linear | nn.Conv2d, x: torch.Tensor, weight: torch.Tensor,
           bias: torch.Tensor | None = None) -> torch.Tensor:
    """What `like` would do with another weight."""
    if isinstance(like, nn.Conv2d):
        return F.conv2d(x, weight, bias, like.stride, like.padding)
    return F.linear(x, weight, bias)


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRA layer of a model by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The LoRA parameters, as a list: the official code clips none, its iterator is exhausted."""
    return [p for layer in layers(model).values()
            for p in (layer.lora_A.weight, layer.lora_B.weight)]


def add(model: nn.Module, rank: int, alpha: float | None = None,
        targets: tuple[str, ...] = TARGETS, seed: int = 0) -> list[nn.Parameter]:
    """Freeze `model` and put LoRA on every linear map whose name ends in a target.

    Returns the new parameters. Raises ValueError for a target that matches nothing.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    maps = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in maps):
            raise ValueError(f"no linear layer's name ends in {target!r}")
    for name in maps:
        if any(f".{name}".endswith(f".{target}") for target in targets):
            _replace(model, name, LoRALinear(model.get_submodule(name), rank,
                                             rank if alpha is None else alpha, generator))
    return parameters(model)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` says."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def remove(model: nn.Module) -> None:
    """Take all LoRA layers off again; the base model is what it was."""
    for name, layer in layers(model).items():
        base, = layer.base
        base.weight, base.bias = layer.weight, layer.bias
        _replace(model, name, base)


@contextlib.contextmanager
def disabled(model: nn.Module):
    """Inside, the model is the reference p_ref: every LoRA layer is off."""
    switched = [layer for layer in layers(model).values() if layer.enabled]
    for layer in switched:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in switched:
            layer.enabled = True


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """LoRA weights in diffusers' format (A): `unet.<module>.lora_A.weight`, fp32, on the CPU."""
    out = {}
    for name, layer in layers(model).items():       # the format carries no alpha: fold it into B
        b = (layer.lora_B.weight * layer.scaling).detach().cpu().contiguous()
        a = layer.lora_A.weight.detach().cpu().clone()
        out |= {f"unet.{name}.lora_B.weight": b, f"unet.{name}.lora_A.weight": a}
    return out


def to_kohya(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Diffusers format (A) -> kohya's (D), with alpha = rank written down."""
    out = {}
    for key, value in weights.items():
        module, part = re.fullmatch(r"unet\.(.+)\.lora_([AB])\.weight", key).groups()
        name = "lora_unet_" + module.replace(".", "_")
        side, rank = ("down", value.shape[0]) if part == "A" else ("up", value.shape[1])
        out |= {f"{name}.lora_{side}.weight": value.contiguous(),
                f"{name}.alpha": torch.tensor(float(rank))}
    return out


def kohya_header(weights: dict[str, torch.Tensor], unet: UNet, base: str) -> dict[str, str]:
    """What user interfaces show of a file in kohya's format: name, base model, rank.

    `weights`: in diffusers' format (A); `base`: the model's name. The keys are sd-scripts' and
    those of https://github.com/Stability-AI/ModelSpec. No date: the same LoRA, the same bytes.
    """
    xl = unet.config.addition_embed_type == "text_time"
    ranks = {len(value) for key, value in weights.items() if ".lora_A." in key}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"           # sd-scripts' word
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank,
            "ss_base_model_version": "sdxl_base_v1-0" if xl else "sd_v1", "ss_v2": "False",
            "ss_sd_model_name": base, "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if xl else 'v1'}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": f"{base}, preference LoRA of rank {rank}"}


def normalise(weights: dict[str, torch.Tensor], modules: list[str],
              source: str = "LoRA") -> dict[str, torch.Tensor]:
    """Any of the formats A to D -> A, alpha folded into B. `modules`: the model's layers.

    Raises ValueError for files that other programs would load as a silent no-op (no `unet.` prefix,
    raw peft names), for text-encoder LoRAs, for modules that the model does not have, and for
    tensors that are no sound matrices.
    """
    names = dict(zip(modules, modules)) | original_module_names(modules)
    by_kohya = {name.replace(".", "_"): module for name, module in names.items()}
    found = {}                  # module -> its A, B, and alpha if it is said
    for key, value in weights.items():
        module, part = _place(key, by_kohya, source)
        side, sides = SIDES.get(part), found.setdefault(module, {})
        faults = {
            "is empty or holds non-finite numbers; the file is damaged":
                not value.numel() or not torch.isfinite(value.float()).all(),
            "is not plain LoRA (LoHa, LoKr and DoRA are not supported)":
                side is None or side == "alpha" and value.numel() != 1,
            f"is no matrix of weights: {value.dtype}, shape {tuple(value.shape)}":
                side != "alpha" and (value.ndim not in (2, 4) or not value.is_floating_point()),
            "is there twice, under two names or for two adapters; keep one of them": side in sides}
        for fault, there in faults.items():
            if there:
                raise ValueError(f"{source}: {key!r} of layer {module!r} {fault}")
        sides[side] = value
    if not found:
        raise ValueError(f"{source}: no LoRA weights inside")
    out = {}
    for module, sides in sorted(found.items()):
        lacking = {"A", "B"} - sides.keys()
        if lacking:
            raise ValueError(f"{source}: layer {module!r} lacks its lora_{min(lacking)} weight; "
                             "the file is incomplete")
        a, b = sides["A"], sides["B"]
        if "alpha" in sides:
            b = b.float() * (float(sides["alpha"]) / len(a))
        out |= {f"unet.{module}.lora_A.weight": a, f"unet.{module}.lora_B.weight": b}
    return out


def _place(key: str, by_kohya: dict[str, str], source: str) -> tuple[str, str]:
    """The module that a key of any of the formats A to D is about, and the rest of the key.

    Dots count as underscores. What wraps modules (torch.compile, DDP) or names a peft adapter
    (`lora_A.default.weight`) is left out.
    """
    plain = re.sub(r"(?:^|(?<=[._]))(?:(?:_orig_mod|module)[._])+", "", key)
    for beginnings, fault in REFUSED.items():
        if plain.startswith(beginnings):
            raise ValueError(f"{source}: key {key!r} {fault}")
    plain = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora\.",
                   lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}.lora.", plain)
    match = re.fullmatch(r"(?:lora_unet[._]|unet\.|(?:model\.)?diffusion_model\.)"
                         r"(.+?)\.(lora[._].+|[^.]+)", plain)
    if match is None:
        raise ValueError(f"{source}: cannot make sense of key {key!r}; "
                         "expected diffusers or kohya LoRA names")
    module = by_kohya.get(match[1].replace(".", "_"))
    if module is None:
        raise ValueError(f"{source}: {key!r} is for a layer that this model does not have; "
                         "the file belongs to another model or another LoRA target set")
    return module, re.sub(r"^(lora_[AB])\.[^.]+\.weight$", r"\1.weight", match[2])


def fitted(model: nn.Module, weights: dict[str, torch.Tensor], source: str = "LoRA",
           scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A LoRA file (formats A to D) -> A, `scale` times as strong, in the shapes of these layers.

    Raises ValueError on any mismatch.
    """
    if not math.isfinite(scale):
        raise ValueError(f"{source}: {scale} is no strength of a LoRA")
    modules = {name: module for name, module in model.named_modules()
               if isinstance(module, (nn.Linear, nn.Conv2d, LoRALinear))
               and not name.endswith((".lora_A", ".lora_B"))}
    out = normalise(weights, list(modules), source)
    for key in [key for key in out if ".lora_A." in key]:
        other = key.replace(".lora_A.", ".lora_B.")
        name, a, b = key[5:-len(".lora_A.weight")], out[key], out[other]
        outer, *inner = modules[name].weight.shape
        needed = (len(a), math.prod(inner)), (outer, len(a))
        if (a.flatten(1).shape, b.flatten(1).shape) != needed:
            raise ValueError(f"{source}: layer {name!r} has shapes {tuple(a.shape)}, "
                             f"{tuple(b.shape)}, this model needs {needed[0]}, {needed[1]}; "
                             "the LoRA is for another model")
        out[key] = a.reshape(-1, *inner)
        out[other] = (b if scale == 1 else b.float() * scale).reshape(
            outer, -1, *[1] * (len(inner) - 1))
    return out


@torch.no_grad()
def load(model: nn.Module, weights: dict[str, torch.Tensor], source: str = "LoRA",
         scale: float = 1.0) -> None:
    """Put a LoRA file (formats A to D) on `model`, replacing any LoRA that it has.

    `scale`: its strength, 0 for none. Raises ValueError on any mismatch, before the model is
    touched.
    """
    weights = fitted(model, weights, source, scale)
    remove(model)
    model.requires_grad_(False)
    for key, a in weights.items():
        name, found, _ = key[5:].partition(".lora_A.")
        if found:
            layer = LoRALinear(model.get_submodule(name), rank=len(a), alpha=len(a))
            _replace(model, name, layer)
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(weights[key.replace(".lora_A.", ".lora_B.")])


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every LoRA term to its base weight (computed in fp32) and take the LoRA layers off."""
    for layer in layers(model).values():
        delta = layer.scaling * (layer.lora_B.weight.flatten(1) @ layer.lora_A.weight.flatten(1))
        merged = layer.weight.float() + delta.view_as(layer.weight)
        layer.weight.data = merged.to(layer.weight.dtype)       # its old storage may be shared
    remove(model)


@torch.no_grad()
def norm(model: nn.Module) -> float:
    """Frobenius norm of all low-rank terms: how far the policy's weights are from the base's."""
    square = 0.0
    for layer in layers(model).values():        # |B A|^2 is the sum of (A A^T) * (B^T B)
        a, b = layer.lora_A.weight.flatten(1), layer.lora_B.weight.flatten(1)
        square += ((a @ a.T) * (b.T @ b)).sum() * layer.scaling ** 2
    return math.sqrt(max(float(square), 0.0))


def file_in(source: str, folder: Path) -> Path:
    """The LoRA in a folder: one of LORA_NAMES, or else the only .safetensors file.

    Official ones have names of their own.
    """
    if (folder / "unet/adapter_config.json").is_file():         # peft's example for diffusion
        folder = folder / "unet"
    files = [folder / name for name in LORA_NAMES if (folder / name).is_file()][:1] or sorted(
        fetch(source, ["*.safetensors", "adapter_config.json"]).glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "no .safetensors file"
        raise InputError(f"{source}: holds {names}; say which with {source}/FILE")
    return files[0]


def parse() -> argparse.Namespace:
    """What the command line says."""
    parser = plain_parser(__doc__)
    parser.add_argument("action", choices=("convert", "merge"))
    parser.add_argument("source", type=Path,
                        help="a LoRA file in one of the formats A to D, or the folder of a run "
                        "or of a peft adapter")
    parser.add_argument("target", type=Path, help="convert: the file to write; merge: the folder "
                        "to write, or the file if the model is one")
    parser.add_argument("--model", default="tiny", help="the model that the LoRA belongs to: "
                        "tiny, sd15, sdxl, folder, hub id, single file")
    parser.add_argument("--format", choices=("diffusers", "kohya"), default="diffusers",
                        help="convert: what to write")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="how strong the LoRA is written or merged")
    return parser.parse_args()


def open_model(options: argparse.Namespace) -> tuple[UNet, Path, dict[str, torch.Tensor]]:
    """The model's UNet, yet without weights; where the model is; all tensors if it is one file."""
    root = (loading.fetch_model(options.model) if options.action == "merge" else
            fetch(loading.NAMES.get(options.model, options.model), ["unet/config.json"]))
    whole = read_weights(root) if root.is_file() else {}
    if whole and options.action == "merge" and options.target.suffix != ".safetensors":
        raise InputError(f"{options.target}: a single file is merged into another one, "
                         "so this must end in .safetensors")
    config = (loading.SINGLE_UNETS["sdxl" if is_sdxl(whole) else "sd15"] if whole else
              loading.read_config(UNetConfig, root / "unet/config.json"))
    return loading.build(UNet, config, root), root, whole


def save(weights: dict[str, torch.Tensor], target: Path, header: dict[str, str]) -> None:
    """Write a .safetensors file, the same bytes each time.

    Tensors that share memory (tied weights) become two. The library leaves the order of the header
    to chance; here it is sorted.
    """
    owner = {value.untyped_storage().data_ptr(): key for key, value in weights.items()}
    out = {key: value.contiguous() if owner[value.untyped_storage().data_ptr()] == key else
           value.clone().contiguous() for key, value in weights.items()}

    def write(path: Path) -> None:
        """The library's file, its header's entries put in order within the same bytes."""
        save_file(out, path, metadata=header | {"format": "pt"})
        with open(path, "rb+") as file:
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(size))
            head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(head, separators=(",", ":"), ensure_ascii=False)
                       .encode().ljust(size))

    write_atomic(target, write)


def convert(options: argparse.Namespace, unet: UNet, weights: dict[str, torch.Tensor]) -> None:
    """Write a LoRA (format A) for this UNet in the format that is asked for."""
    if options.format == "kohya":
        header = kohya_header(weights, unet, Path(options.model).name)
        save(to_kohya(weights), options.target, header)
    else:
        save(weights, options.target, {})
    print(f"{options.target}: {len(weights) // 2} layers, {options.format} format")


def merge_into_model(options: argparse.Namespace, unet: UNet, weights: dict[str, torch.Tensor],
                     root: Path, whole: dict[str, torch.Tensor]) -> None:
    """Write a copy of the model, in the layout that it has, with a LoRA (format A) in its UNet.

    `unet`, `root`, `whole`: from `open_model`.
    """
    file = root if whole else weight_file(root / "unet")
    names = loading.original_names(unet)
    own = rename(unet, take(whole, ORIGINAL), names.get) if whole else clean(read_weights(file))
    load_strict(unet, own, file, whole=whole)
    load(unet, weights)
    count = len(layers(unet))
    merge(unet)
    if whole:
        for key, value in unet.state_dict().items():
            place = ORIGINAL + names[key]
            whole[place] = value.view_as(whole[place])
        save(whole, options.target, read_header(file))
        beside = root.with_suffix(".yaml")              # A1111's: it may say v-prediction
        if beside.is_file() and not options.target.with_suffix(".yaml").exists():
            shutil.copy(beside, options.target.with_suffix(".yaml"))
    else:
        write_folder(unet, root, options.target, file)
    print(f"{options.target}: {options.model} with {count} LoRA layers merged")


def write_folder(unet: UNet, root: Path, target: Path, file: Path) -> None:
    """A model's folder in the diffusers layout with another UNet of the same shape, in all or not.

    `file`: its UNet's weights; the new ones get the same variant (.fp16) and header.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    index = read_json(root / "model_index.json")
    with writing(target):
        try:
            (temporary / "unet").mkdir(parents=True)
            shutil.copy(root / "unet/config.json", temporary / "unet")
            for part in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "scheduler",
                         "vae"):
                if loading.part_of(root, part).is_dir():
                    shutil.copytree(loading.part_of(root, part), temporary / part)
            index.pop("shared", None)
            for part, value in index.items():   # diffusers would look for parts that are not copied
                if isinstance(value, list) and not (temporary / part).is_dir():
                    index[part] = [None, None]
            if "safety_checker" in index:
                index["requires_safety_checker"] = False
            write_json(temporary / "model_index.json", index)
            name = "diffusion_pytorch_model" + (".fp16" if ".fp16." in file.name else "")
            save(unet.state_dict(), temporary / f"unet/{name}.safetensors", read_header(file))
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def command_line() -> None:
    """`convert` a LoRA file between formats, or `merge` it into a copy of its model."""
    options = parse()
    if os.path.exists(options.target):
        raise InputError(f"{options.target}: exists already; nothing is overwritten")
    unet, root, whole = open_model(options)
    source = options.source
    file = file_in(str(source), source) if os.path.isdir(source) else source
    try:
        weights = fitted(unet, read_weights(file), str(file), options.scale)
    except ValueError as error:             # the LoRA is another model's, or none
        raise InputError(str(error)) from None
    if options.action == "convert":
        convert(options, unet, weights)
    else:
        merge_into_model(options, unet, weights, root, whole)


if __name__ == "__main__":
    run_script(command_line)
