"""How a run calls its networks: timed by phase, counted, and filled up for torch.compile.

None of it changes what a network computes. It stands here, and where the UNet is called
(diffusion.guided_noise), so that the mathematics need not speak of it.
"""
import contextlib
import time
from collections.abc import Callable

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor to the device, without waiting for what the device is doing."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Calls:
    """What a model's calls have cost so far, and the sizes that compiled networks see by phase.

    A phase inside another takes its time away from the outer one. On a GPU events are set, so that
    measuring does not wait for it.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.cuda = torch.device(device).type == "cuda"
        self.evaluations = 0
        self.sizes: dict[str, tuple[int, ...]] = {}     # by phase; without one nothing is filled
        self.marks: list[tuple] = []                    # (phase that ends here, begin, end)
        self.running = ""                               # the innermost phase,
        self.since = None                               # and when its time began

    @contextlib.contextmanager
    def phase(self, name: str):
        """What happens inside is timed as `name`, and filled up to the sizes of `name`."""
        outer = self.running
        self._turn_to(name)
        yield
        self._turn_to(outer)

    def _turn_to(self, phase: str) -> None:
        """Time is this phase's from now on; what has passed was the running one's."""
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self.running:
            self.marks.append((self.running, self.since, now))
        self.running, self.since = phase, now

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds since this was last asked."""
        if self.cuda:
            torch.cuda.synchronize()
        out: dict[str, float] = {}
        for phase, begin, end in self.marks:
            passed = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            out[phase] = out.get(phase, 0.0) + passed
        self.marks.clear()
        return out

    def fill(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, ...], the first repeated up to the phase's smallest size that holds them all.

        A compiled network then sees few shapes. Nobody reads what is computed for the copies.
        """
        sizes = [size for size in self.sizes.get(self.running, ()) if size >= len(rows)]
        missing = min(sizes, default=len(rows)) - len(rows)
        return torch.cat([rows] + [rows[:1]] * missing) if missing else rows

    def count(self, samples: int) -> None:
        """`samples` go through the UNet: 1 each, counted as 3 where a backward follows."""
        self.evaluations += samples * (3 if torch.is_grad_enabled() else 1)

    def wrap(self, function: Callable, name: str) -> Callable:
        """`function` of tensors [N, ...] -> [N, ...], timed and filled up as the phase `name`."""
        def call(*tensors: torch.Tensor) -> torch.Tensor:
            with self.phase(name):
                return function(*map(self.fill, tensors))[:len(tensors[0])]
        return call
