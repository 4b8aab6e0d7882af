"""spm_train.py: data, inputs of the SPM, the run and what it leaves behind."""
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gentle
import spm_train
from clip_spm import make_step_aware
from conftest import assert_close, seeded
from diffusion import encode_prompts
from loading import load_clip, load_pipeline
from helpers import PROMPTS, call, log_of, shell
from pairs import UnreadablePicture, encode_pairs, epoch_order, folder_pairs, is_encoded, load_pairs, open_latents, square
from spm_train import Setting, SPMConfig, accuracy_table, pair_scores, predicted_pixels, relabel
from training import start_processes
from weights import InputError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twenty pairs of pictures of odd sizes: three labels, one caption more often than the others."""
    folder = tmp_path_factory.mktemp("pairs")
    rand, rows = np.random.default_rng(0), []
    for i in range(20):
        for side in (0, 1):
            pixels = rand.integers(0, 255, (4, 5, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((24, 18) if side else (16, 20)).save(folder / f"{i}-{side}.png")
        label = (1, 0, 0.5, 1)[i % 4]
        rows.append(dict(caption=PROMPTS[max(0, i - 14)], image_0=f"{i}-0.png", image_1=f"{i}-1.png", label_0=label, label_1=1 - label))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder


@pytest.fixture(scope="module")
def kind(sd, pickscore, pairs):
    """The options of a short run but its folder."""
    return ("--model", sd, "--pickscore", pickscore, "--pairs", pairs, "--dtype", "fp32", "--steps", 5, "--batch", 6, "--micro_batch", 4,
            "--validation", 5, "--rate", "constant", "--warmup", 2, "--lr", 1e-3, "--save_every", 2, "--step_blind")


@pytest.fixture(scope="module")
def whole(kind, tmp_path_factory):
    """The folder of such a run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    call("spm_train", *kind, "--out", folder)
    return folder


def test_pairs_are_read(pairs):
    data = load_pairs(str(pairs), side=16)
    images = torch.stack([data.pictures(i) for i in range(20)])
    assert images.shape == (20, 2, 3, 16, 16) and images.dtype == torch.uint8 and data.captions[15] == PROMPTS[1]
    assert data.label.tolist() == [1, 0, 0.5, 1] * 5 and data.weight.tolist() == pytest.approx([1 / 15] * 15 + [1] * 5)
    first = np.asarray(Image.open(pairs / "3-0.png").crop((0, 2, 16, 18)))       # 16 x 20: no resizing, the middle
    assert np.array_equal(images[3, 0].permute(1, 2, 0).numpy(), first)


@pytest.mark.parametrize("row, says", [
    ("{", "pairs.jsonl"), ("", "holds no pairs"), ('{"caption": "x"}', "line 1 lacks image_0, image_1, label_0"), ("[]", "line 1 lacks"),
    ('{"caption": "x", "image_0": "no.png", "image_1": "no.png", "label_0": 1}', "no.png"),
    ("[" * 100_000, "cannot be read"), ('{"caption": "\\ud800", "image_0": "a", "image_1": "a", "label_0": 1}', "line 1, .* is no Unicode text"),
    ('{"caption": "x", "image_0": "' + 300 * "a" + '", "image_1": "a", "label_0": 1}', "does not exist"), ('{"caption": null, "image_0": "a", "image_1": "a", "label_0": 1}', "line 1 has a caption that is no text"),
    ('{"caption": "x", "image_0": null, "image_1": "a", "label_0": 1}', "line 1 names the picture None"),
    ('{"caption": "x", "image_0": "../a", "image_1": "a", "label_0": 1}', "names the picture '../a'; it must be a file in this folder"),
    ('{"caption": "x", "image_0": "/etc/passwd", "image_1": "a", "label_0": 1}', "it must be a file in this folder"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": null}', "line 1 has label_0 None"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": "1"}', "line 1 has label_0 '1'"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": 1, "num_example_per_prompt": 0}', "num_example_per_prompt 0"),
    ('{"caption": "x\\u0000", "image_0": "a", "image_1": "a", "label_0": 1}', "line 1, .* is no Unicode text: character 2"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": -1}', "line 1 has label_0 -1; it must be 1, 0, or 0.5"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": NaN}', "line 1 has label_0 nan"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": 1, "label_1": 1}', "line 1 has label_0 1 and label_1 1"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": 0, "label_1": 0}', "line 1 has label_0 0 and label_1 0"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": 1, "label_1": "0"}', "line 1 has label_0 1 and label_1 '0'"),
    ('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": 1, "has_label": "False"}', "line 1 has has_label 'False'"),
    *[('{"caption": "x", "image_0": "a", "image_1": "a", "label_0": 1, "num_example_per_prompt": ' + size + "}", "line 1 has num_example_per_prompt ")
      for size in ("Infinity", "NaN", "-2", "1e-300", '"3"', "1" + 400 * "0")]])
def test_pairs_that_are_wrong(tmp_path, row, says):
    (tmp_path / "pairs.jsonl").write_text(row)
    with pytest.raises(InputError, match=says) as caught:
        load_pairs(str(tmp_path), 16)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="nowhere"):
        load_pairs(str(tmp_path / "nowhere"), 16)


def test_only_tiny_brings_its_own_pairs(sd, pickscore, tmp_path):
    with pytest.raises(InputError, match="--pairs"):
        call("spm_train", "--model", sd, "--pickscore", pickscore, "--out", tmp_path / "run")


@pytest.mark.parametrize("words", ["--batch -4", "--micro_batch 0", "--save_every 0", "--validation -5", "--lr nan", f"--seed {10 ** 30}"])
def test_numbers_that_no_run_could_use_are_refused(words):
    with pytest.raises(InputError, match=f"^{words}: must be "):
        call("spm_train", *words.split())


def test_damaged_picture_is_named(pairs, tmp_path):
    for file in pairs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "3-1.png").write_bytes((tmp_path / "3-1.png").read_bytes()[:40])
    data = folder_pairs(tmp_path, 16)
    assert data.pictures(2).shape == (2, 3, 16, 16)
    with pytest.raises(InputError, match="3-1.png: not a readable picture"):
        data.pictures(3)


def write_parquet(pairs, path, rows: int = 4, **columns):
    """The folder's pairs as Pick-a-Pic stores them: PNG or JPEG bytes in `jpg_0`, `jpg_1`; `rows` to a row group."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().split("\n") if line]
    table = dict(caption=[r["caption"] for r in lines], label_0=[float(r["label_0"]) for r in lines],
                 jpg_0=[(pairs / r["image_0"]).read_bytes() for r in lines], jpg_1=[(pairs / r["image_1"]).read_bytes() for r in lines])
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in (table | columns).items() if v is not None}), path, row_group_size=rows)
    return path


def test_parquet_equals_the_folder(pairs, tmp_path):
    """Same captions, labels, weights and pictures; several files; other splits, unlabelled rows and the order of reading do not matter."""
    want = load_pairs(str(pairs), 16)
    file = write_parquet(pairs, tmp_path / "data/train-00000.parquet")
    for source in (file, tmp_path):
        got = load_pairs(str(source), 16)
        assert got.captions == want.captions and torch.equal(got.label, want.label) and torch.equal(got.weight, want.weight)
        assert [list(g) for g in got.groups] == [list(range(i, i + 4)) for i in range(0, 20, 4)]
        assert all(torch.equal(got.pictures(i), want.pictures(i)) for i in (19, 0, 7, 8, 3, 19))
    write_parquet(pairs, tmp_path / "data/validation-00000.parquet")
    second = write_parquet(pairs, tmp_path / "data/train-00001.parquet", has_label=[i % 3 > 0 for i in range(20)],
                           num_example_per_prompt=list(range(1, 21)))
    alone, both = load_pairs(str(second), 16), load_pairs(str(tmp_path), 16)
    kept = [i for i in range(20) if i % 3]
    assert alone.label.tolist() == want.label[kept].tolist() and alone.weight.tolist() == pytest.approx([1 / (i + 1) for i in kept])
    assert torch.equal(alone.pictures(4), want.pictures(kept[4]))
    assert len(both.captions) == 20 + len(kept) and torch.equal(both.pictures(25), want.pictures(kept[5]))


def test_columns_as_the_library_datasets_writes_them(pairs, tmp_path):
    """Pictures as structs of bytes and path, large binaries and dictionaries are what plain columns are; a text is no picture."""
    pa = pytest.importorskip("pyarrow")
    want = load_pairs(str(pairs), 16)
    lines = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().split("\n") if line]
    first, second = ([(pairs / r[k]).read_bytes() for r in lines] for k in ("image_0", "image_1"))
    file = write_parquet(pairs, tmp_path / "x.parquet", jpg_0=pa.array([dict(bytes=b, path="a.png") for b in first]),
                         jpg_1=pa.array(second, pa.large_binary()), caption=pa.array(want.captions).dictionary_encode())
    got = load_pairs(str(file), 16)
    assert got.captions == want.captions and all(torch.equal(got.pictures(i), want.pictures(i)) for i in (0, 6, 19))
    for column in ([str(pairs / r["image_0"]) for r in lines], [5000 * "/9j4"] * 20, [dict(bytes=None, path=str(pairs / r["image_0"])) for r in lines], [None] * 20):
        with pytest.raises(UnreadablePicture, match="row 1 of row group 0: not a readable picture") as caught:
            load_pairs(str(write_parquet(pairs, tmp_path / "y.parquet", jpg_0=column)), 16).pictures(1)
        assert len(str(caught.value)) < 300 and " at 0x" not in str(caught.value), "the same pair is known by the same words"


@pytest.mark.parametrize("columns, says", [
    (dict(label_0=[1.0, 0.25] * 10), "row 1 of row group 0 has label_0 0.25"), (dict(caption=[None] * 20), "row 0 of row group 0 has a caption"),
    (dict(label_0=[float("nan")] * 20, has_label=[True] * 20), "row 0 of row group 0 has label_0 nan"),
    (dict(label_1=[1.0] * 20), "row 0 of row group 0 has label_0 1.0 and label_1 1.0"), (dict(label_0=["1"] * 20), "row 0 of row group 0 has label_0 '1'"),
    (dict(num_example_per_prompt=[1, 0] * 10), "row 1 of row group 0 has num_example_per_prompt 0"),
    (dict(num_example_per_prompt=[float("inf")] * 20), "row 0 of row group 0 has num_example_per_prompt inf"),
    (dict(caption=["a\0b"] * 20), "row 0 of row group 0, .* is no Unicode text"),
    (dict(label_0=[float("nan")] * 20), "no labelled pairs"), (dict(jpg_0=[7] * 20), "row 1 of row group 1"),
    (dict(jpg_1=None), "lacks the columns jpg_1"), (dict(label_0=[None] * 20), "no labelled pairs"), (dict(jpg_0=[b"no"] * 20), "row 1 of row group 1")])
def test_parquet_that_is_wrong(pairs, tmp_path, columns, says):
    file = write_parquet(pairs, tmp_path / "x.parquet", **columns)
    with pytest.raises(InputError, match=says) as caught:
        load_pairs(str(file), 16).pictures(5)
    assert "\n" not in str(caught.value) and "x.parquet" in str(caught.value)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        load_pairs(str(file), 16)


def test_rows_without_a_label_stay_for_pickscore(pairs, tmp_path):
    """It labels every pair anew, so a row without a label serves as well; people's labels are needed where they count."""
    labels, known = [None, float("nan"), 1.0, 0.5] * 5, [True, True, False, True] * 5
    file = write_parquet(pairs, tmp_path / "x.parquet", label_0=labels, has_label=[k and i % 4 > 1 for i, k in enumerate(known)])
    assert load_pairs(str(file), 16).label.tolist() == [0.5] * 5
    got = load_pairs(str(file), 16, unlabelled=True)
    assert [None if v != v else v for v in got.label.tolist()] == [None, None, None, 0.5] * 5
    assert torch.equal(got.pictures(4), load_pairs(str(pairs), 16).pictures(4))
    shutil.copytree(pairs, tmp_path / "folder")
    rows = (pairs / "pairs.jsonl").read_text().replace('"label_0": 1,', '"label_0": null,')
    (tmp_path / "folder/pairs.jsonl").write_text(rows)
    with pytest.raises(InputError, match="line 1 has label_0 None"):
        load_pairs(str(tmp_path / "folder"), 16)
    assert load_pairs(str(tmp_path / "folder"), 16, unlabelled=True).label.isnan().tolist() == [True, False, False, True] * 5


def test_a_damaged_page_is_an_unreadable_picture(pairs, tmp_path):
    """The file opens, its captions and labels are whole; a training run skips such pairs."""
    file = write_parquet(pairs, tmp_path / "x.parquet")
    import pyarrow.parquet as pq
    columns, data = pq.ParquetFile(file).metadata.row_group(1), bytearray(file.read_bytes())
    column = next(columns.column(i) for i in range(columns.num_columns) if columns.column(i).path_in_schema == "jpg_0")
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin:begin + 80] = bytes(80)
    file.write_bytes(data)
    got = load_pairs(str(file), 16)
    assert got.pictures(0).shape == (2, 3, 16, 16)
    with pytest.raises(UnreadablePicture, match="x.parquet: row 1 of row group 1") as caught:
        got.pictures(5)
    assert "\n" not in str(caught.value)


def test_no_caption_is_on_both_sides(pairs):
    """Pick-a-Pic has many pairs of the same pictures under one caption; the tiny world's rows stand alone, drawn as ever."""
    from pairs import hold_out, world_pairs
    from training import permutation
    data = load_pairs(str(pairs), 16)
    held, used = hold_out(data, 4, 0)
    assert len(held) == 4 and held == sorted(held) and used | set(held) == set(range(20)) and len(used) == 16
    assert not {data.captions[i] for i in held} & {data.captions[i] for i in used}
    held, used = hold_out(world_pairs(40, 0), 8, 3)
    order = permutation(40, 3, "validation")
    assert held == sorted(order[:8]) and used == set(order[8:])


def test_an_epoch_is_every_row_once_and_neighbours_share_groups(monkeypatch):
    """Exactly the used rows, differently in each epoch; within a window only few groups are open."""
    import pairs as module
    monkeypatch.setattr(module, "WINDOW", 40)
    data = module.Pairs([""] * 400, torch.ones(400), torch.ones(400), [range(i, i + 10) for i in range(0, 400, 10)], None)
    used = set(range(400)) - {5, 17}
    first, again, second = (epoch_order(data, used, 0, e) for e in (0, 0, 1))
    assert first == again != second and sorted(first) == sorted(second) == sorted(used)
    assert max(len({r // 10 for r in first[i:i + 20]}) for i in range(0, 398, 20)) <= 10
    assert sum(abs(a - b) > 10 for a, b in zip(first, first[1:])) > 200         # and yet they are well mixed


@pytest.fixture
def setting(sd, pickscore, pairs):
    """What shows those pairs to a judge."""
    return Setting(load_pipeline(str(sd)), load_clip(str(pickscore)), load_pairs(str(pairs), 16), SPMConfig(micro_batch=4), start_processes("cpu"))


def test_both_pictures_of_a_pair_get_the_same_noise(setting):
    """Equal pictures stay equal, at every t; another pair, step or seed gets other noise."""
    pipe = setting.pipe
    images = torch.randint(0, 256, (1, 1, 3, 16, 16), generator=seeded(0)).byte().expand(3, 2, 3, 16, 16)
    pipe.vae.moments = lambda x, plain=pipe.vae.moments: (plain(x)[0], torch.zeros_like(plain(x)[1]))     # the encoder's own noise differs
    cond, t = encode_prompts(pipe, [PROMPTS[0]] * 3), torch.tensor([500, 500, 900])
    see = lambda *key: predicted_pixels(setting, [0, 1, 2], encode_pairs(pipe, images), cond, t, key)
    pixels = see(0, "noise", 0)
    assert_close(pixels[:, 0], pixels[:, 1]) and torch.equal(see(0, "noise", 0), see(0, "noise", 0))
    assert (pixels[0] - pixels[1]).abs().max() > 0.1
    for other in ((0, "noise", 1), (1, "noise", 0), (0, "report", 0)):
        assert (see(*other) - pixels).abs().amax((1, 2, 3, 4)).min() > 0.1


def test_pixels_by_hand(sd, setting):
    """Encode, add that pair's noise at t, predict x0 under guidance, decode: with diffusers' networks and scheduler."""
    from diffusers import StableDiffusionPipeline

    from clip_spm import preprocess_decoded
    from training import generator
    pipe, theirs = setting.pipe, StableDiffusionPipeline.from_pretrained(sd)
    images = torch.randint(0, 256, (2, 2, 3, 16, 16), generator=seeded(1)).byte()
    t = torch.tensor([251, 777])
    ours = predicted_pixels(setting, [0, 1], encode_pairs(pipe, images), encode_prompts(pipe, PROMPTS[:2]), t, (0, "noise", 4))
    with torch.no_grad():
        for i in range(2):
            noise, *encoder = torch.randn(3, 4, 8, 8, generator=generator(0, "noise", 4, i))
            text, empty = theirs.encode_prompt(PROMPTS[i], "cpu", 1, True)[:2]
            for side in range(2):
                posterior = theirs.vae.encode(images[i, side][None] / 127.5 - 1).latent_dist
                latent = (posterior.mean + posterior.std * encoder[side]) * theirs.vae.config.scaling_factor
                x = theirs.scheduler.add_noise(latent, noise[None], t[i:i + 1])
                low, high = (theirs.unet(x, t[i], e).sample for e in (empty, text))
                alpha = theirs.scheduler.alphas_cumprod[t[i]]
                x0 = (x - (1 - alpha).sqrt() * (low + 5 * (high - low))) / alpha.sqrt()
                picture = theirs.vae.decode(x0 / theirs.vae.config.scaling_factor).sample
                assert_close(ours[i, side][None], preprocess_decoded(picture, 16, clamp_first=True), 1e-4)


def test_the_judge_is_told_each_pairs_own_timestep(setting, spm):
    """Both pictures of a pair are scored at that pair's t, one by one or together."""
    clip, t, ids = load_clip(str(spm)), torch.tensor([0, 400, 999]), setting.ids[14:17]
    pixels = torch.randn(3, 2, 3, 16, 16, generator=seeded(0))
    with torch.no_grad():
        scores = pair_scores(setting.pipe, clip, pixels, t, ids, torch.float32)
        for n in range(3):
            alone = clip.image_features(pixels[n], t[n].expand(2))
            assert_close(scores[n], clip.score(alone, clip.text_features(ids[n:n + 1])))
        assert (scores - pair_scores(setting.pipe, clip, pixels, t.flip(0), ids, torch.float32)).abs()[[0, 2]].min() > 1e-3


def test_noise_and_judge_have_one_timestep(kind, tmp_path, monkeypatch):
    """A step's timesteps are drawn uniformly, one a pair; the pair is noised to it, and both judges are told it."""
    from training import generator
    seen = {"predicted_pixels": [], "pair_scores": []}
    for name, place in (("predicted_pixels", 4), ("pair_scores", 3)):
        plain = getattr(spm_train, name)
        monkeypatch.setattr(spm_train, name, lambda *words, name=name, place=place, plain=plain: seen[name].append(words[place]) or plain(*words))
    monkeypatch.setattr(spm_train, "accuracy_table", lambda *inputs: {})
    call("spm_train", *kind, "--steps", 1, "--out", tmp_path / "run")
    first, second = torch.randint(0, 1000, (6,), generator=generator(0, "timestep", 0)).split((4, 2))
    assert [t.tolist() for t in seen["predicted_pixels"]] == [first.tolist(), second.tolist()]
    assert [t.tolist() for t in seen["pair_scores"]] == [first.tolist()] * 2 + [second.tolist()] * 2


def test_the_table_by_hand(setting, pickscore, spm):
    """Ties are left out, the others count once; differences are paired."""
    models, rows = {"PickScore": load_clip(str(pickscore)), "SPM": load_clip(str(spm))}, list(range(20))
    table = accuracy_table(setting, models, rows)
    images = torch.stack([setting.pairs.pictures(i) for i in rows])
    cond, sure = encode_prompts(setting.pipe, setting.pairs.captions), setting.pairs.label != 0.5
    for t in (0, 701):
        pixels = predicted_pixels(setting, rows, encode_pairs(setting.pipe, images), cond, torch.full((20,), t), (0, "report", t))
        right = {}
        for name, clip in models.items():
            with torch.no_grad():
                scores = pair_scores(setting.pipe, clip, pixels, torch.full((20,), t), setting.ids, torch.float32)
            right[name] = ((scores[:, 0] > scores[:, 1]) == (setting.pairs.label == 1))[sure].double()
        for name in models:
            accuracy, _, n, difference, error = table[name][t]
            change = right[name] - right["PickScore"]
            assert n == 15 and accuracy == pytest.approx(float(right[name].mean())) and difference == pytest.approx(float(change.mean()))
            assert error == pytest.approx(float(change.std(unbiased=False)) / 15 ** 0.5, abs=1e-6)


def test_relabelling_by_pickscore(pickscore, pairs, sd):
    """Softmax over the pair; closer than 0.1 is a tie."""
    from clip_spm import preprocess_decoded
    clip, pipe = load_clip(str(pickscore)), load_pipeline(str(sd))
    clip.logit_scale.data.fill_(1.0)            # so that no softmax is saturated
    data = load_pairs(str(pairs), 16)
    images, captions = torch.stack([data.pictures(i) for i in range(20)]), data.captions
    with torch.no_grad():
        text = clip.text_features(torch.tensor(pipe.tokenizers[0](captions, padding="max_length", max_length=16).input_ids))
        gap = []
        for pair, words in zip(images, text):
            scores = [clip.score(clip.image_features(preprocess_decoded(p[None] / 127.5 - 1, 16)), words[None]) for p in pair]
            gap.append(float(torch.tanh((scores[0] - scores[1]) / 2)))
    for threshold in (0.1, sorted(map(abs, gap))[10]):
        want = [0.5 if abs(g) <= threshold else float(g > 0) for g in gap]
        assert relabel(clip, images, text, threshold + 1e-6).tolist() == want
    assert want.count(0.5) == 11 and {0.0, 1.0} < set(want)


def test_relabelling_sees_what_pickscore_sees(pickscore, monkeypatch):
    """Large noisy pictures through PIL's anti-aliased bicubic: the pixels agree up to PIL's rounding to whole numbers."""
    from clip_spm import preprocess_pil
    clip, seen = load_clip(str(pickscore)), []
    monkeypatch.setattr(clip, "image_features", lambda pixels: seen.append(pixels) or torch.ones(len(pixels), 10))
    images = torch.randint(0, 256, (1, 2, 3, 100, 100), generator=seeded(2)).byte()
    relabel(clip, images, torch.ones(1, 10))
    want = preprocess_pil([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images[0]], 16)
    assert (seen[0] - want).abs().max() < 2 / 255 / 0.26


def test_training_starts_equal_to_pickscore(kind, tmp_path, pickscore):
    """With learning rate 0 all three rows of the table agree, and the saved weights are PickScore's and adaLN's start."""
    call("spm_train", *kind, "--lr", 0, "--steps", 1, "--out", tmp_path / "run")
    table = json.loads((tmp_path / "run/results.json").read_text())
    assert table["PickScore"] == table["SPM"] == table["step-blind SPM"]
    start, ours, blind = load_clip(str(pickscore)), load_clip(str(tmp_path / "run/spm")), load_clip(str(tmp_path / "run/spm_step_blind"))
    assert all(torch.equal(v, ours.state_dict()[k]) and torch.equal(v, blind.state_dict()[k]) for k, v in start.state_dict().items())
    pixels = torch.randn(3, 3, 16, 16, generator=seeded(0))
    with torch.no_grad():
        for t in (0, 500, 999):
            assert torch.equal(ours.image_features(pixels, torch.full((3,), t)), start.image_features(pixels))


def test_a_run_leaves_table_and_weights(kind, tmp_path, pickscore):
    """As a user runs it."""
    out = tmp_path / "run"
    done = shell("spm_train.py", *kind, "--out", out, "--device", "cpu")
    assert "pair accuracy at t =" in done.stdout and "Traceback" not in done.stderr
    table = json.loads((out / "results.json").read_text())
    assert list(table) == ["PickScore", "SPM", "step-blind SPM"]
    for row in table.values():
        assert list(row) == ["0", "251", "501", "701", "951"]
        for t, (share, error, n, difference, paired_error) in row.items():
            assert 0 <= share <= 1 and 1 <= n <= 5 and error == pytest.approx((share * (1 - share) / n) ** 0.5)
            assert difference == pytest.approx(share - table["PickScore"][t][0], abs=1e-6) and 0 <= paired_error <= (1 / n) ** 0.5
    weights = load_file(out / "spm/model.safetensors")
    assert all(k.startswith("model.") for k in weights)
    spm, blind, start = (load_clip(str(f)) for f in (out / "spm", out / "spm_step_blind", pickscore))
    assert spm.config.step_aware and not blind.config.step_aware
    for key, value in start.state_dict().items():           # both towers have learnt
        assert not torch.equal(value, spm.state_dict()[key]) and not torch.equal(value, blind.state_dict()[key]), key
    assert torch.equal(weights["model.logit_scale"], spm.logit_scale)
    rows = log_of(out)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5] and [r["lr"] for r in rows] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
    assert rows[0]["epoch"] == 0 and rows[-1]["epoch"] == 2


def test_learning_rate_is_the_released_one():
    """DeepSpeed's WarmupDecayLR, read off the pinned official code: {step, from 1: rate}. The tiny world's falls from the start."""
    for preset, measured in (("sd15", {1: 0.0, 10: 1.11e-6, 250: 2.67e-6, 500: 3e-6, 501: 3e-6, 4000: 1.60e-6, 7999: 8e-10}),
                             ("sdxl", {10: 3.71e-7, 500: 1e-6, 3750: 5e-7})):
        config = spm_train.SPMConfig(**spm_train.PRESETS[preset])
        for step, rate in measured.items():
            assert math.isclose(spm_train.learning_rate(step - 1, config), rate, rel_tol=4e-3, abs_tol=1e-12)
    for rate, want in (("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]), ("linear", [0.25, 0.4375, 0.5625, 0.625, 0.5, 0.375, 0.25, 0.125])):
        config = spm_train.SPMConfig(rate=rate, lr=1.0, warmup=4, steps=8)
        assert [spm_train.learning_rate(s, config) for s in range(8)] == want
    assert spm_train.SPMConfig(**spm_train.PRESETS["tiny"]).rate == "linear"
    assert spm_train.learning_rate(0, spm_train.SPMConfig(warmup=0, lr=2.0)) == 2.0


def test_fp16_scales_the_loss(kind, tmp_path, monkeypatch):
    """An overflow lowers the scale, which a checkpoint keeps; ten of them in a row are no fault. Gradients are as without."""
    words = [*kind, "--dtype", "fp16", "--lr", 0, "--steps", 8]
    call("spm_train", *words, "--out", tmp_path / "a")
    state = torch.load(tmp_path / "a/checkpoint-000008.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0 ** (16 - state["skipped"]) and state["skipped"] < 6
    monkeypatch.setattr(spm_train, "loss_scaler", lambda config, device: torch.amp.GradScaler("cpu", enabled=False))
    call("spm_train", *words, "--out", tmp_path / "b")
    for a, b in zip(log_of(tmp_path / "a"), log_of(tmp_path / "b"), strict=True):
        if a["grad_norm"] is not None:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)
    assert a["grad_norm"] is not None

    def high(config, device) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 100)
        scaler.scale(torch.zeros(1))
        return scaler

    monkeypatch.setattr(spm_train, "loss_scaler", high)
    call("spm_train", *words[:-1], 12, "--out", tmp_path / "c")
    assert log_of(tmp_path / "c")[-1]["skipped"] == 12


def test_the_timestep_layers_learn_at_their_own_rate(kind, tmp_path, pickscore):
    """Adam's first step moves a weight by its learning rate; `--adaln_lr 10` makes that ten times as much where adaLN is."""
    call("spm_train", *kind, "--steps", 1, "--warmup", 1, "--lr", 1e-4, "--adaln_lr", 10, "--weight_decay", 0, "--out", tmp_path / "run")
    start, new = load_clip(str(pickscore)), load_clip(str(tmp_path / "run/spm")).state_dict()
    torch.manual_seed(0)
    fresh = make_step_aware(start).state_dict()
    moved = {k: float((new[k] - v).abs().max()) for k, v in fresh.items()}
    known = start.state_dict().keys()
    assert max(v for k, v in moved.items() if k in known) == pytest.approx(1e-4, rel=0.05)
    assert max(v for k, v in moved.items() if "adaLN" in k) == pytest.approx(1e-3, rel=0.05)


def assert_same_models(a, b, tolerance: float = 0.0) -> None:
    """Both folders hold the same two judges."""
    for name in ("spm", "spm_step_blind"):
        ours, theirs = (load_file(f / name / "model.safetensors") for f in (a, b))
        for key, value in ours.items():
            assert (value - theirs[key]).abs().max() <= tolerance * max(1, float(value.abs().max())), key


def test_stopped_and_continued_is_the_same_run(kind, whole, tmp_path, monkeypatch):
    """A signal in step 3 saves after it; the same command again ends where an undisturbed run ends, bit for bit."""
    plain = spm_train.Run.log

    def log(self, record):
        plain(self, record)
        self.processes.stop = 15 * (record["step"] == 3)

    with monkeypatch.context() as patch:
        patch.setattr(spm_train.Run, "log", log)
        with pytest.raises(SystemExit, match="143"):
            call("spm_train", *kind, "--out", tmp_path / "parts")
    assert len(log_of(tmp_path / "parts")) == 3 and not (tmp_path / "parts/results.json").exists()
    assert "starting at step 3" in call("spm_train", *kind, "--out", tmp_path / "parts")
    assert_same_models(tmp_path / "parts", whole)
    assert log_of(tmp_path / "parts") == log_of(whole)
    assert (tmp_path / "parts/results.json").read_text() == (whole / "results.json").read_text()


def test_two_processes_train_what_one_trains(kind, tmp_path, monkeypatch):
    """Sharded optimizer state, shares of 3 and 3 pairs of which micro batches hold 4 and 2, one cache of latents for both processes."""
    monkeypatch.setattr(torch.optim, "AdamW", gentle.adamw)
    call("spm_train", *kind, "--out", tmp_path / "one")
    words = ("spm_train.py", *kind, "--device", "cpu", "--out", tmp_path / "two")
    said = shell("tests/killed.py", tmp_path / "two", *words, "--micro_batch", 2, "--cache_latents", "then", *words, processes=2).stdout
    assert_same_models(tmp_path / "one", tmp_path / "two-first", 1e-5)
    assert "starting at step 4" in said and [row["step"] for row in log_of(tmp_path / "two")] == [1, 2, 3, 4, 5]
    assert_same_models(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.parametrize("labels, dtype", [("human", "fp32"), ("human", "bf16"), ("pickscore", "fp32")])
def test_cached_latents_change_nothing(kind, tmp_path, monkeypatch, labels, dtype):
    """Same losses, weights and table, also where a run goes on with what another part encoded; each training pair is encoded once."""
    import pairs as module
    encoded, read, plain, readable = [], [], module.encode_pairs, spm_train.readable
    monkeypatch.setattr(module, "encode_pairs", lambda pipe, images: encoded.append(len(images)) or plain(pipe, images))
    monkeypatch.setattr(spm_train, "readable", lambda pairs, i: read.append(i) or readable(pairs, i))
    monkeypatch.setattr(spm_train, "accuracy_table", lambda *inputs: {name: {t: [0] * 5 for t in (0, 251, 501, 701, 951)} for name in inputs[1]})
    words = ("spm_train", *kind, "--labels", labels, "--dtype", dtype, "--save_every", 3)
    call(*words, "--out", tmp_path / "plain")
    assert sum(encoded) == 5 * 6                                # of 15 pairs
    encoded.clear(), read.clear()
    call(*words, "--out", tmp_path / "cached", "--cache_latents")
    seen = sum(encoded)
    assert 12 <= seen <= 15 and (len(read) == 30 if labels == "pickscore" else seen <= len(read) < 30)
    assert log_of(tmp_path / "cached") == log_of(tmp_path / "plain")
    assert_same_models(tmp_path / "cached", tmp_path / "plain")
    for path in (tmp_path / "cached").glob("checkpoint-000005.*"):
        path.unlink()
    encoded.clear(), read.clear()
    call(*words, "--out", tmp_path / "cached", "--cache_latents")           # steps 4 and 5 once more
    assert encoded == [] and len(read) == (12 if labels == "pickscore" else 0)
    assert_same_models(tmp_path / "cached", tmp_path / "plain")


def test_unreadable_pairs_are_not_cached(kind, pairs, tmp_path, monkeypatch):
    """The second epoch, too, finds them damaged and gives them no weight."""
    monkeypatch.setattr("pairs.warn", lambda text: None)
    words = ("spm_train", *kind, "--pairs", damaged_copy(pairs, tmp_path / "bad", (1, 2, 3, 6, 7, 8)), "--max_unreadable", 1)
    call(*words, "--out", tmp_path / "plain")
    call(*words, "--out", tmp_path / "cached", "--cache_latents")
    assert log_of(tmp_path / "cached") == log_of(tmp_path / "plain") and log_of(tmp_path / "plain")[-1]["unreadable"] >= 3
    assert_same_models(tmp_path / "cached", tmp_path / "plain")


def test_a_cache_that_does_not_fit_is_one_line(sd, tmp_path, monkeypatch):
    """Latents of other pairs, and a disk without room, before anything is encoded. What is written is there when opened again."""
    pipe = load_pipeline(str(sd))
    latents = open_latents(tmp_path, pipe, 16, 3)
    assert latents.shape == (3, 2, 2, 4, 8, 8) and not latents.any()
    latents[1] = 2.5
    again = open_latents(tmp_path, pipe, 16, 3)
    assert [is_encoded(again, i) for i in range(3)] == [False, True, False] and torch.equal(again, latents)
    again[2, 0], again[2, 1, 0] = 1.0, 1.0                      # cut off while it was written
    assert not is_encoded(again, 2)
    with pytest.raises(InputError, match="latents.bin: holds the latents of other pairs; delete it"):
        open_latents(tmp_path, pipe, 16, 4)
    monkeypatch.setattr(os, "posix_fallocate", lambda *what: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(InputError, match="No space left on device.; 0.0 GB are needed; leave out --cache_latents"):
        open_latents(tmp_path, pipe, 16, 3)
    assert torch.equal(again, latents) and is_encoded(again, 1), "what is there already stays"
    (tmp_path / "latents.bin").unlink()
    with pytest.raises(InputError, match="leave out --cache_latents"):
        open_latents(tmp_path, pipe, 16, 3)
    assert (tmp_path / "latents.bin").stat().st_size == 0


def test_the_cache_takes_its_space_at_once(sd, tmp_path):
    """A disk that fills up behind its back would kill the process when it writes: there are no holes, whoever began the file."""
    pipe = load_pipeline(str(sd))
    size = 200 * 2 * 2 * 4 * 8 * 8 * 4
    for begun in (False, True):
        if begun:
            os.truncate(tmp_path / "latents.bin", 0)
            os.truncate(tmp_path / "latents.bin", size)         # as earlier versions left it
            assert (tmp_path / "latents.bin").stat().st_blocks * 512 < size
        open_latents(tmp_path, pipe, 16, 200)
        found = (tmp_path / "latents.bin").stat()
        assert found.st_size == size <= found.st_blocks * 512


def test_compiling_changes_nothing_and_happens_once(kind, tmp_path, monkeypatch, compilations):
    """Microbatches of four and two pairs, and of any number that the cache lacks; the table's end: the first step's graphs serve."""
    made, plain, backward = [], torch.compile, spm_train.backward
    monkeypatch.setattr(torch.optim, "AdamW", gentle.adamw)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: made.append(function.__qualname__) or plain(function, **settings))

    def counted(*arguments):
        found = backward(*arguments)
        after.append(len(compilations))
        return found

    monkeypatch.setattr(spm_train, "backward", counted)
    words, after = ("spm_train", *kind, "--steps", 3, "--batch", 6, "--save_every", 100, "--cache_latents"), []
    call(*words, "--out", tmp_path / "plain")
    assert not made and after.pop() == 0
    after.clear()
    printed = call(*words, "--out", tmp_path / "compiled", "--compile")
    blocks = sum(type(m).__name__ in ("ResnetBlock", "TransformerBlock") for m in load_pipeline(str(kind[1])).unet.modules())
    assert sum(name in ("ResnetBlock.forward", "TransformerBlock.forward") for name in made) == blocks > 20
    assert made[blocks:] == ["VAE.moments", "VAE.decode"] + ["CLIP.image_features", "CLIP.text_features"] * 2
    assert len(after) == 3 and after[0] >= 6 and set(after) == {len(compilations)}
    assert "compiling took about" in printed
    assert_same_models(tmp_path / "compiled", tmp_path / "plain", 1e-4)
    for a, b in zip(log_of(tmp_path / "compiled"), log_of(tmp_path / "plain"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["accuracy"] == b["accuracy"]
    assert (tmp_path / "compiled/results.json").read_text() == (tmp_path / "plain/results.json").read_text()


def test_seconds_of_each_step_are_logged_and_one_can_be_profiled(kind, tmp_path):
    call("spm_train", *kind, "--steps", 2, "--out", tmp_path / "run", "--profile")
    for row in log_of(tmp_path / "run", timing=True):
        assert set(row["seconds"]) == {"reading", "encoding", "predicting", "training"} and row["pairs_per_second"] > 0
        assert 0 < sum(row["seconds"].values()) < 6 / row["pairs_per_second"]
    events = json.loads((tmp_path / "run/profile.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "aten::conv2d" for e in events) > 10 and "aten::" in (tmp_path / "run/profile.txt").read_text()


def damaged_copy(pairs, folder, numbers):
    """The pairs with one picture of each of `numbers` cut short."""
    shutil.copytree(pairs, folder)
    for i in numbers:
        (folder / f"{i}-1.png").write_bytes((folder / f"{i}-1.png").read_bytes()[:40])
    return folder


def test_unreadable_pictures_are_skipped_counted_and_listed(kind, pairs, whole, tmp_path, monkeypatch):
    """What stands in a damaged pair does not matter; which pairs are damaged survives a resume."""
    said = []
    monkeypatch.setattr("pairs.warn", said.append)
    bad = damaged_copy(pairs, tmp_path / "bad", (1, 2, 3))
    call("spm_train", *kind, "--pairs", bad, "--out", tmp_path / "run", "--steps", 4)
    listed = (tmp_path / "run/unreadable.txt").read_text().splitlines()
    assert 1 <= len(listed) <= 3 and log_of(tmp_path / "run")[-1]["unreadable"] == len(listed) == len(said)
    assert all("-1.png: not a readable picture" in line for line in listed) and all("skipped" in line for line in said)
    numbers = json.loads((tmp_path / "run/results.json").read_text())["SPM"]["0"]
    assert numbers[2] <= json.loads((whole / "results.json").read_text())["SPM"]["0"][2]
    state = torch.load(tmp_path / "run/checkpoint-000004.pt", weights_only=True)
    assert len(state["unreadable"]) == len(listed)
    for i in (1, 2, 3):                                         # broken otherwise, the same run
        (bad / f"{i}-0.png").write_bytes(b"GIF89a")
    call("spm_train", *kind, "--pairs", bad, "--out", tmp_path / "again", "--steps", 4)
    assert_same_models(tmp_path / "run", tmp_path / "again", 0)


def test_damaged_pictures_weigh_nothing(kind, pairs, tmp_path):
    """The first step's loss is that of the good pairs alone, divided by the weight of the whole batch."""
    def weighted(folder, numbers):
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().split("\n") if line]
        rows = [row | dict(num_example_per_prompt=1e30 if i in numbers else 1) for i, row in enumerate(rows)]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder
    broken, losses = (1, 2, 3, 6, 7), {}
    for name, cut, light in (("good", (), broken), ("cut", broken, ())):
        folder = weighted(damaged_copy(pairs, tmp_path / ("pairs-" + name), cut), light)
        call("spm_train", *kind, "--pairs", folder, "--out", tmp_path / name, "--steps", 1, "--max_unreadable", 1)
        losses[name] = log_of(tmp_path / name)[0]
    skipped = losses["cut"]["unreadable"]
    assert 0 < skipped < 6 and losses["good"]["unreadable"] == 0
    assert losses["cut"]["loss"] * 6 == pytest.approx(losses["good"]["loss"] * (6 - skipped), rel=1e-5)


def test_too_many_unreadable_pictures_stop_the_run(kind, pairs, tmp_path):
    bad = damaged_copy(pairs, tmp_path / "bad", range(12))
    with pytest.raises(InputError, match="damaged pictures, listed in .*unreadable.txt.*--max_unreadable"):
        call("spm_train", *kind, "--pairs", bad, "--out", tmp_path / "run")
    assert len((tmp_path / "run/unreadable.txt").read_text().splitlines()) > 3
    call("spm_train", *kind, "--pairs", bad, "--out", tmp_path / "run", "--max_unreadable", 1)       # allowed: the run goes on
    assert log_of(tmp_path / "run")[-1]["step"] == 5


def test_pictures_of_every_kind(tmp_path, monkeypatch):
    """16-bit grey keeps its upper byte, transparency is white, CMYK is converted; what is no picture says so."""
    asked = []
    ramp = (np.arange(100, dtype=np.uint16).reshape(10, 10) * 655)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    assert np.array_equal(square(tmp_path / "grey16.png", 10)[0].numpy(), ramp >> 8)
    Image.new("RGBA", (10, 12), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert square(tmp_path / "clear.png", 10).eq(255).all()
    Image.new("LA", (10, 12), (0, 255)).save(tmp_path / "la.png")
    assert square(tmp_path / "la.png", 10).eq(0).all()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert square(tmp_path / "cmyk.jpg", 16).float().mean((1, 2)).tolist() == pytest.approx([255, 0, 0], abs=6)
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "text.png").write_text("no picture")
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
                                        + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 95, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    whole = np.asarray(noise.resize((41, 16), Image.Resampling.BICUBIC))[:, 12:28]
    assert np.abs(square(tmp_path / "noise.png", 16).permute(1, 2, 0).numpy().astype(int) - whole).max() <= 1
    Image.new("RGB", (8, 30_000), "red").save(tmp_path / "long.png")
    monkeypatch.setattr(Image.Image, "resize", lambda *a, resize=Image.Image.resize, **k: asked.append(a[1]) or resize(*a, **k))
    assert square(tmp_path / "long.png", 512).shape == (3, 512, 512) and asked == [(512, 512)]
    (tmp_path / "odd.dds").write_bytes(b"DDS " + struct.pack("<I", 124) + bytes(120))
    for name, says in (("dot.png", "1 x 1 pixels"), ("text.png", "cannot identify"), ("huge.png", "exceeds limit"), ("odd.dds", ".")):
        with pytest.raises(UnreadablePicture, match=says):
            square(tmp_path / name, 16)
    monkeypatch.setattr(Image.Image, "convert", lambda *a: torch.empty(1 << 60) if a[1] == "RGB" else a[0])
    with pytest.raises(UnreadablePicture, match="allocate"):
        square(tmp_path / "noise.png", 16)


@pytest.mark.parametrize("size", [(95, 37), (640, 480), (333, 1001), (100, 65), (1000, 30)])
def test_pictures_are_resized_as_the_released_code_does(size, tmp_path):
    """CLIPImageProcessor: the longer side is rounded down, bicubic, the middle rounded to the left; (100, 65) tells both from rounding."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    whole = np.asarray(image.resize(tuple(64 * n // min(size) for n in size), Image.Resampling.BICUBIC)).astype(int)
    top, left = ((n - 64) // 2 for n in whole.shape[:2])
    got = square(tmp_path / "x.png", 64).permute(1, 2, 0).numpy()
    assert np.abs(got - whole[top:top + 64, left:left + 64]).max() <= 1


def test_exif_turns_a_picture(tmp_path):
    """A telephone's photograph stands upright, and damaged EXIF leaves the pixels as they are."""
    pixels = np.zeros((64, 32, 3), np.uint8)
    pixels[:32], pixels[32:] = (255, 0, 0), (0, 0, 255)                 # red above blue
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "damaged.png", exif=b"Exif\0\0nonsense")
    want = square(tmp_path / "upright.png", 16)
    assert all(torch.equal(square(tmp_path / name, 16), want) for name in ("turned.png", "damaged.png"))


@pytest.mark.parametrize("broken", ["predicted_pixels", "pair_scores"])
def test_what_is_not_finite_is_reported_skipped_and_ends_the_run_after_ten(kind, tmp_path, monkeypatch, broken):
    """One step is skipped and the run goes on; when all are, the weights stay what they were and the run ends."""
    original, calls, pills, said = getattr(spm_train, broken), [], {2}, []

    def poisoned(*args, **kwargs):
        out = original(*args, **kwargs)
        calls.append(len(out))
        return out.index_fill(0, torch.tensor([0]), float("nan")) if pills is None or len(calls) in pills else out

    monkeypatch.setattr(spm_train, broken, poisoned)
    monkeypatch.setattr(spm_train, "warn", said.append)
    call("spm_train", *kind, "--out", tmp_path / "once")
    assert len(said) == 1 and ("picture" if broken == "predicted_pixels" else "judge") in said[0] and "t =" in said[0], said
    rows = log_of(tmp_path / "once")
    assert rows[-1]["skipped"] == 1 and [r["loss"] for r in rows].count(None) == 1
    pills = None
    with pytest.raises(InputError, match="10 optimizer steps in a row were not finite"):
        call("spm_train", *kind, "--steps", 50, "--out", tmp_path / "always")
    state = torch.load(tmp_path / "always/checkpoint-000010.pt", weights_only=True)
    start = load_clip(kind[kind.index("--pickscore") + 1].__str__()).state_dict()
    assert all(torch.equal(v, state["models"][1][k]) for k, v in start.items())


def test_a_validation_set_of_its_own(kind, pairs, whole, tmp_path):
    """All pairs are trained on, the table is of the others' labelled ones; a number holds back so many, as ever."""
    others = tmp_path / "data"
    write_parquet(pairs, others / "train-00000.parquet")
    write_parquet(pairs, others / "validation-00000.parquet", label_0=[0.0] * 20, has_label=[i > 16 for i in range(20)])
    write_parquet(pairs, others / "validation_unique-00000-of-00001.parquet", label_0=[1.0] * 20, has_label=[i < 12 for i in range(20)])
    words = ("spm_train", *kind, "--steps", 1)
    said = call(*words, "--validation", others, "--out", tmp_path / "own")
    assert "20 training and 12 validation pairs" in said
    table = json.loads((tmp_path / "own/results.json").read_text())
    assert {row["0"][2] for row in table.values()} == {12} and json.loads((tmp_path / "own/config.json").read_text())["validation"] == str(others)
    assert "15 training and 5 validation pairs" in call(*words, "--out", tmp_path / "number")
    config = json.loads((tmp_path / "number/config.json").read_text())
    assert config["validation"] == 5 == json.loads((whole / "config.json").read_text())["validation"]
    with pytest.raises(InputError, match="^nowhere: neither an existing file"):
        call(*words, "--validation", "nowhere", "--out", tmp_path / "none")


def test_ties_count_half_where_asked(setting, pickscore, spm):
    """As the released code counts people's labels: a tie is half right whatever a model says."""
    models, rows = {"PickScore": load_clip(str(pickscore)), "SPM": load_clip(str(spm))}, list(range(20))
    plain = accuracy_table(setting, models, rows)
    setting.config.ties = "half"
    half = accuracy_table(setting, models, rows)
    for name in models:
        for t, (accuracy, _, n, difference, _) in half[name].items():
            right, _, sure, more, _ = plain[name][t]
            assert (sure, n) == (15, 20) and accuracy == pytest.approx((right * 15 + 0.5 * 5) / 20, abs=1e-6)
            assert difference == pytest.approx(more * 15 / 20, abs=1e-6)


def test_unlabelled_pairs_are_trained_on_as_pickscore_labels_them(kind, pairs, tmp_path):
    """A row nobody labelled is one more pair; with people's labels it is left out."""
    file = write_parquet(pairs, tmp_path / "x.parquet", label_0=[1.0, None] * 10)
    words = ("spm_train", *kind, "--pairs", file, "--steps", 1, "--validation", 0)
    assert "20 training and 0 validation" in call(*words, "--labels", "pickscore", "--out", tmp_path / "a")
    assert log_of(tmp_path / "a")[0]["loss"] > 0
    assert "10 training and 0 validation" in call(*words, "--out", tmp_path / "b")


def test_labels_and_weights_are_part_of_a_run(kind, pairs, tmp_path):
    """Turned round or weighed otherwise under the same name, they are another run; a checkpoint that says nothing of weights goes on."""
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    lines = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().split("\n") if line]
    words = ("spm_train", *kind, "--pairs", folder, "--save_every", 1, "--out", tmp_path / "run")
    call(*words, "--steps", 5)
    checkpoint = tmp_path / "run/checkpoint-000005.pt"
    for change, says in ((dict(num_example_per_prompt=7), "the pair weights"), (dict(label_0=1, label_1=0), "the pairs")):
        (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line | change) for line in lines[:1]) + "\n"
                                            + "\n".join(json.dumps(dict(num_example_per_prompt=1) | line | change) for line in lines[1:]))
        with pytest.raises(InputError, match=f"{says}.* that this run was trained with had the same name but another content"):
            call(*words)
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(dict(num_example_per_prompt=7) | line) for line in lines))
    state = torch.load(checkpoint, weights_only=True)
    del state["identity"]["pair_weights"]
    torch.save(state, checkpoint)
    note = json.loads(checkpoint.with_suffix(".json").read_text())
    checkpoint.with_suffix(".json").write_text(json.dumps(note | dict(sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest())))
    assert "starting at step 5" in call(*words)


def test_a_set_of_damaged_pictures_ends_the_run_however_small(kind, pairs, tmp_path):
    """Three damaged pairs of three are no accident."""
    bad = damaged_copy(pairs, tmp_path / "bad", range(20))
    lines = (bad / "pairs.jsonl").read_text().split("\n")
    (bad / "pairs.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(InputError, match="^3 of the 3 pairs read so far have damaged pictures"):
        call("spm_train", *kind, "--pairs", bad, "--validation", 0, "--batch", 3, "--out", tmp_path / "run")


def test_a_signal_while_pairs_are_read_ends_at_once():
    """Nothing is done yet; afterwards signals are what they were."""
    from pairs import read_or_leave
    from training import Stopped
    from helpers import ALONE
    processes, want = dataclasses.replace(ALONE), object()
    assert read_or_leave(processes, lambda: want) is want and not processes.dropping

    def interrupted():
        assert processes.dropping
        processes.stop, processes.dropping = 2, False           # what the handler does
        raise Stopped

    with pytest.raises(SystemExit, match="130"):
        read_or_leave(processes, interrupted)


def test_the_other_options_run(kind, tmp_path, sdxl):
    call("spm_train", *kind[:-1], "--labels", "pickscore", "--rate", "linear", "--dtype", "bf16", "--steps", 2, "--out", tmp_path / "a")
    rows = log_of(tmp_path / "a")
    assert rows[1]["lr"] == pytest.approx(1e-3 * 0.5) and not (tmp_path / "a/spm_step_blind").exists()
    said = call("spm_train", *kind, "--model", sdxl, "--vae", sdxl, "--resolution", 32, "--steps", 1, "--out", tmp_path / "b")
    assert said.startswith("settings of sdxl ") and json.loads((tmp_path / "b/config.json").read_text())["labels"] == "pickscore"
    assert len(log_of(tmp_path / "b")) == 1 and (tmp_path / "b/results.json").exists()
    with pytest.raises(InputError, match="labels"):
        call("spm_train", *kind, "--labels", "mine", "--out", tmp_path / "c")
