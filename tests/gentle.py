"""Optimizers for tests of several processes: one that does not amplify rounding, and one that waits to be killed.

Adam divides each gradient by its own size, so that one which is rounding and nothing else becomes a full step. With a large eps
it divides by a constant instead; what then differs between one process and several is the program's doing.
"""
import os
import signal
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PLAIN = torch.optim.AdamW


def adamw(parameters, **options) -> torch.optim.Optimizer:
    """AdamW that divides by a constant."""
    return PLAIN(parameters, **(options | dict(eps=1e-2)))


class Waiting(PLAIN):
    """AdamW that waits at its twelfth step for a signal, but where torchrun has restarted twice: a killer may be slow and is not too late."""

    taken = 0

    def step(self, *words):
        self.taken += 1
        if self.taken == 12 and os.environ["TORCHELASTIC_RESTART_COUNT"] < "2":
            signal.pause()
        return super().step(*words)
