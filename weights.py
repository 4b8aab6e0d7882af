"""Find and read weight files: local folders, the Hugging Face hub, sharded or single files; strict loading.

Every loader in this project ends in `load_strict`: a missing or unexpected tensor or a wrong shape is one clear error,
never a silently random module. Renamings of foreign layouts live here and nowhere else.
"""
import contextlib
import json
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")


class InputError(Exception):
    """Something that the user gave is wrong; its message is one line: what, which file, what to do."""


def read_json(path: Path) -> dict:
    """A JSON file that holds an object, as a dict; InputError if it is missing or malformed."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object, {...}")
        return value
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file, or of a sharded set given by its index (`.index.json`, `.index.fp16.json`).

    Pickles only with weights_only=True.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weight file")
    if path.suffix == ".json":
        out, index = {}, read_json(path)
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{path}: no index of shards (a weight_map from tensors to file names)")
        for name in sorted(set(names.values())):
            if Path(name).name != name:
                raise InputError(f"{path}: shard name {name!r} leaves the folder")
            out |= read_weights(path.parent / name)
        return out
    header = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            weights = load_file(path)
        else:
            with open(path, "rb") as file:          # files of before PyTorch 1.6 are no zip archives and cannot be mapped
                mmap = file.read(2) == b"PK"
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated weight file ({(str(error).splitlines() or ['too short'])[0][:120]})") from None
    except Exception as error:      # pickle.UnpicklingError and whatever a hostile file provokes
        raise InputError(f"{path}: not a plain weight file; pickles with code are never run "
                         f"({type(error).__name__})") from None
    if "lora_adapter_metadata" in header:
        return weights | lora_alphas(weights, header["lora_adapter_metadata"], path)
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided
                                                and not (v.is_quantized or v.is_meta) for k, v in weights.items()):
        raise InputError(f"{path}: holds no flat dictionary of names and plain tensors")
    return weights


def fetch_weights(source: str, root: Path, parts: list[str]) -> Path:
    """Into `root`, which `fetch` gave: the weights of its folders `parts`, each in the first of the KINDS that the hub has."""
    if os.path.exists(source) or root.is_file():
        return root
    for variant, suffix in KINDS:
        lacking = [p for p in parts if find_weights(root / p) is None]
        names = weight_names(variant, suffix) + [f"{name}{variant}-*-of-*.{suffix}" for name in WEIGHT_NAMES]
        if lacking:
            fetch(source, [f"{p}/{n}" if p else n for p in lacking for n in names])
    return root


def fetch_parquet(source: str) -> Path:
    """Local Parquet files as they are, or a hub data set's: its training split, or all where it has none of that name."""
    path = fetch(source, ["*train*.parquet"], "dataset")
    if not os.path.exists(source) and not path.is_file() and not any(path.rglob("*.parquet")):
        path = fetch(source, ["*.parquet"], "dataset")
    return path


def lora_alphas(weights: dict[str, torch.Tensor], metadata: str, path: Path) -> dict[str, torch.Tensor]:
    """`<module>.alpha` for every layer of a LoRA whose alpha peft wrote into the file's header instead.

    An entry of `alpha_pattern` names a module by the end of its name and wins over `lora_alpha`.
    """
    out = {}
    try:
        config = {k.removeprefix("unet."): v for k, v in json.loads(metadata).items() if not k.startswith("text_encoder")}
        for key, value in weights.items():
            module, found, _ = key.partition(".lora_A.weight")
            if found and "lora_alpha" in config:
                alpha = next((a for p, a in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({p})$", module)),
                             config["lora_alpha"])
                out[f"{module}.alpha"] = torch.tensor(alpha * (value.shape[0] ** 0.5 if config.get("use_rslora") else 1.0))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{path}: its lora_adapter_metadata cannot be read ({error}), so the LoRA's strength is not known") from None
    return out


KINDS = (("", "safetensors"), (".fp16", "safetensors"), ("", "bin"), (".fp16", "bin"))


def weight_names(variant: str, suffix: str) -> list[str]:
    """What a component's weights may be called in one of the KINDS: one file, or the index of a sharded set."""
    return [n for name in WEIGHT_NAMES for n in (f"{name}{variant}.{suffix}", f"{name}.{suffix}.index{variant}.json",
                                                 f"{name}{variant}.{suffix}.index.json")]


def find_weights(folder: Path) -> Path | None:
    """The weight file of a component folder, if it has one: plain, sharded or fp16 variant, safetensors before pickle."""
    return next((Path(folder) / n for kind in KINDS for n in weight_names(*kind) if (Path(folder) / n).is_file()), None)


def weight_file(folder: Path) -> Path:
    """The weight file of a component folder; InputError if it has none."""
    if (file := find_weights(folder)) is None:
        raise InputError(f"{folder}: no weight file ({', '.join(n + '.safetensors' for n in WEIGHT_NAMES)} or their shards)")
    return file


def fetch(source: str, patterns: list[str], repo_type: str = "model") -> Path:
    """A local file or folder as it is, or a hub repository downloaded (resumably, only `patterns`) into the hub's cache.

    `owner/name/path/in/repository` fetches that one file. `repo_type`: "model" or "dataset".
    """
    if os.path.exists(source):          # Path.exists raises where a name is too long
        return Path(source)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", source)
    if not match or source.startswith("."):
        raise InputError(f"{source}: neither an existing file or folder nor a hub id of the form owner/name")
    from huggingface_hub import hf_hub_download, snapshot_download
    try:
        return Path(hf_hub_download(match[1], match[2], repo_type=repo_type) if match[2] else
                    snapshot_download(source, allow_patterns=patterns, repo_type=repo_type))
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on") else ""
        raise InputError(f"{source}: no such file or folder here; as a hub id not in the cache and not to be downloaded{offline} "
                         f"({type(error).__name__})") from None


def preset_of(model: str) -> str:
    """Whose settings fit a model: its own if it is tiny, sd15 or sdxl; else what a local folder's UNet or single file is; else sd15's.

    Raises InputError for a word that can name no model. Empty: none is meant, as where only pictures are scored.
    """
    if model in ("tiny", "sd15", "sdxl"):
        return model
    if model and "/" not in model and not os.path.exists(model):
        raise InputError(f"--model {model}: neither tiny, sd15 or sdxl, nor a file or folder here, nor a hub id of the form owner/name")
    path, sdxl = Path(model), False
    with contextlib.suppress(InputError, SafetensorError, OSError):         # loading will say what is wrong
        if path.is_dir():
            unet = read_json(path / "unet/config.json")
            if unet == read_json(Path(__file__).parent / "tiny/model/unet/config.json"):        # a merge, or a full fine-tune
                return "tiny"
            sdxl = unet.get("addition_embed_type") == "text_time"
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                sdxl = is_sdxl(file.keys())
    return "sdxl" if sdxl else "sd15"


def is_sdxl(names) -> bool:
    """Are these the tensors of a single-file SDXL, with its two text encoders?"""
    return any(k.startswith("conditioner.embedders.1.") for k in names)


def clean(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the harmless differences between official files of one layout.

    Drops `position_ids` buffers, renames the VAE's old attention names (query -> to_q, ...), flattens attention
    weights that were stored as 1x1 convolutions, takes off the SPM files' prefix `model.`, and puts back the prefix
    `text_model.` that transformers 5 leaves out when it saves a text encoder.
    """
    if weights and all(k.startswith("model.") for k in weights):
        weights = {k[len("model."):]: v for k, v in weights.items()}
    if "embeddings.token_embedding.weight" in weights:
        weights = {f"text_model.{k}": v for k, v in weights.items()}
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
             ("decoder.layers.", "a diffusers AutoencoderTiny"), ("conv.4.weight", "half of a TAESD"),
             ("up_blocks", "a diffusers UNet"), ("blip.", "ImageReward")]
    return next((name for sign, name in signs if any(sign in key for key in weights)), "of unknown layout")


def load_strict(module: nn.Module, weights: dict[str, torch.Tensor], source: object, dtype: torch.dtype | None = None,
                device: torch.device | str = "cpu", whole: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """Load `weights` into `module` (which may be on the meta device), every name and every shape checked.

    Floating tensors are cast to `dtype`, single numbers (a CLIP's logit_scale) at least to fp32. `whole`: all of the
    file, if `weights` are a part. Raises InputError that names the first few keys at fault and what the file looks like.
    """
    own = module.state_dict()
    expected = {k: tuple(v.shape) for k, v in own.items()}
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        parts = [f"{len(keys)} {name} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                 for name, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise InputError(f"{source}: does not fit {type(module).__name__}: {'; '.join(parts)}; the file looks like "
                         f"{layout(whole or weights)}")
    wrong = [f"{k} is {tuple(weights[k].shape)}, expected {shape}" for k, shape in expected.items()
             if tuple(weights[k].shape) != shape]
    if wrong:
        raise InputError(f"{source}: {len(wrong)} tensors of {type(module).__name__} have a wrong shape "
                         f"({'; '.join(wrong[:3])}); another model's weights or configuration; the file looks like "
                         f"{layout(whole or weights)}")
    for key, value in weights.items():
        if own[key].is_floating_point() and not value.is_floating_point():
            raise InputError(f"{source}: tensor {key} holds {str(value.dtype).removeprefix('torch.')}, not weights")
        if value.is_floating_point() and not torch.isfinite(value.sum(dtype=torch.float32)):
            if not torch.isfinite(value.float()).all():
                raise InputError(f"{source}: tensor {key} holds NaN or infinity; the file is damaged, fetch it again")
    exact = dtype and torch.promote_types(dtype, torch.float32)
    module.load_state_dict({k: v.to(device=device, dtype=(dtype if v.ndim else exact) if v.is_floating_point() else None)
                            for k, v in weights.items()}, assign=True)
    return module.requires_grad_(False).eval()


def from_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's names (SDXL's second text encoder in single files, HPSv2) -> transformers'.

    Fused q, k, v are split in thirds; projections, stored [in, out], are transposed.
    """
    plain = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "logit_scale": "logit_scale",
    }
    parts = {"ln_final.": "text_model.final_layer_norm.", "visual.ln_pre.": "vision_model.pre_layrnorm.",
             "visual.ln_post.": "vision_model.post_layernorm.", "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.",
             "attn.out_proj.": "self_attn.out_proj.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2."}
    out = {}
    for key, value in weights.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", key)
        lead, rest = "", key
        if block:
            lead, rest = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}.", block[3]
        if key in plain:
            out[plain[key]] = value
        elif key in ("text_projection", "visual.proj"):
            out["text_projection.weight" if key == "text_projection" else "visual_projection.weight"] = value.T.contiguous()
        elif rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for name, third in zip("qkv", value.chunk(3)):
                out[f"{lead}self_attn.{name}_proj.{rest.rpartition('_')[2]}"] = third
        else:
            part = next((p for p in parts if rest.startswith(p)), None)
            out[key if part is None else lead + parts[part] + rest[len(part):]] = value
    return out


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def original_unet_name(key: str, layers: int, up_attentions: list[bool]) -> str:
    """A UNet parameter's name in a single-file checkpoint (`model.diffusion_model.` left out).

    `layers` is layers_per_block; `up_attentions` says which up blocks have attention, which shifts their upsampler.
    """
    plain = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
             "conv_out": "out.2"}
    for ours, theirs in plain.items():
        if key.startswith(ours + "."):
            return theirs + key[len(ours):]
    match = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
    where, i, kind, j, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        inner, _, leaf = rest.rpartition(".")
        rest = f"{RESNET[inner]}.{leaf}"
    if where == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"
    place = (layers + 1) * i + j
    if where == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (i + 1)}.0.{rest.replace('conv.', 'op.')}"
        return f"input_blocks.{place + 1}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * i + layers}.{1 + up_attentions[i]}.{rest}"
    return f"output_blocks.{place}.{int(kind == 'attentions')}.{rest}"


def original_module_names(modules: list[str]) -> dict[str, str]:
    """Original name -> ours for the modules in a UNet's blocks, whose names also tell how many layers and which attentions it has."""
    places = [re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", m) for m in modules]
    layers = 1 + max((int(p[4]) for p in places if p and p[1] == "down"), default=0)
    attentions = {int(p[2]) for p in places if p and p[1] == "up" and p[3] == "attentions"}
    up = [i in attentions for i in range(1 + max((int(p[2]) for p in places if p and p[1] == "up"), default=-1))]
    return {original_unet_name(m + ".weight", layers, up).removesuffix(".weight"): m for m in modules
            if m.startswith(("down_blocks.", "mid_block.", "up_blocks."))}


def original_vae_name(key: str, levels: int) -> str:
    """A VAE parameter's name in a single-file checkpoint (`first_stage_model.` left out); decoder levels count backwards."""
    key = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", key)
    key = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
    key = re.sub(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def original_tiny_decoder(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoder of diffusers' AutoencoderTiny with the names of `taesd_decoder.pth`, which counts the input's clamp as layer 0."""
    if not any(k.startswith("decoder.layers.") for k in weights):
        return weights
    return {re.sub(r"^decoder\.layers\.(\d+)", lambda m: str(int(m[1]) + 1), k): v
            for k, v in weights.items() if not k.startswith("encoder.layers.")}


def take(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, which is cut off."""
    return {k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)}


def rename(module: nn.Module, weights: dict[str, torch.Tensor], name_of) -> dict[str, torch.Tensor]:
    """Foreign names -> `module`'s, where name_of(our key) is the foreign one; what is left over stays, for load_strict to report."""
    out, shapes = dict(weights), {k: v.shape for k, v in module.state_dict().items()}
    for key, shape in shapes.items():
        value = out.pop(name_of(key), None)
        if value is not None:           # attention weights stored as 1x1 convolutions
            out[key] = value.flatten(1) if value.ndim == 4 and len(shape) == 2 else value
    return out
