"""Run one of the scripts with an Adam that does not amplify rounding: python tests/gentle.py spo_train.py --out ...

Adam divides each gradient by its own size, so that one which is rounding and nothing else becomes a full step. With a large eps
it divides by a constant instead; what then differs between one process and several is the program's doing.
"""
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PLAIN = torch.optim.AdamW


def adamw(parameters, **options) -> torch.optim.Optimizer:
    """AdamW that divides by a constant."""
    return PLAIN(parameters, **(options | dict(eps=1e-2)))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.optim.AdamW = adamw
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
