"""The full-size UNets against diffusers' with the same random weights: the largest difference.

    python benchmarks/parity.py             # SD-1.5 and SDXL, fp32; 11 GB, minutes on a CPU

Both models share one copy of the weights, so SDXL's 2.6 billion fit beside each other. Needs
requirements-dev.txt. Writes benchmarks/results/full_size_parity.json.
"""
import datetime
import gc
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from training import plain_parser, run_script, write_json
from unet import UNet, UNetConfig
from weights import InputError


@torch.no_grad()
def compare(config: dict, height: int = 16, width: int = 24) -> dict:
    """One forward of both on latents of `height` x `width`.

    Differences are relative to the largest entry of diffusers' output.
    """
    from conftest import randomize
    from diffusers import UNet2DConditionModel
    from test_unet import make_inputs, run_theirs
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


def main() -> None:
    """Compare both models, keep what was found."""
    plain_parser(__doc__).parse_args()
    try:
        import diffusers
        from conftest import sd15_shaped, sdxl_shaped
        from test_unet import SD15_FULL, SDXL_FULL
    except ModuleNotFoundError as error:
        raise InputError(f"{error}; pip install -r requirements-dev.txt") from None
    results = {}
    for name, config in (("sd15", sd15_shaped(**SD15_FULL)), ("sdxl", sdxl_shaped(**SDXL_FULL))):
        results[name] = compare(config)
        print(name, results[name], flush=True)
        gc.collect()
    path = ROOT / "benchmarks/results/full_size_parity.json"
    write_json(path, dict(
        date=str(datetime.date.today()), device=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(), torch=torch.__version__,
        diffusers=diffusers.__version__, dtype="fp32", results=results,
    ))
    print(path)


if __name__ == "__main__":
    run_script(main)
