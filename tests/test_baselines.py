"""baselines.py: each loss by hand, the walk that the online ones share with SPO, and every method as a run."""
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import baselines
import ddim
import gentle
import lora
import pairs
import spo_train
from baselines import (BaselineConfig, advantages, d3po_as_spo, ddpo_loss, denoising_errors, density, diffusion_dpo_loss, group_advantages,
                       mapo_loss, policy_round, policy_values)
from conftest import assert_close, seeded
from calls import Calls
from diffusion import Conditioning, encode_empty, encode_prompts, guided_noise, judge_features, negative
from loading import TINY, load_pipeline
from evaluate import wear
from finetune import Trainer
from helpers import ALONE, PROMPTS, NoWaiting, bare_trainer, call, log_of, shell, together, turn_of, unpinned
from observers import report
from pairs import load_pairs
from spo_train import SPOConfig
from test_distributed import LORA, assert_close_loras, assert_same_run
from weights import InputError

WORDS = ("--steps", 4, "--prompts_per_round", 3, "--pairs_per_step", 5, "--lr", "2e-3", "--dtype", "fp32", "--grid_every", 0)


# The losses, by hand

def test_ddpo_loss_by_hand():
    """min of the plain and the clipped surrogate: no gain from going further, full pain from going wrong."""
    log_ratio = torch.log(torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5]))
    advantage = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0])
    assert_close(ddpo_loss(log_ratio, advantage, 0.1), torch.tensor([-2.0, -2.2, -1.0, 1.5, 0.9]))
    ratio = torch.zeros(3, requires_grad=True)              # ratio 1: the plain policy gradient, -advantage x d log p
    ddpo_loss(ratio, torch.tensor([3.0, -1.0, 0.5]), 1e-4).sum().backward()
    assert_close(ratio.grad, torch.tensor([-3.0, 1.0, -0.5]))


def test_advantages_by_hand():
    scores = torch.tensor([[1.0, 3.0], [5.0, 2.0], [0.0, 1.0]])
    values = [3, 1, 5, 2, 1, 0]                             # better one first
    mean, std = np.mean(values), np.std(values, ddof=1)
    assert_close(advantages(scores, 5.0), torch.tensor([(v - mean) / std for v in values]).float().view(3, 2))
    assert advantages(scores, 0.5).abs().max() == 0.5
    assert torch.equal(advantages(torch.ones(2, 2), 5.0), torch.zeros(2, 2))


def test_group_advantages_by_hand():
    """Each reward against its own prompt's; equal rewards say nothing."""
    scores = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    expected = (scores[0] - 3) / (7.0 ** 0.5 + 1e-4)
    found = group_advantages(scores, 5.0)
    assert_close(found[0], expected)
    assert torch.equal(found[1], torch.zeros(3)) and group_advantages(scores, 0.5).abs().max() == 0.5


def test_diffusion_dpo_loss_by_hand():
    win, lose, win_ref, lose_ref = (torch.tensor([v]) for v in (0.20, 0.50, 0.25, 0.45))
    inside = -10 / 2 * ((0.20 - 0.25) - (0.50 - 0.45))      # winner's error fell, loser's grew: +0.5
    assert inside == pytest.approx(0.5)
    assert float(diffusion_dpo_loss(win, lose, win_ref, lose_ref, 10.0)) == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-6)
    assert float(diffusion_dpo_loss(win, lose, win, lose, 5000.0)) == pytest.approx(math.log(2))


def test_mapo_loss_by_hand():
    win, lose = 0.3, 0.302
    phi = lambda e: 0.5 * e / (math.exp(0.5 * e) - 1)       # noqa: E731
    odds = 1000 * (phi(win) - phi(lose))
    assert odds > 0
    expected = win + 0.1 * math.log(1 + math.exp(-odds))
    assert float(mapo_loss(torch.tensor([win], dtype=torch.float64), torch.tensor([lose], dtype=torch.float64), 0.1)) == \
        pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoising_errors_by_hand(prediction):
    """A network that says what it should has error 0; one that says 0 has the target's mean square."""
    schedule = ddim.Schedule(torch.linspace(0.99, 0.01, 1000), 0.99, prediction)
    latents, noise, t = torch.randn(3, 4, 8, 8, generator=seeded(0)), torch.randn(3, 4, 8, 8, generator=seeded(1)), torch.tensor([3, 500, 990])
    cond = Conditioning(torch.zeros(3, 1, 1))
    alpha = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    target = noise if prediction == "epsilon" else alpha ** 0.5 * noise - (1 - alpha) ** 0.5 * latents

    def network(x, timestep, *rest):
        assert_close(x, alpha ** 0.5 * latents + (1 - alpha) ** 0.5 * noise)
        return target

    pipe = SimpleNamespace(unet=network, schedule=schedule, calls=Calls())
    assert_close(denoising_errors(pipe, latents, noise, t, cond), torch.zeros(3))
    pipe.unet = lambda *a: torch.zeros_like(latents)
    errors = denoising_errors(pipe, latents, noise, t, cond)
    assert_close(errors, target.square().flatten(1).mean(1))


# The walk

def walked(sd, pickscore, method="ddpo", **changes):
    """(trainer, judge, pairs, configuration) of one sampled round."""
    config = BaselineConfig(model=str(sd), reward=str(pickscore), method=method, steps=6, dtype="fp32", lr=1e-3, beta=0.1, k=3)
    walk = dataclasses.replace(d3po_as_spo(config), **changes)
    pipe, judge, observers = spo_train.prepare(walk, ALONE)
    trainer = bare_trainer(pipe, config)
    return trainer, judge, sampled(trainer, judge, walk, [*observers, density(pipe.schedule, config)]), config


def sampled(trainer, judge, walk, observers) -> spo_train.Pairs:
    """The round of three prompts, walked anew."""
    return spo_train.sample_round(trainer, judge, turn_of([0, 2, 5]), walk, observers)


@pytest.mark.parametrize("method, k", [("ddpo", 2), ("d3po", 3)])
def test_online_rivals_walk_whole_trajectories_and_are_judged_once(sd, pickscore, method, k):
    trainer, judge, pairs, config = walked(sd, pickscore, method)
    assert pairs.x_t.shape[:3] == (3, 6, 2) and pairs.scores.shape == (3, 1, k) and pairs.valid.all()
    assert torch.equal(pairs.x_t[:, 0, 0], pairs.x_t[:, 0, 1]) and not torch.equal(pairs.x_t[:, 1, 0], pairs.x_t[:, 1, 1])
    assert torch.equal(pairs.x_t[:, 1:], pairs.x_next[:, :-1])
    from clip_spm import preprocess_decoded
    with torch.no_grad():                                   # winner and loser: highest and lowest reward of the finished pictures
        text = judge_features(trainer.pipe, judge.clip, [PROMPTS[i] for i in (0, 2, 5)])
        for place, extreme in ((0, pairs.scores.amax(-1)), (1, pairs.scores.amin(-1))):
            features = judge.clip.image_features(preprocess_decoded(trainer.pipe.vae.decode(pairs.x_next[:, -1, place]), 16))
            assert_close(judge.clip.score(features, text), extreme[:, 0], 1e-4)


@pytest.mark.parametrize("j", [1, 2, 6])
def test_log_prob_at_sampling_is_that_of_the_policy(sd, pickscore, j):
    """What the sampler recorded, recomputed from x_t and x_next; so DDPO's ratio is 1 before the first update."""
    trainer, judge, pairs, config = walked(sd, pickscore, **(dict(j=j, t_max=751) if j < 6 else {}))
    pipe, cond = trainer.pipe, pairs.cond
    steps = pipe.schedule.timesteps(6)[-pairs.x_t.shape[1]:]
    uncond = negative(pipe, cond, encode_empty(pipe))
    log_prob = pairs.notes["log_prob"]
    with torch.no_grad():
        for slot, t in enumerate(steps):
            for place in (0, 1):
                x_t = pairs.x_t[:, slot, place]
                mean, std = ddim.step_gaussian(pipe.schedule, x_t, guided_noise(pipe, x_t, t, cond, uncond, 5.0), t, t - 166)
                assert_close(ddim.log_prob(pairs.x_next[:, slot, place], mean, std), log_prob[:, slot, place])
    assert log_prob.std() > 0.01


def test_ddpo_starts_at_ratio_one_and_raises_the_reward(sd, pickscore, prompts, tmp_path):
    call("baselines", "--method", "ddpo", "--model", sd, "--reward", pickscore, "--prompts", prompts, "--out", tmp_path / "run", *WORDS,
         "--rounds", 1, "--pairs_per_step", 1000)
    row = log_of(tmp_path / "run")[0]
    assert row["ratio"] == pytest.approx(1, abs=1e-5) and abs(row["margin"]) < 1e-4 and row["clipped"] < 0.5 and row["updates"] == 1
    assert abs(row["loss"]) < 1e-4                          # advantages have mean zero
    trainer, judge, pairs, config = walked(sd, pickscore)
    pipe, cond = trainer.pipe, pairs.cond
    gain, steps = advantages(pairs.scores[:, 0], 5.0), pipe.schedule.timesteps(6)
    trainer.optimizer = torch.optim.AdamW(lora.parameters(pipe.unet), lr=2e-3)
    trainer.config = config = dataclasses.replace(config, pairs_per_step=1000, clip_range=0.2)
    observers = [spo_train.Faults(judge), density(pipe.schedule, config)]
    for _ in range(3):                                      # the same round (same key) again: the first policy's trajectories are redrawn
        again = sampled(trainer, judge, d3po_as_spo(config), observers)
        stats = baselines.policy_round(trainer, again, turn_of([0, 2, 5]), config)
    assert stats["updates"] == 1 and trainer.rounds.bad == 0 and report(again, turn_of([0, 2, 5]), True)["not_finite"] == 0
    uncond, total = negative(pipe, cond, encode_empty(pipe)), 0.0
    with torch.no_grad():                                   # on the first trajectories: likelier where the advantage was positive
        for slot, t in enumerate(steps):
            for place in (0, 1):
                x_t = pairs.x_t[:, slot, place]
                mean, std = ddim.step_gaussian(pipe.schedule, x_t, guided_noise(pipe, x_t, t, cond, uncond, 5.0), t, t - 166)
                log_ratio = ddim.log_prob(pairs.x_next[:, slot, place], mean, std) - pairs.notes["log_prob"][:, slot, place]
                total += float((gain[:, place] * log_ratio).sum())
    assert total > 1e-4


def test_flow_grpo_by_hand(sd, pickscore):
    """All K trajectories of a prompt: the clipped surrogate with their own advantages, and the penalty, from the definition."""
    trainer, judge, pairs, config = walked(sd, pickscore, "flow-grpo")
    pipe, cond = trainer.pipe, pairs.cond
    assert pairs.notes["x_t"].shape[:3] == pairs.notes["x_next"].shape[:3] == pairs.notes["log_prob"].shape == (3, 6, 3)
    assert torch.equal(pairs.notes["x_t"][:, 1:], pairs.notes["x_next"][:, :-1])
    gain = group_advantages(pairs.scores[:, 0], 5.0)
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            if "lora_B" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=seeded(p.numel())))
    uncond = negative(pipe, cond, encode_empty(pipe))
    config = dataclasses.replace(config, clip_range=0.02)
    slots = [0, 8, 15]                                      # of 3 x 6: (prompt, step) = (0, 0), (1, 2), (2, 3)
    loss, margin, ratio, outside = policy_values(trainer, pairs, gain, slots, config)
    for n, slot in enumerate(slots):
        prompt, step = divmod(slot, 6)
        t, parts = pipe.schedule.timesteps(6)[step], []
        for which in range(3):
            x_t, x_next = (pairs.notes[name][prompt, step, which][None] for name in ("x_t", "x_next"))
            with torch.no_grad():
                mean, std = ddim.step_gaussian(pipe.schedule, x_t, guided_noise(pipe, x_t, t, cond[[prompt]], uncond[[prompt]], 5.0), t, t - 166)
                with lora.disabled(pipe.unet):
                    ref, _ = ddim.step_gaussian(pipe.schedule, x_t, guided_noise(pipe, x_t, t, cond[[prompt]], uncond[[prompt]], 5.0), t, t - 166)
            normal, reference = torch.distributions.Normal(mean, std), torch.distributions.Normal(ref, std)
            r = (normal.log_prob(x_next).mean() - pairs.notes["log_prob"][prompt, step, which]).exp()
            a = gain[prompt, which]
            surrogate = -torch.min(a * r, a * r.clamp(0.98, 1.02))
            parts.append((surrogate + 0.1 * torch.distributions.kl_divergence(normal, reference).mean(), r))
        assert_close(loss[n].detach(), sum(p for p, _ in parts) / 3, 2e-5)
        assert_close(ratio[n], sum(r for _, r in parts) / 3, 2e-5)
    assert 0 < float(outside.detach().mean()) < 1 and loss.requires_grad


def test_steps_of_a_flow_without_spread_are_not_trained(monkeypatch):
    """The last step is walked by nobody; one with next to no spread is walked, but its ratio has no bounds."""
    config = BaselineConfig(model="tiny-flow", method="flow-grpo", preset="tiny-flow", steps=4, dtype="fp32", lr=1e-3, beta=0.1, k=2, clip_range=0.1,
                            reward=str(TINY / "pickscore"), guidance_scale=2.0)
    walk = d3po_as_spo(config)
    pipe, judge, observers = spo_train.prepare(walk, ALONE)
    trainer = bare_trainer(pipe, config)
    batch = dataclasses.replace(turn_of([0, 2, 5]), texts=["a red circle", "two cyan circles", "a blue square"])
    pairs = spo_train.sample_round(trainer, judge, batch, walk, [*observers, density(pipe.schedule, config)])
    assert pairs.timesteps == pytest.approx([1000.0, 667.0, 334.0]) and pairs.valid.all()
    trainer.optimizer, seen = torch.optim.AdamW(lora.parameters(pipe.unet), lr=1e-3), []
    monkeypatch.setattr(baselines, "policy_values", lambda trainer, pairs, gain, slots, config: seen.extend(slots) or policy_values(
        trainer, pairs, gain, slots, config))
    policy_round(trainer, pairs, batch, config)
    assert sorted(seen) == [0, 1, 3, 4, 6, 7]               # 334 -> 1 has a spread of .001


def test_evaluations_are_counted(sd, pickscore, prompts, tmp_path):
    """1 per sample through the UNet, guidance's two sides apart, 3 where a backward follows."""
    pipe = SimpleNamespace(unet=lambda x, *rest: x, calls=Calls())
    cond = Conditioning(torch.zeros(5, 1, 1))
    guided_noise(pipe, torch.zeros(5, 1), 3, cond, None, 5.0)
    with torch.no_grad():
        guided_noise(pipe, torch.zeros(5, 1), 3, cond, None, 5.0)
    assert pipe.calls.evaluations == 5 * 3 + 5
    call("baselines", "--method", "d3po", "--model", sd, "--reward", pickscore, "--prompts", prompts, "--out", tmp_path / "run", *WORDS,
         "--rounds", 1)
    # Three prompts, four steps, two trajectories from one x_T; then per pair and step policy and reference, at both x_t but for the first.
    sampling, training = 3 * (1 + 2 * 3) * 2, 3 * (1 + 2 * 3) * 2 * (3 + 1)
    assert log_of(tmp_path / "run")[0]["evaluations"] == sampling + training


# Runs

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of six preference pairs, bright pictures liked better than dark ones; two are ties."""
    folder, rand = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = []
    for i in range(6):
        label = [1, 0, 0.5][i % 3]
        for side, bright in (("a", label), ("b", 1 - label)):
            pixels = rand.integers(0, 100, (20, 20, 3)) + int(150 * bright)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}{side}.png")
        rows.append(dict(caption=PROMPTS[i], image_0=f"{i}a.png", image_1=f"{i}b.png", label_0=label))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def options(method, pickscore, pictures, prompts):
    """What a method needs beyond the model."""
    return ("--method", method, *(("--pairs", pictures) if method in baselines.OFFLINE else ("--reward", pickscore, "--prompts", prompts)))


@pytest.mark.parametrize("method", list(baselines.METHODS))
@pytest.mark.parametrize("kind", ["small", "small_xl"])
def test_every_method_trains_both_kinds_of_model(method, kind, request, pickscore, pictures, prompts, tmp_path):
    model = request.getfixturevalue(kind)
    call("baselines", "--model", model, "--vae", model, *options(method, pickscore, pictures, prompts), "--out", tmp_path / "run", *WORDS,
         "--rounds", 2)
    rows, weights = log_of(tmp_path / "run"), load_file(tmp_path / "run" / LORA)
    assert len(rows) == 2 and all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, (int, float)))
    assert max(float(v.abs().max()) for k, v in weights.items() if "lora_B" in k) > 1e-4
    if method == "diffusion-dpo":                           # policy equals reference at first
        assert 0.6 < rows[0]["loss"] < 0.8 and rows[0]["pairs"] == 3
    assert (rows[0]["score"] is None) == (method in baselines.OFFLINE)


def margin(sd, pictures, source: str) -> float:
    """By how much the losers' denoising errors exceed the winners', over the four labelled pairs and nine timesteps, noise fixed."""
    pipe = load_pipeline(str(sd))
    wear(pipe, source)
    data, total = load_pairs(str(pictures), pipe.side(0)), 0.0
    with torch.no_grad():
        for i in (0, 1, 3, 4):
            mean, _ = pipe.vae.moments(data.pictures(i).float() / 127.5 - 1)
            latents, cond = mean * pipe.vae.config.scaling_factor, encode_prompts(pipe, [data.captions[i]] * 2)
            for t in range(100, 1000, 100):
                noise = torch.randn(latents.shape, generator=seeded(t))[:1].expand_as(latents)
                error = denoising_errors(pipe, latents, noise, torch.tensor([t, t]), cond)
                total += float(error[1] - error[0]) * (1 if data.label[i] > 0.5 else -1)
    return total / 36


@pytest.mark.parametrize("method", ["diffusion-dpo", "mapo"])
def test_offline_methods_learn_their_pairs(sd, pickscore, pictures, tmp_path, method):
    """Four labelled pairs, over and over: the winner's denoising error falls against the loser's."""
    call("baselines", "--model", sd, "--method", method, "--pairs", pictures, "--out", tmp_path / "run", *WORDS, "--prompts_per_round", 4,
         "--rounds", 12, "--epochs", 12, "--lr", "5e-3")
    assert all(r["pairs"] == 4 for r in log_of(tmp_path / "run"))              # six pairs, two of them ties
    assert margin(sd, pictures, str(tmp_path / "run" / LORA)) > margin(sd, pictures, "") + 1e-4


def damaged(pictures, folder, numbers=range(6)):
    """The pairs with one picture of each of `numbers` cut short."""
    shutil.copytree(pictures, folder)
    for i in numbers:
        (folder / f"{i}a.png").write_bytes((pictures / f"{i}a.png").read_bytes()[:60])
    return folder


def test_a_set_of_damaged_pictures_ends_the_run(small, pictures, tmp_path):
    """Nothing to learn from: one line after the pairs were read, as in spm_train.py; they are listed."""
    words = ("baselines", "--model", small, "--method", "mapo", *WORDS, "--out", tmp_path / "run", "--prompts_per_round", 4)
    with pytest.raises(InputError, match="^4 of the 4 pairs read so far have damaged pictures, listed in .*unreadable.txt"):
        call(*words, "--pairs", damaged(pictures, tmp_path / "bad"))
    assert len((tmp_path / "run/unreadable.txt").read_text().splitlines()) == 4 and (tmp_path / "run/checkpoint-000001.pt").exists()


def test_damaged_pairs_are_counted_over_a_stop(small, pictures, tmp_path):
    """Some are skipped and listed; which, survives a resume."""
    words = ("baselines", "--model", small, "--method", "mapo", *WORDS, "--prompts_per_round", 1, "--pairs",
             damaged(pictures, tmp_path / "bad", (0, 1)), "--save_every", 1)
    call(*words, "--rounds", 4, "--out", tmp_path / "whole")
    rows = log_of(tmp_path / "whole")
    assert rows[-1]["unreadable"] == 2 and rows[0]["unreadable"] <= 1
    for rounds in (3, 4):
        call(*words, "--rounds", rounds, "--out", tmp_path / "parts")
    assert log_of(tmp_path / "parts") == rows
    assert (tmp_path / "parts/unreadable.txt").read_text() == (tmp_path / "whole/unreadable.txt").read_text()


@pytest.mark.parametrize("method", ["diffusion-dpo", "mapo"])
def test_labels_are_part_of_an_offline_run(small, pictures, tmp_path, method):
    folder = shutil.copytree(pictures, tmp_path / "pairs")
    words = ("baselines", "--model", small, "--method", method, *WORDS, "--pairs", folder, "--out", tmp_path / "run")
    call(*words, "--rounds", 1)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row | dict(label_0=1 - row["label_0"])) for row in rows))
    with pytest.raises(InputError, match="the pair labels that this run was trained with had the same name but another content"):
        call(*words, "--rounds", 2)


def test_the_worlds_pairs_are_painted_when_they_are_read(monkeypatch):
    """Each with what it is in the whole set, label included, and nothing else; a second reading paints nothing."""
    from pairs import unpainted_pairs, world_pairs
    from tiny import world
    want, drawn, render = world_pairs(300, 5), [], world.render
    monkeypatch.setattr(world, "render", lambda *words, **more: drawn.append(len(pictures := render(*words, **more))) or pictures)
    got = unpainted_pairs(300, 5)
    assert got.captions == want.captions and got.label.isnan().all() and not drawn
    for i in (299, 0, 127, 128, 0, 200):
        assert torch.equal(got.pictures(i), want.pictures(i)) and got.label[i] == want.label[i]
    assert drawn == [2] * 5 and int(got.label.isnan().sum()) == 295


def test_offline_methods_paint_what_they_train_on(tmp_path, monkeypatch):
    """From the tiny world, by default of 44,000 pairs; what is trained is what was trained when all were painted."""
    from tiny import world
    drawn, render = [], world.render
    words = ("baselines", "--method", "mapo", "--count", 400, "--rounds", 1, "--prompts_per_round", 6, "--pairs_per_step", 3, "--grid_every", 0)
    with monkeypatch.context() as patch:
        patch.setattr(world, "render", lambda *words, **more: drawn.append(len(pictures := render(*words, **more))) or pictures)
        call(*words, "--out", tmp_path / "some")
    assert drawn == [2] * 6
    monkeypatch.setattr(baselines, "unpainted_pairs", pairs.world_pairs)
    call(*words, "--out", tmp_path / "all")
    assert log_of(tmp_path / "some") == log_of(tmp_path / "all")
    assert (tmp_path / "some" / LORA).read_bytes() == (tmp_path / "all" / LORA).read_bytes()


def test_offline_methods_encode_no_empty_prompt(small, pictures, tmp_path, monkeypatch):
    """They train without guidance."""
    import finetune
    monkeypatch.setattr(finetune, "encode_empty", lambda pipe: pytest.fail("the empty prompt"))
    call("baselines", "--model", small, "--method", "mapo", "--pairs", pictures, "--out", tmp_path / "run", *WORDS, "--rounds", 1)


def test_a_microbatch_of_ddpo_never_waits_for_the_device(small, pickscore, monkeypatch):
    """The meta device stands for a GPU."""
    trainer, judge, pairs, config = walked(small, pickscore)
    meta, pipe = torch.device("meta"), trainer.pipe
    notes = dict(log_prob=pairs.notes["log_prob"].to(meta))
    pairs = dataclasses.replace(pairs, x_t=pairs.x_t.to(meta), x_next=pairs.x_next.to(meta), notes=notes, cond=pairs.cond.map(lambda v: v.to(meta)))
    trainer.empty = trainer.empty.map(lambda v: v.to(meta))
    pipe.device = pipe.unet.to(meta).conv_in.weight.device
    monkeypatch.setattr(baselines, "upload", unpinned)
    gain = torch.zeros(3, 2, device=meta)
    baselines.policy_values(trainer, pairs, gain, [0, 4, 5], config)          # the table of the schedule is copied to a device once
    with NoWaiting():
        baselines.policy_values(trainer, pairs, gain, [1, 7, 3], config)[0].sum().backward()


@pytest.mark.parametrize("method", ["ddpo", "mapo"])
def test_a_compiled_run_sees_one_shape_and_trains_the_same(sd, pickscore, pictures, prompts, tmp_path, monkeypatch, compilations, method):
    """Minibatches of five slots and fewer, rounds of three and of one: filled up, so that the first round's graphs serve. Grids, too."""
    after, end = [], Trainer.end

    def counted(*arguments, **settings):
        after.append(len(compilations))
        return end(*arguments, **settings)

    monkeypatch.setattr(Trainer, "end", counted)
    words = ("--model", sd, *options(method, pickscore, pictures, prompts), *WORDS, "--rounds", 3, "--pairs_per_step", 8, "--train_batch", 5)
    call("baselines", *words, "--out", tmp_path / "compiled", "--compile", "--grid_every", 1)
    assert len(after) == 3 and after[0] > 10 and set(after) == {len(compilations)}
    call("baselines", *words, "--out", tmp_path / "eager")
    for ours, theirs in zip(log_of(tmp_path / "compiled"), log_of(tmp_path / "eager"), strict=True):
        assert ours.pop("evaluations") > theirs.pop("evaluations") and (ours["score"] is None) == (theirs["score"] is None)
        ours = {k: v for k, v in ours.items() if "validation" not in k}         # the grids'
        assert {k: v or 0 for k, v in ours.items()} == pytest.approx({k: v or 0 for k, v in theirs.items()}, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["ddpo", "mapo"])
def test_resume_is_exact_and_processes_agree(small, pickscore, pictures, prompts, tmp_path, monkeypatch, method):
    monkeypatch.setattr(torch.optim, "AdamW", gentle.adamw)
    words = ("baselines", "--model", small, *options(method, pickscore, pictures, prompts), *WORDS, "--save_every", 1)
    call(*words, "--rounds", 3, "--out", tmp_path / "whole")
    if method == "ddpo":
        call(*words, "--rounds", 1, "--out", tmp_path / "cut")
        call(*words, "--rounds", 3, "--out", tmp_path / "cut")
        assert_same_run(tmp_path / "whole", tmp_path / "cut", 3)
    together(*words, "--rounds", 3, "--out", tmp_path / "two", adam=gentle.adamw)
    assert_close_loras(tmp_path / "whole", tmp_path / "two")


def test_snapshots_stay(small, pickscore, prompts, tmp_path):
    call("baselines", "--method", "d3po", "--model", small, "--reward", pickscore, "--prompts", prompts, "--out", tmp_path / "run", *WORDS,
         "--rounds", 3, "--snapshot_every", 1)
    files = [tmp_path / "run/loras" / f"{i:05d}" / LORA for i in (1, 2, 3)]
    last, previous = load_file(files[2]), load_file(files[1])
    assert files[0].exists() and all(torch.equal(v, last[k]) for k, v in load_file(tmp_path / "run" / LORA).items())
    assert any(not torch.equal(v, last[k]) for k, v in previous.items())


def test_what_cannot_be_trained_is_refused(sd, pickscore, pictures, prompts, tmp_path):
    done = shell("baselines.py", "--method", "mapo", "--model", sd, "--out", tmp_path / "a", check=False)       # as a user runs it
    assert done.returncode == 2 and "--pairs" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(InputError, match="choose one of ddpo, flow-grpo, d3po"):
        call("baselines", "--method", "dpo", "--model", sd, "--out", tmp_path / "b")
    with pytest.raises(InputError, match="--clip_range -1.0: must be above 0"):
        call("baselines", "--method", "ddpo", "--clip_range", -1)
    with pytest.raises(InputError, match="unknown option '--start'"):          # SPO's own options mean nothing here
        call("baselines", "--method", "ddpo", "--start", "win")
    folder = tmp_path / "ties"
    folder.mkdir()
    for name in ("0a.png", "0b.png"):
        (folder / name).write_bytes((pictures / name).read_bytes())
    (folder / "pairs.jsonl").write_text(json.dumps(dict(caption="x", image_0="0a.png", image_1="0b.png", label_0=0.5)) + "\n")
    with pytest.raises(InputError, match="every pair is a tie"):
        call("baselines", "--method", "mapo", "--model", sd, "--pairs", folder, "--out", tmp_path / "c")


def test_defaults_are_the_methods_own():
    assert d3po_as_spo(BaselineConfig(beta=0.1)) == SPOConfig(out="runs/baseline", lr=0.0, prompts_per_round=40, judge="pickscore", k=2, j=20,
                                                              t_min=0, t_max=1000, threshold=0.0, beta=0.1, clamp=0.1)
    assert set(baselines.PRESETS) == set(spo_train.PRESETS) and "k" not in baselines.PRESETS["sdxl"]
