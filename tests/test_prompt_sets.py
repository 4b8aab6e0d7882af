"""prompt_sets.py: the real files where they are at hand, made-up ones for the rest."""
import json
from collections import Counter

import pytest

from conftest import FACTS
from prompt_sets import SETS, STYLES, prompt_set
from weights import InputError

REAL = FACTS.parent / "data/prompts"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the published prompt files")


@needs_real
@pytest.mark.parametrize("word", ["parti={}", "{}"])
def test_partiprompts(word):
    """1632 in 12 categories; one prompt begins with a quotation mark that a careless reader would eat."""
    got = prompt_set(word.format(REAL / "PartiPrompts.tsv"))
    assert len(got.prompts) == len(got.groups) == 1632 and len(set(got.groups)) == 12 and got.prompts[0] == "bond"
    assert sum(p.startswith('"G I G G L E') for p in got.prompts) == 1
    lines = (REAL / "PartiPrompts.tsv").read_text(encoding="utf-8").split("\n")[1:]
    assert got.prompts == [line.split("\t")[0].strip() for line in lines if line]


@needs_real
def test_geneval_and_spo_prompts():
    got = prompt_set(f"geneval={REAL / 'geneval_evaluation_metadata.jsonl'}")
    assert len(got.prompts) == len(got.rows) == 553 and Counter(got.groups)["counting"] == 80
    assert prompt_set(str(REAL / "geneval_evaluation_metadata.jsonl")).prompts == got.prompts
    plain = prompt_set(str(REAL / "spo_4k_training_prompts.json"), limit=7)
    assert len(plain.prompts) == 7 and plain.groups == plain.rows == []
    with pytest.raises(InputError, match="parti has 1632 prompts, this holds 4000"):
        prompt_set(f"parti={REAL / 'spo_4k_training_prompts.json'}")


def test_hpsv2_is_four_styles_in_order(tmp_path):
    (tmp_path / "benchmark").mkdir()
    for style in STYLES:
        (tmp_path / "benchmark" / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(800)]))
    for source in (tmp_path, tmp_path / "benchmark"):
        got = prompt_set(f"hpsv2={source}")
        assert len(got.prompts) == 3200 and got.prompts[799:801] == ["anime 799", "concept-art 0"]
        assert all(p.startswith(g + " ") for p, g in zip(got.prompts, got.groups))
    (tmp_path / "benchmark/photo.json").unlink()
    with pytest.raises(InputError, match="photo.json: cannot be read"):
        prompt_set(f"hpsv2={tmp_path}")


def test_pickapic_from_its_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    (tmp_path / "data").mkdir()
    for name, n in (("validation_unique-00000-of-00001-aa", 500), ("train-00000-of-00001-aa", 9)):
        pq.write_table(pa.table({"caption": [f"{name[:5]} {i}" for i in range(n)]}), tmp_path / f"data/{name}.parquet")
    for source in (tmp_path, tmp_path / "data/validation_unique-00000-of-00001-aa.parquet"):
        assert prompt_set(f"pickapic={source}").prompts == [f"valid {i}" for i in range(500)]
    pq.write_table(pa.table({"caption": ["a cat"] * 500}), tmp_path / "twice.parquet")
    assert prompt_set(f"pickapic={tmp_path / 'twice.parquet'}").prompts == ["a cat"] * 500, "two users may have asked for the same"
    with pytest.raises(InputError, match="pickapic has 500 prompts"):
        prompt_set(f"pickapic={tmp_path / 'data/train-00000-of-00001-aa.parquet'}")


@pytest.mark.parametrize("text, says", [
    ('{"tag": "colors", "prompt": "p"}', "line 1"), ('\n{"tag": "colors"', "line 2"), ("[1]", "line 1"), ("[" * 100_000, "line 1"),
    ('{"tag": [1], "prompt": "p", "include": [{"class": "cat", "count": 1}]}', "line 1"),
    ('{"tag": "a", "prompt": "p", "include": [{"class": "cat"}]}', "line 1"), ('{"tag": "a", "prompt": "p", "include": [{"class": "cat", "count": 0}]}', "line 1")])
def test_bad_metadata_names_its_line(text, says, tmp_path):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        prompt_set(f"geneval={tmp_path / 'm.jsonl'}")


def test_names_that_cannot_be_had(tmp_path):
    with pytest.raises(InputError, match="write --prompts geneval=FILE"):
        prompt_set("geneval")
    for name in set(SETS) - {"geneval"}:
        with pytest.raises(InputError, match=f"HF_HUB_OFFLINE.*--prompts {name}=F"):
            prompt_set(name)
    for text in ("a\tb\nc\td", ""):
        (tmp_path / "x.tsv").write_text(text)
        with pytest.raises(InputError, match="the column Prompt"):
            prompt_set(str(tmp_path / "x.tsv"))
    (tmp_path / "x.tsv").write_text("Category\tPrompt\nx\ty\nz\n")
    assert prompt_set(str(tmp_path / "x.tsv")).prompts == ["y"]
    (tmp_path / "x.tsv").write_text("Prompt\n" + 200_000 * "a")
    with pytest.raises(InputError, match="x.tsv: cannot be read"):
        prompt_set(str(tmp_path / "x.tsv"))
    (tmp_path / "x.tsv").write_text("Prompt\n" + 20_000 * "a")
    with pytest.raises(InputError, match="x.tsv: prompt 1, .* has 20,000 characters"):
        prompt_set(str(tmp_path / "x.tsv"))
    with pytest.raises(InputError, match="not a readable file of GenEval's metadata"):
        prompt_set(f"geneval={tmp_path}")
    for word in ("parti=nowhere.tsv", "nowhere.tsv", "nowhere.txt"):
        with pytest.raises(InputError, match="nowhere"):
            prompt_set(word)
