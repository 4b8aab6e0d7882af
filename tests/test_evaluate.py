"""evaluate.py and metrics.py: the numbers against scipy, the run end to end, and the tiny world's ground truth."""
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import lora
import metrics
from conftest import seeded
from diffusion import generate, to_pil
from finetune import load_model
from loading import NAMES, load_pipeline
from evaluate import compare
from helpers import PROMPTS, call, taken, together
from metrics import load_metric
from tiny import world
from report import data_uri
from weights import InputError


# The numbers

def test_compare_against_scipy():
    x, y = np.random.default_rng(1).normal(0.3, 1, 80), np.random.default_rng(2).normal(0, 1, 80)
    got = compare(x.tolist(), y.tolist())
    assert got["mean"] == pytest.approx(x.mean()) and got["standard_error"] == pytest.approx(scipy.stats.sem(x)) and got["n"] == 80
    assert got["difference"] == pytest.approx((x - y).mean())
    assert got["difference"] / got["difference_standard_error"] == pytest.approx(scipy.stats.ttest_rel(x, y).statistic)
    assert got["win_rate"] == pytest.approx((x > y).mean())
    low, high = scipy.stats.binomtest(int((x > y).sum()), 80).proportion_ci()
    assert got["win_rate_interval"] == pytest.approx([low, high], abs=0.03)


def test_win_rate_by_hand():
    """Two wins, a loss, a tie: 2.5 of 4."""
    got = compare([2.0, 3.0, 1.0, 5.0], [1.0, 2.0, 2.0, 5.0])
    assert got["win_rate"] == 0.625 and got["difference"] == 0.25
    same = compare([1.0, 2.0], [1.0, 2.0])
    assert same["win_rate"] == 0.5 and same["win_rate_interval"] == [0.5, 0.5] and same["difference_standard_error"] == 0
    alone = compare([3.0], [1.0])
    assert alone["win_rate"] == 1.0 and alone["standard_error"] is alone["difference_standard_error"] is alone["win_rate_interval"] is None


def test_pictures_of_one_prompt_are_not_independent():
    """Every score four times, as four pictures of its prompt, says no more; and errors are those of the prompts' means."""
    x, y = (np.random.default_rng(i).normal(0.2 * i, 1, 24) for i in (2, 1))
    once, often = compare(x.tolist(), y.tolist()), compare(np.repeat(x, 4).tolist(), np.repeat(y, 4).tolist(), each=4)
    assert once.pop("n") == 24 and often.pop("n") == 96
    assert once == {k: pytest.approx(v, abs=1e-12) for k, v in often.items()}
    pair = compare(x.tolist(), y.tolist(), each=2)
    assert pair["standard_error"] == pytest.approx(scipy.stats.sem(x.reshape(-1, 2).mean(1))) and pair["prompts"] == 12
    assert pair["difference_standard_error"] == pytest.approx(scipy.stats.sem((x - y).reshape(-1, 2).mean(1)))


def test_groups_count_alike_however_large():
    """Accuracies 1 of three and 1/2 of one tag: 3/4, not the pictures' 7/8; the error is that of a mean of two independent means."""
    x, groups = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0], ["a"] * 4 + ["b"] * 2
    got = compare(x, [0.0] * 6, groups=groups)
    assert got["mean"] == got["win_rate"] - 0.125 == 0.75 and got["difference"] == 0.75
    assert got["standard_error"] == pytest.approx(scipy.stats.sem([0.0, 1.0]) / 2)


# End to end

@pytest.fixture
def trained(small, tmp_path):
    """Two different LoRA files."""
    unet, files = load_pipeline(str(small)).unet, []
    lora.add(unet, 2)
    for i in range(2):
        with torch.no_grad():
            for layer in lora.layers(unet).values():
                layer.lora_B.weight.normal_(0, 0.5, generator=seeded(i))
        files.append(tmp_path / f"{i}.safetensors")
        save_file(lora.state(unet), files[-1])
    return files


@pytest.fixture
def kind(small, prompts, tmp_path, monkeypatch, pickscore_metric):
    """The options of a quick evaluation but its candidates; PickScore is the random one."""
    monkeypatch.setattr(evaluate, "load_metric", pickscore_metric)
    monkeypatch.setattr(evaluate, "find_metric", lambda *_: None)
    return ("--model", small, "--prompts", prompts, "--dtype", "fp32", "--steps", 2, "--batch", 3, "--out", tmp_path / "e",
            "--metrics", "aesthetics", "pickscore")


@pytest.fixture
def pickscore_metric(pickscore):
    """load_metric with the random PickScore."""
    return lambda name, model, tokenizer, device: (
        metrics.pickscore(str(pickscore), tokenizer, device) if name == "pickscore" else load_metric(name, model, tokenizer, device))


def test_evaluation_end_to_end(kind, trained, tmp_path, small, pickscore):
    out = tmp_path / "e"
    said = call("evaluate", *kind, "--lora", "base=", f"spo={trained[0]}", "--images_per_prompt", 2, "--limit", 3)
    report = json.loads((out / "results.json").read_text())
    assert report["protocol"]["steps"] == 2 and report["protocol"]["sampler"] == "DDIM, eta 0.0" and report["protocol"]["resolution"] == 16
    assert report["protocol"]["prompts"] == 3 and set(report["metrics"]) == {"aesthetics", "pickscore"}
    for name in ("base", "spo"):
        files = sorted((out / "images" / name).iterdir())
        assert [f.name for f in files] == [f"{i:05d}.png" for i in range(6)]
        for metric in ("aesthetics", "pickscore"):
            want = compare(report["scores"][name][metric], report["scores"]["base"][metric], each=2)
            assert report["results"][name][metric] == want and want["n"] == 6
    # Picture 3 is the second prompt from seed 3; its scores are the metrics of what is on disk.
    pipe = load_pipeline(str(small))
    image = to_pil(generate(pipe, [PROMPTS[1]], [3], steps=2))[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(evaluate.Image.open(out / "images/base/00003.png"))).max() <= 1
    pictures = evaluate.load_images([out / "images/spo" / f"{i:05d}.png" for i in range(6)])
    assert report["scores"]["spo"]["aesthetics"] == pytest.approx(world.aesthetics(pictures).tolist(), abs=1e-5)
    metric = metrics.pickscore(str(pickscore), pipe.tokenizers[0], torch.device("cpu"))
    assert report["scores"]["spo"]["pickscore"] == pytest.approx(metric.score(to_pil(pictures), [p for p in PROMPTS[:3] for _ in "ab"]).tolist(), abs=1e-3)
    assert report["scores"]["spo"]["pickscore"] != report["scores"]["base"]["pickscore"]
    text = (out / "results.md").read_text()
    assert text.startswith("| model | aesthetics | win rate | pickscore | win rate |") and "| spo |" in text and "guidance_scale 5.0" in said
    with Image.open(out / "grid.png") as grid:                  # two rows of six pictures, labelled
        assert grid.width == 64 + 6 * 20 + 4 and grid.height > 2 * 20 + 4


def test_pictures_are_drawn_once(kind, trained, tmp_path):
    """Continue after a stop, add a candidate later; what is there stays."""
    folder = tmp_path / "e/images"
    call("evaluate", *kind, "--lora", "base=")
    for file in (folder / "base").iterdir():
        os.utime(file, (0, 0))                  # some file systems count whole seconds
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in (folder / "base").iterdir()}
    lost = folder / "base/00004.png"
    lost.unlink()
    call("evaluate", *kind, "--lora", "base=", f"spo={trained[0]}", "--batch", 2)
    assert len(before) == 7 and all((f.stat().st_mtime_ns == t) == (f != lost) for f, (t, _) in before.items())
    assert lost.read_bytes() == before[lost][1] and len(list((folder / "spo").iterdir())) == 7


def changed(pipe):
    """The same model after somebody has trained its text encoder on."""
    pipe.text_encoders[0].text_model.final_layer_norm.bias[0] += 1e-3
    return pipe


def test_folder_of_another_evaluation_is_refused(kind, trained, tmp_path, prompts, monkeypatch):
    call("evaluate", *kind, "--lora", "base=", f"spo={trained[0]}")
    report = (tmp_path / "e/results.json").read_bytes()
    for words, says in ((("--lora", "base=", f"spo={trained[1]}"), "another LoRA file"), (("--steps", 3), "another steps"),
                        (("--eta", 1), "another sampler"), (("--limit", 2), "another prompts"), (("--seed", 1), "another seed"),
                        (("--vae", tmp_path / "vae"), "another vae"), (("--negative", "zeros"), "another negative"),
                        (("--prediction_type", "v_prediction"), "another prediction_type")):
        (tmp_path / "vae").exists() or evaluate.Path(tmp_path / "vae").symlink_to(kind[1] / "vae")
        with pytest.raises(InputError, match=says):
            call("evaluate", *kind, *words)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_model", lambda *a: changed(load_model(*a)))
        with pytest.raises(InputError, match="another base"):
            call("evaluate", *kind)
    prompts.write_text("\n".join(reversed(PROMPTS)))
    with pytest.raises(InputError, match="prompts_sha256"):
        call("evaluate", *kind)
    for damage in ("{", "[]", "{}", '{"lora": 3}'):
        (tmp_path / "e/protocol.json").write_text(damage)
        with pytest.raises(InputError, match="e/protocol.json: not "):
            call("evaluate", *kind)
    assert (tmp_path / "e/results.json").read_bytes() == report


@pytest.fixture
def other_unet(small, tmp_path):
    """A folder like Diffusion-DPO's release: unet/ with weights of its own, no configuration."""
    weights = load_file(small / "unet/diffusion_pytorch_model.safetensors")
    (tmp_path / "dpo/unet").mkdir(parents=True)
    save_file({k: v * 1.1 for k, v in weights.items()}, tmp_path / "dpo/unet/diffusion_pytorch_model.safetensors")
    return tmp_path / "dpo"


def test_what_is_wrong_is_said_before_anything_is_drawn(kind, trained, tmp_path, monkeypatch):
    """A LoRA of another model in second place; a metric of which the weights or the prompts do not fit."""
    weights = load_file(trained[0])
    save_file({k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in weights.items()}, tmp_path / "foreign.safetensors")
    monkeypatch.setattr(evaluate, "load_metric", load_metric)
    monkeypatch.setattr(evaluate, "find_metric", metrics.find_metric)
    for words, says in ((("--lora", "base=", f"spo={tmp_path / 'foreign.safetensors'}", "--metrics", "aesthetics"), "foreign.safetensors"),
                        (("--metrics", "aesthetics", f"aesthetic-v1={trained[0]},{kind[1]}"), "text_encoder|weight file"),
                        (("--metrics", "aesthetics", "pickscore"), "PickScore_v1")):
        with pytest.raises(InputError, match=says):
            call("evaluate", *kind, *words)
        assert not list((tmp_path / "e").rglob("*.png"))


def test_processes_deal_out_what_is_missing(tmp_path):
    """Pictures 0, 2, 4 and 5 are there: of 1, 3 and 6 the first process of two draws 1 and 6, not only what its turn was."""
    for i in (0, 2, 4, 5):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / f"{i:05d}.png").touch()
    todo = evaluate.undrawn({"base": ""}, 7, evaluate.Processes(0, 1, torch.device("cpu")), tmp_path)
    assert todo == {"base": [1, 3, 6]}
    drawn = []
    config = evaluate.EvaluateConfig(batch=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "wear", lambda *_: None)
        patch.setattr(evaluate, "generate_latents", lambda pipe, prompts, *_: drawn.extend(prompts))
        patch.setattr(evaluate, "decode", lambda *_: torch.zeros(1, 3, 8, 8))
        evaluate.draw_all(None, {"base": ""}, list("abcdefg"), config, evaluate.Processes(0, 2, torch.device("cpu")), tmp_path, todo)
    assert drawn == ["b", "g"]


def test_whole_unets_are_candidates(kind, trained, tmp_path, small, other_unet, monkeypatch):
    """Folder with unet/, folder, file; and the models after it are what they are without it."""
    pictures = lambda: {f: f.read_bytes() for f in sorted((tmp_path / "e/images").rglob("*.png"))}  # noqa: E731
    call("evaluate", *kind, "--lora", "base=", f"spo={trained[0]}", "--limit", 2)
    alone = pictures()
    shutil.rmtree(tmp_path / "e")
    file = other_unet / "unet/diffusion_pytorch_model.safetensors"
    call("evaluate", *kind, "--lora", f"dpo={other_unet}", f"root={other_unet / 'unet'}", f"spo={trained[0]}", f"file={file}", "base=", "--limit", 2)
    drawn = pictures()
    assert all(drawn[f] == content for f, content in alone.items()) and len(drawn) == 10
    name = lambda n: [content for f, content in drawn.items() if f.parent.name == n]  # noqa: E731
    assert name("dpo") == name("root") == name("file") and name("dpo") != name("base")
    shutil.copytree(small, tmp_path / "whole")
    shutil.copy(file, tmp_path / "whole/unet")
    image = to_pil(generate(load_pipeline(str(tmp_path / "whole")), PROMPTS[:1], [0], steps=2))[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(evaluate.Image.open(tmp_path / "e/images/dpo/00000.png"))).max() <= 1


def test_loras_with_names_of_their_own(trained, tmp_path, monkeypatch):
    """The only file of a folder, one named in a hub repository; several, or none, are named in the refusal."""
    of = lambda source: evaluate.candidates(evaluate.EvaluateConfig(lora=(f"spo={source}",)))["spo"]  # noqa: E731
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(InputError, match="holds no .safetensors file"):
        of(home)
    shutil.copy(trained[0], home / "spo_lora_diffusers.safetensors")
    assert of(home) == str(home / "spo_lora_diffusers.safetensors")
    shutil.copy(trained[1], home / "spo_lora_webui.safetensors")
    with pytest.raises(InputError, match="spo_lora_diffusers.safetensors, spo_lora_webui.safetensors; say which with .*home/FILE"):
        of(home)
    shutil.copy(trained[1], home / "pytorch_lora_weights.safetensors")
    assert of(home).endswith("pytorch_lora_weights.safetensors")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **_: home / file if repo == "owner/name" else None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns, **_: home)
    assert of("owner/name/spo_lora_webui.safetensors") == str(home / "spo_lora_webui.safetensors")
    (home / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(InputError, match="say which with owner/name/FILE"):
        of("owner/name")


def test_strengths_of_a_lora(kind, trained, tmp_path, other_unet):
    """@0 draws the base's pictures and @1 the LoRA's, byte for byte; a file whose name has an @ is meant as it is; another strength is noticed."""
    file = shutil.copy(trained[0], tmp_path / "lora@0.5")
    shutil.copy(trained[1], tmp_path / "lora")                  # not this one
    words = ("--limit", 2, "--lora", "base=", f"none={trained[0]}@0", f"half={trained[0]}@.5", f"one={trained[0]}@1", f"spo={trained[0]}")
    os.rename(file, file := tmp_path / "lora@0.5.safetensors")
    call("evaluate", *kind, *words, f"named={file}", f"more={trained[0]}@1.5", f"twice={file}@0.5")
    drawn = {home.name: [f.read_bytes() for f in sorted(home.iterdir())] for home in (tmp_path / "e/images").iterdir()}
    assert drawn["base"] == drawn["none"] and drawn["spo"] == drawn["one"] == drawn["named"] and drawn["half"] == drawn["twice"]
    assert len({str(drawn[name]) for name in ("base", "half", "spo", "more")}) == 4
    with pytest.raises(InputError, match="'half' come from another"):
        call("evaluate", *kind, "--limit", 2, "--lora", "base=", f"half={trained[0]}@0.6")
    with pytest.raises(InputError, match="whole UNet, which has no strength"):
        call("evaluate", *kind, "--limit", 2, "--lora", f"dpo={other_unet}@0.6")
    with pytest.raises(InputError, match="strong: neither an existing"):
        call("evaluate", *kind, "--limit", 2, "--lora", f"a={trained[0]}@strong")


def test_a_peft_folder_is_a_candidate(kind, tmp_path, small):
    """Where its example has it, too; and its strength, in another file, is part of what was drawn."""
    unet = load_pipeline(str(small)).unet
    lora.add(unet, 2)
    with torch.no_grad():
        for layer in lora.layers(unet).values():
            layer.lora_B.weight.normal_(0, 0.5, generator=seeded(0))
    for home in (tmp_path / "a", tmp_path / "b/unet"):
        home.mkdir(parents=True)
        save_file({k.replace("unet.", "base_model.model."): v for k, v in lora.state(unet).items()}, home / "adapter_model.safetensors")
        (home / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=1)))
    save_file(lora.state(unet), tmp_path / "c.safetensors")
    words = ("--limit", 2, "--lora", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", f"c={tmp_path / 'c.safetensors'}@0.5")
    call("evaluate", *kind, *words)
    a, b, c = ([f.read_bytes() for f in sorted((tmp_path / "e/images" / name).iterdir())] for name in "abc")
    assert a == b == c
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=2)))
    with pytest.raises(InputError, match="'a' come from another"):
        call("evaluate", *kind, *words)


def test_unets_of_another_shape_are_refused(kind, other_unet, sdxl):
    with pytest.raises(InputError, match="UNet"):
        call("evaluate", *kind, "--lora", f"dpo={sdxl}")
    weights = load_file(other_unet / "unet/diffusion_pytorch_model.safetensors")
    del weights["conv_out.bias"]
    save_file(weights, other_unet / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="1 missing .conv_out.bias"):
        call("evaluate", *kind, "--lora", f"again={other_unet}")


def test_pictures_made_elsewhere(kind, trained, tmp_path, monkeypatch):
    """The same scores as where they were drawn, without the model; the base is the first row; the counts must match."""
    call("evaluate", *kind, "--lora", "base=", f"alpha={trained[0]}")
    monkeypatch.setattr(evaluate, "load_model", None)
    elsewhere = (*kind[:-5], "--metrics", "aesthetics", "pickscore", "--images", tmp_path / "e/images", "--out", tmp_path / "f")
    said = call("evaluate", *elsewhere)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ef")
    assert one["scores"] == two["scores"] and one["results"] == two["results"] and "steps" not in two["protocol"]
    assert list(two["results"]) == ["base", "alpha"] and str(tmp_path / "e/images") in said and (tmp_path / "f/grid.png").exists()
    Image.new("RGB", (20, 20)).save(tmp_path / "e/images/alpha/00003.jpg")
    with pytest.raises(InputError, match="alpha holds 8 pictures, the prompts ask for 7"):
        call("evaluate", *elsewhere)
    (tmp_path / "e/images/alpha/00003.png").unlink()                # a JPEG of another size takes its place
    call("evaluate", *elsewhere)
    three = json.loads((tmp_path / "f/results.json").read_text())["scores"]["alpha"]["aesthetics"]
    assert [i for i in range(7) if three[i] != one["scores"]["alpha"]["aesthetics"][i]] == [3]
    (tmp_path / "e/images/alpha/00003.jpg").write_text("no picture")
    with pytest.raises(InputError, match="00003.jpg: not a readable picture"):
        call("evaluate", *elsewhere)
    for folder in (tmp_path / "none", tmp_path / "f/scores"):
        with pytest.raises(InputError, match="no such folder|holds no folder"):
            call("evaluate", *elsewhere[:-4], "--images", folder, "--out", tmp_path / "g")


def test_pictures_are_in_the_order_of_their_numbers(tmp_path):
    names = ["0.png", "1.png", "2.png", "10.png", "11.JPG", "a2.png", "a10.png", "b.webp"]
    (tmp_path / "x").mkdir()
    for name in names:
        (tmp_path / "x" / name).touch()
    assert [p.name for p in evaluate.find_images(str(tmp_path), 8)["x"]] == names


def test_pictures_of_no_model_are_scored_by_official_weights(tmp_path, prompts):
    """The tiny model's PickScore only where tiny is asked for; without network the official tokenizer is what is missing."""
    (tmp_path / "p/x").mkdir(parents=True)
    for i in range(7):
        Image.new("RGB", (64, 64), (30 * i, 0, 0)).save(tmp_path / f"p/x/{i}.png")
    words = ("--images", tmp_path / "p", "--prompts", prompts, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="--metrics pickscore: reads prompts by the tokenizer of --model or --tokenizer FOLDER, else .*stable-diffusion-v1-5"):
        call("evaluate", *words)
    with pytest.raises(InputError, match="--metrics nowhere.pt"):                        # brings its own tokenizer
        call("evaluate", *words, "--metrics", f"hpsv2=nowhere.pt,{tmp_path}")
    metric = pytest.MonkeyPatch()
    metric.setattr(metrics, "pickscore", lambda source, *_: metrics.Metric("pickscore", source, None))
    assert load_metric("pickscore", "", None, None).formula == "yuvalkirstain/PickScore_v1"
    metric.undo()
    call("evaluate", *words, "--model", "tiny", "--metrics", "pickscore")
    assert "tiny" in json.loads((tmp_path / "out/results.json").read_text())["metrics"]["pickscore"]
    call("evaluate", *words[:-1], tmp_path / "other", "--metrics", "aesthetics")         # needs no tokenizer


def test_scores_are_kept_while_pictures_prompts_and_weights_last(kind, trained, tmp_path, monkeypatch, pickscore_metric):
    seen = []

    def counted(*arguments):
        metric = pickscore_metric(*arguments)
        run = metric.score
        metric.score = lambda images, prompts: seen.extend([metric.name] * len(images)) or run(images, prompts)
        return metric

    monkeypatch.setattr(evaluate, "load_metric", counted)
    call("evaluate", *kind, "--lora", "base=")
    assert seen.count("aesthetics") == seen.count("pickscore") == 7 + 1     # and a blank picture before anything is drawn
    first = json.loads((tmp_path / "e/results.json").read_text())["scores"]["base"]
    seen.clear()
    call("evaluate", *kind, "--lora", "base=", f"spo={trained[0]}")
    again = json.loads((tmp_path / "e/results.json").read_text())["scores"]
    assert again["base"] == first and len(seen) == 14 + 2, "only the new candidate was scored"
    seen.clear()
    Image.new("RGB", (16, 16)).save(tmp_path / "e/images/spo/00000.png")
    call("evaluate", *kind, "--lora", "base=", f"spo={trained[0]}")
    assert len(seen) == 14
    seen.clear()
    monkeypatch.setattr(evaluate, "load_metric", lambda *a: dataclasses.replace(counted(*a), weights="others"))
    call("evaluate", *kind, "--lora", "base=")
    assert len(seen) == 14


def test_scoring_goes_on_where_it_was_stopped(tmp_path):
    """One of two processes, stopped twice; what the other had is not lost; a changed picture or prompt makes all anew."""
    seen, stop = [], 0
    files, prompts = [tmp_path / f"{i}.png" for i in range(7)], [str(i) for i in range(7)]
    for i, path in enumerate(files):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)

    def score(images, words):
        if len(seen) >= stop:
            raise KeyboardInterrupt
        seen.extend(words)
        return torch.tensor([float(i.getpixel((0, 0))[0]) / 3 for i in images])

    def run(limit: int, rank: int = 0, world: int = 1, digest: str = "d"):
        nonlocal stop
        seen.clear()
        stop = limit
        processes = evaluate.Processes(rank, world, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate.Processes, "union", lambda self, mine: mine)          # the other process is not there
            return evaluate.score_model(metrics.Metric("m", "f", score), "a", files, digest, prompts, 2, processes, tmp_path / "s")

    for limit, rank, count, want in ((2, 0, 1, "01"), (2, 1, 2, "13"), (0, 0, 1, ""), (2, 0, 1, "24")):
        with pytest.raises(KeyboardInterrupt):
            run(limit, rank, count)
        assert "".join(seen) == want
        if not limit:                   # the second process begins its file anew; what it held is the first one's by now
            (tmp_path / "s/a.m.part1.json").unlink()
    other = tmp_path / "s/a.m.partial.m.json"         # of a candidate called a.m.partial
    other.write_text("{}")
    got = run(9)
    other.unlink()
    assert "".join(seen) == "56" and got == pytest.approx([i / 3 for i in range(7)]) and [p.name for p in (tmp_path / "s").iterdir()] == ["a.m.json"]
    assert run(0) == got and run(9, digest="e") == got and len(seen) == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value, tmp_path):
    with pytest.raises(InputError, match="spo: draws NaN for the prompt 'second'"):
        evaluate.refuse_damaged(torch.tensor([0.0, value]).view(2, 1, 1, 1), "spo", ["first", "second"])
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    metric = metrics.Metric("m", "f", lambda images, prompts: torch.tensor([value]))
    with pytest.raises(InputError, match="m: (nan|inf) for .*0.png of spo, prompt 'second'"):
        evaluate.score_model(metric, "spo", [tmp_path / "0.png"], "d", ["second"], 2, evaluate.Processes(0, 1, torch.device("cpu")), tmp_path / "s")


def test_means_by_group(kind, tmp_path):
    """PartiPrompts' categories: each group's mean, and their unweighted mean."""
    rows = ["Prompt\tCategory", "a red circle\tSingles", "two blue squares\tCounts", "three cyan crosses\tCounts"]
    (tmp_path / "p.tsv").write_text("\n".join(rows))
    call("evaluate", *kind, "--prompts", tmp_path / "p.tsv", "--images_per_prompt", 2, "--lora", "base=")
    report = json.loads((tmp_path / "e/results.json").read_text())
    scores, got = report["scores"]["base"]["aesthetics"], report["groups"]["base"]["aesthetics"]
    assert got == pytest.approx({"Singles": np.mean(scores[:2]), "Counts": np.mean(scores[2:]), "mean": (np.mean(scores[:2]) + np.mean(scores[2:])) / 2})
    assert "| aesthetics | Singles | Counts | mean |" in (tmp_path / "e/results.md").read_text()


def test_several_sets_in_one_evaluation(kind, tmp_path):
    """Figure 6 of the paper: so many of each, drawn by the seed; the protocol, the tables and the study page hold both."""
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\na red circle\tSingles\ntwo blue squares\tCounts\nthree cyan crosses\tCounts\n")
    words = (*kind, "--prompts", f"{tmp_path / 'p.tsv'}:2", f"{tmp_path / 'prompts.txt'}:3", "--lora", "base=", "again=")
    call("evaluate", *words, "--study", tmp_path / "study.html", "--seed", 3)
    report = json.loads((tmp_path / "e/results.json").read_text())
    assert report["protocol"]["prompts"] == 5 and report["protocol"]["prompt_sets"].endswith("prompts.txt:3 (:N drawn by seed 3)")
    groups = {g.rpartition("/")[2] for g in report["groups"]["base"]["pickscore"]}
    assert "prompts.txt" in groups and {"p.tsv Singles", "p.tsv Counts"} & groups and len(groups) <= 4
    chosen = evaluate.join_sets(evaluate.parse_options(evaluate.EvaluateConfig, {}, list(map(str, words))).prompts, seed=3).prompts
    page = json.loads((tmp_path / "study.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert [item["prompt"] for item in page["items"]] == chosen
    with pytest.raises(InputError, match="another .*prompt"):
        call("evaluate", *words[:-4], f"{tmp_path / 'prompts.txt'}:2", "--lora", "base=", "--seed", 3)


def test_only_tiny_brings_prompts(kind, tmp_path, monkeypatch):
    """One's own checkpoint, and pictures made elsewhere, are never scored by the tiny world's captions unawares."""
    monkeypatch.setattr(evaluate, "load_model", None)
    of = lambda *words: evaluate.parse_options(evaluate.EvaluateConfig, evaluate.PRESETS, list(map(str, words))).prompts  # noqa: E731
    assert of("--model", "tiny")[0].endswith("held_out_prompts.txt") and of("--model", "sd15") == of("--model", kind[1]) == of("--images", "x") == ()
    for words in (kind[:2], ("--images", tmp_path), ("--model", "sdxl")):
        with pytest.raises(InputError, match="--prompts: name .*only tiny brings its own"):
            call("evaluate", *words, "--out", tmp_path / "e")


@pytest.mark.parametrize("words, says", [
    (("--lora", "base=", "x=no/where.safetensors"), "--lora no/where.safetensors"), (("--metrics", "hpsv2=no/where.pt"), "--metrics no/where.pt"),
    (("--metrics", "aesthetic-v1=prompts.txt,no/clip"), "--metrics no/clip"), (("--metrics", "imagereward=prompts.txt,no/bert"), "--metrics no/bert"),
    (("--metrics", "geneval=no/detector"), "wants its own prompts"), (("--prompts", "no/where.txt"), "--prompts no/where.txt"),
    (("--prompts", "prompts.txt:8"), "has only 7 prompts"), (("--images", "no"), "--images no"), (("--images", "."), "prompts ask for 7"),
    (("--trace", "a red circle", "--spm", "no/spm"), "--spm no/spm")])
def test_what_is_missing_is_told_before_the_model_is_loaded(small, prompts, tmp_path, monkeypatch, words, says):
    """By the option that names it; where the metrics are to be had."""
    monkeypatch.setattr(evaluate, "load_model", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        call("evaluate", "--model", small, "--prompts", "prompts.txt", "--metrics", "aesthetics", "--out", "e", *words)
    assert says in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "e").exists()


def test_two_evaluations_never_share_a_folder(kind, tmp_path, monkeypatch):
    """Drawing, --prompt too: another process's folder is refused before the model is loaded."""
    monkeypatch.setattr(evaluate, "load_model", None)
    with taken(tmp_path / "e"):
        for words in ((), ("--prompt", "a red circle")):
            with pytest.raises(InputError, match="e: another process is at work in it"):
                call("evaluate", *kind, *words)


def test_the_grid_is_of_a_sensible_size(tmp_path):
    """Pictures of over 512 pixels a side become tiles; smaller ones stay as they are."""
    Image.new("RGB", (2048, 1024), "red").save(tmp_path / "a.png")
    Image.new("RGB", (2048, 2048), "blue").save(tmp_path / "b.png")
    pictures = evaluate.load_images([tmp_path / "a.png", tmp_path / "b.png"])
    assert pictures.shape == (2, 3, 256, 512) and pictures[:, :, 9, 9].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_exif_turns_what_is_shown(tmp_path):
    """In the grid, the report and the study; damaged EXIF turns nothing."""
    picture, exif = Image.new("RGB", (16, 32), "red"), Image.Exif()
    picture.paste((0, 0, 255), (0, 16, 16, 32))
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    picture.save(tmp_path / "b.png", exif=b"Exif\0\0no TIFF!")
    grid = evaluate.load_images([tmp_path / "a.png", tmp_path / "b.png"])
    assert grid.shape == (2, 3, 32, 16) and torch.equal(grid[0], grid[1])
    assert data_uri(Image.open(tmp_path / "a.png")) == data_uri(Image.open(tmp_path / "b.png")) == data_uri(picture)


def test_pipes_are_no_pictures(tmp_path):
    (tmp_path / "x").mkdir()
    os.mkfifo(tmp_path / "x/0.png")
    with pytest.raises(InputError, match="x holds 0 pictures"):
        evaluate.find_images(str(tmp_path), 1)


def test_a_unet_for_another_noise_process_is_no_candidate(kind, other_unet, tmp_path):
    """Its folder's scheduler is asked, wherever in it the weights are pointed at."""
    scheduler = json.loads((kind[1] / "scheduler/scheduler_config.json").read_text())
    (other_unet / "scheduler").mkdir()
    for change, says in ((dict(prediction_type="v_prediction"), "made for v_prediction"), (dict(beta_end=0.02), "other betas"),
                         (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler")):
        (other_unet / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | change))
        for source in (other_unet, other_unet / "unet", other_unet / "unet/diffusion_pytorch_model.safetensors"):
            with pytest.raises(InputError, match=says):
                call("evaluate", *kind, "--lora", f"x={source}")
    shutil.copytree(other_unet, tmp_path / "blobs")
    for file in [file for file in other_unet.rglob("*") if file.is_file()]:         # as in the hub's cache
        file.unlink()
        file.symlink_to((tmp_path / "blobs" / file.relative_to(other_unet)).rename(tmp_path / f"blobs/{file.parent.name}-{file.name}"))
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler"):
        call("evaluate", *kind, "--lora", f"x={other_unet}")
    (other_unet / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    call("evaluate", *kind, "--lora", f"x={other_unet}", "--limit", 1)


def test_a_text_encoder_is_no_pickscore(kind, monkeypatch):
    monkeypatch.setattr(evaluate, "load_metric", load_metric)
    with pytest.raises(InputError, match="text_encoder: a text encoder, without eyes"):
        call("evaluate", *kind, "--metrics", f"pickscore={kind[1] / 'text_encoder'}", "--limit", 1)


def test_one_prompt_leaves_errors_undefined(kind, tmp_path):
    """Valid JSON, and blanks in the table and in the report."""
    call("evaluate", *kind, "--limit", 1, "--lora", "base=", "again=")
    report = json.loads((tmp_path / "e/results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["results"]["again"]["aesthetics"]["standard_error"] is None
    assert "nan" not in (tmp_path / "e/results.md").read_text() and "| 50.0 % |" in (tmp_path / "e/results.md").read_text()


def test_geneval_end_to_end(kind, tmp_path, monkeypatch):
    """Six tags, their unweighted mean, and the pictures in the original's folders; the detector is made up."""
    import geneval
    import prompt_sets
    rows = [dict(tag="single_object" if i < 3 else "counting", prompt=p, include=[{"class": "cat", "count": 1}]) for i, p in enumerate(PROMPTS)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setitem(prompt_sets.SETS, "geneval", ("", [], 7))
    monkeypatch.setattr(geneval, "load_detector", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(geneval, "load_clip", lambda *_, **__: torch.nn.Linear(1, 1))
    monkeypatch.setattr(geneval, "colour_words", lambda *_: None)
    monkeypatch.setattr(geneval, "name_colours", lambda *_: [])
    hits = iter([0] + [1, 1, 0, 1] * 3 + [1, 0, 0, 1] * 4)        # the first is the blank picture
    monkeypatch.setattr(geneval, "detect", lambda *_: [geneval.Found("cat", 0.95, (0, 0, 1, 1))] * next(hits))
    words = (*kind[:-3], "--metrics", "geneval", "--lora", "base=", "--images_per_prompt", 4, "--export_geneval", tmp_path / "export")
    call("evaluate", *words, "--prompts", f"geneval={tmp_path / 'm.jsonl'}")
    report = json.loads((tmp_path / "e/results.json").read_text())
    assert report["groups"]["base"]["geneval"] == {"single_object": 0.75, "counting": 0.5, "mean": 0.625} and len(report["scores"]["base"]["geneval"]) == 28
    assert report["results"]["base"]["geneval"]["mean"] == 0.625, "the mean over tags, not over pictures"
    text = (tmp_path / "e/results.md").read_text()
    assert "| base | 62.50 ± " in text and "| base | 75.00 | 50.00 | 62.50 |" in text
    assert len(list((tmp_path / "export/base").glob("*/samples/*.png"))) == 28 and (tmp_path / "export/base/00006/metadata.jsonl").exists()
    for prompts in ((), ("--prompts", *2 * [f"geneval={tmp_path / 'm.jsonl'}"])):
        with pytest.raises(InputError, match="wants its own prompts alone"):
            call("evaluate", *words, *prompts)


def test_two_processes_evaluate_what_one_does(kind, trained, tmp_path):
    words = ("evaluate", *kind[:-5], "--lora", "base=", f"spo={trained[0]}", "--metrics", "aesthetics")
    call(*words, "--out", tmp_path / "1")
    together(*words, "--out", tmp_path / "2")
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["scores"] for name in "12")
    for name in ("base", "spo"):
        assert one[name]["aesthetics"] == pytest.approx(two[name]["aesthetics"], abs=0.05)      # a pixel may round the other way


@pytest.mark.parametrize("words, says", [
    (("--lora", "base"), "name=FILE"), (("--lora", "a=", "a="), "each name once"), (("--lora", "a/b="), "name=FILE"), (("--lora", "..="), "name=FILE"), (("--lora", 300 * "ä" + "="), "at most 100"),
    (("--prompt", "caf\udce9"), "--prompt, 'caf\\udce9', is no Unicode text"), (("--trace", 20_000 * "a"), "20,000 characters"),
    (("--lora", "a=nowhere.safetensors"), "nowhere.safetensors"), (("--metrics", "beauty"), "unknown metric 'beauty'"),
    (("--metrics", "hpsv2", "hpsv2"), "each metric once"), (("--metrics", "aesthetic-v1"), "aesthetic-v1=FILE"), (("--prompts", "geneval"), "geneval=FILE"),
    (("--resolution", "17"), "multiple of 2"), (("--images", "x", "--trace", "a red circle"), "leave out --trace"), (("--trace", "a red circle"), "Step-Aware_Preference_Models"),
    (("--steps", "0"), "--steps 0"), (("--batch", "0"), "--batch 0"), (("--images_per_prompt", "0"), "at least 1"), (("--prompts", "none.txt"), "none.txt"), (("--metric", "pickscore"), "did you mean --metrics?")])
def test_mistakes_are_one_line(small, prompts, tmp_path, words, says):
    with pytest.raises(InputError) as caught:
        call("evaluate", "--model", small, "--prompts", prompts, "--dtype", "fp32", "--steps", 1, "--out", tmp_path / "e", "--metrics", "aesthetics", *words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_one_line(kind, small, spm, tmp_path):
    (tmp_path / "file").touch()
    for words in ((), ("--prompt", "a red circle"), ("--trace", "a red circle", "--spm", spm)):
        with pytest.raises(InputError, match="file.*cannot be (written|used)") as caught:
            call("evaluate", *kind, *words, "--out", tmp_path / "file")
        assert "\n" not in str(caught.value)


def test_no_model_need_be_named(tmp_path):
    """Empty is the default, and means tiny, or, for pictures made elsewhere, none."""
    assert evaluate.parse_options(evaluate.EvaluateConfig, evaluate.PRESETS, []).model == ""
    with pytest.raises(InputError, match="nope.json"):
        call("evaluate", "--tally", tmp_path / "nope.json")


def test_one_prompt_for_every_candidate(small, trained, tmp_path):
    words = ("--model", small, "--dtype", "fp32", "--steps", 2, "--out", tmp_path)
    call("evaluate", *words, "--prompt", "a red circle", "--lora", "base=", f"spo={trained[0]}")
    first = (tmp_path / "base.png").read_bytes()
    assert first != (tmp_path / "spo.png").read_bytes()
    call("evaluate", *words, "--prompt", "a blue cross", "--lora", "base=")             # into the same folder: nothing is overwritten
    assert (tmp_path / "base.png").read_bytes() == first != (tmp_path / "base-2.png").read_bytes()
    call("evaluate", *words, "--prompt", "a green square", "--lora", f"spo={trained[0]}", "base=")
    assert {p.name for p in tmp_path.glob("*.png")} == {"base.png", "spo.png", "base-2.png", "base-3.png", "spo-3.png"}


@pytest.mark.parametrize("words", [("--prompt", "a red circle"), ("--trace", "a red circle")])
def test_an_unfit_candidate_is_refused_before_a_picture(tmp_path, words):
    with pytest.raises(InputError, match="made for flow"):
        call("evaluate", *words, "--lora", "base=", "flow=" + NAMES["tiny-flow"], "--out", tmp_path)
    assert not [*tmp_path.glob("*.png")]


def test_trace_of_any_model(small, spm, trained, tmp_path):
    """A folder is judged by its kind's official SPM unless --spm names another. Sixteen pools of four."""
    call("evaluate", "--model", small, "--dtype", "fp32", "--trace", "a red circle", "--spm", spm, "--lora", f"spo={trained[0]}", "--out", tmp_path)
    with Image.open(tmp_path / "trace-spo.png") as image:
        assert image.size == (64 + 4 * 108, 16 * 124 + 16) and {(0x1a, 0x98, 0x50), (0x2b, 0x6c, 0xff)} & {c for _, c in image.getcolors(10 ** 6)}


def test_metrics_run_in_fp32(kind, tmp_path, monkeypatch, pickscore_metric):
    """Drawing may use TF32, scoring does not."""
    (tmp_path / "p/x").mkdir(parents=True)
    for i in range(7):
        Image.new("RGB", (16, 16)).save(tmp_path / f"p/x/{i}.png")
    seen, flags = [], (torch.backends.cuda.matmul, torch.backends.cudnn)
    for flag in flags:
        flag.allow_tf32 = True
    monkeypatch.setattr(evaluate, "load_metric", lambda *a: metrics.Metric(
        "m", "f", lambda images, _: seen.extend(f.allow_tf32 for f in flags) or torch.zeros(len(images))))
    call("evaluate", *kind, "--images", tmp_path / "p", "--metrics", "aesthetics")
    assert seen and not any(seen)


def test_alignment_wants_captions_of_the_world():
    metric = load_metric("alignment", "tiny", None, torch.device("cpu"))
    with pytest.raises(InputError, match="a photo of a cat"):
        metric.score([Image.new("RGB", (64, 64))], ["a photo of a cat"])
    with pytest.raises(InputError, match="64 x 32"):
        metric.score([Image.new("RGB", (64, 32))], ["a red circle"])


# The tiny world

@pytest.fixture(scope="module")
def split():
    """(training captions, held-out captions)."""
    return world.split_captions()


def test_captions_and_split(split):
    """Sizes; disjoint; and a scene is held out in both phrasings or in none."""
    train, held = split
    assert len(world.all_captions()) == 1992 and len(held) == 256 and len(train) == 1992 - 256
    texts = {c.text for c in held}
    assert len(texts) == 256 and not texts & {c.text for c in train}
    kinds = [sum(c.kind == kind for c in held) for kind in ("single", "count", "relation")]
    assert kinds == [4, 8, 244]
    for c in world.all_captions():
        if c.kind == "relation":
            (a, b), back = c.objects, world.OPPOSITE[c.relation]
            assert (f"a {b[0]} {b[1]} {back} a {a[0]} {a[1]}" in texts) == (c.text in texts)
    assert [c.text for c in world.split_captions()[1]] == [c.text for c in held]


def test_verifier_is_right_on_real_pictures(split):
    """1.0 on its own caption, at random vividness and cleanliness, and 0 on a caption of which one thing is wrong."""
    _, held = split
    images = world.render(held, seeded(3))
    assert world.alignment(images, held).tolist() == [1.0] * len(held)
    wrong = [world.mistaken(c, world.all_captions(), seeded(i)) for i, c in enumerate(held)]
    assert world.alignment(images, wrong).sum() == 0


def test_aesthetics_grow_with_both_factors_and_ignore_the_caption(split):
    _, held = split
    levels = torch.linspace(0, 1, 6)
    for factor in ("vividness", "cleanliness"):
        rows = []
        for level in levels:
            other = {"vividness": "cleanliness", "cleanliness": "vividness"}[factor]
            images = world.render(held[::4], seeded(5), **{factor: torch.full((64,), level), other: torch.full((64,), 0.5)})
            rows.append(world.aesthetics(images))
        rows = torch.stack(rows)
        assert (rows.mean(1).diff() > 0.3).all() and (rows.diff(dim=0) > 0).float().mean() > 0.97 and 0 <= rows.min() and rows.max() <= 10
    ends = [world.aesthetics(world.render(held[:64], seeded(5), torch.full((64,), v), torch.full((64,), v))).mean() for v in (0.0, 1.0)]
    assert ends[0] < 1 and ends[1] > 9.5


def test_preferences_blend_alignment_and_aesthetics():
    """Bernoulli of the stated sigmoid; neither alone decides."""
    n = 20_000
    for aligned, beauty, want in (((1, 0), (5, 5), 1.0), ((1, 1), (6.2, 5), 1 / (1 + np.exp(-1))), ((1, 1), (5, 5), 0.5)):
        labels = world.generic_preference(torch.tensor([aligned] * n), torch.tensor([beauty] * n), seeded(0))
        assert float(labels.mean()) == pytest.approx(want, abs=0.015)
    images, captions, labels = world.preference_pairs(64, seed=1)
    again = world.preference_pairs(64, seed=1)
    assert images.shape == (64, 2, 3, 64, 64) and images.dtype == torch.uint8 and torch.equal(images, again[0]) and captions == again[1]
    assert set(captions) <= {c.text for c in world.split_captions()[0]} and set(labels.tolist()) == {0.0, 1.0}
