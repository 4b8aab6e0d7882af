"""Your card, your command, GB, hours: the tables of docs/cost.md, from what was measured.

    python benchmarks/cost.py           # after new results: prints and writes them

A whole training is the paper's: ten epochs of 4,000 prompts. Seconds per prompt are those of
results/gpu_*.json (whole rounds, this program compiled), else of results/parts_*.json (put together
from parts). Where neither has a card of that size, they are calculated: counted arithmetic over the
speed that SD-1.5 reached on the H100, in proportion to the cards' peaks.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_tables import into_page, rows
from training import plain_parser
from weights import read_json

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/cost.md"
PROMPTS = 10 * 4000
CALCULATED = "calculated"
# Arithmetic of one prompt, in TFLOP, counted: k = 4 and j = 1; k = 2 and j = 4.
TFLOP = {"sd15": dict(sampling=104, decoding=161, scoring=21, training=77),
         "sdxl": dict(sampling=473, decoding=84, scoring=3, training=1136)}
CHECKPOINTING = 4 / 3       # a pair's policy forward is done twice: four forwards' worth, not three
# NVIDIA's data sheets: dense bf16 products in TFLOP/s, of an H100 SXM and an RTX 4090.
PEAK = {80: 989.4, 24: 165.2}
CARD = {80: "80 GB (H100)", 24: "24 GB (RTX 4090)"}
NAMES = {"sd15": "SD-1.5", "sdxl": "SDXL"}
LORA = {"sd15": 797_184, "sdxl": 92_897_280}        # parameters, rank 4 and 64
SPM = 1_306_176_001                                 # of a step-aware preference model
# Weights on the card in bf16 (UNet, VAE, text encoders, judge), in billions.
WEIGHTS = {"sd15": 0.860 + 0.084 + 0.123 + 1.306, "sdxl": 2.567 + 0.084 + 0.818 + 1.306}
# What is fetched from the hub, in GB.
DOWNLOADS = {
    "sd15": (("`stable-diffusion-v1-5/stable-diffusion-v1-5`", 3.44 + 0.33 + 0.49),
             ("`SPO-Diffusion-Models/Step-Aware_Preference_Models`, SD-1.5's", 5.22)),
    "sdxl": (("`stabilityai/stable-diffusion-xl-base-1.0`", 10.27 + 0.33 + 0.49 + 2.78),
             ("`madebyollin/sdxl-vae-fp16-fix`", 0.33),
             ("`SPO-Diffusion-Models/Step-Aware_Preference_Models`, SDXL's", 5.22))}
PICKSCORE = 3.94


@dataclass
class Speed:
    """Of one model on one card."""
    seconds: float              # a prompt
    gb: str                     # of the card's memory
    source: str                 # measured where, or CALCULATED


def records(folder: Path, name: str) -> list[tuple[dict, dict]]:
    """(a card's results, what an entry of gpu.py found there), for every card that has it."""
    files = [read_json(path) for path in sorted(folder.glob("gpu_*.json"))]
    return [(file, r["found"]) for file in files for r in file["records"]
            if r["name"] == name and r["found"]]


def measured(folder: Path, model: str, size: int) -> Speed | None:
    """What a card of about `size` GB took for a prompt, compiled."""
    for file, found in records(folder, f"round {model}"):
        side = found.get("bench", {}).get("sides", {}).get("compiled")
        if side and 0.9 * size <= file["memory_gb"] <= 1.2 * size:
            return Speed(side["seconds_per_prompt"], f"{side['peak_bytes'] / 1e9:.1f}",
                         f"measured, {file['card']}")
    for path in sorted(folder.glob(f"parts_{model}_*.json")) if size == 80 else ():
        side, card = read_json(path)["sides"]["compiled"], read_json(path)["device"]
        return Speed(side["seconds_per_prompt"], f"{side['peak_bytes'] / 1e9:.1f}",
                     f"measured in parts, {card}")
    return None


def memory(folder: Path, model: str, size: int) -> str:
    """GB on the card: as `setting` found it, or estimated."""
    low = {"sd15": 10, "sdxl": 24}[model]
    name = f"setting {model} " + (f"low in {low} GB" if size == 24 else "normal")
    for _, found in records(folder, name):
        if found.get("peak_memory_gb"):
            return f"{found['peak_memory_gb']:.1f}"
    if size == 24:
        return f"meant for {low}"
    # Four latents with gradients: half of what eight took (parts_sd15_h100.json, networks_alone).
    lora = 16 * LORA[model] / 1e9           # with gradients and AdamW's state, in fp32
    return f"about {2 * WEIGHTS[model] + lora + 45.7 / 2:.0f}, calculated"


def speed(folder: Path, model: str, size: int) -> Speed:
    """Measured, or calculated."""
    if found := measured(folder, model, size):
        return found
    reached = read_json(folder / "parts_sd15_h100.json")["sides"]["compiled"]["tflops"]
    work = dict(TFLOP[model])
    work["training"] *= CHECKPOINTING if size == 24 else 1          # --memory low
    seconds = sum(work.values()) / (reached * PEAK[size] / PEAK[80])
    return Speed(seconds, memory(folder, model, size), CALCULATED)


def hours(folder: Path) -> list[str]:
    """The table of whole trainings."""
    cells = []
    for model, name in NAMES.items():
        for count, size in ((1, 24), (1, 80), (4, 80)):
            found = speed(folder, model, size)
            total = PROMPTS * found.seconds / count / 3600
            start = "python" if count == 1 else f"torchrun --nproc_per_node={count}"
            source = found.source + (f"; over {count}: calculated" if count > 1 and
                                     found.source != CALCULATED else "")
            cells.append([
                f"{count} x {CARD[size]}", name,
                f"`{start} spo_train.py --model {model} --prompts PROMPTS.json --compile`",
                found.gb, f"{found.seconds / count:.2f}", f"{total:.0f}", source])
    return rows("card | model | command | GB on a card | s / prompt | hours | where from", cells)


def disk() -> list[str]:
    """The table of files."""
    cells = []
    for model, name in NAMES.items():
        one, lora = 12 * LORA[model] / 1e9, 8 * LORA[model] / 1e9
        cells.append([f"`spo_train.py`, {name}", size_of(one), size_of(lora),
                      size_of(3 * one + 2 * lora)])
    one, file = 12 * SPM / 1e9, 4 * SPM / 1e9
    cells.append(["`spm_train.py`, either", size_of(one), size_of(file),
                  size_of(3 * one + 2 * file)])
    return rows("run | a checkpoint | what it trains | folder at the end", cells)


def size_of(gb: float) -> str:
    """In GB or MB."""
    return f"{gb:.1f} GB" if gb >= 10 else f"{gb:.2f} GB" if gb >= 0.1 else f"{1000 * gb:.0f} MB"


def downloads() -> list[str]:
    """The table of downloads."""
    cells = []
    for model, name in NAMES.items():
        cells += [[name, source, f"{gb:.2f}"] for source, gb in DOWNLOADS[model]]
        cells.append([name, "together", f"{sum(gb for _, gb in DOWNLOADS[model]):.2f}"])
    cells.append(["either", "`yuvalkirstain/PickScore_v1`, to evaluate or to train an SPM",
                  f"{PICKSCORE:.2f}"])
    return rows("model | from the hub | GB", cells)


def page(folder: Path = RESULTS) -> list[str]:
    """All three tables."""
    return ["## Hours", "", *hours(folder), "## Disk", "", *disk(), "## Downloads", "",
            *downloads()]


if __name__ == "__main__":
    plain_parser(__doc__).parse_args()
    print("\n".join(page()))
    into_page(PAGE, page())
