"""The notebook and the page on Python run as they stand; the notebook is kept with its pictures, which are its own.

    python tests/test_notebook.py       # runs docs/walkthrough.ipynb and keeps what comes out
"""
import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs/walkthrough.ipynb"
SIZES = "ROUNDS, PER_ROUND, VALIDATION = 4, 16, 32"     # of the training at the end


def execute(notebook, cwd) -> None:
    """Run all cells in place, in a fresh kernel whose folder is `cwd`; raises what a cell raises."""
    from nbclient import NotebookClient
    NotebookClient(notebook, timeout=600, startup_timeout=600, kernel_name="python3", record_timing=False,
                   resources=dict(metadata=dict(path=str(cwd)))).execute()


def kept() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def source(cell) -> str:
    return "".join(cell["source"])


def cells(kind: str) -> list[dict]:
    return [cell for cell in kept()["cells"] if cell["cell_type"] == kind]


def kinds(cell) -> list[list[str]]:
    """What a code cell shows: of each output the formats, or the stream that it went to."""
    return [sorted(out.get("data", [])) or [out.get("name", out["output_type"])] for out in cell["outputs"]]


def texts() -> list[str]:
    """All that a reader sees of the notebook but its pictures' bytes."""
    outputs = [out for cell in cells("code") for out in cell["outputs"]]
    data = ["".join(text) for out in outputs for kind, text in out.get("data", {}).items() if kind != "image/png"]
    return [*map(source, kept()["cells"]), *("".join(out.get("text", "")) for out in outputs), *data]


def test_the_notebook_is_kept_as_it_ran():
    assert NOTEBOOK.stat().st_size < 1.5e6
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
    shown = [kind for cell in cells("code") for kind in kinds(cell)]
    assert {"error", "stderr"}.isdisjoint(sum(shown, []))
    assert sum("image/png" in kind for kind in shown) >= 7 and sum("image/svg+xml" in kind for kind in shown) >= 6
    assert SIZES in source(cells("code")[1])


def test_its_pictures_are_its_own_and_it_names_no_folder_of_a_machine():
    for cell in kept()["cells"]:
        assert "attachments" not in cell
    for text in texts():
        text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"!\[|<img|<image|href=|url\(|url=|data:", text), text[:300]
        assert not re.search(r"(?<![\w.:/)])/\w+/\w+", text), text[:300]


def test_its_links_lead_somewhere():
    for cell in cells("markdown"):
        for target in re.findall(r"\]\(([^)#\s]+)", source(cell)):
            assert target.startswith("https:") or (NOTEBOOK.parent / target).exists(), target


def test_it_names_functions_that_there_are():
    """`module.function` in the text is one of the project's; so are its options."""
    import importlib
    for cell in cells("markdown"):
        for module, name in re.findall(r"`(\w+)\.(\w+)`", source(cell)):
            assert name == "txt" or hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("folder", [ROOT, NOTEBOOK.parent], ids=["root", "docs"])
def test_it_finds_the_project(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found: dict = {}
    exec(source(cells("code")[0]), found)
    assert found["ROOT"] == ROOT == Path(sys.path[0])


def test_the_notebook_runs(monkeypatch):
    """Every cell, with a shorter training; what each shows is of the kept kinds."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="runs the notebook (requirements-dev.txt)")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(SIZES, "ROUNDS, PER_ROUND, VALIDATION = 1, 4, 8")
    execute(notebook, NOTEBOOK.parent)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert list(map(kinds, ran)) == list(map(kinds, cells("code")))


@pytest.fixture
def signals():
    """The signals are afterwards what they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_page_on_python_runs_as_it_stands(tmp_path, monkeypatch, capsys, signals):
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 6 and page.count("```") == 12
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        assert len(list(filter(str.strip, block.splitlines()))) <= 10, block
        exec(block, names)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["circle.png", "circles.png"]
    assert [row["round"] for row in names["log"]] == [1, 2] and all(row["pairs"] > 20 for row in names["log"])
    assert names["trained"].shape == (2, 3, 64, 64) and not torch.equal(names["trained"], names["images"])
    scores = re.findall(r"tensor\(\[ ?(-?[\d.]+), +(-?[\d.]+)\]", capsys.readouterr().out)
    assert len(scores) == 2         # of PickScore and of the SPM


if __name__ == "__main__":
    import nbformat
    executed = nbformat.read(NOTEBOOK, 4)
    execute(executed, NOTEBOOK.parent)
    nbformat.write(executed, NOTEBOOK)
