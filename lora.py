"""Low-rank adaptation of the UNet's attentions: W x + (alpha / rank) B A x, with W frozen (paper, section 5.1).

The same network is policy and reference: with LoRA switched off the UNet is bit for bit the base model, so
SPO needs no second copy for p_ref (Eq. 4). A is Gaussian, B zero, alpha = rank, on to_q, to_k, to_v and to_out.0.

    python lora.py convert IN OUT.safetensors --model sdxl --format diffusers|kohya
    python lora.py merge IN OUT_FOLDER --model sdxl                         # a checkpoint with the LoRA inside
    python lora.py merge IN OUT.safetensors --model MY.safetensors          # IN: a LoRA file or the folder of a run

Files in four formats are read; the first and the last are written:
    diffusers   unet.<module>.lora_A.weight / lora_B.weight                     (A, peft)
                unet.<module>.lora.down.weight / lora.up.weight                 (B, the official SPO releases)
                unet.<attention>.processor.to_q_lora.down.weight / up           (C, old)
    kohya       lora_unet_<module, dots as underscores>.lora_down.weight / lora_up.weight / alpha   (D: ComfyUI, A1111)
                or with the original layout's module names, input_blocks_4_1_...
"""
import contextlib
import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from weights import InputError, fetch, original_module_names

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class LoRALinear(nn.Linear):
    """A frozen linear map with a trainable low-rank term, in fp32 beside a weight of any dtype.

    It takes over the weight of the map that it replaces, so the base parameter keeps its name, and its own are
    `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank]: diffusers' names.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        with torch.no_grad():           # drawn on the CPU: the same start on every device
            self.lora_A.weight.copy_(torch.randn(rank, self.in_features, generator=generator) / rank)
            self.lora_B.weight.zero_()
        self.rank, self.alpha, self.scaling, self.enabled = rank, alpha, alpha / rank, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        # Never merged into a bf16 weight: rounding would eat a small update (design note in README).
        low = F.linear(x, self.lora_A.weight.to(x.dtype))
        return y + self.scaling * F.linear(low, self.lora_B.weight.to(x.dtype))


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRA layer of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The LoRA parameters as a list. A list: an exhausted iterator is how the official gradient clip clips nothing."""
    return [p for layer in layers(model).values() for p in (layer.lora_A.weight, layer.lora_B.weight)]


def add(model: nn.Module, rank: int, alpha: float | None = None, targets: tuple[str, ...] = TARGETS,
        seed: int = 0) -> list[nn.Parameter]:
    """Freeze `model`, put LoRA on every linear map whose name ends in a target, and return the new parameters.

    Raises ValueError if nothing matches.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and not isinstance(module, LoRALinear)
             and any(name == t or name.endswith("." + t) for t in targets)]
    if not found:
        raise ValueError(f"no linear layer matches the LoRA targets {', '.join(targets)}")
    for name in found:
        _replace(model, name, LoRALinear(model.get_submodule(name), rank, rank if alpha is None else alpha, generator))
    return parameters(model)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` says."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def remove(model: nn.Module) -> None:
    """Take all LoRA layers off again; the base model is what it was."""
    for name, layer in layers(model).items():
        with torch.device("meta"):
            base = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
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
    for name, layer in layers(model).items():
        if layer.alpha != layer.rank:       # the format carries no alpha: fold it into B
            out[f"unet.{name}.lora_B.weight"] = (layer.lora_B.weight * layer.scaling).detach().cpu().contiguous()
        else:
            out[f"unet.{name}.lora_B.weight"] = layer.lora_B.weight.detach().cpu().clone()
        out[f"unet.{name}.lora_A.weight"] = layer.lora_A.weight.detach().cpu().clone()
    return out


def to_kohya(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Diffusers format (A) -> kohya's (D), with alpha = rank written down."""
    out = {}
    for key, value in weights.items():
        module, part = re.fullmatch(r"unet\.(.+)\.lora_([AB])\.weight", key).groups()
        name = "lora_unet_" + module.replace(".", "_")
        out[f"{name}.lora_{'down' if part == 'A' else 'up'}.weight"] = value.contiguous()
        out[f"{name}.alpha"] = torch.tensor(float(value.shape[0] if part == "A" else value.shape[1]))
    return out


def normalise(weights: dict[str, torch.Tensor], modules: list[str], source: str = "LoRA") -> dict[str, torch.Tensor]:
    """Any of the formats A to D -> A, with alpha folded into B. `modules`: names of the model's linear layers.

    Raises ValueError for files that other programs would load as a silent no-op (no `unet.` prefix, raw peft names),
    for text-encoder or convolution LoRAs, for modules that the model does not have, and for tensors that are no sound matrices.
    """
    by_kohya = {name.replace(".", "_"): m for name, m in (dict(zip(modules, modules)) | original_module_names(modules)).items()}
    out, alphas = {}, {}
    for key, value in weights.items():
        if key.startswith(("base_model.model.", "transformer_blocks", "down_blocks", "mid_block", "up_blocks")):
            raise ValueError(f"{source}: key {key!r} has no `unet.` prefix; diffusers would load this file as a no-op. "
                             "Rename its keys to `unet.<module>.lora_A.weight` and `.lora_B.weight`")
        if key.startswith(("text_encoder", "lora_te")):
            raise ValueError(f"{source}: key {key!r} belongs to a text encoder; only UNet attention LoRAs are supported")
        if key.startswith("lora_unet_"):
            name, _, part = key[len("lora_unet_"):].partition(".")
            module = by_kohya.get(name)
            if module is None:
                raise ValueError(f"{source}: {key!r} is for a layer that this model does not have; "
                                 "the file belongs to another model or another LoRA target set")
        else:
            key_ = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora\.", lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}.lora.", key)
            match = re.fullmatch(r"unet\.(.+?)\.(lora_[AB]\.weight|lora\.(?:down|up)\.weight|alpha)", key_)
            if match is None:
                raise ValueError(f"{source}: cannot make sense of key {key!r}; expected diffusers or kohya LoRA names")
            module, part = match.groups()
        if not value.numel() or not torch.isfinite(value.float()).all():
            raise ValueError(f"{source}: {key!r} of layer {module!r} is empty or holds non-finite numbers; the file is damaged")
        if part == "alpha" and value.numel() == 1:
            alphas[module] = float(value)
            continue
        side = "A" if part in ("lora_A.weight", "lora.down.weight", "lora_down.weight") else "B"
        if part not in ("lora_A.weight", "lora_B.weight", "lora.down.weight", "lora.up.weight", "lora_down.weight", "lora_up.weight"):
            raise ValueError(f"{source}: {key!r} is not plain LoRA (LoHa, LoKr and DoRA are not supported)")
        if value.ndim not in (2, 4) or not value.is_floating_point():
            raise ValueError(f"{source}: {key!r} of layer {module!r} is no matrix of weights: {value.dtype}, shape {tuple(value.shape)}")
        out[f"unet.{module}.lora_{side}.weight"] = value.flatten(1) if value.ndim == 4 else value
    for module in sorted({k[5:].rpartition(".lora_")[0] for k in out} | alphas.keys()):
        if module not in set(modules):
            raise ValueError(f"{source}: layer {module!r} does not exist in this model; the LoRA is for another one")
        missing = [s for s in "AB" if f"unet.{module}.lora_{s}.weight" not in out]
        if missing:
            raise ValueError(f"{source}: layer {module!r} lacks its lora_{missing[0]} weight; the file is incomplete")
    if not out:
        raise ValueError(f"{source}: no LoRA weights inside")
    for module, alpha in alphas.items():
        rank = out[f"unet.{module}.lora_A.weight"].shape[0]
        out[f"unet.{module}.lora_B.weight"] = out[f"unet.{module}.lora_B.weight"].float() * (alpha / rank)
    return out


def load(model: nn.Module, weights: dict[str, torch.Tensor], source: str = "LoRA") -> None:
    """Put a LoRA file (formats A to D) on `model`, replacing any LoRA that it has.

    Raises ValueError on any mismatch, before the model is touched.
    """
    modules = {name: m for name, m in model.named_modules()
               if isinstance(m, nn.Linear) and not name.endswith((".lora_A", ".lora_B"))}
    weights = normalise(weights, list(modules), source)
    ranks = {k[5:-len(".lora_A.weight")]: v.shape[0] for k, v in weights.items() if k.endswith("lora_A.weight")}
    for name, rank in ranks.items():
        a, b = weights[f"unet.{name}.lora_A.weight"], weights[f"unet.{name}.lora_B.weight"]
        expected = ((rank, modules[name].in_features), (modules[name].out_features, rank))
        if (tuple(a.shape), tuple(b.shape)) != expected:
            raise ValueError(f"{source}: layer {name!r} has shapes {tuple(a.shape)}, {tuple(b.shape)}, this model needs "
                             f"{expected[0]}, {expected[1]}; the LoRA is for another model")
    remove(model)
    model.requires_grad_(False)
    for name, rank in ranks.items():
        layer = LoRALinear(model.get_submodule(name), rank, rank)
        _replace(model, name, layer)
        with torch.no_grad():
            layer.lora_A.weight.copy_(weights[f"unet.{name}.lora_A.weight"])
            layer.lora_B.weight.copy_(weights[f"unet.{name}.lora_B.weight"])


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every LoRA term to its base weight (computed in fp32) and take the LoRA layers off."""
    for layer in layers(model).values():
        delta = layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight)
        layer.weight.copy_((layer.weight.float() + delta).to(layer.weight.dtype))
    remove(model)


def norm(model: nn.Module) -> float:
    """Frobenius norm of all low-rank terms together: how far the policy's weights are from the reference's."""
    with torch.no_grad():
        squares = [((layer.lora_A.weight @ layer.lora_A.weight.T) * (layer.lora_B.weight.T @ layer.lora_B.weight)).sum()
                   * layer.scaling ** 2 for layer in layers(model).values()]
    return math.sqrt(max(float(sum(squares)), 0.0))


def file_in(source: str, folder: Path) -> Path:
    """The LoRA in a folder: pytorch_lora_weights.safetensors, or the only .safetensors file; official ones have names of their own."""
    path = folder / "pytorch_lora_weights.safetensors"
    if path.is_file():
        return path
    files = sorted(fetch(source, ["*.safetensors"]).glob("*.safetensors"))
    if len(files) != 1:
        raise InputError(f"{source}: holds {', '.join(p.name for p in files) or 'no .safetensors file'}; say which with {source}/FILE")
    return files[0]


def command_line() -> None:
    """`convert` a LoRA file between formats, or `merge` it into a copy of its model's folder."""
    import argparse
    import shutil

    from safetensors.torch import save_file

    from loading import NAMES, SINGLE_UNETS, build, fetch_model, read_config
    from training import refuse, write_atomic, write_json, writing
    from unet import UNet, UNetConfig
    from weights import clean, is_sdxl, load_strict, original_unet_name, read_json, read_weights, rename, take, weight_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("convert", "merge"))
    parser.add_argument("source", type=Path, help="a LoRA file in one of the formats A to D, or the folder of a run")
    parser.add_argument("target", type=Path, help="convert: the file to write; merge: the folder to write, or the file "
                        "if the model is one")
    parser.add_argument("--model", default="tiny", help="the model that the LoRA belongs to: tiny, sd15, sdxl, folder, hub id, single file")
    parser.add_argument("--format", choices=("diffusers", "kohya"), default="diffusers", help="convert: what to write")
    parser.error = refuse
    options = parser.parse_args()
    if os.path.exists(options.target):
        raise InputError(f"{options.target}: exists already; nothing is overwritten")
    model, whole = NAMES.get(options.model, options.model), {}
    if single := model.endswith((".safetensors", ".ckpt")):
        root = fetch(model, [])
        whole = read_weights(root)
        config = SINGLE_UNETS["sdxl" if is_sdxl(whole) else "sd15"]
        if options.action == "merge" and options.target.suffix != ".safetensors":
            raise InputError(f"{options.target}: a single file is merged into another one, so this must end in .safetensors")
    else:
        root = fetch(model, ["unet/config.json"]) if options.action == "convert" else fetch_model(model)
        config = read_config(UNetConfig, root / "unet/config.json")
    unet = build(UNet, config, root)
    source = str(options.source)
    if os.path.isdir(source):
        source = str(file_in(source, options.source))
    weights = read_weights(Path(source))
    if options.action == "convert":
        try:
            out = normalise(weights, [n for n, m in unet.named_modules() if isinstance(m, nn.Linear)], source)
        except ValueError as error:
            raise InputError(str(error)) from None
        count, out = len(out) // 2, to_kohya(out) if options.format == "kohya" else out
        write_atomic(options.target, lambda p: save_file({k: v.contiguous() for k, v in out.items()}, p, metadata={"format": "pt"}))
        return print(f"{options.target}: {count} layers, {options.format} format")
    if single:
        up = [kind.startswith("CrossAttn") for kind in config.up_block_types]
        original = {k: original_unet_name(k, config.layers_per_block, up) for k in unet.state_dict()}
        load_strict(unet, rename(unet, take(whole, "model.diffusion_model."), original.get), root, whole=whole)
    else:
        file = weight_file(root / "unet")
        load_strict(unet, clean(read_weights(file)), file)
    try:
        load(unet, weights, source)
    except ValueError as error:
        raise InputError(str(error)) from None
    count = len(layers(unet))
    merge(unet)
    if single:
        for key, value in unet.state_dict().items():
            place = "model.diffusion_model." + original[key]
            whole[place] = value.view_as(whole[place])
        write_atomic(options.target, lambda p: save_file({k: v.contiguous() for k, v in whole.items()}, p, metadata={"format": "pt"}))
        return print(f"{options.target}: {options.model} with {count} LoRA layers merged")
    with writing(options.target):
        for part in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "scheduler", "vae"):
            if (root / part).is_dir():
                shutil.copytree(root / part, options.target / part)
        (options.target / "unet").mkdir()
        shutil.copy(root / "unet/config.json", options.target / "unet")
    index = read_json(root / "model_index.json")
    for part, value in index.items():       # diffusers would look for a safety checker that is not copied
        if isinstance(value, list) and part != "unet" and not (options.target / part).is_dir():
            index[part] = [None, None]
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    write_json(options.target / "model_index.json", index)
    write_atomic(options.target / "unet/diffusion_pytorch_model.safetensors",
                 lambda p: save_file(unet.state_dict(), p, metadata={"format": "pt"}))
    print(f"{options.target}: {options.model} with {count} LoRA layers merged")


if __name__ == "__main__":
    from training import run_script
    run_script(command_line)
