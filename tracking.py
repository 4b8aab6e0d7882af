"""Shows a training in TensorBoard or Weights & Biases while it runs (--track).

Both are optional extras, imported only where one is asked for. Steps are rounds, so a run that is
resumed goes on in the same curves.
"""
import importlib
import json
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from training import write_text
from weights import InputError, first_line

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
