"""The rounds of a training: counted, logged, saved, and shown while they run.

report.html in the run's folder is kept up to date. --track also shows a run in TensorBoard or
Weights & Biases: optional extras, imported only where one is asked for. A run that is resumed goes
on in the same curves.
"""
import contextlib
import importlib
import json
import signal
import sys
import time
import typing
import uuid
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from calls import Calls
from report import write_live
from training import Run, profiled, write_text
from weights import InputError, first_line

OFTEN = 30          # seconds after which report.html is written again, as often as it loads itself
MODULES = dict(tensorboard="torch.utils.tensorboard", wandb="wandb")


def load(name: str):
    """The tracker's module; InputError where its package is missing."""
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise InputError(f"--track {name}: needs the package {name} ({first_line(error, 60)}); "
                         f"pip install {name}") from None


def numbers(record: dict) -> dict[str, float]:
    """What a line of the log says in numbers; those inside another get its name before theirs."""
    inner = {f"{name}/{key}": value for name, part in record.items() if isinstance(part, dict)
             for key, value in part.items()}
    return {name: value for name, value in (record | inner).items()
            if isinstance(value, int | float)}


class Nowhere:
    """Shows nothing: the default, and every process but the main one."""

    def __init__(self, folder: Path, config: dict, done: int):
        """`folder`: the run's; `done`: rounds in the checkpoint, after which it goes on."""

    def log(self, step: int, record: dict, grid: Path, prompts: list[str]) -> None:
        """The numbers of round `step`, and its sample grid where that file is there."""

    def close(self) -> None:
        """Nothing is shown from here on."""


class TensorBoard(Nowhere):
    """Event files in the run's folder: tensorboard --logdir RUNFOLDER."""

    def __init__(self, folder: Path, config: dict, done: int):
        self.writer = load("tensorboard").SummaryWriter(
            str(folder / "tensorboard"), purge_step=done + 1)       # rounds that are made again
        self.writer.add_text("configuration", f"```json\n{json.dumps(config, indent=1)}\n```", 0)

    def log(self, step: int, record: dict, grid: Path, prompts: list[str]) -> None:
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, step)
        if grid.exists():                                           # captions are drawn into it
            pixels = np.asarray(Image.open(grid).convert("RGB"))
            self.writer.add_image("samples", pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB(Nowhere):
    """A run of Weights & Biases, whose name the run's folder keeps for when it is resumed."""

    def __init__(self, folder: Path, config: dict, done: int):
        self.wandb, kept = load("wandb"), folder / "wandb.txt"
        if not (done and kept.exists()):
            write_text(kept, uuid.uuid4().hex)
        try:
            self.run = self.wandb.init(
                project="spo", name=folder.name, id=kept.read_text(encoding="utf-8").strip(),
                resume="allow", dir=str(folder), config=config)
        except Exception as error:          # no key, no network: its errors are of many types
            raise InputError(f"--track wandb: does not start ({first_line(error, 200)}); log in, "
                             "or set WANDB_MODE=offline") from None

    def log(self, step: int, record: dict, grid: Path, prompts: list[str]) -> None:
        found = numbers(record)
        if grid.exists():
            found["samples"] = self.wandb.Image(str(grid), caption="; ".join(prompts))
        self.run.log(found, step=step)      # it drops a step that it has: the numbers are the same

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"": Nowhere, "tensorboard": TensorBoard, "wandb": WandB}


class Rounds:
    """The rounds of a run, or its steps: progress, clock, log, pages, when to save, how to leave.

        rounds.begin("so many pairs")
        for step in rounds:                         # from the last checkpoint on
            ...
            rounds.end(record, "prompts", count, score, shown)
            if rounds.due or rounds.ending:         # a checkpoint is; a signal came
                rounds.save(rounds.take_score(), **state)
        rounds.close()                              # however it ended
    """

    def __init__(self, run: Run, total: int, unit: str, config, calls: Calls, name: str):
        self.run, self.processes = run, run.processes
        self.total, self.unit, self.name = total, unit, name
        self.config = config                # of which save_every, compile, profile and track count
        self.calls = calls                  # whose phases are logged
        self.prompts: list[str] = []        # of the samples, if any are drawn
        self.done = 0                       # how many are, in earlier processes too
        self.saved = 0                      # of them, those in the newest checkpoint
        self.bad = 0                        # how many in a row were not finite
        self.recent: list[float] = []       # scores since the last checkpoint
        self.took: list[float] = []         # seconds of each
        self.started = self.shown = time.perf_counter()

    def restore(self, state: dict) -> None:
        """Go on where a checkpoint ends."""
        self.done = self.saved = state["step"]
        self.bad = int(state.get("bad", 0))
        self.recent = [float(score) for score in state.get("recent", [])]

    def begin(self, what: str) -> None:
        """Say what begins, and where to follow it; InputError if the tracker does not start."""
        if self.processes.main:
            print(f"{what}, starting at {self.unit} {self.done}; follow it in "
                  f"{self.run.folder / 'report.html'}", flush=True)
        with self.processes.agreed():
            tracker = TRACKERS[self.config.track if self.processes.main else ""]
            self.tracker = tracker(self.run.folder, self.run.config, self.done)

    def grid(self, done: int) -> Path:
        """Where the samples after `done` rounds are, if any are drawn."""
        return self.run.folder / f"samples-{done:05d}.png"

    def track(self, record: dict) -> None:
        """What is known after the rounds that are done, to where --track says."""
        self.tracker.log(self.done, record, self.grid(self.done), self.prompts)

    def show(self, running: bool = True) -> None:
        """Write the run folder's report.html."""
        if self.processes.main:
            write_live(self.run.folder, self.run.read_log(), self.total, self.unit,
                       running, self.run.config)
        self.shown = time.perf_counter()

    def close(self) -> None:
        """The page says that nothing runs, the tracker ends, signals are the caller's again."""
        self.show(running=False)
        self.tracker.close()
        self.run.close()

    def __iter__(self) -> typing.Iterator[int]:
        self.show()
        second = min(self.done + 1, self.total - 1)
        with tqdm(total=self.total, initial=self.done, desc=self.name, unit=self.unit,
                  disable=not self.processes.main) as self.progress:
            for step in range(self.done, self.total):
                self.started = time.perf_counter()
                wanted = self.config.profile and self.processes.main and step == second
                watch = profiled(self.run.folder, self.processes.device) if wanted else None
                with watch or contextlib.nullcontext():
                    yield step

    def end(self, record: dict, things: str, count: int, score: float | None, shown: dict) -> None:
        """Log `record` with its speed in `things` per second; decide whether to save, to leave."""
        seconds = time.perf_counter() - self.started
        self.done += 1
        self.took.append(seconds)
        phases = {phase: round(value, 3) for phase, value in self.calls.seconds().items()}
        record |= {f"{things}_per_second": count / seconds, "seconds": phases,
                   "eta_minutes": (self.total - self.done) * seconds / 60}
        if self.processes.device.type == "cuda":
            record["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.processes.device) / 1e9
        self.run.log(record)
        self.progress.set_postfix(shown, refresh=False)
        self.progress.update()
        if self.config.compile is True and self.processes.main and len(self.took) == 2:
            tqdm.write(f"compiling took about {max(self.took[0] - seconds, 0):.0f} s "
                       f"(the first {self.unit} less the second)")
        if score is not None:
            self.recent.append(score)
        self.due = (self.done == self.total
                    or self.done % self.config.save_every == 0 and not self.bad)
        self.ending = self.processes.any(bool(self.processes.stop))
        self.track(record)
        if self.due or self.grid(self.done).exists() or time.perf_counter() > self.shown + OFTEN:
            self.show()

    def take_score(self) -> float | None:
        """The mean score since the last checkpoint, where one is due; counted anew from here on."""
        if not self.due or not self.recent:
            return None
        score = sum(self.recent) / len(self.recent)
        self.recent = []
        return score

    def save(self, score: float | None, **state) -> None:
        """Write a checkpoint of `state`; for every process."""
        self.run.save(self.done, dict(state, recent=self.recent, bad=self.bad), score)
        self.saved = self.done

    def leave(self) -> typing.NoReturn:
        """End this process early, with a signal's exit status: it is not finished."""
        self.progress.close()
        if self.processes.main:
            tqdm.write(f"stopped after {self.done} of {self.total} {self.unit}s; "
                       "the same command goes on from there")
        sys.exit(128 + (self.processes.stop or signal.SIGTERM))
