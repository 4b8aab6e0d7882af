"""Preference pairs for the step-aware preference model, read as they are needed.

    FOLDER/pairs.jsonl   one object a line: caption, image_0, image_1, label_0, label_1 (1 / 0;
                         0.5 twice for a tie)
    *.parquet            Pick-a-Pic's columns: caption, jpg_0, jpg_1, label_0; label_1, has_label,
                         num_example_per_prompt if there
    world_pairs          the tiny world's own

Captions and labels are held in memory, pictures are not. Where pictures lie together on disk (a row
group of a Parquet file), they are used at about the same time: an epoch shuffles the groups, then
the rows of a few groups at a time.
"""
import functools
import io
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from calls import upload
from clip_spm import to_rgb, upright
from loading import Pipeline
from prompt_sets import TRAINING, checked_prompt, parquet_files
from training import Processes, Run, Stopped, permutation, warn, write_atomic
from weights import InputError

SMALLEST = 8            # pixels of a picture's shorter side
WINDOW = 4096           # rows shuffled together; a process caches about two windows of pictures


class UnreadablePicture(InputError):
    """A picture of a pair is damaged, too small or too large."""


@dataclass
class Pairs:
    """N preference pairs.

    `pictures(i)` reads pair i as uint8 [2, 3, S, S], in several threads if need be, or raises
    UnreadablePicture.
    """
    captions: list[str]
    label: torch.Tensor                 # [N] 1: the first is liked, 0: the second, 0.5: tie;
                                        # nan: nobody said, or the world has not painted it yet
    weight: torch.Tensor                # [N] 1 / pairs of the same prompt
    groups: list[range]                 # rows that lie together
    pictures: Callable[[int], torch.Tensor]
    together: list[str] | None = None   # [N] equal entries may share pictures; None: no rows do


# Which rows are used, in what order

def hold_out(pairs: Pairs, count: int, seed: int) -> tuple[list[int], set[int]]:
    """(rows held out, in order; the others), drawn by the seed: no picture is on both sides.

    At most `count` rows are held out, and at most a quarter of all.
    """
    total = len(pairs.captions)
    keys = pairs.together or range(total)
    rows = {}
    for i, key in enumerate(keys):
        rows.setdefault(key, []).append(i)
    held = []
    for i in permutation(total, seed, "validation"):
        group = rows.pop(keys[i], [])
        if len(held) + len(group) <= min(count, total // 4):
            held += group
    return sorted(held), set(range(total)) - set(held)


def epoch_order(pairs: Pairs, used: set[int], seed: int, epoch: int) -> list[int]:
    """All `used` rows in the shuffled order of an epoch; neighbours come from few groups."""
    order = permutation(len(pairs.groups), seed, "groups", epoch)
    out, window = [], []
    for i, group in enumerate(order):
        window += [row for row in pairs.groups[group] if row in used]
        if len(window) >= WINDOW or i + 1 == len(order):
            out += [window[j] for j in permutation(len(window), seed, "order", epoch, i)]
            window = []
    return out


# What every source has in common

def square(picture: Path | bytes | dict, side: int, place: str = "") -> torch.Tensor:
    """The middle of an encoded picture, shorter side resized to `side` -> uint8 [3, side, side].

    Bicubic, as CLIP's own preprocessing, which the released code uses here. Any mode that PIL
    reads: 16-bit greys keep their upper byte, transparency is put on white, EXIF turns. A dict is
    what the library `datasets` makes of a picture. Raises UnreadablePicture that names the `place`,
    or the file.
    """
    try:
        if isinstance(picture, dict):
            picture = picture.get("bytes")
        image = upright(Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture)))
        size = np.array(image.size)
        if size.min() < SMALLEST:
            raise UnreadablePicture(f"{image.width} x {image.height} pixels")
        if image.mode.startswith("I"):
            image = Image.fromarray(
                (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        # Only what will be seen is resized: all of 8 x 30,000 pixels would fill the memory.
        whole = np.maximum(side, (side * size / size.min()).astype(int))    # sides after resizing
        begin = (whole - side) // 2                             # of the square in them
        box = (*(begin * size / whole), *((begin + side) * size / whole))
        image = to_rgb(image).resize((side, side), Image.Resampling.BICUBIC, box)
    except Exception as error:          # PIL's many decoders raise what they like
        why = str(error).partition(" <_io")[0] or type(error).__name__      # not where in memory
        raise UnreadablePicture(f"{place or picture}: not a readable picture "
                                f"({why.splitlines()[0]})") from None
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def prompt_weights(captions: list[str], sizes: list[int | None]) -> torch.Tensor:
    """[N] 1 / pairs of the same prompt: of all there are (`sizes`, if known), else of these."""
    if not all(sizes):
        sizes = map(Counter(captions).get, captions)
    return torch.tensor([1 / n for n in sizes])


def read_row(row: dict, place: str) -> tuple[str, float, float | None]:
    """Caption, label and num_example_per_prompt (None: not known) of a pair.

    The label is nan where the row has none. Raises InputError that begins with the place.
    """
    caption, label, other, size = (
        row.get(name) for name in ("caption", "label_0", "label_1", "num_example_per_prompt"))
    if not isinstance(caption, str):
        raise InputError(f"{place} has a caption that is no text")
    checked_prompt(caption, place)
    if isinstance(row.get("has_label"), str):           # of which "False" would count as true
        raise InputError(f"{place} has has_label {row['has_label']!r}; it must be true or false")
    if not is_labelled(row):
        label = torch.nan
    elif not isinstance(label, int | float) or label not in (0, 0.5, 1):
        raise InputError(f"{place} has label_0 {label!r}; it must be 1, 0, or 0.5 for a tie")
    elif other is not None and other != 1 - label:
        raise InputError(f"{place} has label_0 {label!r} and label_1 {other!r}; "
                         "their sum must be 1")
    if size is not None and not (isinstance(size, int | float) and 1 <= size < 1e38):
        raise InputError(f"{place} has num_example_per_prompt {size!r}; it must be 1 or more")
    return caption, label, size


def is_labelled(row: dict) -> bool:
    """Has somebody compared the two pictures of a row? `has_label` says so or, without it, a label.
    """
    label = row.get("label_0")
    return label is not None and row.get("has_label", label == label)           # not NaN


# The sources

def world_pairs(count: int, seed: int) -> Pairs:
    """The tiny world's own preferences."""
    from tiny.world import preference_pairs
    images, captions, label = preference_pairs(count, seed=seed + 1000)
    return Pairs(captions, label, torch.ones(count), [range(count)], lambda i: images[i])


def unpainted_pairs(count: int, seed: int) -> Pairs:
    """The same, each painted, and its label known, when its pictures are first asked for."""
    from tiny.world import pairs_to_paint
    captions, paint = pairs_to_paint(count, seed + 1000)
    label = torch.full((count,), torch.nan)

    @functools.cache
    def pictures(i: int) -> torch.Tensor:
        images, label[i:i + 1] = paint(i, i + 1)
        return images[0]

    return Pairs(captions, label, torch.ones(count), [range(count)], pictures)


def folder_pairs(folder: Path, side: int, unlabelled: bool = False) -> Pairs:
    """A folder with pairs.jsonl. Raises InputError that names the line.

    So does a line without a label, unless `unlabelled`. A bad picture is reported when it is read.
    """
    path = folder / "pairs.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n")
                if line.strip()]
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no pairs")
    read = []
    for i, row in enumerate(rows):
        place = f"{path}: line {i + 1}"
        missing = [k for k in ("caption", "image_0", "image_1", "label_0")
                   if not isinstance(row, dict) or k not in row]
        if missing:
            raise InputError(f"{place} lacks {', '.join(missing)}")
        if not is_labelled(row) and not unlabelled:
            raise InputError(f"{place} has label_0 {row['label_0']!r} and counts as unlabelled")
        read.append(read_row(row, place))
        for name in (row["image_0"], row["image_1"]):
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"{place} names the picture {name!r}; "
                                 "it must be a file in this folder")
            if not os.path.isfile(folder / name):
                raise InputError(f"{place} names {name}, which does not exist")
    captions, labels, sizes = map(list, zip(*read))
    return Pairs(captions, torch.tensor(labels).float(), prompt_weights(captions, sizes),
                 [range(i, i + 1) for i in range(len(rows))],
                 lambda i: torch.stack([square(folder / rows[i][k], side)
                                        for k in ("image_0", "image_1")]),
                 together=captions)


def parquet_pairs(files: list[Path], side: int, unlabelled: bool = False) -> Pairs:
    """Parquet files with Pick-a-Pic's columns; rows without a label stay only if `unlabelled`.

    Needs pyarrow, an optional extra. Every process reads all captions and labels, and whole row
    groups of pictures, but decodes only the pictures it is asked for.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{files[0]}: reading Parquet needs pyarrow; "
                         "pip install pyarrow") from None
    handles, groups = [], []
    rows = []                           # (place, caption, label, num_example_per_prompt or None)
    for file, path in enumerate(files):
        try:
            handles.append(ParquetFile(path))
            there = handles[file].schema_arrow.names
            missing = [k for k in ("caption", "jpg_0", "jpg_1", "label_0") if k not in there]
            if missing:
                raise InputError(f"{path}: lacks the columns {', '.join(missing)}; "
                                 f"it has {', '.join(sorted(set(there)))}")
            for group in range(handles[file].num_row_groups):
                begin = len(rows)
                table = handles[file].read_row_group(group, [       # of which some may not be there
                    "caption", "label_0", "label_1", "has_label", "num_example_per_prompt"])
                rows += [((file, group, i), *read_row(row, f"{path}: row {i} of row group {group}"))
                         for i, row in enumerate(table.to_pylist())
                         if unlabelled or is_labelled(row)]
                groups.append(range(begin, len(rows)))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable Parquet file "
                             f"({str(error).splitlines()[0]})") from None
    if not rows:
        raise InputError(f"{files[0]}: holds no labelled pairs")
    places, captions, labels, sizes = map(list, zip(*rows))
    encoded = RowGroups(handles)

    def pictures(i: int) -> torch.Tensor:
        file, group, row = places[i]
        place = f"{files[file]}: row {row} of row group {group}"
        try:
            table = encoded.read(file, group)
        except (OSError, ValueError) as error:
            raise UnreadablePicture(f"{place} is damaged: {str(error).splitlines()[0]}") from None
        return torch.stack([square(table[k][row], side, place) for k in ("jpg_0", "jpg_1")])

    return Pairs(captions, torch.tensor(labels).float(), prompt_weights(captions, sizes), groups,
                 pictures, together=captions)


@dataclass
class RowGroups:
    """The encoded pictures of Parquet files, read by the row group; those used last are kept."""
    handles: list
    kept: OrderedDict = field(default_factory=OrderedDict)          # the longest unused first
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, file: int, group: int) -> dict[str, list[bytes]]:
        """jpg_0 and jpg_1 of all rows of a row group; several threads may ask."""
        with self.lock:
            table = self.kept.pop((file, group), None) or self.handles[file].read_row_group(
                group, ["jpg_0", "jpg_1"]).to_pydict()
            self.kept[file, group] = table
            while len(self.kept) > 1 and 2 * WINDOW < sum(
                    len(other["jpg_0"]) for other in self.kept.values()):
                self.kept.popitem(last=False)
            return table


def load_pairs(source: str, side: int, unlabelled: bool = False, splits: tuple = TRAINING) -> Pairs:
    """A folder (pairs.jsonl or Parquet files), a Parquet file, or a hub data set of such files.

    A data set is `owner/name[/file.parquet]`; of several splits, the first of `splits` is read.
    Pictures are cut to squares of `side` pixels. Pairs that nobody labelled are left out, or stay
    if `unlabelled`. Raises InputError where something is missing or malformed.
    """
    if os.path.exists(os.path.join(source, "pairs.jsonl")):
        return folder_pairs(Path(source), side, unlabelled)
    return parquet_pairs(parquet_files(source, splits), side, unlabelled)


def read_or_leave(processes: Processes, read: Callable[[], Pairs]) -> Pairs:
    """What `read` gives. A signal meanwhile ends the process at once: nothing is done yet."""
    try:
        with processes.droppable():
            return read()
    except Stopped:
        raise SystemExit(128 + (processes.stop or 15)) from None        # 15: SIGTERM


def readable(pairs: Pairs, i: int) -> torch.Tensor | str:
    """Pair i's pictures, uint8 [2, 3, S, S], or why they cannot be read."""
    try:
        return pairs.pictures(i)
    except UnreadablePicture as error:
        return str(error)


def stack_pictures(got: list[torch.Tensor | str | None],
                   side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `readable` gave for N pairs (None: not needed) -> their pictures, and which are sound.

    uint8 [N, 2, 3, S, S], black where there is nothing, and bool [N], false where unreadable.
    """
    blank = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    return (torch.stack([g if isinstance(g, torch.Tensor) else blank for g in got]),
            torch.tensor([not isinstance(g, str) for g in got]))


# Pictures that cannot be read

def list_unreadable(known: dict, new: dict, run: Run) -> dict:
    """{pair: why} so far and of this step -> both.

    The first ten are said on stderr, all stand in unreadable.txt.
    """
    both = known | new
    if run.processes.main:
        for place, i in enumerate(sorted(new.keys() - known.keys()), len(known)):
            if place < 10:
                more = " (further ones: see unreadable.txt)" if place == 9 else ""
                warn(f"{new[i]}; the pair is skipped{more}")
        lines = "".join(f"{both[i]}\n" for i in sorted(both))
        write_atomic(run.folder / "unreadable.txt", lambda p: p.write_text(lines, encoding="utf-8"))
    return both


def too_many_unreadable(known: dict, read: int, total: int, most: float,
                        folder: Path) -> InputError | None:
    """What ends a run if over `most` of the pairs read so far, or all the `total`, are damaged."""
    read = min(read, total)
    if len(known) < total and len(known) <= max(3, most * read):
        return None
    return InputError(
        f"{len(known)} of the {read} pairs read so far have damaged pictures, listed in "
        f"{folder / 'unreadable.txt'}; mend them, or allow more with --max_unreadable")


# Their latents

@torch.no_grad()
def encode_pairs(pipe: Pipeline, images: torch.Tensor) -> torch.Tensor:
    """Pictures of N pairs [N, 2, 3, H, W] uint8 -> [N, 2, 2, C, h, w].

    That is mean and standard deviation of both unscaled latents.
    """
    vae = pipe.vae.quant_conv.weight
    pictures = upload(images, vae.device).flatten(0, 1).to(vae.dtype) / 127.5 - 1
    moments = pipe.vae.moments(pictures)                                    # [2 N, C, h, w] each
    return torch.stack([m.unflatten(0, (-1, 2)) for m in moments], 1).contiguous()


def open_latents(folder: Path, pipe: Pipeline, side: int, count: int) -> torch.Tensor:
    """What encode_pairs gives for `count` pairs, as a file that a machine's processes share.

    It is zero where nothing was encoded yet. Its space is taken at once: on a full disk, writing
    to a mapped file kills the process. Raises InputError.
    """
    path, dtype = folder / "latents.bin", pipe.vae.quant_conv.weight.dtype
    shape = torch.Size((count, 2, 2, *pipe.latent_shape(side)))
    size = shape.numel() * dtype.itemsize
    try:
        path.touch()
        before = path.stat().st_size
        if before not in (0, size):
            raise InputError(f"{path}: holds the latents of other pairs; delete it")
        with open(path, "rb+") as file:
            try:
                if hasattr(os, "posix_fallocate"):              # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                file.truncate(before)
                raise
        latents = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype)
        return latents.view(shape)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be used as a cache ({reason}); {size / 1e9:.1f} GB are "
                         "needed; leave out --cache_latents") from None


def is_encoded(latents: torch.Tensor | None, i: int) -> bool:
    """Is pair i there? Its standard deviations, none of which is zero, are written last."""
    return latents is not None and bool(latents[i, 1].all())


def encode_cached(pipe: Pipeline, images: torch.Tensor, latents: torch.Tensor | None,
                  index: list[int], seen: torch.Tensor) -> torch.Tensor:
    """encode_pairs of the pairs `index`; with `latents`, of those that it lacks.

    Where `seen`, these are written there.
    """
    encode = pipe.calls.wrap(lambda rows: encode_pairs(pipe, rows), "encoding")
    if latents is None:
        return encode(images)
    moments = upload(latents[index], pipe.device)
    new = [n for n, i in enumerate(index) if not is_encoded(latents, i)]
    if new:
        moments[new] = encode(images[new])
    for n in new:
        if seen[n]:
            latents[index[n], 0], latents[index[n], 1] = moments[n].cpu()
    return moments
