"""Find and read weight files, local or of the Hugging Face hub, sharded or single; strict loading.

Every loader in this project ends in `load_strict`: a missing or unexpected tensor or a wrong shape
is one clear error, never a silently random module. In order: reading files, finding and fetching
them, loading them, and the renamings of foreign layouts, which live here and nowhere else.
"""
import contextlib
import json
import os
import re
from pathlib import Path
from zipfile import is_zipfile

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
PEFT = "base_model.model."      # begins the names in a LoRA that peft itself has saved
PLAIN_PEFT = {                  # settings without which B A alpha / rank is not all of an adapter
    "peft_type": ("LORA", None), "use_dora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}
KINDS = (("", "safetensors"), (".fp16", "safetensors"), ("", "bin"), (".fp16", "bin"))  # best first


class InputError(Exception):
    """What the user gave is wrong; the message is one line: what, which file, what to do."""


def first_line(error: Exception, length: int) -> str:
    """How another program's message begins, which may be long or empty."""
    return (str(error).splitlines() or [""])[0][:length]


# Reading files


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


def main_process() -> bool:
    """Is this, of the processes that torchrun started, the one that speaks?"""
    return os.environ.get("RANK", "0") == "0"


def read_header(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, but for hashes of its weights.

    Nothing for others, and for damaged ones.
    """
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        return {key: v for key, v in (file.metadata() or {}).items() if "hash" not in key}
    return {}


def read_weights(path: Path, part: str = "") -> dict[str, torch.Tensor]:
    """All tensors of one file, or of a sharded set given by its index (`.index.json`).

    Pickles only with weights_only=True. A LoRA gets the alphas as tensors that peft wrote into its
    header, or into an `adapter_config.json` beside it; there its names get diffusers' prefix. With
    the name of a `part` the main process says what is read, and its size: SDXL takes a minute.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weight file")
    if path.suffix == ".json":
        return _read_shards(path, part)
    if part and main_process():
        print(f"loading {part}, {path.stat().st_size / 1e9:.2f} GB", flush=True)
    header = read_header(path)
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            zipped = is_zipfile(path)           # since PyTorch 1.6; others cannot be mapped
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated weight file "
                         f"({first_line(error, 120) or 'too short'})") from None
    except Exception as error:      # pickle.UnpicklingError and whatever a hostile file provokes
        raise InputError(f"{path}: not a plain weight file; pickles with code are never run "
                         f"({type(error).__name__})") from None
    if "lora_adapter_metadata" in header:
        return weights | lora_alphas(weights, header["lora_adapter_metadata"],
                                     f"{path}: its lora_adapter_metadata")
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided
            and not (v.is_quantized or v.is_meta) for k, v in weights.items()):
        raise InputError(f"{path}: holds no flat dictionary of names and plain tensors")
    beside = path.with_name("adapter_config.json")
    if any(key.startswith(PEFT) for key in weights) and beside.is_file():
        weights = {f"unet.{key.removeprefix(PEFT)}": value for key, value in weights.items()}
        return weights | lora_alphas(weights, beside.read_text("utf-8", "replace"), f"{beside}:")
    return weights


def _read_shards(path: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of all files that an index names; they lie beside it."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in names.values()):
        raise InputError(f"{path}: no index of shards (a weight_map from tensors to file names), "
                         "or a name that leaves the folder")
    out = {}
    for name in sorted(set(names.values())):
        out |= read_weights(path.parent / name, part)
    return out


def lora_alphas(weights: dict[str, torch.Tensor], metadata: str,
                source: str) -> dict[str, torch.Tensor]:
    """`<module>.alpha` for every layer of a LoRA whose peft configuration is the JSON `metadata`.

    An entry of `alpha_pattern` names modules by the end of their names, or one by all of it (`^`),
    and wins over `lora_alpha`; of several entries the first does. peft would take it for a regular
    expression, which may take forever; others than names are refused.
    """
    out = {}
    try:
        config = {key.removeprefix("unet."): value for key, value in json.loads(metadata).items()
                  if not key.startswith("text_encoder")}
        ends = {end.replace("\\.", ".").rstrip("$"): (i, alpha) for i, (end, alpha)
                in enumerate((config.get("alpha_pattern") or {}).items())}
        odd = [f"{name} {config[name]!r} is not plain LoRA" for name, plain in PLAIN_PEFT.items()
               if config.get(name, plain[0]) not in plain]
        odd += [f"alpha_pattern names no modules with {end!r}" for end in ends
                if not re.fullmatch(r"\^?\w+(\.\w+)*", end)]
        if odd:
            raise ValueError(odd[0])
        for key, value in weights.items():
            match = re.fullmatch(r"((?:unet\.)?(.+))\.lora_A(?:\.\w+)?\.weight", key)
            if match:
                parts = match[2].rsplit(".", 16)
                names = [".".join(parts[i:]) for i in range(len(parts))] + [f"^{match[2]}"]
                found = min((ends[name] for name in names if name in ends), default=None)
                alpha = float(found[1] if found else config["lora_alpha"])
                scale = len(value) ** 0.5 if config.get("use_rslora") else 1.0
                out[f"{match[1]}.alpha"] = torch.tensor(alpha * scale)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as error:
        raise InputError(f"{source} cannot be read ({first_line(error, 120)}), "
                         "so the LoRA's strength is not known") from None
    return out


# Finding and fetching them


def weight_names(variant: str, suffix: str) -> list[str]:
    """A component's possible weight files of one of the KINDS: a file, or the index of a set."""
    return [name for stem in WEIGHT_NAMES for name in (
        f"{stem}{variant}.{suffix}", f"{stem}.{suffix}.index{variant}.json",
        f"{stem}{variant}.{suffix}.index.json")]


def find_weights(folder: Path) -> Path | None:
    """The weight file of a component folder, if it has one; safetensors before pickle."""
    files = [Path(folder) / name for kind in KINDS for name in weight_names(*kind)]
    return next((file for file in files if file.is_file()), None)


def weight_file(folder: Path) -> Path:
    """The weight file of a component folder; InputError if it has none. A file is its own."""
    file = folder if folder.is_file() else find_weights(folder)
    if file is None:
        raise InputError(f"{folder}: no weight file ({'.safetensors, '.join(WEIGHT_NAMES)}"
                         ".safetensors or their shards)")
    return file


def hub_id(source: str) -> re.Match:
    """`owner/name` or `owner/name/path/in/repository` taken apart; InputError for other words."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", source)
    if not match or source.startswith(".") or not match[2] and source.endswith(SUFFIXES):
        raise InputError(f"{source}: neither an existing file or folder "
                         "nor a hub id of the form owner/name")
    return match


def fetch(source: str, patterns: list[str], repo_type: str = "model") -> Path:
    """A local file or folder as it is, or a hub repository, of which `patterns` are downloaded.

    They go into the hub's cache, resumably. `owner/name/path/in/repository` fetches that one file.
    `repo_type`: "model" or "dataset".
    """
    if os.path.exists(source):          # Path.exists raises where a name is too long
        return Path(source)
    match = hub_id(source)
    from huggingface_hub import hf_hub_download, snapshot_download
    try:
        return Path(hf_hub_download(match[1], match[2], repo_type=repo_type) if match[2] else
                    snapshot_download(source, allow_patterns=patterns, repo_type=repo_type))
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get(
            "HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on") else ""
        kind = " --repo-type dataset" if repo_type == "dataset" else ""
        raise InputError(f"{source}: no such file or folder here; as a hub id not in the cache and "
                         f"not to be downloaded{offline} ({type(error).__name__}); on a machine "
                         f"with network: hf download {' '.join(filter(None, match.groups()))}{kind}"
                         ", and let HF_HOME here be a copy of what it fills") from None


def fetch_weights(source: str, root: Path, parts: list[str]) -> Path:
    """Into `root`, from `fetch`: the weights of its folders `parts`, in the first kind there is."""
    if os.path.exists(source) or root.is_file():
        return root
    for variant, suffix in KINDS:
        lacking = [part for part in parts if find_weights(root / part) is None]
        names = weight_names(variant, suffix) + [
            f"{stem}{variant}-*-of-*.{suffix}" for stem in WEIGHT_NAMES]
        if lacking:
            fetch(source, [f"{part}/{n}" if part else n for part in lacking for n in names])
    return root


def fetch_parquet(source: str) -> Path:
    """Local Parquet files, or a hub data set's: its training split, or all if none is named so."""
    path = fetch(source, ["*train*.parquet"], "dataset")
    if not os.path.exists(source) and not path.is_file() and not any(path.rglob("*.parquet")):
        path = fetch(source, ["*.parquet"], "dataset")
    return path


def preset_of(model: str) -> str:
    """Whose settings fit a model: its own if it has a name here; else what its UNet is like.

    The UNet of a local folder or single file, that is; sd15 where that tells nothing. Raises
    InputError for a word that can name no model. Empty: no model is meant, only pictures scored.
    """
    if model in ("tiny", "tiny-flow", "sd15", "sdxl"):
        return model
    if model and "/" not in model and not os.path.exists(model):
        raise InputError(f"--model {model}: neither tiny, tiny-flow, sd15 or sdxl, nor a file or "
                         "folder here, nor a hub id of the form owner/name")
    with contextlib.suppress(InputError, SafetensorError, OSError):     # loading will say why
        if model.endswith(".safetensors"):
            with safe_open(model, "pt") as file:
                return "sdxl" if is_sdxl(file.keys()) else "sd15"
        unet = read_json(Path(model) / "unet/config.json")
        if unet == read_json(Path(__file__).parent / "tiny/model/unet/config.json"):
            noise = Path(model) / "scheduler/scheduler_config.json"     # of a merge, a fine-tune
            flow = noise.is_file() and "Flow" in str(read_json(noise))
            return "tiny-flow" if flow else "tiny"
        if unet.get("addition_embed_type") == "text_time":
            return "sdxl"
    return "sd15"


def is_sdxl(names) -> bool:
    """Are these the tensors of a single-file SDXL, with its two text encoders?"""
    return any(name.startswith("conditioner.embedders.1.") for name in names)


# Loading them

SIGNS = {"model.diffusion_model.": "a single-file checkpoint in the original layout",
         "lora": "a LoRA",
         "visual.transformer.resblocks": "an open_clip model",
         "visual.": "an open_clip model",
         "adaLN_modulation": "a step-aware preference model",
         "vision_model.": "a transformers CLIP",
         "text_model.": "a transformers CLIP text encoder",
         "decoder.up_blocks": "a diffusers VAE",
         "decoder.layers.": "a diffusers AutoencoderTiny",
         "conv.4.weight": "half of a TAESD",
         "up_blocks": "a diffusers UNet",
         "blip.": "ImageReward"}


def layout(weights: dict[str, torch.Tensor]) -> str:
    """A guess at what a weight file is, for error messages: the first of the SIGNS in any name."""
    return next((kind for sign, kind in SIGNS.items() if any(sign in key for key in weights)),
                "nothing that is known here")


def clean(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the harmless differences between official files of one layout.

    Drops `position_ids` buffers and what training leaves in a VAE's file, renames the VAE's old
    attention names (query -> to_q, ...), takes off the SPM files' prefix `model.`, and puts back
    the prefix `text_model.` that transformers 5 leaves out when it saves a text encoder.
    """
    if weights and all(key.startswith("model.") for key in weights):
        weights = take(weights, "model.")
    if "embeddings.token_embedding.weight" in weights:
        weights = {f"text_model.{key}": value for key, value in weights.items()}
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    place = r"(?<=coder\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)"
    return {re.sub(place, lambda match: old[match[1]], key): value
            for key, value in weights.items()
            if not key.endswith("position_ids") and not key.startswith(("loss.", "model_ema."))}


def load_strict(module: nn.Module, weights: dict[str, torch.Tensor], source: object,
                dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
                whole: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """Load `weights` into `module` (which may be on the meta device), every name and shape checked.

    Floating tensors are cast to `dtype`, single numbers (a CLIP's logit_scale) at least to fp32;
    1x1 convolutions become the linear maps that they are. `whole`: all of the file, if `weights`
    are a part. Raises InputError that names the first few keys at fault and what the file looks
    like.
    """
    own = module.state_dict()
    weights = {key: value.flatten(1) if value.ndim == 4 and own.get(key, value).ndim == 2 else value
               for key, value in weights.items()}
    faults = {"missing": sorted(own.keys() - weights.keys()),
              "unexpected": sorted(weights.keys() - own.keys()),
              "of a wrong shape": [
                  f"{key} is {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
                  for key, value in own.items() if weights.get(key, value).shape != value.shape]}
    listed = [f"{len(keys)} {fault} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
              for fault, keys in faults.items() if keys]
    if listed:
        raise InputError(f"{source}: does not fit {type(module).__name__}: {'; '.join(listed)}; "
                         f"the file looks like {layout(whole or weights)}")
    cast = {}
    exact = dtype and torch.promote_types(dtype, torch.float32)
    for key, value in weights.items():
        floating = value.is_floating_point()
        if own[key].is_floating_point() and not floating:
            raise InputError(f"{source}: tensor {key} holds "
                             f"{str(value.dtype).removeprefix('torch.')}, not weights")
        if floating and not torch.isfinite(value.sum(dtype=torch.float32)) and not (
                torch.isfinite(value.float()).all()):       # or else it is only a large sum
            raise InputError(f"{source}: tensor {key} holds NaN or infinity; "
                             "the file is damaged, fetch it again")
        kind = (dtype if value.ndim else exact) if floating else None
        cast[key] = value.to(device=device, dtype=kind)
    same = [key for key, value in cast.items() if value is weights[key]]
    if 2 * sum(cast[key].nbytes for key in same) < sum(v.nbytes for v in cast.values()):
        # or these few would keep the whole file mapped
        cast |= {key: cast[key].clone() for key in same}
    module.load_state_dict(cast, assign=True)
    return module.requires_grad_(False).eval()


# Foreign layouts


def take(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, which is cut off."""
    return {key[len(prefix):]: v for key, v in weights.items() if key.startswith(prefix)}


def rename(module: nn.Module, weights: dict[str, torch.Tensor],
           name_of) -> dict[str, torch.Tensor]:
    """Foreign names -> `module`'s, where name_of(our key) is the foreign one.

    What is left over stays, for load_strict to report.
    """
    ours = {name_of(key): key for key in module.state_dict()}
    return {ours.get(key, key): value for key, value in weights.items()}


OPEN_CLIP = {           # names outside the transformers' blocks
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
OPEN_CLIP_PARTS = {     # parts of names, replaced one after the other
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.", "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.", ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.", ".attn.": ".self_attn.", ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def from_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's names (SDXL's second text encoder in single files, HPSv2) -> transformers'.

    Fused q, k, v are split in thirds; projections, stored [in, out], are transposed. Names that are
    transformers' already stay.
    """
    out = {}
    for key, value in weights.items():
        name = OPEN_CLIP.get(key, key)
        for theirs, ours in OPEN_CLIP_PARTS.items():
            name = name.replace(theirs, ours)
        attention, fused, leaf = name.partition("in_proj_")     # then weight or bias
        if fused:
            for letter, third in zip("qkv", value.chunk(3)):
                out[f"{attention}{letter}_proj.{leaf}"] = third
        else:
            transposed = key in OPEN_CLIP and "proj" in key
            out[name] = value.T.contiguous() if transposed else value
    return out


UNET = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def original_unet_name(key: str, layers: int, up_attentions: list[bool]) -> str:
    """A UNet parameter's name in a single-file checkpoint (`model.diffusion_model.` left out).

    `layers` is layers_per_block; `up_attentions` says which up blocks have attention, which shifts
    their upsampler.
    """
    module, _, leaf = key.rpartition(".")
    if module in UNET:
        return f"{UNET[module]}.{leaf}"
    where, i, kind, j, rest = re.fullmatch(
        r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?"
        r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key).groups()
    if kind == "resnets":
        rest = f"{RESNET[rest.removesuffix('.' + leaf)]}.{leaf}"
    attention = int(kind == "attentions")
    if where == "mid_block":
        return f"middle_block.{1 if attention else 2 * int(j)}.{rest}"
    first = (layers + 1) * int(i)               # number of the level's first block
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + up_attentions[int(i)]}.{rest}"
    if where == "down_blocks":
        return f"input_blocks.{first + int(j) + 1}.{attention}.{rest}"
    return f"output_blocks.{first + int(j)}.{attention}.{rest}"


def original_module_names(modules: list[str]) -> dict[str, str]:
    """Original name -> ours for the modules in a UNet's blocks.

    Their names also tell how many layers a block has and which up blocks have attention.
    """
    places = re.findall(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)",
                        "\n".join(modules), re.MULTILINE)
    layers = 1 + max((int(j) for side, _, _, j in places if side == "down"), default=0)
    count = 1 + max((int(i) for side, i, _, _ in places if side == "up"), default=-1)
    up = [("up", str(i), "attentions") in {place[:3] for place in places} for i in range(count)]
    return {original_unet_name(f"{m}.weight", layers, up).removesuffix(".weight"): m
            for m in modules if m.startswith(("down_blocks.", "mid_block.", "up_blocks."))}


VAE = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k",
       "to_v": "v", "to_out.0": "proj_out", "down_blocks": "down", "resnets": "block",
       "downsamplers.0": "downsample", "upsamplers.0": "upsample",
       "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}


def original_vae_name(key: str, levels: int) -> str:
    """A VAE parameter's name in a single-file checkpoint (`first_stage_model.` left out)."""
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)    # backwards
    for ours, theirs in VAE.items():
        key = key.replace(ours, theirs)
    return key


def original_tiny_decoder(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoder of diffusers' AutoencoderTiny -> the names of `taesd_decoder.pth`.

    That counts the input's clamp as layer 0. Other files stay as they are.
    """
    if not any(key.startswith("decoder.layers.") for key in weights):
        return weights
    return {re.sub(r"^decoder\.layers\.(\d+)", lambda m: str(int(m[1]) + 1), key): value
            for key, value in weights.items() if not key.startswith("encoder.layers.")}
