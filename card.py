"""The README.md of a run's folder: a model card for the Hub, made of what lies in the folder.

    python card.py runs/spo                 # a training writes it, too; this adds later evaluations
    hf upload OWNER/NAME runs/spo --exclude "checkpoint-*"
"""
import needs  # noqa: F401
import contextlib
import os
from pathlib import Path

from huggingface_hub import ModelCardData

import report
from loading import NAMES
from training import plain_parser, run_script, warn, write_text
from weights import InputError, hub_id, read_json

MARK = "<!-- Written anew by each training and card.py; without this line the page is yours. -->"
LICENSES = {NAMES["sd15"]: "creativeml-openrail-m", NAMES["sdxl"]: "openrail++"}
SETTINGS = ("method", "judge", "reward", "seed", "resolution", "steps", "guidance_scale", "eta",
            "k", "j", "t_min", "t_max", "continue_from", "pair", "threshold", "beta", "clamp",
            "lr", "rank", "targets", "prompts_per_round", "pairs_per_step")
TEXT = """{mark}

# {title}

A LoRA of {base}, trained with {method}; rounds: {rounds}.

{pictures}

## Use it

Recommended: strength 1, guidance (CFG) {guidance:g}, {steps} steps, as it was trained. Less
strength is closer to the base. {note}

diffusers:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{source}", torch_dtype=torch.float16).to("cuda")
pipe.load_lora_weights("OWNER/NAME", weight_name="pytorch_lora_weights.safetensors",
                       adapter_name="{method}")
pipe.set_adapters("{method}", 1.0)
image = pipe("{prompt}", guidance_scale={guidance:g},
             num_inference_steps={steps}).images[0]
image.save("picture.png")
```

ComfyUI: put `lora_kohya.safetensors` into `models/loras`; node LoraLoaderModelOnly with
strength_model 1, KSampler with cfg {guidance:g} and {steps} steps.

A1111: put `lora_kohya.safetensors` into `models/Lora`; write `<lora:lora_kohya:1>` in the prompt,
CFG scale {guidance:g}, {steps} steps.

## How it went

{results}{curve}

{best}

## Settings

All of them are in `config.json`.

{settings}
"""

TINY = """The tiny model is a toy of 64 x 64 pixels. It is not on the Hub: run this in the folder of
the project that holds `tiny/model`. ComfyUI and A1111 do not know it, so their lines below are for
a LoRA of SD-1.5 or SDXL."""
FLOW = """The tiny flow-matching model is a toy of 64 x 64 pixels, and not on the Hub. diffusers,
ComfyUI and A1111 have no pipeline for a UNet that matches a flow: draw with `python evaluate.py
--model tiny-flow`. Their lines below are for a LoRA of SD-1.5 or SDXL."""
OWN = "The base is not on the Hub: write the path of your folder for `FOLDER/OF/...`."
BEST = """The LoRA here is that of the last round. `best/` holds that of the saved round with the
highest score."""


def rows_of(head: tuple, lines: list[tuple]) -> str:
    """A Markdown table; "" without lines."""
    cells = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells) if lines else ""


def base_of(config: dict) -> str:
    """The base model's hub id; "" for a folder or file of one's own."""
    base = NAMES.get(config["model"], config["model"])
    with contextlib.suppress(InputError):
        if not os.path.exists(base):
            hub_id(base)
            return base
    return ""


def about_base(config: dict) -> dict[str, str]:
    """What the page says of the base. No path of this machine is told."""
    if config["model"] in ("tiny", "tiny-flow"):
        source, note = ("tiny/model", TINY) if config["model"] == "tiny" else ("tiny/flow", FLOW)
        return dict(base="this project's tiny model", source=source, note=note,
                    prompt="a red circle above a blue cross")
    base = base_of(config)
    own = Path(config["model"]).name
    return dict(base=base or own, source=base or f"FOLDER/OF/{own}", prompt="a photo of a cat",
                note="" if base else OWN)


def results(folder: Path) -> str:
    """What evaluations in folders below found, a line for each model."""
    lines = []
    for path in sorted(folder.glob("*/results.json")):
        try:
            lines += [f"- {path.parent.name}: {words}" for words in report.summary(read_json(path))]
        except (InputError, LookupError, TypeError, ValueError) as error:
            warn(f"{path}: not an evaluation's results ({error}); the card goes without it")
    return "\n".join(lines) + "\n\n" if lines else ""


def curve(rows: list[dict]) -> str:
    """The validation scores, as a table."""
    start = rows[0].get("validation_score_at_start")
    lines = [(0, f"{start:.4f}")] if report.number(start) else []
    lines += [(row["round"], f"{row['validation_score']:.4f}") for row in rows
              if report.number(row.get("validation_score"))]
    return rows_of(("round", "judge's mean score of the same prompts and seeds"), lines)


def card(folder: Path) -> str:
    """The page, with the Hub's metadata; InputError where the folder is not a run's."""
    config = read_json(folder / "config.json")
    if not {"model", "steps", "guidance_scale"} <= config.keys():
        raise InputError(f"{folder}: not the folder of a training of LoRAs")
    rows = next(iter(report.read_logs((f"run={folder}",)).values()))
    known = base_of(config)
    method, guidance, steps = (config.get("method", "spo"), config["guidance_scale"],
                               config["steps"])
    data = ModelCardData(
        base_model=known or None, base_model_relation="adapter" if known else None,
        license=LICENSES.get(known), library_name="diffusers", pipeline_tag="text-to-image",
        tags=["text-to-image", "lora", method, "diffusers"],
        inference=dict(parameters=dict(guidance_scale=guidance, num_inference_steps=steps)))
    grids = sorted(folder.glob("samples-*.png"))
    pictures = "\n\n".join(
        f"{report.round_of(grid)}:\n\n![sample pictures]({grid.name})"
        for grid in dict.fromkeys(grids[:1] + grids[-1:]))
    settings = [(name, config[name]) for name in SETTINGS if name in config]
    settings.append(("prompts", Path(config.get("prompts", "")).name))
    return f"---\n{data.to_yaml()}\n---\n" + TEXT.format(
        mark=MARK, title=folder.resolve().name, method=method, **about_base(config),
        rounds=rows[-1].get("round"), pictures=pictures, guidance=guidance, steps=steps,
        results=results(folder), curve=curve(rows), best=BEST * (folder / "best").exists(),
        settings=rows_of(("option", "value"), settings))


def write_card(folder: Path) -> None:
    """Write README.md; one that somebody has made their own stays."""
    path = folder / "README.md"
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, card(folder))


def main() -> None:
    """Write the card of a run's folder."""
    parser = plain_parser(__doc__)
    parser.add_argument("folder", type=Path, help="of a training")
    folder = parser.parse_args().folder
    write_card(folder)
    print(f"{folder / 'README.md'} says how to use the LoRA; to publish it: "
          f"hf upload OWNER/NAME {folder} --exclude \"checkpoint-*\"")


if __name__ == "__main__":
    run_script(main)
