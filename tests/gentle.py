"""An Adam that does not amplify rounding, for tests that compare one process with several.

Adam divides each gradient by its own size, so that one which is rounding and nothing else becomes a full step. With a large eps
it divides by a constant instead; what then differs between one process and several is the program's doing.
"""
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PLAIN = torch.optim.AdamW


def adamw(parameters, **options) -> torch.optim.Optimizer:
    """AdamW that divides by a constant."""
    return PLAIN(parameters, **(options | dict(eps=1e-2)))
