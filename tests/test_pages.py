"""The pages: README is short, shows lines that are the code's own, and every relative link leads somewhere."""
import ast
import re
import shutil
import textwrap
import zipfile

import pytest

from helpers import ROOT

# Not those of .venv and .pytest_cache, which come and go.
PAGES = [p for p in ROOT.rglob("*.md") if not any(part in ("runs", "results") or part[0] == "." for part in p.relative_to(ROOT).parts)]


def test_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_the_algorithm_in_readme_is_the_code():
    """Every line but the headings stands in spo_train.py, in this order within its function."""
    page, source = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "spo_train.py"))
    block = page[page.index("## The algorithm"):]
    code = re.search(r"```python\n(.*?)```", block, re.S).group(1)
    parts = re.split(r"^# (\w+).*\n", code, flags=re.M)[1:]
    assert parts[::2] == ["sample_pools", "pair_log_ratios", "spo_loss"]
    for name, lines in zip(parts[::2], parts[1::2]):
        body = re.search(rf"^def {name}\(.*?(?=^\S)", source + "\nend", re.S | re.M).group(0)
        place = 0
        for line in filter(None, map(str.strip, lines.splitlines())):
            place = body.find(line, place)
            assert place >= 0, f"{name}: {line}"


def test_no_check_is_an_assert():
    """`python -O` leaves them out."""
    product = [p for folder in (".", "tiny", "benchmarks", "experiments") for p in (ROOT / folder).glob("*.py")]
    assert len(product) > 30
    for path in product:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Assert)]
        assert not found, f"{path}: {found}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = textwrap.dedent(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"", text):
        path = next(filter(None, target))
        assert path.startswith(("http:", "https:")) or (page.parent / path).exists(), path


@pytest.mark.filterwarnings("ignore")       # setuptools' own, which pytest-xdist cannot hand on
def test_pip_installs_everything(tmp_path, monkeypatch):
    """`pip install .`: a wheel holds every component and the tiny model, and nothing that is not committed as source."""
    build = pytest.importorskip("setuptools.build_meta")
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "requirements.txt", ROOT / "LICENSE"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("__pycache__", "work"))
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    files = {str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.py"), *(ROOT / "tiny").rglob("*")] if p.is_file()}
    assert {n for n in names if "dist-info" not in n} == {f for f in files if "__pycache__" not in f and "tiny/work" not in f}
    assert "torch==2.13.0" in metadata and "pyarrow" in metadata
