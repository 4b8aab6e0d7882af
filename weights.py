"""Find and read weight files: local folders, the Hugging Face hub, sharded or single files; strict loading.

Every loader in this project ends in `load_strict`: a missing or unexpected tensor or a wrong shape is one clear error,
never a silently random module. Renamings of foreign layouts live here and nowhere else.
"""
import json
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")


class InputError(Exception):
    """Something that the user gave is wrong; its message is one line: what, which file, what to do."""


def read_json(path: Path) -> dict:
    """A JSON file as a dict; InputError if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file, or of a sharded set given by its `.index.json`. Pickles only with weights_only=True."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weight file")
    if path.name.endswith(".index.json"):
        out = {}
        for name in sorted(set(read_json(path)["weight_map"].values())):
            if Path(name).name != name:
                raise InputError(f"{path}: shard name {name!r} leaves the folder")
            out |= read_weights(path.parent / name)
        return out
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated weight file ({str(error).splitlines()[0][:120]})") from None
    except Exception as error:      # pickle.UnpicklingError and whatever a hostile file provokes
        raise InputError(f"{path}: not a plain weight file; pickles with code are never run "
                         f"({type(error).__name__})") from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise InputError(f"{path}: holds no flat dictionary of tensors")
    return weights


def weight_file(folder: Path) -> Path:
    """The weight file of a component folder: plain, sharded or fp16 variant, safetensors before pickle."""
    folder = Path(folder)
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            for name in WEIGHT_NAMES:
                for candidate in (f"{name}{variant}.{suffix}", f"{name}.{suffix}.index{variant}.json",
                                  f"{name}{variant}.{suffix}.index.json"):
                    if (folder / candidate).is_file():
                        return folder / candidate
    raise InputError(f"{folder}: no weight file ({', '.join(n + '.safetensors' for n in WEIGHT_NAMES)} or their shards)")


def fetch(source: str, patterns: list[str]) -> Path:
    """A local file or folder as it is, or a hub repository downloaded (resumably, only `patterns`) into the hub's cache.

    `owner/name/path/in/repository` fetches that one file.
    """
    if Path(source).exists():
        return Path(source)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", source)
    if not match or source.startswith("."):
        raise InputError(f"{source}: neither an existing file or folder nor a hub id of the form owner/name")
    from huggingface_hub import hf_hub_download, snapshot_download
    try:
        return Path(hf_hub_download(match[1], match[2]) if match[2] else snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(f"{source}: not in the hub cache and cannot be downloaded{offline}; give a local folder instead "
                         f"({type(error).__name__})") from None


def clean(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the harmless differences between official files of one layout.

    Drops `position_ids` buffers, renames the VAE's old attention names (query -> to_q, ...), flattens attention
    weights that were stored as 1x1 convolutions, and takes off the SPM files' prefix `model.`.
    """
    if weights and all(k.startswith("model.") for k in weights):
        weights = {k[len("model."):]: v for k, v in weights.items()}
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    out = {}
    for key, value in weights.items():
        if key.endswith("position_ids"):
            continue
        match = re.fullmatch(r"((?:en|de)coder\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.(weight|bias)", key)
        if match:
            key = f"{match[1]}{old[match[2]]}.{match[3]}"
            value = value.flatten(1) if value.ndim == 4 else value
        out[key] = value
    return out


def layout(weights: dict[str, torch.Tensor]) -> str:
    """A guess at what a weight file is, for error messages."""
    signs = [("model.diffusion_model.", "a single-file checkpoint in the original layout"),
             ("lora", "a LoRA"), ("visual.transformer.resblocks", "an open_clip model"), ("visual.", "an open_clip model"),
             ("adaLN_modulation", "a step-aware preference model"), ("vision_model.", "a transformers CLIP"),
             ("text_model.", "a transformers CLIP text encoder"), ("decoder.up_blocks", "a diffusers VAE"),
             ("up_blocks", "a diffusers UNet"), ("blip.", "ImageReward")]
    return next((name for sign, name in signs if any(sign in key for key in weights)), "of unknown layout")


def load_strict(module: nn.Module, weights: dict[str, torch.Tensor], source: object,
                dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Load `weights` into `module` (which may be on the meta device), every name and every shape checked.

    Floating tensors are cast to `dtype`. Raises InputError that names the first few keys at fault.
    """
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        parts = [f"{len(keys)} {name} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                 for name, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise InputError(f"{source}: does not fit {type(module).__name__}: {'; '.join(parts)}; the file looks like "
                         f"{layout(weights)}")
    wrong = [f"{k} is {tuple(weights[k].shape)}, expected {shape}" for k, shape in expected.items()
             if tuple(weights[k].shape) != shape]
    if wrong:
        raise InputError(f"{source}: {len(wrong)} tensors of {type(module).__name__} have a wrong shape "
                         f"({'; '.join(wrong[:3])}); another model's weights or configuration")
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value.sum(dtype=torch.float32)):
            if not torch.isfinite(value).all():
                raise InputError(f"{source}: tensor {key} holds NaN or infinity; the file is damaged, fetch it again")
    module.load_state_dict({k: v.to(device=device, dtype=dtype if v.is_floating_point() else None)
                            for k, v in weights.items()}, assign=True)
    return module.requires_grad_(False).eval()
