"""The full-size UNets against diffusers' with the same random weights: the largest difference.

    python benchmarks/parity.py             # SD-1.5 and SDXL, fp32; 11 GB, minutes on a CPU

Both models share one copy of the weights, so SDXL's 2.6 billion fit beside each other. Needs
requirements-dev.txt. Writes benchmarks/results/full_size_parity.json.
"""
import datetime
import gc
import json
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import diffusers
import torch
from conftest import randomize, sd15_shaped, sdxl_shaped
from diffusers import UNet2DConditionModel
from test_unet import SD15_FULL, SDXL_FULL, make_inputs, run_theirs

from unet import UNet, UNetConfig


@torch.no_grad()
def compare(config: dict, height: int = 16, width: int = 24) -> dict:
    """One forward of both on latents of `height` x `width`.

    Differences are relative to the largest entry of diffusers' output.
    """
    with torch.device("meta"):
        ours, theirs = UNet(UNetConfig.from_json(config)), UNet2DConditionModel(**config)
    weights = randomize(ours.to_empty(device="cpu")).state_dict()
    theirs.load_state_dict(weights, strict=True, assign=True)
    inputs = make_inputs(config, height, width)
    outputs, seconds = [], []
    for run in (lambda: ours(**inputs), lambda: run_theirs(theirs, inputs)):
        begin = time.perf_counter()
        outputs.append(run())
        seconds.append(round(time.perf_counter() - begin, 2))
    error, largest = float((outputs[0] - outputs[1]).abs().max()), float(outputs[1].abs().max())
    return dict(
        parameters=sum(p.numel() for p in ours.parameters()), tensors=len(weights),
        latents=[height, width], largest_difference=error, largest_entry=largest,
        relative=error / max(1.0, largest), seconds=seconds,
    )


if __name__ == "__main__":
    results = {}
    for name, config in (("sd15", sd15_shaped(**SD15_FULL)), ("sdxl", sdxl_shaped(**SDXL_FULL))):
        results[name] = compare(config)
        print(name, results[name], flush=True)
        gc.collect()
    record = dict(
        date=str(datetime.date.today()), device=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(), torch=torch.__version__,
        diffusers=diffusers.__version__, dtype="fp32", results=results,
    )
    path = ROOT / "benchmarks/results/full_size_parity.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)
