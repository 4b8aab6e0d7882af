"""Preference pairs for the step-aware preference model, read as they are needed: a folder, Parquet files, or the tiny world.

    FOLDER/pairs.jsonl   one object a line: caption, image_0, image_1, label_0, label_1 (1 / 0; 0.5 twice for a tie)
    *.parquet            Pick-a-Pic's columns: caption, jpg_0, jpg_1, label_0; has_label, num_example_per_prompt if there

Captions and labels are held in memory, pictures are not. Where pictures lie together on disk (a row group of a Parquet
file), they are used at about the same time: an epoch shuffles the groups, then the rows of a few groups at a time.
"""
import io
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_spm import to_rgb
from training import permutation
from prompt_sets import checked_prompt
from weights import InputError, fetch_parquet

SMALLEST = 8            # pixels of a picture's shorter side
WINDOW = 4096           # rows shuffled together; a process keeps at most about two windows of encoded pictures


class UnreadablePicture(InputError):
    """A picture of a pair is damaged, too small or too large."""


@dataclass
class Pairs:
    """N preference pairs; `pictures(i)` reads pair i as uint8 [2, 3, S, S], by several threads if need be, or raises UnreadablePicture."""
    captions: list[str]
    label: torch.Tensor                             # [N] 1: the first is liked, 0: the second, 0.5: tie
    weight: torch.Tensor                            # [N] 1 / pairs of the same prompt
    groups: list[range]                             # rows that lie together
    pictures: Callable[[int], torch.Tensor]
    together: list[str] | None = None               # [N] rows with the same entry may share pictures; None: no two rows do


def hold_out(pairs: Pairs, count: int, seed: int) -> tuple[list[int], set[int]]:
    """At most `count` rows and a quarter of all, drawn by the seed -> (those, in order; the others). No picture is on both sides."""
    total, rows, held = len(pairs.captions), {}, []
    for i in range(total):
        rows.setdefault(pairs.together[i] if pairs.together else i, []).append(i)
    count = min(count, total // 4)
    for first in permutation(total, seed, "validation"):
        group = rows.pop(pairs.together[first] if pairs.together else first, [])
        if group and len(held) + len(group) <= count:
            held += group
        if len(held) == count:
            break
    return sorted(held), set(range(total)) - set(held)


def epoch_order(pairs: Pairs, used: set[int], seed: int, epoch: int) -> list[int]:
    """All `used` rows in the shuffled order of an epoch; neighbours come from few groups."""
    rows, out, part = [pairs.groups[g] for g in permutation(len(pairs.groups), seed, "groups", epoch)], [], []
    for i, group in enumerate(rows):
        part += [r for r in group if r in used]
        if len(part) >= WINDOW or i + 1 == len(rows):
            out += [part[j] for j in permutation(len(part), seed, "order", epoch, i)]
            part = []
    return out


def square(file, side: int) -> torch.Tensor:
    """The middle of a picture (a path or an open file), its shorter side resized to `side` -> uint8 [3, side, side].

    Any mode that PIL reads: 16-bit greys keep their upper byte, transparency is put on white. Raises UnreadablePicture.
    """
    try:
        image = Image.open(file)
        if min(image.size) < SMALLEST:
            raise UnreadablePicture(f"{image.width} x {image.height} pixels")
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        image = to_rgb(image)
        # Only what will be seen is resized: the whole of a picture of 8 x 30,000 pixels would fill the memory.
        scale, box = side / min(image.size), []
        for length in image.size:
            whole = max(side, round(length * scale))
            box.append(((whole - side) // 2 * length / whole, ((whole - side) // 2 + side) * length / whole))
        image = image.resize((side, side), Image.Resampling.LANCZOS, box=(box[0][0], box[1][0], box[0][1], box[1][1]))
    except Exception as error:          # PIL's many decoders raise what they like
        raise UnreadablePicture((str(error) or type(error).__name__).splitlines()[0]) from None
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def prompt_weights(captions: list[str]) -> torch.Tensor:
    """1 / number of pairs with the same caption."""
    counts = Counter(captions)
    return torch.tensor([1 / counts[c] for c in captions])


def world_pairs(count: int, seed: int) -> Pairs:
    """The tiny world's own preferences."""
    from tiny.world import preference_pairs
    images, captions, label = preference_pairs(count, seed=seed + 1000)
    return Pairs(captions, label, torch.ones(count), [range(count)], lambda i: images[i])


def checked_label(label, place: str) -> float:
    """A label as it must be; InputError that begins with its place otherwise."""
    if not isinstance(label, int | float) or label not in (0, 0.5, 1):
        raise InputError(f"{place} has label_0 {label!r}; it must be 1, 0, or 0.5 for a tie")
    return float(label)


def folder_pairs(folder: Path, side: int) -> Pairs:
    """A folder with pairs.jsonl. Raises InputError that names the line; a bad picture is reported when it is read."""
    path = folder / "pairs.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    for i, row in enumerate(rows):
        missing = [k for k in ("caption", "image_0", "image_1", "label_0") if not isinstance(row, dict) or k not in row]
        if missing:
            raise InputError(f"{path}: line {i + 1} lacks {', '.join(missing)}")
        if not isinstance(row["caption"], str):
            raise InputError(f"{path}: line {i + 1} has a caption that is no text")
        checked_prompt(row["caption"], f"{path}: line {i + 1}")
        checked_label(row["label_0"], f"{path}: line {i + 1}")
        if not isinstance(size := row.get("num_example_per_prompt", 1), int | float) or not size > 0:
            raise InputError(f"{path}: line {i + 1} has num_example_per_prompt {size!r}; it must be above 0")
        for name in (row["image_0"], row["image_1"]):
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"{path}: line {i + 1} names the picture {name!r}; it must be a file in this folder")
            if not os.path.isfile(folder / name):
                raise InputError(f"{path}: line {i + 1} names {name}, which does not exist")
    if not rows:
        raise InputError(f"{path}: holds no pairs")

    def picture(name: str) -> torch.Tensor:
        try:
            return square(folder / name, side)
        except UnreadablePicture as error:
            raise UnreadablePicture(f"{folder / name}: not a readable picture ({error})") from None

    captions = [row["caption"] for row in rows]
    weight = torch.tensor([1 / row["num_example_per_prompt"] for row in rows]) \
        if all("num_example_per_prompt" in row for row in rows) else prompt_weights(captions)
    return Pairs(captions, torch.tensor([float(row["label_0"]) for row in rows]), weight, [range(i, i + 1) for i in range(len(rows))],
                 lambda i: torch.stack([picture(rows[i]["image_0"]), picture(rows[i]["image_1"])]), captions)


def parquet_pairs(files: list[Path], side: int) -> Pairs:
    """Parquet files with Pick-a-Pic's columns; rows without a label are left out. Needs pyarrow, an optional extra.

    Every process reads all captions and labels, and whole row groups of pictures, but decodes only the pictures it is asked for.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{files[0]}: reading Parquet needs pyarrow; pip install pyarrow") from None
    captions, labels, weights, groups, places = [], [], [], [], []
    handles = []
    for path in files:
        try:
            handle = pq.ParquetFile(path)
            names = set(handle.schema_arrow.names)
            missing = [k for k in ("caption", "jpg_0", "jpg_1", "label_0") if k not in names]
            if missing:
                raise InputError(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(sorted(names))}")
            wanted = [k for k in ("caption", "label_0", "has_label", "num_example_per_prompt") if k in names]
            for g in range(handle.num_row_groups):
                table, begin = handle.read_row_group(g, columns=wanted).to_pydict(), len(captions)
                for row in range(len(table["caption"])):
                    label, place = table["label_0"][row], f"{path}: row {row} of row group {g}"
                    if label is None or (not table["has_label"][row] if "has_label" in table else label != label):      # None or NaN
                        continue
                    if not isinstance(table["caption"][row], str):
                        raise InputError(f"{place} has a caption that is no text")
                    captions.append(table["caption"][row])
                    labels.append(checked_label(label, place))
                    weights.append(table["num_example_per_prompt"][row] if "num_example_per_prompt" in table else None)
                    places.append((len(handles), g, row))
                groups.append(range(begin, len(captions)))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        handles.append(handle)
    if not captions:
        raise InputError(f"{files[0]}: holds no labelled pairs")
    cache: OrderedDict = OrderedDict()                  # (file, group) -> its encoded pictures, least recently used first
    lock = threading.Lock()

    def encoded(file: int, group: int) -> tuple[list[bytes], list[bytes]]:
        """A row group's encoded pictures, jpg_0 and jpg_1."""
        with lock:
            if (file, group) not in cache:
                try:
                    table = handles[file].read_row_group(group, columns=["jpg_0", "jpg_1"]).to_pydict()
                except (OSError, ValueError) as error:
                    raise UnreadablePicture(f"row group {group} is damaged: {str(error).splitlines()[0]}") from None
                cache[file, group] = table["jpg_0"], table["jpg_1"]
                while len(cache) > 1 and sum(len(v[0]) for v in cache.values()) > 2 * WINDOW:
                    cache.popitem(last=False)
            cache.move_to_end((file, group))
            return cache[file, group]

    def pictures(i: int) -> torch.Tensor:
        file, group, row = places[i]
        try:
            return torch.stack([square(io.BytesIO(column[row]), side) for column in encoded(file, group)])
        except (TypeError, UnreadablePicture) as error:         # TypeError: no bytes
            raise UnreadablePicture(f"{files[file]}: row {row} of row group {group} holds no readable pictures ({error})") from None

    known = all(w for w in weights)
    return Pairs(captions, torch.tensor(labels), 1 / torch.tensor(weights).float() if known else prompt_weights(captions), groups, pictures,
                 captions)


def load_pairs(source: str, side: int) -> Pairs:
    """A folder (pairs.jsonl, or Parquet files in it), one Parquet file, or a hub data set `owner/name[/file.parquet]`.

    Pictures are cut to squares of `side` pixels. Raises InputError where something is missing or malformed.
    """
    path = fetch_parquet(source)
    if path.is_file() and path.suffix == ".parquet":
        return parquet_pairs([path], side)
    if path.is_dir() and not (path / "pairs.jsonl").exists():
        files = sorted(path.rglob("*.parquet"))
        train = [f for f in files if f.name.startswith("train")]           # a hub data set also holds its other splits
        if files:
            return parquet_pairs(train or files, side)
    return folder_pairs(path, side)
