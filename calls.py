"""How a run calls its networks: timed by phase, counted, and filled up to few sizes for torch.compile.

None of it changes what a network computes. It stands here, and where the UNet is called (diffusion.guided_noise),
so that the mathematics need not speak of it.
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


def fill_up(rows: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Rows [N, ...] with the first repeated up to the smallest of `sizes` that holds them all.

    A compiled network then sees few shapes. Nobody reads what is computed for the copies.
    """
    size = min((size for size in sizes if size >= len(rows)), default=len(rows))
    if size == len(rows):
        return rows
    return torch.cat([rows, rows[:1].expand(size - len(rows), *rows.shape[1:])])


class Clock:
    """Seconds by phase; a phase inside another takes its time away from the outer one.

    On a GPU events are set, so that measuring does not wait for it.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple] = []        # (phase that ends here, begin, end)
        self.running: list[str] = []
        self.since = None

    @contextlib.contextmanager
    def __call__(self, phase: str):
        self._mark()
        self.running.append(phase)
        yield
        self._mark()
        self.running.pop()

    def _mark(self) -> None:
        """The innermost running phase has taken the time since the last mark."""
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self.running:
            self.marks.append((self.running[-1], self.since, now))
        self.since = now

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


class Calls:
    """What a model's calls have cost so far, and the sizes that a compiled network may see in each phase."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.clock = Clock(torch.device(device))
        self.sizes: dict[str, tuple[int, ...]] = {}     # by phase; a phase without any fills nothing up
        self.evaluations = 0

    @contextlib.contextmanager
    def phase(self, name: str):
        """What happens inside is timed as `name`, and filled up to the sizes of `name`."""
        with self.clock(name):
            yield

    def fill(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, ...], filled up to a size of the running phase."""
        running = self.clock.running
        return fill_up(rows, self.sizes.get(running[-1], ()) if running else ())

    def count(self, samples: int) -> None:
        """`samples` go through the UNet: 1 each, 3 where a backward follows (frozen weights spare half of it)."""
        self.evaluations += samples * (3 if torch.is_grad_enabled() else 1)

    def wrap(self, function: Callable, name: str) -> Callable:
        """`function` of tensors [N, ...] -> [N, ...], timed and filled up as the phase `name`."""
        def call(*tensors: torch.Tensor) -> torch.Tensor:
            with self.phase(name):
                return function(*map(self.fill, tensors))[:len(tensors[0])]
        return call
