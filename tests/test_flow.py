"""The flow-matching tiny model through every command; its formulas are in test_ddim.py."""
import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file

import baselines
import card
import ddim
import gentle
import report
import spm_train
import spo_train
from conftest import assert_close
from diffusion import encode_empty, encode_prompts, generate_latents
from evaluate import wear
from helpers import ROOT, call, command, log_of, together
from loading import JUDGES, NAMES, TINY, load_clip, load_pipeline, part_of
from test_distributed import LORA, assert_close_loras, assert_same_run
from training import parse_options
from weights import InputError, preset_of

WORDS = ("--model", "tiny-flow", "--steps", 4, "--prompts_per_round", 3, "--pairs_per_step", 4, "--grid_every", 0, "--save_every", 1, "--lr", 1e-3)
SPO = ("spo_train", *WORDS, "--k", 2, "--threshold", 0, "--t_min", 100)
FLOW = NAMES["tiny-flow"]


@pytest.fixture(scope="module")
def flow():
    """The model."""
    return load_pipeline("tiny-flow")


def test_it_shares_all_but_the_unet_with_tiny(flow):
    tiny = load_pipeline("tiny")
    assert flow.schedule.flow and not tiny.schedule.flow and flow.schedule.shift == 1.0
    assert part_of(TINY.parent / "flow", "vae").resolve() == TINY / "vae" and part_of(TINY.parent / "flow", "unet") == TINY.parent / "flow/unet"
    for ours, theirs in ((flow.vae, tiny.vae), (flow.text_encoders[0], tiny.text_encoders[0])):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert sum(path.stat().st_size for path in (TINY.parent / "flow").rglob("*")) < 8e6
    assert preset_of("tiny-flow") == preset_of(FLOW) == "tiny-flow" and preset_of(str(TINY)) == "tiny"
    assert spo_train.PRESETS["tiny-flow"]["t_max"] == 950 and set(spo_train.PRESETS) == set(baselines.PRESETS) == set(spm_train.PRESETS)


def test_drawing_without_noise_equals_diffusers(flow):
    """Guidance, all 20 steps: diffusers' UNet and its FlowMatchEulerDiscreteScheduler."""
    prompts = ["a red circle", "two cyan circles"]
    unet = UNet2DConditionModel.from_pretrained(FLOW, subfolder="unet", torch_dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(FLOW, subfolder="scheduler")
    scheduler.set_timesteps(20)
    x = torch.stack([torch.randn(flow.latent_shape(), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    embeds = torch.cat([encode_empty(flow).prompt_embeds.expand(2, -1, -1), encode_prompts(flow, prompts).prompt_embeds])
    with torch.no_grad():
        for t in scheduler.timesteps:
            without, with_ = unet(torch.cat([x, x]), t, embeds).sample.chunk(2)
            x = scheduler.step(without + 2.0 * (with_ - without), t, x).prev_sample
    assert_close(generate_latents(flow, prompts, [0, 1], guidance_scale=2.0), x, 1e-4)


def test_spo_trains_it_resumes_and_processes_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", gentle.adamw)
    call(*SPO, "--rounds", 2, "--out", tmp_path / "whole")
    call(*SPO, "--rounds", 1, "--out", tmp_path / "cut")
    call(*SPO, "--rounds", 2, "--out", tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 2)
    together(*SPO, "--rounds", 2, "--out", tmp_path / "two", adam=gentle.adamw)
    assert_close_loras(tmp_path / "whole", tmp_path / "two")
    rows = log_of(tmp_path / "whole")
    assert all(row["pairs"] and row["ratio_win"] for row in rows) and any(
        "lora_B" in k and v.abs().max() > 0 for k, v in load_file(tmp_path / "whole" / LORA).items())


def test_pools_end_where_the_spread_does(flow):
    """The last step, to sigma = 0, is walked by nobody: its outcome is the predicted clean latent, which is judged anyway."""
    config = parse_options(spo_train.SPOConfig, spo_train.PRESETS, ["--model", "tiny-flow", "--steps", "4", "--t_min", "0", "--t_max", "1000", "--k", "2"])
    judge = spo_train.load_judge(config, flow)
    seen, features = [], judge.features
    judge.features = lambda pixels, t: seen.extend(t.tolist()) or features(pixels, t)
    cond = encode_prompts(flow, ["a red circle"])
    batch = spo_train.Batch(cond, encode_empty(flow), judge.clip.text_features(torch.zeros(1, 16, dtype=torch.long)), [torch.Generator().manual_seed(0)])
    pools = spo_train.sample_pools(flow, judge, batch, config)
    assert [pool.timesteps for pool in pools] == [[t] for t in flow.schedule.timesteps(4)[:3]]
    assert [pool.t for pool in pools] == pytest.approx([667, 334, 1]) and all(torch.isfinite(pool.x0).all() for pool in pools)
    told = ddim.told(flow.schedule, torch.tensor([pool.t for pool in pools]), by_flow=False).tolist()
    assert [t for t in seen[::2]] == told and told[-1] == 0 and 500 < told[0] < 600           # the shipped SPM learnt on diffusion's path


def test_log_ratio_is_zero_at_the_start_and_finite_after(flow, tmp_path):
    """Sampled and trained with the same Gaussians: policy and reference are one before the first update."""
    call(*SPO, "--rounds", 1, "--pairs_per_step", 1000, "--out", tmp_path / "run")
    [row] = log_of(tmp_path / "run")
    assert row["updates"] == 1 and row["margin"] == 0 and row["ratio_win"] == row["ratio_lose"] == 1


@pytest.mark.parametrize("method", list(baselines.METHODS))
def test_rivals_train_it(method, tmp_path):
    words = ("--count", 8) if method in baselines.OFFLINE else ("--clip_range", 0.1, "--k", 2)
    call("baselines", *WORDS, "--method", method, *words, "--rounds", 2, "--out", tmp_path / "run")
    rows = log_of(tmp_path / "run")
    assert all(row["updates"] and row["loss"] == row["loss"] for row in rows)


def test_diffusion_dpo_asks_for_the_flows_own_target(flow):
    """The denoising error of the exact answer is zero."""
    clean, noise = torch.randn(2, 2, *flow.latent_shape(), generator=torch.Generator().manual_seed(0))
    flow_unet, cond = flow.unet.forward, encode_prompts(flow, ["a red circle"] * 2)
    try:
        flow.unet.forward = lambda *_: noise - clean
        assert float(baselines.denoising_errors(flow, clean, noise, torch.tensor([10, 900]), cond).max()) == 0
    finally:
        flow.unet.forward = flow_unet


def test_an_spm_of_its_own_knows_its_path(tmp_path):
    """Trained on a flow's predictions, its file says so, and it is told 1000 sigma."""
    call("spm_train", "--model", "tiny-flow", "--steps", 2, "--batch", 4, "--count", 12, "--validation", 4, "--save_every", 1, "--out", tmp_path / "run",
         "--step_blind", "false")
    spm = load_clip(str(tmp_path / "run/spm"))
    assert spm.config.flow and json.loads((tmp_path / "run/spm/config.json").read_text())["flow"] is True
    assert not load_clip(JUDGES["tiny"]["spm"]).config.flow and "flow" not in json.loads((TINY / "spm/config.json").read_text())
    call(*SPO, "--rounds", 1, "--spm", tmp_path / "run/spm", "--out", tmp_path / "spo")


def test_it_is_traced_evaluated_and_merged(tmp_path):
    call(*SPO, "--rounds", 1, "--out", tmp_path / "run")
    (tmp_path / "p.txt").write_text("a red circle\ntwo cyan circles\n")
    call("evaluate", "--model", "tiny-flow", "--lora", "base=", f"spo={tmp_path / 'run'}", "--prompts", tmp_path / "p.txt", "--steps", 4, "--out", tmp_path / "e")
    found = json.loads((tmp_path / "e/results.json").read_text())
    assert found["protocol"]["prediction_type"] == "flow" and set(found["results"]) == {"base", "spo"}
    call("evaluate", "--model", "tiny-flow", "--trace", "a red circle", "--lora", f"spo={tmp_path / 'run'}", "--out", tmp_path / "e")
    assert (tmp_path / "e/trace-spo.png").exists()
    assert not command("lora", "merge", tmp_path / "run", tmp_path / "merged", "--model", "tiny-flow").returncode
    merged = load_pipeline(str(tmp_path / "merged"))
    assert merged.schedule.flow and preset_of(str(tmp_path / "merged")) == "tiny-flow"
    assert "shared" not in json.loads((tmp_path / "merged/model_index.json").read_text())


def test_a_compiled_run_sees_one_shape_and_trains_the_same(tmp_path, compilations):
    call(*SPO, "--rounds", 2, "--compile", "--out", tmp_path / "compiled")
    call(*SPO, "--rounds", 2, "--out", tmp_path / "eager")
    for ours, theirs in zip(log_of(tmp_path / "compiled"), log_of(tmp_path / "eager"), strict=True):
        ours.pop("evaluations"), theirs.pop("evaluations")
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert compilations


def test_another_models_unet_or_prediction_is_one_line(tmp_path):
    done = command("spo_train", *WORDS, "--prediction_type", "epsilon", "--rounds", 1, "--out", tmp_path / "a")
    assert done.returncode == 2 and "prediction_type" in done.stderr and done.stderr.strip().count("\n") <= 6
    with pytest.raises(InputError, match="made for flow"):
        wear(load_pipeline("tiny"), f"{FLOW}/unet/diffusion_pytorch_model.safetensors")


def test_the_page_is_what_the_results_say(monkeypatch):
    """Tables and picture come from results/flow.json; one figure recomputed by hand."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import flow as study
    found = study.kept()
    assert study.render(found).strip() in (ROOT / "docs/flow.md").read_text(encoding="utf-8")
    assert study.draw(found) == (ROOT / "experiments/results/flow.svg").read_text(encoding="utf-8")
    base, rows = found["base"]["results"]["aesthetics"]["mean"], list(found["arms"]["SPO"].values())
    closed = [100 * (row["aesthetics"]["mean"] - base) / (found["ceiling"]["best_through_vae"] - base) for row in rows]
    half = 4.303 * (sum((c - sum(closed) / 3) ** 2 for c in closed) / 2 / 3) ** 0.5
    assert len(rows) == 3 and f"| {sum(closed) / 3:.0f} ± {half:.0f} |" in study.render(found)
    assert all(row["evaluations"] >= study.EVALUATIONS for arm in found["arms"].values() for row in arm.values())


def test_the_search_chooses_what_the_results_say(monkeypatch, tmp_path):
    """Replayed from the scores in results/flow.json: the same runs in the same order, each once, and the same choice."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import flow as study
    recorded, wanted, runs = study.kept()["tuned"], {}, []
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(study, "kept", dict)
    monkeypatch.setattr(study, "keep", lambda part, value: wanted.update(value))
    monkeypatch.setattr(study, "train", lambda name, options, seed: (runs.append(name) or tmp_path, {}))
    monkeypatch.setattr(study, "judged", lambda folder, *_: dict(results=dict(tried=dict(pickscore=dict(
        mean=next(found["pickscore"][words] for method, found in recorded.items() for words in found["pickscore"] if folder == f"choice/{method} {words}"))))))
    for method, found in recorded.items():
        assert study.tune(method) == study.TUNED[method][0] | found["chosen"]
        assert list(wanted[method]["pickscore"]) == list(found["pickscore"])
    assert wanted == recorded and runs == [f"{method} {words}" for method, found in recorded.items() for words in found["pickscore"]]


@pytest.mark.parametrize("shared", [3, None, ["model"]])
def test_shared_that_is_no_path_is_one_line(shared, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(dict(shared=shared)))
    with pytest.raises(InputError, match="model_index.json"):
        part_of(tmp_path, "vae")


def test_fractions_are_rounded_where_people_read_them(flow):
    """In the trace's margin, 56 pixels wide, and in what a walk without pools says."""
    drawn = [dict(opened=t, timestep=u, images=torch.zeros(2, 3, 8, 8), scores=[0.0, 1.0], win=1, lose=0, chosen=0, valid=True)
             for t, u in ((947.3684210526316, 894.7), (947, 895))]
    assert report.draw_trace(drawn[:1]).tobytes() == report.draw_trace(drawn[1:]).tobytes()
    with pytest.raises(InputError, match=r"at t = \[1000.0, 667.0, 334.0\]"):
        spo_train.pool_groups(ddim.spread(flow.schedule, 4), 960, 980, 1)


def test_its_card_names_its_folder():
    assert card.about_base(dict(model="tiny-flow"))["source"] == "tiny/flow" and card.about_base(dict(model="tiny"))["source"] == "tiny/model"
    assert "tiny-flow" in card.about_base(dict(model="tiny-flow"))["note"]
