"""spm_train.py: data, inputs of the SPM, the run and what it leaves behind."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import spm_train
from conftest import assert_close, seeded
from diffusion import encode_empty, encode_prompts, load_clip, load_pipeline
from helpers import PROMPTS, call, log_of, shell
from spm_train import Dataset, SPMConfig, load_pairs, predicted_pixels, relabel
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


@pytest.fixture
def kind(sd, pickscore, pairs):
    """The options of a short run but its folder."""
    return ("--model", sd, "--pickscore", pickscore, "--pairs", pairs, "--dtype", "fp32", "--steps", 5, "--batch", 6, "--micro_batch", 4,
            "--validation", 5, "--warmup", 2, "--lr", 1e-3, "--save_every", 2, "--step_blind")


def test_pairs_are_read(pairs):
    images, captions, label, weight = load_pairs(SPMConfig(pairs=str(pairs)), side=16)
    assert images.shape == (20, 2, 3, 16, 16) and images.dtype == torch.uint8 and captions[15] == PROMPTS[1]
    assert label.tolist() == [1, 0, 0.5, 1] * 5 and weight.tolist() == pytest.approx([1 / 15] * 15 + [1] * 5)
    first = np.asarray(Image.open(pairs / "3-0.png").crop((0, 2, 16, 18)))       # 16 x 20: no resizing, the middle
    assert np.array_equal(images[3, 0].permute(1, 2, 0).numpy(), first)


@pytest.mark.parametrize("row, says", [
    ("{", "pairs.jsonl"), ("", "holds no pairs"), ('{"caption": "x"}', "line 1 lacks image_0, image_1, label_0"), ("[]", "line 1 lacks"),
    ('{"caption": "x", "image_0": "no.png", "image_1": "no.png", "label_0": 1}', "no.png")])
def test_pairs_that_are_wrong(tmp_path, row, says):
    (tmp_path / "pairs.jsonl").write_text(row)
    with pytest.raises(InputError, match=says) as caught:
        load_pairs(SPMConfig(pairs=str(tmp_path)), 16)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="pairs.jsonl"):
        load_pairs(SPMConfig(pairs=str(tmp_path / "nowhere")), 16)
    with pytest.raises(InputError, match="--pairs"):
        load_pairs(SPMConfig(model="sd15"), 16)


def test_both_pictures_of_a_pair_get_the_same_noise(sd):
    """Equal pictures stay equal, at every t; another pair, step or seed gets other noise."""
    pipe = load_pipeline(str(sd))
    mean = torch.randn(1, 1, 4, 8, 8, generator=seeded(0)).expand(3, 2, 4, 8, 8)
    data = Dataset(mean, torch.zeros_like(mean), PROMPTS[:3], torch.ones(3), torch.ones(3))
    cond, t = encode_prompts(pipe, [PROMPTS[0]] * 3), torch.tensor([500, 500, 900])
    see = lambda *key: predicted_pixels(pipe, data, [0, 1, 2], t, cond, encode_empty(pipe), 5.0, key, 16)
    pixels = see(0, "noise", 0).unflatten(0, (3, 2))
    assert_close(pixels[:, 0], pixels[:, 1]) and torch.equal(see(0, "noise", 0), see(0, "noise", 0))
    assert (pixels[0] - pixels[1]).abs().max() > 0.1
    for other in ((0, "noise", 1), (1, "noise", 0), (0, "report", 0)):
        assert (see(*other).unflatten(0, (3, 2)) - pixels).abs().amax((1, 2, 3, 4)).min() > 0.1


def test_pixels_by_hand(sd):
    """Encode, add that pair's noise at t, predict x0 under guidance, decode: with diffusers' networks and scheduler."""
    from diffusers import StableDiffusionPipeline

    from clip_spm import preprocess_decoded
    from training import generator
    pipe, theirs = load_pipeline(str(sd)), StableDiffusionPipeline.from_pretrained(sd)
    images = torch.randint(0, 256, (2, 2, 3, 16, 16), generator=seeded(1)).byte()
    data = spm_train.encode_dataset(pipe, images, PROMPTS[:2], torch.ones(2), torch.ones(2), chunk=3)
    t = torch.tensor([251, 777])
    ours = predicted_pixels(pipe, data, [0, 1], t, encode_prompts(pipe, PROMPTS[:2]), encode_empty(pipe), 5.0, (0, "noise", 4), 16)
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
                assert_close(ours[2 * i + side][None], preprocess_decoded(picture, 16, clamp_first=True), 1e-4)


def test_relabelling_by_pickscore(pickscore, pairs, sd):
    """Softmax over the pair; closer than 0.1 is a tie."""
    from clip_spm import preprocess_decoded
    clip, pipe = load_clip(str(pickscore)), load_pipeline(str(sd))
    clip.logit_scale.data.fill_(1.0)            # so that no softmax is saturated
    images, captions, *_ = load_pairs(SPMConfig(pairs=str(pairs)), 16)
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


def assert_same_models(a, b, tolerance: float = 0.0) -> None:
    """Both folders hold the same two judges."""
    for name in ("spm", "spm_step_blind"):
        ours, theirs = (load_file(f / name / "model.safetensors") for f in (a, b))
        for key, value in ours.items():
            assert (value - theirs[key]).abs().max() <= tolerance * max(1, float(value.abs().max())), key


def test_stopped_and_continued_is_the_same_run(kind, tmp_path, monkeypatch):
    """A signal in step 3 saves after it; the same command again ends where an undisturbed run ends, bit for bit."""
    call("spm_train", *kind, "--out", tmp_path / "whole")
    plain = spm_train.Run.log

    def log(self, record):
        plain(self, record)
        self.stop = record["step"] == 3

    with monkeypatch.context() as patch:
        patch.setattr(spm_train.Run, "log", log)
        call("spm_train", *kind, "--out", tmp_path / "parts")
    assert len(log_of(tmp_path / "parts")) == 3 and not (tmp_path / "parts/results.json").exists()
    assert "starting at step 3" in call("spm_train", *kind, "--out", tmp_path / "parts")
    assert_same_models(tmp_path / "parts", tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert (tmp_path / "parts/results.json").read_text() == (tmp_path / "whole/results.json").read_text()


def test_two_processes_train_what_one_trains(kind, tmp_path):
    """Sharded optimizer state, shares of 3 and 3 pairs of which micro batches hold 4 and 2."""
    words = ("tests/gentle.py", "spm_train.py", *kind, "--device", "cpu")
    shell(*words, "--out", tmp_path / "one")
    shell(*words, "--out", tmp_path / "two", "--micro_batch", 2, processes=2)
    assert_same_models(tmp_path / "one", tmp_path / "two", 1e-5)
    shell(*words, "--out", tmp_path / "two", processes=2)       # resumes; nothing left to do
    assert_same_models(tmp_path / "one", tmp_path / "two", 1e-5)


def test_the_other_options_run(kind, tmp_path, sdxl):
    call("spm_train", *kind[:-1], "--labels", "pickscore", "--decay", "--dtype", "bf16", "--steps", 2, "--out", tmp_path / "a")
    rows = log_of(tmp_path / "a")
    assert rows[1]["lr"] == pytest.approx(1e-3 * 0.5) and not (tmp_path / "a/spm_step_blind").exists()
    call("spm_train", *kind, "--model", sdxl, "--resolution", 32, "--steps", 1, "--out", tmp_path / "b")
    assert len(log_of(tmp_path / "b")) == 1 and (tmp_path / "b/results.json").exists()
    with pytest.raises(InputError, match="labels"):
        call("spm_train", *kind, "--labels", "mine", "--out", tmp_path / "c")
