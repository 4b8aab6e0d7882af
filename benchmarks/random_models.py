"""Random checkpoints in the official layouts, for measuring where nothing can be downloaded.

    python benchmarks/random_models.py sdxl FOLDER          # 7 GB in bf16, made on the GPU: seconds
    python benchmarks/random_models.py sdxl FOLDER --small  # the same structure in a few kilobytes

KIND is sd15 (2.1 GB), sdxl, judge (a step-aware preference model, 2.6 GB), pickscore (2 GB) or
pairs (a folder of pictures with preferences). Every network has its default initialization, so that
what it computes stays finite; random weights cost what trained ones cost. The tokenizer has the
official size, 49,408, and made-up merges. A folder that is there already is left as it is.
"""
import argparse
import itertools
import json
import math
import shutil
import string
import sys
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image
from safetensors.torch import save_file

from clip_spm import CLIP, CLIPConfig, TowerConfig, clip_h
from ddim import STABLE_DIFFUSION
from loading import SDXL_UNET, TEXT_G, TEXT_L
from training import generator, write_json
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

KINDS = ("sd15", "sdxl", "judge", "pickscore", "pairs")
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 49_408


def shapes(kind: str, small: bool) -> tuple[UNetConfig, VAEConfig, list[CLIPConfig]]:
    """UNet, VAE and text encoders; SDXL's VAE is as the one that is safe in half precision."""
    xl = kind == "sdxl"
    vae = VAEConfig(scaling_factor=0.13025 if xl else 0.18215)
    if not small:
        return (SDXL_UNET, vae, [TEXT_L, TEXT_G]) if xl else (UNetConfig(), vae, [TEXT_L])
    few = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    vae = replace(vae, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    first = CLIPConfig(TowerConfig(8, 16, 2, 2))
    if not xl:
        return UNetConfig(
            **few, cross_attention_dim=8, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")), vae, [first]
    second = CLIPConfig(TowerConfig(12, 24, 2, 2, "gelu"), None, 12)
    return replace(
        SDXL_UNET, **few, cross_attention_dim=20, attention_head_dim=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        addition_time_embed_dim=6, projection_class_embeddings_input_dim=12 + 36), vae, [
            first, second]


def clip_shape(step_aware: bool, small: bool) -> CLIPConfig:
    """CLIP-H, or something like it."""
    if not small:
        return clip_h(step_aware)
    return CLIPConfig(TowerConfig(12, 24, 2, 2, "gelu"),
                      TowerConfig(16, 32, 2, 2, "gelu", image_size=28, patch_size=14), 10,
                      step_aware)


def network(cls, config, device: torch.device) -> torch.nn.Module:
    """A bf16 network, initialized on the device itself."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        module = cls(config)
    torch.set_default_dtype(torch.float32)
    if hasattr(module, "logit_scale"):
        module.logit_scale.data.fill_(math.log(100))
    return module


def save(module: torch.nn.Module, config: dict, folder: Path, name: str, prefix: str = "") -> None:
    """A network's weights and its config.json, as the official folders have them."""
    write_json(folder / "config.json", config)
    weights = {prefix + key: value.cpu() for key, value in module.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, pad: str) -> None:
    """A byte-level BPE tokenizer of the official size, in the official files."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pairs = [a + b for a, b in itertools.product(string.ascii_lowercase, repeat=2)]
    merges = [*map(tuple, pairs)] + [(a, b + "</w>") for a, b in pairs]
    merges += [*itertools.product(pairs, string.ascii_lowercase), *itertools.product(pairs, pairs)]
    merges = merges[:VOCABULARY - 2 * len(letters) - 2]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=pad)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", dict(
        special, tokenizer_class="CLIPTokenizer", model_max_length=77))


def write_model(kind: str, folder: Path, small: bool, device: torch.device) -> None:
    """A model in the diffusers layout."""
    unet, vae, texts = shapes(kind, small)
    parts = {f"text_encoder{n}": ["transformers", "CLIPTextModel"]
             for n in ("", "_2")[:len(texts)]}
    write_json(folder / "model_index.json", dict(
        parts, _class_name=f"StableDiffusion{'XL' * (kind == 'sdxl')}Pipeline",
        force_zeros_for_empty_prompt=kind == "sdxl"))
    write_json(folder / "scheduler/scheduler_config.json", STABLE_DIFFUSION)
    name = "diffusion_pytorch_model"
    save(network(UNet, unet, device), asdict(unet), folder / "unet", name)
    save(network(VAE, vae, device), asdict(vae), folder / "vae", name)
    for n, text in zip(("", "_2"), texts):
        kinds = ["CLIPTextModelWithProjection" if text.projection_dim else "CLIPTextModel"]
        config = asdict(text.text) | dict(architectures=kinds, projection_dim=text.projection_dim)
        save(network(CLIP, text, device), config, folder / f"text_encoder{n}", "model")
        write_tokenizer(folder / f"tokenizer{n}", "!" if n else END)


def write_clip(step_aware: bool, folder: Path, small: bool, device: torch.device) -> None:
    """PickScore, or a step-aware preference model with the official names."""
    shape = clip_shape(step_aware, small)
    config = dict(text_config=asdict(shape.text), vision_config=asdict(shape.vision),
                  projection_dim=shape.projection_dim)
    save(network(CLIP, shape, device), config, folder, "model", "model." * step_aware)


def write_pairs(folder: Path, small: bool) -> None:
    """Sixty-four preferences between pictures of coloured blotches, 512 pixels a side."""
    side, lines = 16 if small else 512, []
    for n in range(64):
        names = [f"{n}_{which}.jpg" for which in (0, 1)]
        for name in names:
            blotches = torch.randint(0, 256, (8, 8, 3), generator=generator(0, name))
            picture = Image.fromarray(blotches.to(torch.uint8).numpy())
            picture.resize((side, side)).save(folder / name)
        lines.append(json.dumps(dict(caption=f"picture {n}", image_0=names[0], image_1=names[1],
                                     label_0=n % 2, label_1=1 - n % 2)))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def write(kind: str, folder: Path, small: bool, device: torch.device) -> None:
    """What `kind` says; it lies in `folder` whole, or not at all."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.manual_seed(0)
    if kind == "pairs":
        write_pairs(unfinished, small)
    elif kind in ("judge", "pickscore"):
        write_clip(kind == "judge", unfinished, small, device)
    else:
        write_model(kind, unfinished, small, device)
    unfinished.rename(folder)


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="the same structure, minuscule")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write(given.kind, given.folder, given.small, device)


if __name__ == "__main__":
    main()
