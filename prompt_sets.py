"""Reading prompts: any file or data set, and the field's prompt sets by name, with their groups.

    pickapic   Pick-a-Pic's validation_unique, 500: the paper's Tables 1 and 2
    hpsv2      HPDv2's benchmark, 4 styles x 800
    parti      PartiPrompts, 1632 in 12 categories
    geneval    553 in 6 tags; not on the hub: geneval=evaluation_metadata.jsonl
"""
import csv
import importlib.util
import io
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from training import permutation
from weights import InputError, fetch, fetch_parquet

LONGEST = 10_000                        # characters of a prompt
ENDINGS = (".txt", ".json", ".jsonl", ".csv", ".tsv")       # of files with prompts, and .parquet
SPLIT = re.compile("(?<![a-z])(train|training|validation_unique|validation|valid|val|dev|test"
                   "|testing|eval|evaluation)(?![a-z])")
# The splits of a data set that may be meant, the likeliest first; "": files that name none.
TRAINING = (("train", "training"), ("",))
VALIDATION = (("validation_unique",), ("validation", "valid", "val"),
              ("dev", "test", "testing", "eval", "evaluation"), ("",))
STYLES = ("anime", "concept-art", "paintings", "photo")
SETS = {        # name -> (hub data set or file in it, what to fetch of it, number of prompts)
    "pickapic": ("yuvalkirstain/pickapic_v1_no_images", ["*validation_unique*.parquet"], 500),
    "hpsv2": ("zhwang/HPDv2", [f"benchmark/{style}.json" for style in STYLES], 3200),
    "parti": ("nateraw/parti-prompts/PartiPrompts.tsv", [], 1632),
    "geneval": ("", [], 553),
}
# What GenEval's metadata may ask for, as its detector can tell nothing else.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO's 80 classes in the detector's order, matched by place: three names are GenEval's own.
CLASSES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")
MOST = 16               # objects of one class


def checked_prompt(prompt: str, place: str) -> str:
    """The prompt; InputError that begins with its place where it cannot be one."""
    if len(prompt) > LONGEST:
        raise InputError(f"{place}, {prompt[:40]!r}..., has {len(prompt):,} characters, "
                         f"more than {LONGEST:,}; one prompt a line?")
    if lone := re.search("[\0\ud800-\udfff]", prompt):
        raise InputError(f"{place}, {prompt[:40]!r}, is no Unicode text: "
                         f"character {lone.start() + 1} is NUL or half a surrogate pair")
    return prompt


# Any file or data set

def read_prompts(source: str, sample: int = 0, seed: int = 0, distinct: bool = True) -> list[str]:
    """Prompts from .txt (one a line), .json, .jsonl (strings, or objects with `caption` or
    `prompt`), .csv, .tsv (a column `caption`, `prompt` or `text`, also in capitals) or .parquet
    (`caption`).

    Parquet may also be a folder or a hub data set (`owner/name[/file.parquet]`); each caption once
    if `distinct`. `sample` > 0 keeps that many, drawn by `seed`. Raises InputError that names the
    file, the line and what is wrong.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    named = suffix in ENDINGS or "/" not in source
    # What is neither named so nor here is a hub data set, whose name may hold a dot.
    if suffix == ".parquet" or os.path.isdir(path) or not (named or os.path.exists(path)):
        prompts = _read_captions(source, distinct)
    elif suffix in (".csv", ".tsv"):
        prompts = [row["prompt"] for row in read_table(path)]
    else:
        prompts = _read_file(path)
    if not prompts:
        raise InputError(f"{source}: holds no prompts")
    chosen = permutation(len(prompts), seed, "prompts")[:sample] if sample else range(len(prompts))
    return [checked_prompt(prompts[i], f"{source}: prompt {i + 1}") for i in chosen]


def parquet_files(source: str, splits: tuple[tuple[str, ...], ...] = TRAINING) -> list[Path]:
    """A Parquet file, or those files of a folder or hub data set that are of one of the `splits`.

    A file's split is what its name or folder says. Raises InputError where there are none, where
    one of `name-00000-of-00002`, ... is missing, and, before any is fetched, without pyarrow.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{source}: reading Parquet needs pyarrow; pip install pyarrow")
    root = (fetch_parquet(source) if splits is TRAINING
            else fetch(source, ["*validation*.parquet"], "dataset"))
    if root.is_file():
        return [root]
    files = [file for file in sorted(root.rglob("*")) if file.suffix.lower() == ".parquet"]
    found = [SPLIT.search(str(file.relative_to(root)).lower()) for file in files]
    for names in splits:
        chosen = [f for f, split in zip(files, found) if (split[1] if split else "") in names]
        if chosen:
            _check_parts(chosen)
            return chosen
    raise InputError(f"{source}: holds no Parquet files of the {splits[0][0]} split (nor, for "
                     "pairs, a pairs.jsonl); name the file that is meant")


def _check_parts(files: list[Path]) -> None:
    """InputError if one of `name-00000-of-00002.parquet`, `name-00001-of-00002.parquet` lacks."""
    parts: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if part := re.match(r"(.+-)(\d+)-of-(\d+)", file.name):
            parts.setdefault((str(file.parent / part[1]), part[3]), set()).add(int(part[2]))
    for (name, count), there in parts.items():
        if len(there) < int(count):
            lacking = next(i for i in range(int(count) in there, int(count)) if i not in there)
            raise InputError(f"{name}{lacking:0{len(count)}}-of-{count}: this part of the data set "
                             "is missing; fetch it, or name single files")


@contextmanager
def parquet(path: Path, columns: list[str]):
    """A Parquet file, opened. What goes wrong inside, or a lacking column, is its InputError."""
    from pyarrow.parquet import ParquetFile
    try:
        file = ParquetFile(path)
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise InputError(f"{path}: lacks the columns {', '.join(missing)}; it has "
                             f"{', '.join(sorted(set(file.schema_arrow.names)))}")
        yield file
    except (AttributeError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file "
                         f"({str(error).splitlines()[0]})") from None


def _read_captions(source: str, distinct: bool) -> list[str]:
    """The captions of Parquet files, in order; only the training split's where there is one."""
    captions: list[str] = []
    for path in parquet_files(source):
        with parquet(path, ["caption"]) as file:
            column = file.read(["caption"])["caption"].to_pylist()
            captions += [caption.strip() for caption in column if caption and caption.strip()]
    return list(dict.fromkeys(captions)) if distinct else captions


def _read_text(path: Path) -> str:
    """A file's text; InputError where it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _from_json(text: str, fault: str):
    """What JSON says; InputError that begins with the `fault` where it is none."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{fault} ({error})") from None


def json_lines(path: Path) -> dict[int, object]:
    """{line number: value} of a file with one JSON value a line, blank lines left out."""
    lines = _read_text(path).split("\n")        # not splitlines: strings may hold U+2028 and kin
    return {number: _from_json(line, f"{path}: line {number} cannot be read, not valid JSONL")
            for number, line in enumerate(lines, 1) if line.strip()}


def _read_file(path: Path) -> list[str]:
    """The prompts of a text or JSON file, in order, blank ones left out."""
    suffix = path.suffix.lower()
    if suffix not in ENDINGS and os.path.exists(path):
        raise InputError(f"{path}: prompts are read from {', '.join(ENDINGS)} and .parquet; give "
                         "the file the ending that it should have, or convert it")
    if suffix == ".json":
        rows = _from_json(_read_text(path), f"{path}: not valid JSON")
    elif suffix == ".jsonl":
        rows = list(json_lines(path).values())
    else:
        rows = _read_text(path).split("\n")
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of prompts")
    prompts = [r.get("caption", r.get("prompt")) if isinstance(r, dict) else r for r in rows]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"{path}: entry {i + 1} is neither a string "
                             "nor an object with `caption` or `prompt`")
    return [prompt.strip() for prompt in prompts if prompt.strip()]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a .csv or .tsv, by their columns in small letters, and the prompt as `prompt`.

    Quotation marks in a .tsv belong to the prompts: one of PartiPrompts begins with one.
    """
    tabs = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if path.suffix.lower() == ".tsv" else {}
    try:
        lines = list(csv.reader(io.StringIO(_read_text(path), newline="\n"), **tabs))
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    names = [name.strip().lower() for name in lines[0]] if lines else []
    column = next((name for name in ("caption", "prompt", "text") if name in names), None)
    for i, line in enumerate(lines[1:], 1):
        if any(line[len(names):]):
            raise InputError(f"{path}: row {i}, {line[0][:40]!r}..., has more columns than the "
                             "header; put prompts with commas in quotation marks")
    rows = [dict(zip(names, line)) for line in lines[1:]]
    rows = [row | dict(prompt=row[column].strip()) for row in rows if row.get(column, "").strip()]
    if not rows:
        raise InputError(f"{path}: needs a header line with the column Prompt, caption or text, "
                         "and prompts below it")
    return rows


# The field's sets

@dataclass
class PromptSet:
    """Prompts, the group of each ([] without groups), and GenEval's metadata ([] for others)."""
    prompts: list[str]
    groups: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)


def read_geneval(path: Path) -> list[dict]:
    """GenEval's metadata, one object a line.

    InputError for a line that is none, or asks for what the detector cannot tell: all pictures of
    it would count as wrong. Also for a prompt that is there twice.
    """
    try:
        rows = json_lines(path)
    except InputError as error:
        raise InputError(f"{error}: not a readable file of GenEval's metadata, "
                         "evaluation_metadata.jsonl") from None
    known = {"class": CLASSES, "count": range(1, MOST + 1), "color": [None, *COLOURS]}
    lines = {}                          # prompt -> its line
    for number, row in rows.items():
        try:
            wants = [*enumerate(row.get("include", [])), *((0, w) for w in row.get("exclude", []))]
            if not (isinstance(row["tag"], str) and row["prompt"].strip() and wants
                    and all(_can_be_wanted(want, before) for before, want in wants)):
                raise ValueError("incomplete")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: line {number} is no GenEval metadata "
                             "(tag, prompt, include: each with class and count, its position "
                             "to one before it)") from None
        for _, want in wants:
            for name, values in known.items():
                if want.get(name) not in values:
                    raise InputError(f"{path}: line {number}, {row['prompt']!r}, asks for the "
                                     f"{name} {want[name]!r}, which the detector cannot tell")
        first = lines.setdefault(row["prompt"], number)
        if first != number:
            raise InputError(f"{path}: line {number} has the prompt of line {first} again, "
                             f"{row['prompt']!r}, and may ask for something else; leave one out")
    return list(rows.values())


def _can_be_wanted(want: dict, before: int) -> bool:
    """Is this an entry of `include` that `before` others precede, or (0) one of `exclude`?"""
    places = [repr([relation, other]) for relation in ("left of", "right of", "above", "below")
              for other in range(before)]
    return (("position" not in want or repr(want["position"]) in places)
            and want["class"] != "" and isinstance(want["class"], str)
            and isinstance(want.get("color", ""), str)
            and isinstance(want["count"], int) and want["count"] > 0)


def prompt_set(word: str, limit: int = 0) -> PromptSet:
    """The first `limit` prompts (0: all) of a set in SETS, of `name=SOURCE`, or of a file.

    SOURCE is a copy of the set; files are as read_prompts has them. Raises InputError where the
    prompts cannot be had or a named set has not as many as it should.
    """
    name, _, source = word.partition("=")
    if name not in SETS:
        name, source = "", word
    elif not source:
        source = SETS[name][0]
    if name == "geneval" and not source:
        raise InputError("geneval: its prompts are not on the hub; get "
                         "prompts/evaluation_metadata.jsonl from the GitHub repository "
                         "djghosh13/geneval and write --prompts geneval=FILE")
    try:
        path = fetch(source, SETS[name][1], repo_type="dataset") if name else Path(source)
    except InputError as error:
        raise InputError(f"{error}: --prompts {name}="
                         f"{'FOLDER' if name == 'hpsv2' else 'FILE'}") from None
    if name == "geneval":
        rows = read_geneval(path)
        found = PromptSet([r["prompt"] for r in rows], [r["tag"] for r in rows], rows)
    elif path.suffix.lower() in (".csv", ".tsv"):
        rows = read_table(path)
        found = PromptSet([r["prompt"] for r in rows],
                          [r.get("category", "") for r in rows] if "category" in rows[0] else [])
    elif name == "hpsv2":
        home = path / "benchmark" if (path / "benchmark").is_dir() else path
        styles = {style: read_prompts(str(home / f"{style}.json")) for style in STYLES}
        found = PromptSet([p for s in STYLES for p in styles[s]],
                          [s for s in STYLES for _ in styles[s]])
    else:
        if name == "pickapic" and path.is_dir():
            path = parquet_files(str(path), VALIDATION)[0]
        found = PromptSet(read_prompts(str(path), distinct=not name))
    if name and len(found.prompts) != SETS[name][2]:
        raise InputError(f"{source}: {name} has {SETS[name][2]} prompts, "
                         f"this holds {len(found.prompts)}")
    for i, prompt in enumerate(found.prompts):
        checked_prompt(prompt, f"{source}: prompt {i + 1}")
    return PromptSet(*(part[:limit or None] for part in (found.prompts, found.groups, found.rows)))


def drawn(word: str) -> tuple[str, int]:
    """`parti:100` -> parti, 100; what has no number, or is a file whose name ends so -> it, 0."""
    match = re.fullmatch(r"(.+):([1-9]\d*)", word)
    if not match or os.path.exists(word.partition("=")[2] or word):
        return word, 0
    return match[1], int(match[2])


def join_sets(words: tuple[str, ...], limit: int = 0, seed: int = 0) -> PromptSet:
    """The prompts of one or several sets in one list; words as prompt_set and `drawn` have them.

    Of `word:N` N prompts are drawn by `seed` and keep their order. `limit` (0: none) is of each
    set. Of several sets, groups begin with the set's name. Raises InputError for more prompts than
    there are.
    """
    joined = PromptSet([])
    for word in words:
        source, number = drawn(word)
        found = prompt_set(source)
        count, groups = len(found.prompts), found.groups
        if number > count:
            raise InputError(f"{word}: {source} has only {count} prompts")
        some = sorted(permutation(count, seed, "prompts")[:number or None])[:limit or None]
        if len(words) > 1:
            groups = [f"{source.partition('=')[0]} {group}".strip()
                      for group in groups or [""] * count]
        joined.prompts += [found.prompts[i] for i in some]
        joined.groups += [groups[i] for i in some if groups]
        joined.rows += [found.rows[i] for i in some if found.rows]
    return joined
