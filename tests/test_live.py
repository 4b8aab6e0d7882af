"""What stands around a training: trackers, the page that follows it, and the model card (tracking.py, report.py, card.py)."""
import json
import os
import re
import signal
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from huggingface_hub import ModelCard

import card
import report
import spo_train
import tracking
import training
from conftest import seeded
from diffusion import generate, to_pil
from helpers import PROMPTS, call, command, log_of
from loading import TINY, load_pipeline
from metrics import load_metric
from training import permutation
from weights import InputError

BASE = ("--dtype", "fp32", "--steps", 4, "--k", 2, "--prompts_per_round", 3, "--pairs_per_step", 4, "--threshold", 0, "--lr", 1e-2, "--save_every", 1)
SHOWN = [PROMPTS[i] for i in permutation(len(PROMPTS), 0, "preview")]


@pytest.fixture
def words(small, spm, prompts):
    """A training of seconds."""
    return ("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, *BASE)


@pytest.fixture
def judging():
    """A training of the tiny judge, of seconds."""
    return ("spm_train", "--steps", 3, "--count", 16, "--validation", 4, "--batch", 4, "--micro_batch", 4, "--step_blind", "false", "--save_every", 1)


def stopped(words, monkeypatch, done: int) -> None:
    """The same run, which a SIGTERM ends after `done` rounds or steps."""
    real = training.Run.log

    def log(run, record):
        real(run, record)
        if len(run.read_log()) == done:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Run, "log", log)
        call(*words)


# --track

@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("script", ["spo_train", "baselines", "spm_train"])
def test_a_missing_tracker_is_one_line_before_anything_is_loaded(script, name, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tracking.MODULES[name], None)
    own = dict(spo_train=("--prompts", prompts), baselines=("--prompts", prompts, "--method", "ddpo"), spm_train=())[script]
    done = command(script, "--model", tmp_path / "nowhere", *own, "--track", name, "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"pip install {name}" in done.stderr
    assert not (tmp_path / "run").exists()


def test_numbers_by_hand():
    record = dict(round=2, loss=0.5, score=None, name="x", seconds=dict(sampling=1.5, training=2.0))
    assert tracking.numbers(record) == {"round": 2, "loss": 0.5, "seconds/sampling": 1.5, "seconds/training": 2.0}


class Writer:
    """What TensorBoard's writer is told."""
    told: list = []

    def __init__(self, folder, purge_step):
        self.told.append(("open", os.path.basename(folder), purge_step))

    def add_text(self, name, text, step):
        self.told.append((name, json.loads(text.strip("`json\n")), step))

    def add_scalar(self, name, value, step):
        self.told.append((name, value, step))

    def add_image(self, name, pixels, step, dataformats):
        assert dataformats == "HWC" and pixels.shape[2] == 3
        self.told.append((name, pixels.shape, step))

    def flush(self):
        pass

    def close(self):
        self.told.append("close")


class Wandb(ModuleType):
    """What wandb is told."""

    def __init__(self):
        super().__init__("wandb")
        self.told, self.Image = [], lambda path, caption: (os.path.basename(path), caption)

    def init(self, **settings):
        self.told.append(settings)
        return SimpleNamespace(log=lambda found, step: self.told.append((step, found)), finish=lambda: self.told.append("finish"))


def test_tensorboard_is_told_the_log_the_grids_and_the_configuration(words, tmp_path, monkeypatch):
    """Stopped and resumed, it goes on with the same steps; the training is what it is without."""
    monkeypatch.setitem(sys.modules, tracking.MODULES["tensorboard"], SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Writer, "told", [])
    words = (*words, "--grid_every", 2, "--rounds", 3)
    call(*words, "--out", tmp_path / "plain")
    assert not Writer.told
    tracked = (*words, "--track", "tensorboard", "--out", tmp_path / "run")
    stopped(tracked, monkeypatch, 1)
    assert Writer.told[-1] == "close"
    first = len(Writer.told)
    call(*tracked)
    told = Writer.told
    assert told[0] == ("open", "tensorboard", 1) and told[first] == ("open", "tensorboard", 2) and told[-1] == "close"
    assert told[1][0] == "configuration" and told[1][1]["lr"] == 1e-2
    assert [entry[2] for entry in told if entry[0] == "samples"] == [0, 2, 3]
    rows = log_of(tmp_path / "run")
    assert [entry[1:] for entry in told if entry[0] == "loss"] == [(pytest.approx(row["loss"], rel=1e-4), i + 1) for i, row in enumerate(rows)]
    measured = [entry[2] for entry in told if entry[0] == "validation_score"]
    assert measured == [0, 2, 3] and any(entry[0] == "seconds/sampling" for entry in told)
    assert rows == log_of(tmp_path / "plain")
    for name in ("pytorch_lora_weights.safetensors", "samples-00003.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_wandb_is_told_the_same_and_knows_a_resumed_run(words, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    words = (*words, "--grid_every", 2, "--rounds", 2, "--track", "wandb", "--out", tmp_path / "run")
    stopped(words, monkeypatch, 1)
    call(*words)
    starts = [told for told in wandb.told if isinstance(told, dict)]
    assert len(starts) == 2 and starts[0] == starts[1] and starts[0]["id"] and starts[0]["config"]["k"] == 2 and starts[0]["name"] == "run"
    steps = [told for told in wandb.told if isinstance(told, tuple)]
    assert [step for step, _ in steps] == [0, 1, 2] and wandb.told.count("finish") == 2
    assert [found.get("samples") for _, found in steps] == [("samples-00000.png", "; ".join(SHOWN)), None, ("samples-00002.png", "; ".join(SHOWN))]
    # Begun anew, it is another run; one that does not start is one line.
    (tmp_path / "run").rename(tmp_path / "old")
    call(*words)
    assert wandb.told[-5]["id"] != starts[0]["id"] and wandb.told[-1] == "finish"
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    done = command(*words[:-1], tmp_path / "other")
    assert done.returncode == 2 and "WANDB_MODE=offline" in done.stderr.splitlines()[-1]


def test_the_judges_training_is_shown_too(judging, tmp_path, monkeypatch):
    """Its page and its tracker, stopped and resumed; steps instead of rounds, no pictures, advice of its own."""
    monkeypatch.setitem(sys.modules, tracking.MODULES["tensorboard"], SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Writer, "told", [])
    words, page = (*judging, "--track", "tensorboard", "--out", tmp_path / "run"), tmp_path / "run/report.html"
    mine = signal.getsignal(signal.SIGTERM)
    stopped(words, monkeypatch, 1)
    text = page.read_text(encoding="utf-8")
    assert "run: step 1 of 3" in text and "stopped" in text and "refresh" not in text and Writer.told[-1] == "close" and signal.getsignal(signal.SIGTERM) is mine
    first = len(Writer.told)
    call(*words)
    told, rows, text = Writer.told, log_of(tmp_path / "run"), page.read_text(encoding="utf-8")
    assert told[0][2] == 1 and told[first][2] == 2 and told[-1] == "close" and not any(entry[0] == "samples" for entry in told)
    assert [entry[1:] for entry in told if entry[0] == "accuracy"] == [(pytest.approx(row["accuracy"], rel=1e-4), i + 1) for i, row in enumerate(rows)]
    assert "run: step 3 of 3" in text and "finished" in text and "Unreadable pairs so far: 0." in text and "validation_score" not in text
    assert [re.search('aria-label="(.*?):', chart)[1] for chart in text.split("<svg")[1:]] == ["accuracy", "loss", "grad_norm"] and ">step<" in text


def test_the_page_is_written_anew_every_half_minute(words, tmp_path, monkeypatch):
    """Between checkpoints and grids, too."""
    assert tracking.OFTEN == 30
    monkeypatch.setattr(tracking, "OFTEN", 1e9)         # however slow the machine
    pages, real = [], tracking.write_live
    monkeypatch.setattr(tracking, "write_live", lambda folder, rows, *args: (pages.append(len(rows)), real(folder, rows, *args)))
    words = (*words, "--grid_every", 0, "--rounds", 4, "--save_every", 9)
    call(*words, "--out", tmp_path / "run")
    assert pages == [0, 4, 4]
    pages.clear()
    monkeypatch.setattr(tracking, "OFTEN", 0)
    call(*words, "--out", tmp_path / "often")
    assert pages == [0, 1, 2, 3, 4, 4]


def test_tensorboards_own_files(tmp_path):
    """The real package, where it is installed; its threads end with the run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    before = set(threading.enumerate())
    for done in (0, 1):
        tracker = tracking.TensorBoard(tmp_path, dict(lr=1), done)
        for step in range(done + 1, 4 - (done == 0)):
            tracker.log(step, dict(loss=step / 2), tmp_path / "none.png", [])
        tracker.close()
    assert set(threading.enumerate()) <= before
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 1.5)]


# The page of a training

def test_the_page_follows_a_training(words, tmp_path, monkeypatch):
    """Written from round 0 on; it loads itself again while the run goes on, not after it has stopped or ended."""
    monkeypatch.setattr(tracking, "OFTEN", 1e9)
    pages, real = [], tracking.write_live

    def keep(folder, *args):
        real(folder, *args)
        pages.append((folder / "report.html").read_text(encoding="utf-8"))
    monkeypatch.setattr(tracking, "write_live", keep)
    words = (*words, "--grid_every", 2, "--rounds", 3, "--out", tmp_path / "run")
    stopped(words, monkeypatch, 1)
    heads = [re.search("<h1>(.*)</h1>", page)[1] for page in pages]
    assert heads[0] == "run: round 0 of 3" and heads[-1] == "run: round 1 of 3"
    assert 'http-equiv="refresh"' in pages[0] and "running" in pages[0] and pages[0].count("<figcaption>the base") == 1
    assert 'http-equiv="refresh"' not in pages[-1] and "stopped" in pages[-1] and "Learning curves" in pages[-1]
    pages.clear()
    call(*words)
    assert ['http-equiv="refresh"' in page for page in pages] == [True, True, True, False] and "finished" in pages[-1]
    assert "minutes left" in pages[1] and 'value="2" max="3"' in pages[1] and "after round 2</figcaption>" in pages[1]
    rows = log_of(tmp_path / "run")
    for words in (f"validation_score {rows[-1]['validation_score']:.4g}, {rows[0]['validation_score_at_start']:.4g} at the start", "valid_share", "ratio_win"):
        assert words in pages[-1]
    assert "src=\"data:image/jpeg" in pages[-1] and "http://" not in pages[-1] and "https://" not in pages[-1]


def test_a_signal_while_pictures_are_drawn_leaves_nothing_behind(words, tmp_path, monkeypatch):
    """The page says that it stopped, the tracker is closed, the signals are the caller's again, before the process leaves."""
    monkeypatch.setitem(sys.modules, tracking.MODULES["tensorboard"], SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Writer, "told", [])
    mine, seen, leave = signal.getsignal(signal.SIGTERM), [], tracking.Rounds.leave

    def leaving(rounds):
        seen.append((signal.getsignal(signal.SIGTERM), Writer.told[-1], (tmp_path / "run/report.html").read_text(encoding="utf-8")))
        leave(rounds)
    monkeypatch.setattr(tracking.Rounds, "leave", leaving)
    monkeypatch.setattr(spo_train, "sample_pools", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        call(*words, "--rounds", 2, "--grid_every", 0, "--track", "tensorboard", "--out", tmp_path / "run")
    [(handler, last, page)] = seen
    assert caught.value.code == 143 and handler is mine and last == "close" and "stopped" in page and "refresh" not in page


def test_advice_by_hand():
    """Newest values, each from the last round that has one; what a method does not log is left out."""
    rows = [dict(round=1, validation_score=1.0, validation_score_at_start=0.5, ratio_win=1.0, ratio_lose=None),
            dict(round=2, ratio_win=1.25, ratio_lose=0.75, margin=None)]
    assert [words.split(":")[0] for words in report.advice(rows, dict(beta=10.0))] == ["validation_score 1, 0.5 at the start", "ratio_win 1.25, ratio_lose 0.75"]
    assert report.advice([], {}) == []
    assert [report.time_left(minutes) for minutes in (0.2, 99, 100, 1500)] == ["about 0 minutes", "about 99 minutes", "about 1.7 hours", "about 25.0 hours"]


def test_the_page_without_pictures_or_with_a_strange_name(tmp_path):
    folder = tmp_path / "a <b> & c"
    folder.mkdir()
    report.write_live(folder, [dict(round=1, score=1.0, eta_minutes=None)], 2, "round", True, dict(model="<x>"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; &amp; c: round 1 of 2" in page and "<x>" not in page and "<figure class=\"sheet\">" not in page and "What to watch" not in page


def test_a_long_curve_is_thinned():
    """401 points to 134: means of three neighbours, each at their last x; the last of two. 200 points stay."""
    line = report.thinned([(x, float(x)) for x in range(1, 402)])
    assert len(line) == 134 and line[:2] == [(3, 2.0), (6, 5.0)] and line[-1] == (401, 400.5)
    short = [(x, float(x)) for x in range(200)]
    assert report.thinned(short) == short


def test_the_first_point_of_the_curve_is_the_base():
    drawn = report.learning_curves({"run": [dict(round=1, validation_score_at_start=1.0), dict(round=2, validation_score=3.0)]})
    assert drawn.count("<polyline") == 1 and ">0</text>" in drawn and ">2</text>" in drawn


# The model card

@pytest.fixture
def trained(words, tmp_path):
    """A run's folder."""
    call(*words, "--grid_every", 1, "--rounds", 2, "--out", tmp_path / "my run")
    return tmp_path / "my run"


def test_the_card_of_a_run(trained, small):
    """Metadata that the Hub reads, pictures that are there, numbers of the log, no path of this machine; diffusers opens the folder."""
    page = ModelCard.load(trained / "README.md")
    data, rows = page.data, log_of(trained)
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image" and data.tags == ["text-to-image", "lora", "spo", "diffusers"]
    assert data.get("inference") == dict(parameters=dict(guidance_scale=5.0, num_inference_steps=4)) and data.base_model is None and data.license is None
    assert re.findall(r"!\[.*\]\((.*)\)", page.text) == ["samples-00000.png", "samples-00002.png"]
    for words in (f"| 0 | {rows[0]['validation_score_at_start']:.4f} |", f"| 2 | {rows[1]['validation_score']:.4f} |", "strength_model 1", "<lora:lora_kohya:1>",
                  "guidance_scale=5,", "| k | 2 |", "| prompts | prompts.txt |", "FOLDER/OF/small", "`best/` holds"):
        assert words in page.text, words
    assert str(small.parent) not in str(page) and str(trained.parent) not in str(page)
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(small)
    pipe.set_progress_bar_config(disable=True)

    def drawn():
        return pipe(PROMPTS[0], num_inference_steps=2, generator=seeded(0), output_type="np").images

    before = drawn()
    pipe.load_lora_weights(trained)
    assert abs(drawn() - before).max() > 1e-4


@pytest.mark.parametrize("model, base, license", [
    ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
    ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "openrail++"),
    ("someone/finetune", "someone/finetune", None), ("/home/me/models/mine", None, None), ("tiny", None, None)])
def test_base_and_licence(model, base, license, tmp_path):
    """Known where the model is on the Hub; a path is not told."""
    (tmp_path / "config.json").write_text(json.dumps(dict(model=model, steps=20, guidance_scale=5.0, prompts="/home/me/p.txt")))
    (tmp_path / "log.jsonl").write_text('{"round": 1, "validation_score": null}\n')
    card.write_card(tmp_path)
    page = ModelCard.load(tmp_path / "README.md")
    assert (page.data.base_model, page.data.license, page.data.get("base_model_relation")) == (base, license, base and "adapter")
    assert "/home/me" not in str(page) and f'from_pretrained("{base or ("tiny/model" if model == "tiny" else "FOLDER/OF/mine")}"' in page.text
    assert ("not on the Hub" in page.text) == (base is None) and ("ComfyUI and A1111 do not know it" in page.text) == (model == "tiny") and "`best/`" not in page.text


def test_the_card_tells_evaluations_and_stays_its_owners(trained):
    """card.py adds what lies below; damaged results are passed over; an edited page without the mark stays."""
    found = dict(protocol={}, metrics=dict(pickscore="f"), scores=dict(base=dict(pickscore=[1.0, 2.0]), spo=dict(pickscore=[2.0, 3.0])), groups={},
                 results=dict(base=dict(pickscore=dict(mean=1.5, n=2)), spo=dict(pickscore=dict(mean=2.5, n=2, win_rate_interval=[0.6, 1.0]))))
    for name, text in (("evaluation", json.dumps(found)), ("damaged", "{"), ("other", "[]")):
        (trained / name).mkdir()
        (trained / name / "results.json").write_text(text)
    done = command("card", trained)
    assert done.returncode == 0 and "hf upload OWNER/NAME" in done.stdout
    text = (trained / "README.md").read_text()
    assert "- evaluation: spo is better than base in 2 of 2 pictures by pickscore (1.500 to 2.500)." in text and "damaged:" not in text
    (trained / "README.md").write_text("mine")
    assert command("card", trained).returncode == 0 and (trained / "README.md").read_text() == "mine"


def test_card_refuses_what_is_no_training(tmp_path):
    assert command("card", tmp_path).returncode == 2
    (tmp_path / "config.json").write_text('{"model": "tiny"}')
    done = command("card", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "README.md").exists()
    with pytest.raises(InputError, match="not the folder of a training"):
        card.write_card(tmp_path)


def test_tiny_is_also_judged_by_its_pickscore(tmp_path):
    """By hand for the base: the pictures of the fixed prompts, scored as evaluate.py scores them; the training is what it is without."""
    words = ("spo_train", "--rounds", 1, "--steps", 4, "--k", 2, "--prompts_per_round", 2, "--pairs_per_step", 4)
    call(*words, "--grid_every", 1, "--out", tmp_path / "run")
    call(*words, "--grid_every", 0, "--out", tmp_path / "plain")
    [row], [plain] = log_of(tmp_path / "run"), log_of(tmp_path / "plain")
    assert {k: v for k, v in row.items() if "validation" not in k} == plain and "validation_pickscore" in row
    file = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    pipe, texts = load_pipeline("tiny"), (TINY / "train_prompts.txt").read_text().splitlines()
    some = [texts[i] for i in permutation(len(texts), 0, "preview")[:16]]
    images = generate(pipe, some, list(range(16)), steps=4, guidance_scale=3.0)
    scores = load_metric("pickscore", "tiny", pipe.tokenizers[0], pipe.device).score(to_pil(images), some)
    assert row["validation_pickscore_at_start"] == pytest.approx(float(sum(scores)) / 16, rel=1e-3)


def test_the_demo_leaves_at_least_four_grids():
    preset = spo_train.PRESETS["tiny"]
    assert preset["rounds"] // preset["grid_every"] + 1 >= 4
