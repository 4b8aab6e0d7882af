"""The tables of what gpu.py has measured, from results/gpu_*.json."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench
from training import write_atomic
from weights import read_json

MARKS = "<!-- written by a script -->", "<!-- until here -->"


def tables(results: dict) -> list[str]:
    """A card's measurements as Markdown: of each entry the latest."""
    records = {r["name"]: r for r in sorted(results["records"], key=lambda r: r["state"] == "done")
               if r["found"]}
    if not records:
        return []
    dates = sorted({r["date"] for r in records.values()})
    last = list(records.values())[-1]["versions"]
    lines = [f"### {results['card']}", "",
             f"{results['memory_gb']:.0f} GB; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
             + ", ".join(f"{k} {v}" for k, v in last.items()) + "; random weights.", ""]
    kinds = {kind: [r for name, r in records.items() if name.split()[0] == kind]
             for kind in ("spo", "round", "setting", "lead", "spm", "evaluate", "tests")}
    for kind, table in (("spo", run_table), ("setting", setting_table), ("lead", lead_table)):
        lines += table(kinds[kind]) if kinds[kind] else []
    for record in kinds["round"]:
        got = record["found"].get("bench")
        lines += [f"Whole rounds, {got['model']}, {got['prompts']} prompts a round, medians of "
                  f"{got['repeats']}, in turns:", "", *bench.table(got["sides"]), ""] if got else []
    lines += [line for kind in ("spm", "evaluate", "tests") for r in kinds[kind]
              for line in (f"- {r['name']}: {summary(r['found'])}",)]
    unfinished = [f"{r['name']} ({r['error']})" for r in records.values() if "error" in r]
    return lines + [""] + (["Not finished: " + "; ".join(unfinished) + ".", ""]
                           if unfinished else [])


def rounded(value) -> str:
    """A number to three digits, or what there is instead."""
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def summary(found: dict) -> str:
    """The plain values that were found, in a line."""
    return ", ".join(f"{k.replace('_', ' ')} {rounded(v)}" for k, v in found.items()
                     if not isinstance(v, dict | list))


def rows(head: str, cells: list[list]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return lines + [f"| {' | '.join(map(rounded, row))} |" for row in cells] + [""]


def run_table(records: list[dict]) -> list[str]:
    """spo_train.py as it is run."""
    cells = []
    for found in (r["found"] for r in records):
        for n, row in enumerate(found.get("log", [])):
            cells.append([found["model"], f"{n + 1}{', resumed' * (n > 0)}",
                          1 / row["prompts_per_second"], row["pairs"], row.get("peak_memory_gb"),
                          found.get("seconds_to_stop"), found.get("checkpoint_bytes", 0) / 1e9])
    head = "model | round | s / prompt | pairs | peak GB | s to stop | checkpoint GB"
    return ["`spo_train.py` itself, stopped by SIGTERM in the second round and resumed:", "",
            *rows(head, cells)]


def setting_table(records: list[dict]) -> list[str]:
    """Options, memory, speed."""
    cells = [[f["model"], f"`{f['options']}`", f.get("cap_gb"),
              {True: "yes", False: "no"}.get(f.get("fits"), "?"), f.get("peak_memory_gb"),
              f.get("seconds_per_prompt")] for f in (r["found"] for r in records) if "model" in f]
    return ["Settings of `spo_train.py`; \"cap\" is what the allocator was given:", "",
            *rows("model | options | cap GB | fits | peak GB | s / prompt", cells)]


def lead_table(records: list[dict]) -> list[str]:
    """Each lead off and on."""
    cells = []
    for record in records:
        sides = record["found"].get("bench", {}).get("sides", {})
        for name, off in sides.items():
            lead = record["name"].removeprefix("lead ")
            if on := sides.get(f"{name} {lead}"):
                a, b = off["seconds_per_prompt"], on["seconds_per_prompt"]
                cells.append([lead, name, a, b, f"{a / b:.3f} x", *(
                    f"{off['phases'][p]:.3f} / {on['phases'][p]:.3f}" for p in bench.PHASES)])
    head = "lead | of | s / prompt without | with | faster | " + " | ".join(bench.PHASES)
    return ["Leads, SD-1.5, off and on in turns:", "", *rows(head, cells)]


def write_tables(folder: Path, page: Path | None) -> None:
    """Print the tables of every card in the folder, and put them into the page."""
    lines = []
    for path in sorted(folder.glob("gpu_*.json")):
        lines += tables(read_json(path))
    lines = lines or ["No card has been measured with this command yet.", ""]
    print("\n".join(lines))
    if page:
        into_page(page, lines)


def into_page(page: Path, lines: list[str]) -> None:
    """Put these lines between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0] + "\n")
    new = before + MARKS[0] + "\n" + "\n".join(lines) + MARKS[1] + rest.partition(MARKS[1])[2]
    write_atomic(page, lambda p: p.write_text(new, encoding="utf-8"))
