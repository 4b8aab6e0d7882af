"""prompt_sets.py: the real files where they are at hand, made-up ones for the rest."""
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import FACTS
from prompt_sets import SETS, STYLES, TRAINING, VALIDATION, drawn, join_sets, parquet_files, prompt_set, read_prompts
from weights import InputError

REAL = FACTS.parent / "data/prompts"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the published prompt files")


# Any file or data set

def test_prompt_files(tmp_path):
    want = ["a red circle", "ein grüner Kreis, 圆", "x"]
    files = {
        "a.txt": "\n a red circle \n\nein grüner Kreis, 圆\r\nx", "b.json": json.dumps(want), "c.json": json.dumps([dict(caption=p) for p in want]),
        "d.jsonl": "\n".join(json.dumps(dict(caption=p, n=1), ensure_ascii=False) for p in want) + "\n\n",
        "e.jsonl": "\n".join(json.dumps(dict(prompt=p)) for p in want), "f.txt": "\ufeffa red circle\nein grüner Kreis, 圆\nx\n"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_prompts(str(tmp_path / name)) == want, name


@pytest.mark.parametrize("name, content, says", [
    ("a.txt", b"  \n\n", "holds no prompts"), ("a.json", b"[]", "holds no prompts"), ("a.json", b"{\"caption\": \"x\"}", "expected a list"),
    ("a.json", b"[1]", "entry 1"), ("a.jsonl", b"{\"caption\": \"x\"}\n{\"text\": \"y\"}", "entry 2"), ("a.json", b"[", "not valid JSON"),
    ("a.jsonl", b"x", "not valid JSONL"),
    ("a.json", b'["x", "y \\ud800"]', "prompt 2, 'y \\ud800', is no Unicode text: character 3"), (300 * "a" + ".txt", None, "cannot be read"), ("a.txt", b"caf\xe9", "not UTF-8 (byte 3)"),
    ("a.txt", "a cat\n".encode("utf-16-le"), "is no Unicode text: character 2 is NUL"), ("a.json", b'["a\\u0000b"]', "character 2 is NUL"),
    *[(name, b'["a cat"]', "prompts are read from .txt, .json") for name in ("p.yaml", "p.json.bak", "p.txt.gz", "none", "P.MD")],
    ("a.csv", b"a cat\na dog\n", "the column Prompt"), ("a.csv", b"caption;n\na cat;1\n", "the column Prompt"), ("a.tsv", b"Prompt\n\n", "prompts below it"),
    ("a.csv", b"caption\na cat\na dog, flying\n", "row 2, 'a dog'..., has more columns than the header"), ("a.tsv", b"Prompt\tNote\na\tb\tc\n", "row 1, 'a'..., has more"),
    ("a.csv", b"", "the column Prompt"), ("a.csv", b"caption\n\xff", "not UTF-8"), ("none.csv", None, "cannot be read"),
    ("none.txt", None, "cannot be read")])
def test_prompt_files_that_are_wrong(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_prompts(str(tmp_path / name))
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_tables_of_prompts_and_capitals(tmp_path):
    """The column that holds the prompts, quotation marks as each kind means them; every reader reads the same."""
    files = {
        "metadata.csv": 'image,text\r\n1.jpg,"A dragon, ""flying""\nthrough fire"\r\n2.jpg,A knight\r\n3.jpg,\r\n4.jpg\r\n',
        "a.CSV": '\ufeffn,Prompt\n1," A dragon, ""flying""\nthrough fire"\n2,A knight\n'}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_prompts(str(tmp_path / name)) == ['A dragon, "flying"\nthrough fire', "A knight"], name
        assert prompt_set(str(tmp_path / name)).prompts == read_prompts(str(tmp_path / name))
    (tmp_path / "Parti.TSV").write_text('Prompt\tCategory\tNote\n"bond\tAbstract\tx\nhate"\tPeople\t\n')
    assert read_prompts(str(tmp_path / "Parti.TSV")) == ['"bond', 'hate"']
    assert prompt_set(str(tmp_path / "Parti.TSV")).groups == ["Abstract", "People"]
    for name, text in {"P.TXT": "a cat\na dog\n", "P.JSON": '["a cat", "a dog"]', "P.JsonL": '"a cat"\n"a dog"\n'}.items():
        (tmp_path / name).write_text(text)
        assert read_prompts(str(tmp_path / name)) == ["a cat", "a dog"], name


prompt_texts = st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20), max_size=6)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=prompt_texts, objects=st.booleans(), plain=st.booleans())
def test_any_text_survives_json(tmp_path, texts, objects, plain):
    """Whatever is in a prompt, also the separators that str.splitlines knows, comes back; blank ones are left out."""
    rows = [dict(caption=t) if objects else t for t in texts]
    want = [t.strip() for t in texts if t.strip()]
    (tmp_path / "p.json").write_text(json.dumps(rows, ensure_ascii=plain), encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=plain) for r in rows), encoding="utf-8")
    for name in ("p.json", "p.jsonl"):
        if want:
            assert read_prompts(str(tmp_path / name)) == want
        else:
            with pytest.raises(InputError, match="holds no prompts"):
                read_prompts(str(tmp_path / name))


@settings(max_examples=200, deadline=None)
@given(content=st.one_of(st.binary(max_size=60), st.text("[]{}\"':,0aenrtu\\\n \u2028", max_size=40).map(str.encode)),
       suffix=st.sampled_from([".txt", ".json", ".jsonl"]))
@example(content=b"[" * 100_000, suffix=".json")
@example(content=b"9" * 5_000, suffix=".jsonl")
def test_any_bytes_are_prompts_or_one_line(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / ("any" + suffix)
    path.write_bytes(content)
    try:
        prompts = read_prompts(str(path))
    except InputError as error:
        assert "\n" not in str(error) and path.name in str(error)
    else:
        assert prompts and all(isinstance(p, str) and p == p.strip() and p for p in prompts)


def test_fifty_megabytes_of_prompts(tmp_path):
    """A million prompts are read and sampled; one line of 50 MB is no prompt."""
    many, one = tmp_path / "many.txt", tmp_path / "one.txt"
    many.write_text("".join(f"prompt number {i:08d} is this and a little more text\n" for i in range(1_000_000)))
    assert many.stat().st_size > 50e6
    assert len(set(read_prompts(str(many), sample=4000))) == 4000
    one.write_text("a red circle\n" + "word " * 10_000_000)
    with pytest.raises(InputError, match=r"one.txt: prompt 2, 'word .{0,40}'..., has 49,999,999 characters") as caught:
        read_prompts(str(one))
    assert len(str(caught.value)) < 300


def test_captions_of_parquet_files(tmp_path):
    """Each caption once, in order; the training split of a folder; a keyed sample of them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write = lambda name, captions: pq.write_table(pa.table(dict(caption=captions, other=range(len(captions)))), tmp_path / name)
    (tmp_path / "data").mkdir()
    write("data/train-0.parquet", ["b", " a ", "b", ""])
    write("data/train-1.parquet", ["c", "a", None])
    write("data/validation-0.parquet", ["v"])
    assert read_prompts(str(tmp_path / "data/train-0.parquet")) == ["b", "a"]
    assert read_prompts(str(tmp_path)) == ["b", "a", "c"] and read_prompts(str(tmp_path / "data/validation-0.parquet")) == ["v"]
    write("many.parquet", [f"p{i}" for i in range(50)])
    first, again, other = (read_prompts(str(tmp_path / "many.parquet"), 7, seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 7
    pq.write_table(pa.table(dict(text=["x"])), tmp_path / "odd.parquet")
    (tmp_path / "bad.parquet").write_text("no")
    for name in ("odd.parquet", "bad.parquet"):
        with pytest.raises(InputError, match=name):
            read_prompts(str(tmp_path / name))
    with pytest.raises(InputError, match="as a hub id not in the cache"):
        read_prompts("owner/no-such-data-set")


def write_captions(folder, **names):
    """Empty-handed Parquet files that tell their own name as the one caption."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in names["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(dict(caption=[name])), folder / name)


@pytest.mark.parametrize("files, training, validation", [
    (["train/0000.parquet", "validation/0000.parquet", "test/0000.parquet"], [0], [1]),
    (["default/partial-train/0000.parquet", "default/validation/0000.parquet", "default/validation_unique/0000.parquet"], [0], [2]),
    (["a.parquet", "a-test.parquet", "a-validation.parquet", "b_val.parquet"], [0], [2, 3]),
    (["pickapic-Train-1.PARQUET", "x/dev.parquet", "pretrained.parquet"], [0], [1]),
    (["contest.parquet", "evaluations.parquet"], [0, 1], [0, 1]), (["x-test.parquet"], [], [0]), (["x-train.parquet"], [0], []),
    ([f"data/train-0000{i}-of-00003-ab.parquet" for i in range(3)] + ["data/test-00000-of-00002.parquet"], [0, 1, 2], None),
    (["n-1-of-2.parquet", "n-2-of-2.parquet"], [0, 1], [0, 1]), ([], [], [])])
def test_which_files_of_a_data_set(tmp_path, files, training, validation):
    """Folders or names tell the split; what is for validation or tests is never trained on."""
    write_captions(tmp_path, files=files)
    for splits, places in ((TRAINING, training), (VALIDATION, validation)):
        if places:
            assert parquet_files(str(tmp_path), splits) == sorted(tmp_path / files[i] for i in places)
        else:
            with pytest.raises(InputError, match="holds no Parquet files of the .* split" if places == [] else "test-00001-of-00002: "):
                parquet_files(str(tmp_path), splits)
    if training and not files[0].endswith("PARQUET"):
        assert read_prompts(str(tmp_path)) == sorted(files[i] for i in training)


@pytest.mark.parametrize("names, lacking", [
    (["train-00000-of-00003", "train-00002-of-00003"], "train-00001-of-00003"), (["train-00001-of-00002-c3"], "train-00000-of-00002"),
    (["train/x-1-of-3", "train/x-3-of-3"], "train/x-2-of-3")])
def test_a_missing_part_of_a_data_set_is_named(tmp_path, names, lacking):
    write_captions(tmp_path, files=[f"{name}.parquet" for name in names])
    with pytest.raises(InputError, match=f"{lacking}: this part of the data set is missing"):
        read_prompts(str(tmp_path))
    assert read_prompts(str(tmp_path / f"{names[0]}.parquet")) == [f"{names[0]}.parquet"]


def test_a_data_sets_name_may_hold_a_dot(monkeypatch):
    """It is asked of the hub, while a prompts file that is missing is not."""
    asked = []
    monkeypatch.setattr("prompt_sets.fetch_parquet", lambda source: asked.append(source) or Path("nowhere"))
    pytest.importorskip("pyarrow")
    for source in ("owner/data.v1", "owner/data", "some/where.txt", "where.v1"):
        with pytest.raises(InputError, match=source):
            read_prompts(source)
    assert asked == ["owner/data.v1", "owner/data"]


# The field's sets

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
    ('{"tag": "a", "prompt": "p", "include": [{"class": "cat"}]}', "line 1"), ('{"tag": "a", "prompt": "p", "include": [{"class": "cat", "count": 0}]}', "line 1"),
    *[('\n{"tag": "a", "prompt": "p", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, ' + more + "}]}", "line 2 is no GenEval")
      for more in ('"position": ["above", 1]', '"position": ["above", -1]', '"position": ["above", 0.0]', '"position": ["over", 0]', '"position": null',
                   '"position": ["above"]', '"position": "above"', '"position": "[\'above\', 0]"', '"class": 7', '"class": ""', '"class": null', '"count": 1.5', '"count": "1"',
                   '"count": -1', '"color": ["red"]')]])
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


def test_sets_are_joined_and_drawn_from(tmp_path):
    """So many of each, by the seed, in the set's order; a file whose name ends so is itself."""
    (tmp_path / "a.tsv").write_text("Prompt\tCategory\n" + "\n".join(f"a{i}\tc{i % 2}" for i in range(9)))
    (tmp_path / "b.txt").write_text("\n".join(f"b{i}" for i in range(9)))
    a, b = str(tmp_path / "a.tsv"), str(tmp_path / "b.txt")
    assert join_sets((a,)) == prompt_set(a) and join_sets((a,), limit=2) == prompt_set(a, 2)
    got = join_sets((a + ":3", b + ":4"), seed=1)
    assert [p[0] for p in got.prompts] == list("aaabbbb") and got.prompts == sorted(got.prompts)
    assert got.groups == [f"{a} c{int(p[1]) % 2}" for p in got.prompts[:3]] + [b] * 4 and got.rows == []
    assert join_sets((a + ":3", b + ":4"), seed=1) == got != join_sets((a + ":3", b + ":4"), seed=2)
    assert len(join_sets((a, b), limit=2).prompts) == 4
    with pytest.raises(InputError, match="b.txt:10: .*b.txt has only 9 prompts"):
        join_sets((b + ":10",))
    (tmp_path / "b.txt:2").write_text("x")
    assert drawn(b + ":2") == (b + ":2", 0) and drawn("parti=" + b + ":3") == ("parti=" + b, 3) and drawn(b) == (b, 0)
