"""geneval.py: the rules case by case on made-up detections, the detector's outputs by hand, colours, folders, the official metadata."""
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import geneval
from clip_spm import CLIP, CLIPConfig, TowerConfig
from conftest import FACTS, randomize, seeded
from loading import first_tokenizer
from geneval import CLASSES, COLOURS, TAGS, Found, colour_words, export, instances, judge, keep, name_colours, relations
from metrics import find_metric, preprocess_bytes
from prompt_sets import SETS, prompt_set
from weights import InputError

METADATA = FACTS.parent / "data/prompts/geneval_evaluation_metadata.jsonl"
NAMES = FACTS.parent / "data/prompts/geneval_object_names.txt"


def at(name: str, x: float, y: float, width: float = 10, height: float = 10, score: float = 0.95) -> Found:
    """An object whose box is centred on (x, y)."""
    return Found(name, score, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def no_colours(name, group):
    raise AssertionError("colours were asked for")


def right(found: list[Found], row: dict, colours=no_colours) -> bool:
    return judge(keep(found, row["tag"]), row, colours)


def want(tag: str, *include: dict, exclude: tuple = ()) -> dict:
    return dict(tag=tag, include=list(include), exclude=list(exclude), prompt="p")


# What is kept

def test_thresholds_are_strict_and_higher_for_counting():
    found = [at("cat", 0, 0, score=s) for s in (0.3, 0.30001, 0.9, 0.90001)]
    assert [f.score for f in keep(found, "colors")["cat"]] == [0.90001, 0.9, 0.30001]
    assert [f.score for f in keep(found, "counting")["cat"]] == [0.90001]
    assert keep(found[:1], "position") == {}


def test_sixteen_best_of_a_class():
    scores = np.random.default_rng(0).uniform(0.31, 1, 40).tolist()
    kept = keep([at(name, 0, 0, score=s) for s in scores for name in ("cat", "dog")], "colors")
    assert [f.score for f in kept["cat"]] == [f.score for f in kept["dog"]] == sorted(scores)[:-17:-1]


# Objects and counts

def test_single_and_two_objects():
    one, two = want("single_object", dict({"class": "bench"}, count=1)), want("two_object", dict({"class": "cat"}, count=1), dict({"class": "dog"}, count=1))
    assert right([at("bench", 0, 0)], one) and not right([], one) and not right([at("chair", 0, 0)], one)
    assert right([at("bench", 0, 0)] * 5, one), "more than wanted is fine where nothing is excluded"
    assert right([at("dog", 0, 0), at("cat", 0, 0)], two) and not right([at("dog", 0, 0)] * 2, two) and not right([at("cat", 0, 0)], two)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_counting(n):
    row = want("counting", dict({"class": "clock"}, count=n), exclude=(dict({"class": "clock"}, count=n + 1),))
    for m in range(6):
        assert right([at("clock", i, 0) for i in range(m)], row) == (m == n)
        unsure = [at("clock", i, 0, score=0.9) for i in range(3)]
        assert right([at("clock", i, 0) for i in range(m)] + unsure, row) == (m == n), "detections at 0.9 do not count"


# Colours

def test_colours_are_asked_of_the_best_objects_only():
    row = want("colors", dict({"class": "car"}, count=1, color="red"))
    found, asked = [at("car", 0, 0, score=0.5), at("car", 9, 9, score=0.8)], []
    paint = lambda name, group: asked.append((name, [f.score for f in group])) or ["red" for _ in group]  # noqa: E731
    assert right(found, row, paint) and asked == [("car", [0.8])]
    assert not right(found, row, lambda *_: ["blue"]) and not right([], row)


def test_every_counted_object_needs_the_colour():
    row = want("color_attr", dict({"class": "car"}, count=2, color="red"))
    assert right([at("car", 0, 0)] * 2, row, lambda *_: ["red", "red"]) and not right([at("car", 0, 0)] * 2, row, lambda *_: ["red", "blue"])
    two = want("color_attr", dict({"class": "car"}, count=1, color="red"), dict({"class": "cup"}, count=1, color="blue"))
    colours = {"car": ["red"], "cup": ["blue"]}
    assert right([at("car", 0, 0), at("cup", 0, 0)], two, lambda n, _: colours[n])
    assert not right([at("car", 0, 0), at("cup", 0, 0)], two, lambda n, _: colours["cup" if n == "car" else "car"]), "swapped"


# Relations

@pytest.mark.parametrize("x, y, names", [
    (-50, 0, {"left of"}), (50, 0, {"right of"}), (0, -50, {"above"}), (0, 50, {"below"}), (-50, -50, {"left of", "above"}),
    (50, 50, {"right of", "below"}), (0, 0, set()), (1.9, -1.9, set()),
    (2, 2, set()),                      # exactly the slack: 0.1 x (10 + 10)
    (2.0005, 0, set()),                 # less than a thousandth beyond it
    (3, 0, set()),                      # (3 - 2) / 3 is not over one half
    (4, 0, set()),                      # exactly one half
    (4.1, 0, {"right of"}), (-4.1, 0, {"left of"}), (0, 4.1, {"below"}), (0, -4.1, {"above"}),
    (50, 25, {"right of"}),             # 48 / 55.9 and 23 / 55.9
    (50, 35, {"right of", "below"}),    # 33 / 61.0 = 0.54
])
def test_relations(x, y, names):
    assert relations(at("a", 100 + x, 100 + y), at("b", 100, 100)) == names


def test_relations_reckon_with_both_sizes():
    assert relations(at("a", 20, 0, width=100), at("b", 0, 0, width=100)) == set()          # slack 20
    assert relations(at("a", 50, 0, width=100), at("b", 0, 0, width=20)) == {"right of"}    # slack 12: 38 / 50
    assert relations(at("a", 20, 0, height=100), at("b", 0, 0, height=100)) == {"right of"}, "the other axis has its own"


POSITION = want("position", dict({"class": "dog"}, count=1), dict({"class": "cat"}, count=1, position=["left of", 0]))


@pytest.mark.parametrize("relation, x, y", [("left of", -60, 0), ("right of", 60, 0), ("above", 0, -60), ("below", 0, 60)])
def test_position(relation, x, y):
    row = want("position", dict({"class": "dog"}, count=1), dict({"class": "cat"}, count=1, position=[relation, 0]))
    assert right([at("dog", 100, 100), at("cat", 100 + x, 100 + y)], row)
    assert not right([at("dog", 100, 100), at("cat", 100 - x, 100 - y)], row)
    assert not right([at("dog", 100, 100), at("cat", 100, 100)], row)


def test_position_needs_the_other_group_to_be_right():
    assert not right([at("cat", 0, 0)], POSITION)
    coloured = want("position", dict({"class": "dog"}, count=1, color="red"), dict({"class": "cat"}, count=1, position=["left of", 0]))
    found = [at("dog", 100, 0), at("cat", 0, 0)]
    assert right(found, coloured, lambda *_: ["red"]) and not right(found, coloured, lambda *_: ["pink"])


def test_a_right_place_does_not_excuse_a_wrong_colour():
    row = want("position", dict({"class": "dog"}, count=1), dict({"class": "cat"}, count=1, color="red", position=["left of", 0]))
    found = [at("dog", 100, 0), at("cat", 0, 0)]
    assert right(found, row, lambda *_: ["red"]) and not right(found, row, lambda *_: ["pink"])


def test_position_holds_for_all_pairs_of_the_counted():
    row = want("position", dict({"class": "dog"}, count=2), dict({"class": "cat"}, count=2, position=["left of", 0]))
    dogs = [at("dog", 100, 0), at("dog", 140, 0)]
    assert right([*dogs, at("cat", 0, 0), at("cat", 40, 0)], row) and not right([*dogs, at("cat", 0, 0), at("cat", 120, 0)], row)
    assert right([at("dog", 100, 0), at("cat", 0, 0), at("dog", -100, 0, score=0.5)], POSITION), "the less certain dog is not asked"


# The detector's outputs

def test_instances_by_hand():
    """Two queries on a 4 x 4 mask grid; the network saw 32 x 64 of which the picture filled 32 x 48, and was 16 x 24 itself."""
    logits = torch.full((2, 81), -20.0)
    logits[0, 16], logits[1, 73], logits[1, 80] = 20, 0.0, 0.0              # a dog for sure; a book at one half
    masks = torch.full((2, 4, 4), -4.0)
    masks[0, :2, :2] = 4.0
    masks[1] = 2.0
    dog, book = instances(logits, masks, (32, 48), (32, 64), (16, 24))
    assert (dog.name, book.name) == ("dog", "book") and dog.mask.shape == (16, 24) and dog.mask.dtype == bool
    big = F.interpolate(F.interpolate(masks[None, :1], (32, 64), mode="bilinear")[..., :48], (16, 24), mode="bilinear")[0, 0]
    assert dog.score == pytest.approx(float(big[big > 0].sigmoid().mean()), abs=1e-6)
    assert dog.box == (0, 0, 16, 8) and (dog.mask == (big > 0).numpy()).all()
    assert book.score == pytest.approx(0.5 / (1 + np.exp(-2)), abs=1e-6) and book.box == (0, 0, 24, 16)
    masks[1] = -2
    assert [f.name for f in instances(logits, masks, (32, 48), (32, 64), (16, 24))] == ["dog"], "an empty mask is nothing"


def test_one_query_may_be_two_things():
    """0.45 cat, 0.4 dog: both are above 0.3, as (query, class) pairs are ranked."""
    logits = torch.full((1, 81), -30.0)
    logits[0, 15], logits[0, 16], logits[0, 80] = np.log(0.45), np.log(0.4), np.log(0.15)
    assert [(f.name, round(f.score, 2)) for f in instances(logits, torch.full((1, 4, 4), 30.0), (8, 8), (8, 8), (8, 8))] == [("cat", 0.45), ("dog", 0.4)]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A minuscule random Mask2Former in its folder."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=80, feature_strides=[4, 8, 16, 32])
    folder = tmp_path_factory.mktemp("detector")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_detector_sees_what_mmdet_would_show_it(detector, monkeypatch):
    """Shorter side 800 or longer 1333, ImageNet statistics of the bytes, padding of zeros below and to the right."""
    model = geneval.load_detector(str(detector), torch.device("cpu"))
    seen, shapes = [], []
    monkeypatch.setattr(geneval, "instances", lambda c, m, *rest: shapes.append((tuple(c.shape), m.ndim, *rest)) or [])
    run = model.forward
    monkeypatch.setattr(model, "forward", lambda pixel_values: seen.append(pixel_values) or run(pixel_values=pixel_values[..., ::8, ::8]))
    for size in ((512, 512), (600, 300)):
        geneval.detect(model, Image.new("RGB", size, (124, 116, 255)), torch.device("cpu"))
    assert shapes[0] == ((5, 81), 3, (800, 800), (800, 800), (512, 512)) and shapes[1] == ((5, 81), 3, (667, 1333), (672, 1344), (300, 600))
    assert seen[1].shape == (1, 3, 672, 1344) and seen[1][..., 667:, :].abs().max() == seen[1][..., 1333:].abs().max() == 0
    assert seen[1][0, :, 9, 9].tolist() == pytest.approx([(124 - 123.675) / 58.395, (116 - 116.28) / 57.12, (255 - 103.53) / 57.375], abs=1e-4)


def test_detector_is_loaded_strictly(detector, tmp_path):
    from safetensors.torch import load_file, save_file
    weights = load_file(detector / "model.safetensors")
    weights.pop(next(k for k in weights if "class_predictor" in k))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((detector / "config.json").read_text())
    with pytest.raises(InputError, match="lacks 1 weights"):
        geneval.load_detector(str(tmp_path), torch.device("cpu"))
    with pytest.raises(InputError, match="no Mask2Former"):
        geneval.load_detector(str(tmp_path / ".."), torch.device("cpu"))


# Colours

@pytest.fixture(scope="module")
def clip():
    """(a random small CLIP, its tokenizer)."""
    config = CLIPConfig(TowerConfig(16, 32, 2, 2, vocab_size=579, max_position_embeddings=16),
                        TowerConfig(24, 32, 2, 2, image_size=28, patch_size=7), 12)
    return randomize(CLIP(config), 5).eval(), first_tokenizer("tiny")


def test_colour_words_by_hand(clip):
    model, tokenizer = clip
    words = colour_words(model, tokenizer, "cup")
    with torch.no_grad():
        for i, c in enumerate(COLOURS):
            texts = [f"a photo of a {c} cup", f"a photo of a {c}-colored cup", f"a photo of a {c} object"]
            ids = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
            mean = sum(model.text_features(ids)) / 3
            assert torch.allclose(words[i], mean / mean.norm(), atol=1e-6)


def test_colours_are_named_on_grey_inside_the_box(clip, monkeypatch):
    model, _ = clip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    mask = np.zeros((40, 60), bool)
    mask[10:30, 5:25] = True
    crops = []
    monkeypatch.setattr(geneval, "preprocess_bytes", lambda images, size: crops.extend(images) or preprocess_bytes(images, size))
    words = F.normalize(torch.randn(10, 12, generator=seeded(1)), dim=-1)
    names = name_colours(model, words, image, [Found("cup", 1, (4, 9, 30, 31), mask), Found("cup", 1, (0, 0, 60, 40))])
    array, pixels = np.asarray(crops[0]), np.asarray(image)
    assert array.shape == (22, 26, 3) and (array[1:21, 1:21] == pixels[10:30, 5:25]).all() and (array[0] == 0x99).all() and (array[:, 22:] == 0x99).all()
    assert (np.asarray(crops[1]) == pixels).all()
    with torch.no_grad():
        assert names == [COLOURS[int((model.image_features(preprocess_bytes([c], 28)) @ words.T).argmax())] for c in crops]


# The metric, folders, metadata

def test_metric_looks_prompts_up(detector, clip, tmp_path, monkeypatch):
    model, tokenizer = clip
    monkeypatch.setattr(geneval, "load_clip", lambda *_, **__: model)
    rows = [dict(want("single_object", dict({"class": "cat"}, count=1)), prompt="a cat"), dict(POSITION, prompt="a cat left of a dog")]
    metric = geneval.geneval(str(detector), "clip", rows, tokenizer, torch.device("cpu"))
    monkeypatch.setattr(geneval, "detect", lambda m, image, d: [at("cat", 0, 0)] + [at("dog", 90, 0)] * (image.width > 10))
    pictures = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))]
    assert metric.score(pictures, ["a cat", "a cat left of a dog", "a cat left of a dog"]).tolist() == [1, 0, 1]
    assert "not the original's weights" in metric.formula
    less = [rows[0], dict(rows[1], include=rows[1]["include"][:1])]
    assert geneval.geneval(str(detector), "clip", less, tokenizer, torch.device("cpu")).weights != metric.weights, "other rules, other scores"
    with pytest.raises(InputError, match="'a dog' is not in the metadata"):
        metric.score(pictures[:1], ["a dog"])


@pytest.mark.parametrize("entry, says", [
    ({"class": "unicorn", "count": 1}, "the class 'unicorn'"), ({"class": "cat", "count": 17}, "the count 17"),
    ({"class": "cat", "count": 1, "color": "mauve"}, "the color 'mauve'")])
def test_metadata_that_the_detector_cannot_tell(entry, says, tmp_path, monkeypatch):
    """Every picture would count as wrong; said where they are read, whoever scores."""
    monkeypatch.setitem(SETS, "geneval", ("", [], 1))

    def read(*rows: dict) -> list[dict]:
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return prompt_set(f"geneval={tmp_path / 'm.jsonl'}").rows

    assert read(POSITION) == [POSITION]
    file = re.escape(str(tmp_path / "m.jsonl"))
    for row in (want("single_object", entry), want("counting", POSITION["include"][0], exclude=(entry,))):
        with pytest.raises(InputError, match=f"{file}: line 2, 'p', asks for {says}, which the detector cannot tell"):
            read(POSITION | dict(prompt="q"), row)
    with pytest.raises(InputError, match=f"{file}: line 3 has the prompt of line 1 again, 'p', "):
        read(POSITION, POSITION | dict(prompt="q"), POSITION)


def test_scipy_is_told_of_in_one_line(detector, monkeypatch):
    """requirements.txt lacks it; before anything is loaded."""
    find_metric("geneval", [str(detector)])
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match="--metrics geneval: its detector needs scipy; pip install scipy"):
        find_metric("geneval", [str(detector)])


def test_a_clip_of_other_tokens_is_refused_at_once(detector, clip, monkeypatch):
    """Not only when the first picture shows something coloured."""
    other = randomize(CLIP(CLIPConfig(TowerConfig(16, 32, 2, 2, vocab_size=100, max_position_embeddings=16), clip[0].config.vision, 12)))
    monkeypatch.setattr(geneval, "load_clip", lambda *_, **__: other)
    with pytest.raises(InputError, match="579 tokens, the metric's CLIP 100"):
        geneval.geneval(str(detector), "clip", [], clip[1], torch.device("cpu"))


def test_export_is_the_originals_layout(tmp_path):
    rows = [dict(POSITION, prompt=str(i)) for i in range(3)]
    paths = [tmp_path / f"{i}.{'jpg' if i == 5 else 'png'}" for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(path)
    for _ in "again":
        export(rows, paths, tmp_path / "out")
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()) == sorted(
        f"0000{i}/{name}" for i in range(3) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png"))
    assert json.loads((tmp_path / "out/00002/metadata.jsonl").read_text()) == rows[2]
    assert (tmp_path / "out/00001/samples/0001.png").read_bytes() == paths[3].read_bytes()
    with Image.open(tmp_path / "out/00002/samples/0001.png") as last:
        assert last.format == "PNG" and abs(last.getpixel((0, 0))[0] - 200) < 4


def test_export_leaves_nothing_stale_and_turns_pictures(tmp_path):
    """Fewer rows and samples than before; a turned JPEG in CMYK; a folder of the user's own stays."""
    exif, image = Image.Exif(), Image.new("CMYK", (8, 16), (0, 255, 255, 0))
    exif[0x0112] = 6
    image.paste((255, 0, 255, 0), (0, 0, 8, 8))                     # the upper half, which the turn puts to the right
    image.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "out/00009").mkdir(parents=True)
    export([dict(POSITION, prompt=str(i)) for i in range(2)], [tmp_path / "a.jpg"] * 4, tmp_path / "out")
    export([dict(POSITION, prompt="0")], [tmp_path / "a.jpg"], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["0000.png", "00000", "00009", "metadata.jsonl", "samples"]
    with Image.open(tmp_path / "out/00000/samples/0000.png") as out, Image.open(tmp_path / "a.jpg") as source:
        assert out.size == (16, 8) and out.mode == "RGB"
        assert out.getpixel((14, 4)) == source.convert("RGB").getpixel((4, 1)) != out.getpixel((1, 4))


@pytest.mark.skipif(not METADATA.exists(), reason="needs GenEval's metadata")
def test_official_metadata():
    """All 553: the tags' counts; every class is one of the detector's; a picture with just what is listed is right, one without is not."""
    rows = prompt_set(f"geneval={METADATA}").rows
    assert Counter(r["tag"] for r in rows) == dict(zip(TAGS, (80, 99, 80, 94, 100, 100))) and len({r["prompt"] for r in rows}) == 553
    place = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for row in rows:
        found, colours = [], {}
        for group in row["include"]:
            dx, dy = place[group["position"][0]] if "position" in group else (0, 0)
            found += [at(group["class"], 500 + 100 * dx + i, 500 + 100 * dy) for i in range(group["count"])]
            assert group["class"] in CLASSES and group.get("color", "red") in COLOURS
            colours[group["class"]] = [group.get("color")] * group["count"]
        assert right(found, row, lambda n, _: colours[n]) and not right(found[1:], row, lambda n, _: colours[n])
        if row["tag"] == "counting":
            assert not right(found + found[:1], row)


@pytest.mark.skipif(not NAMES.exists(), reason="needs GenEval's list of classes")
def test_official_classes():
    assert CLASSES == NAMES.read_text().split("\n")[:80] and len(CLASSES) == 80
