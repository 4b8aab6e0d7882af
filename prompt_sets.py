"""Reading prompts: any file or data set, and the field's prompt sets by name with the group that each prompt belongs to.

    pickapic   Pick-a-Pic's validation_unique, 500: the paper's Tables 1 and 2
    hpsv2      HPDv2's benchmark, 4 styles x 800
    parti      PartiPrompts, 1632 in 12 categories
    geneval    553 in 6 tags; not on the hub: geneval=evaluation_metadata.jsonl
"""
import csv
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from training import permutation
from weights import InputError, fetch, fetch_parquet

LONGEST = 10_000                        # characters of a prompt
STYLES = ("anime", "concept-art", "paintings", "photo")
SETS = {        # name -> (hub data set or file in it, what to fetch of it, how many prompts there must be)
    "pickapic": ("yuvalkirstain/pickapic_v1_no_images", ["*validation_unique*.parquet"], 500),
    "hpsv2": ("zhwang/HPDv2", [f"benchmark/{style}.json" for style in STYLES], 3200),
    "parti": ("nateraw/parti-prompts/PartiPrompts.tsv", [], 1632),
    "geneval": ("", [], 553),
}


def checked_prompt(prompt: str, place: str) -> str:
    """The prompt; InputError that begins with its place where it cannot be one."""
    if len(prompt) > LONGEST:
        raise InputError(f"{place}, {prompt[:40]!r}..., has {len(prompt):,} characters, more than {LONGEST:,}; one prompt a line?")
    if not prompt.isascii() and (lone := re.search("[\ud800-\udfff]", prompt)):
        raise InputError(f"{place}, {prompt[:40]!r}, is no Unicode text: character {lone.start() + 1} is half a surrogate pair")
    return prompt


def read_prompts(source: str, sample: int = 0, seed: int = 0, distinct: bool = True) -> list[str]:
    """Prompts from .txt (one a line), .json (list of strings, or of objects with `caption`), .jsonl, or .parquet (`caption`).

    Parquet may also be a folder or a hub data set (`owner/name[/file.parquet]`), each caption once if `distinct`. `sample` > 0
    keeps that many, drawn by `seed`. Raises InputError that names the file, the line and what is wrong.
    """
    prompts = _read_prompts(source, distinct)
    chosen = permutation(len(prompts), seed, "prompts")[:sample] if sample else range(len(prompts))
    return [checked_prompt(prompts[i], f"{source}: prompt {i + 1}") for i in chosen]


def _read_captions(source: str, path: Path, distinct: bool) -> list[str]:
    """The captions of Parquet files, in order, each once if `distinct`; a data set's training split if it has several."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{source}: reading Parquet needs pyarrow; pip install pyarrow") from None
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    files = [f for f in files if f.name.startswith("train")] or files
    captions: list[str] = []
    for file in files:
        try:
            captions += [c.strip() for c in pq.read_table(file, columns=["caption"])["caption"].to_pylist() if c and c.strip()]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{file}: no readable Parquet file with a column `caption` ({str(error).splitlines()[0]})") from None
    if not captions:
        raise InputError(f"{source}: holds no captions")
    return list(dict.fromkeys(captions)) if distinct else captions


def _read_prompts(source: str, distinct: bool) -> list[str]:
    path = Path(source)
    file = os.path.exists(path) or path.suffix in (".txt", ".json", ".jsonl") or "/" not in source
    if path.suffix == ".parquet" or os.path.isdir(path) or not file:          # a data set's name may hold a dot
        return _read_captions(source, fetch_parquet(source), distinct)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 (byte {error.start}); save the prompts as UTF-8") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from None
    if path.suffix not in (".json", ".jsonl"):
        prompts = [line.strip() for line in text.split("\n")]      # not splitlines: JSON strings may hold U+2028 and its kin
    else:
        try:
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
        except (RecursionError, ValueError) as error:
            raise InputError(f"{source}: not valid {path.suffix[1:].upper()} ({error})") from None
        if not isinstance(rows, list):
            raise InputError(f"{source}: expected a list of prompts")
        prompts = []
        for i, row in enumerate(rows):
            prompt = row.get("caption", row.get("prompt")) if isinstance(row, dict) else row
            if not isinstance(prompt, str):
                raise InputError(f"{source}: entry {i + 1} is neither a string nor an object with `caption`")
            prompts.append(prompt.strip())
    prompts = [p for p in prompts if p]
    if not prompts:
        raise InputError(f"{source}: holds no prompts")
    return prompts


@dataclass
class PromptSet:
    """Prompts, the group of each ([] where there are none), and GenEval's metadata if that is what they are."""
    prompts: list[str]
    groups: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)


def read_tsv(path: Path) -> list[dict]:
    """PartiPrompts' columns. Quotation marks are part of the prompts: one begins with a quoted word."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not rows or not rows[0].get("Prompt"):
        raise InputError(f"{path}: a .tsv of prompts needs a header line with the column Prompt")
    return [row for row in rows if (row["Prompt"] or "").strip()]


def read_geneval(path: Path) -> list[dict]:
    """GenEval's metadata, one object a line; InputError that names a line which is none."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable file of GenEval's metadata, evaluation_metadata.jsonl ({error})") from None
    for i, line in enumerate(text.split("\n")):
        if line.strip():
            try:
                row = json.loads(line)
                wants = row.get("include", []) + row.get("exclude", [])
                assert isinstance(row["tag"], str) and row["prompt"].strip() and wants and all(w["class"] and w["count"] > 0 for w in wants)
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
                raise InputError(f"{path}: line {i + 1} is no GenEval metadata (tag, prompt, include)") from None
            rows.append(row)
    return rows


def prompt_set(word: str, limit: int = 0) -> PromptSet:
    """A name of SETS, `name=SOURCE` for a copy of it elsewhere, or a file (as read_prompts has it, and .tsv); the first `limit`.

    Raises InputError where it cannot be had or a named set has not as many prompts as it should.
    """
    name, _, source = word.partition("=")
    if name not in SETS:
        name, source = "", word
    elif not source:
        source = SETS[name][0]
        if not source:
            raise InputError("geneval: its prompts are not on the hub; get prompts/evaluation_metadata.jsonl from the GitHub repository "
                             "djghosh13/geneval and write --prompts geneval=FILE")
    try:
        path = fetch(source, SETS[name][1], repo_type="dataset") if name else Path(source)
    except InputError as error:
        raise InputError(f"{error}: --prompts {name}={'FOLDER' if name == 'hpsv2' else 'FILE'}") from None
    if name == "geneval":
        rows = read_geneval(path)
        out = PromptSet([r["prompt"] for r in rows], [r["tag"] for r in rows], rows)
    elif path.suffix == ".tsv":
        rows = read_tsv(path)
        out = PromptSet([r["Prompt"].strip() for r in rows], [r["Category"] for r in rows] if rows[0].get("Category") else [])
    elif name == "hpsv2":
        home = path / "benchmark" if (path / "benchmark").is_dir() else path
        styles = {style: read_prompts(str(home / f"{style}.json")) for style in STYLES}
        out = PromptSet([p for s in STYLES for p in styles[s]], [s for s in STYLES for _ in styles[s]])
    else:
        if name == "pickapic" and path.is_dir():
            path = next(iter(sorted(path.rglob("*validation_unique*.parquet"))), path)
        out = PromptSet(read_prompts(str(path), distinct=not name))
    if name and len(out.prompts) != SETS[name][2]:
        raise InputError(f"{source}: {name} has {SETS[name][2]} prompts, this holds {len(out.prompts)}")
    for i, prompt in enumerate(out.prompts):
        checked_prompt(prompt, f"{source}: prompt {i + 1}")
    return PromptSet(*(part[:limit or None] for part in (out.prompts, out.groups, out.rows)))
