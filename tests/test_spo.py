"""spo_train.py: pools, pairs, the loss and its gradients, MSPO's slots, and every option for one round."""
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ddim
import finetune
import gentle
import helpers
import lora
import spo_train
from clip_spm import preprocess_decoded
from conftest import assert_close, assert_same_gradients, randomize, seeded
from diffusion import encode_empty, encode_prompts, generate, guided_noise, judge_features, negative
from loading import load_pipeline
from evaluate import trace_prompt
from finetune import FREE, LOW, Totals, Trainer, cut_minibatches, fit_memory, vae_decoder
from helpers import ALONE, PROMPTS, NoWaiting, bare_trainer, call, command, log_of, shell, turn_of, unpinned
from loading import judge_source, load_clip
from observers import FAULTS, DecoderCheck, Faults, report
from report import draw_trace
from spo_train import Batch, Pairs, SPOConfig, Steps, choose_pair, pool_groups, spo_loss
from training import Processes, generator, parse_options, permutation
from weights import InputError

STEPS_20 = [951 - 50 * i for i in range(20)]
STEPS_6 = [831, 665, 499, 333, 167, 1]


# Pools and pairs

def test_pool_groups_by_hand():
    assert pool_groups(STEPS_20, 0, 751, 1) == [[i] for i in range(4, 20)]
    assert pool_groups(STEPS_20, 0, 750, 1) == [[i] for i in range(5, 20)]
    assert pool_groups(STEPS_20, 0, 751, 4) == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert pool_groups(STEPS_20, 501, 751, 4) == [[4, 5, 6, 7], [8, 9]]
    assert pool_groups(STEPS_20, 0, 999, 20) == [list(range(20))] == pool_groups(STEPS_20, 0, 999, 99)
    assert pool_groups(STEPS_20, 251, 251, 3) == [[14]]
    # As the released MSPO: the very last step joins the group before.
    assert pool_groups(STEPS_20, 0, 751, 3)[-2:] == [[13, 14, 15], [16, 17, 18, 19]]
    assert pool_groups(STEPS_20, 0, 751, 5) == [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 19]]
    assert pool_groups(STEPS_20, 0, 751, 6)[-1] == [16, 17, 18, 19] and pool_groups(STEPS_20, 0, 1, 3) == [[19]]
    for low, high in ((752, 799), (2, 50), (800, 100)):
        with pytest.raises(InputError, match=f"{low}..{high}"):
            pool_groups(STEPS_20, low, high, 1)


def pair_of(scores, threshold=0.3, how="best-worst", uniform=(0.0, 0.0)):
    """(win, lose, valid) of one pool."""
    return tuple(v.item() for v in choose_pair(torch.tensor([scores]), threshold, how, torch.tensor([uniform])))


def test_choose_pair_best_and_worst():
    assert pair_of([1.0, 5.0, -2.0, 3.0]) == (1, 2, True)
    assert pair_of([7.0, 7.0, 7.0])[2] is False and pair_of([7.0, 7.0], threshold=0.0)[2] is False       # ties never count
    # Softmax of two scores that differ by d differs by tanh(d / 2): 0.3 at d = 0.6190392.
    edge = 2 * math.atanh(0.3)
    assert pair_of([20.0, 20.0 + edge + 1e-3]) == (1, 0, True) and pair_of([20.0 + edge - 1e-3, 20.0]) == (0, 1, False)
    assert pair_of([20.0, 20.0 + edge + 1e-3], threshold=0.4)[2] is False


@settings(deadline=None, max_examples=200)
@given(scores=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9), threshold=st.floats(-1, 1), how=st.sampled_from(["best-worst", "random"]),
       uniform=st.tuples(*[st.floats(0, 1, exclude_max=True, width=32)] * 2))
def test_any_pool_gives_a_pair_of_two(scores, threshold, how, uniform):
    """The winner is not below the loser, the two differ unless all tie, and the threshold is that of the softmax of the two."""
    win, lose, valid = pair_of(scores, threshold, how, uniform)
    values = torch.tensor(scores).tolist()
    assert values[win] >= values[lose] and (win != lose or (how == "best-worst" and len(set(values)) == 1))
    if how == "best-worst":
        assert (values[win], values[lose]) == (max(values), min(values))
    share = math.tanh((values[win] - values[lose]) / 2)
    assert valid == (share > threshold) or abs(share - threshold) < 1e-6


def test_choose_pair_works_on_a_batch():
    win, lose, valid = choose_pair(torch.tensor([[0.0, 1.0, 9.0], [4.0, 4.1, 4.05], [3.0, 2.0, 1.0]]), 0.3, "best-worst", torch.zeros(3, 2))
    assert (win.tolist(), lose.tolist(), valid.tolist()) == ([2, 1, 0], [0, 0, 2], [True, False, True])


@pytest.mark.parametrize("k", [2, 3, 4])
def test_random_pair_takes_two_different_ones_and_orders_them(k):
    """Any ordered choice is equally likely, so each unordered pair is; the better one wins."""
    n = 6000
    scores = torch.randn(n, k, generator=seeded(0))
    win, lose, _ = choose_pair(scores, 0.3, "random", torch.rand(n, 2, generator=seeded(1)))
    assert (win != lose).all() and (scores.gather(1, win[:, None]) > scores.gather(1, lose[:, None])).all()
    counts = Counter((min(p), max(p)) for p in zip(win.tolist(), lose.tolist()))
    expected = n / (k * (k - 1) / 2)
    assert len(counts) == k * (k - 1) // 2 and all(abs(c - expected) < 5 * expected ** 0.5 for c in counts.values())
    assert pair_of([1.0] * k, 0.0, "random", (1.0, 1.0))[:2] != (k - 1, k - 1)          # rounding up to 1 stays inside
    assert k == 2 or (win != scores.argmax(1)).any()


# The loss

def test_loss_of_two_pairs_by_hand():
    """-log sigmoid(beta (log r_w - log r_l)), the second pair clamped on both sides."""
    loss = spo_loss(torch.tensor([0.02, 0.5]), torch.tensor([-0.03, -0.5]), beta=10.0, clamp=0.1)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(-10 * math.log(1.1 / 0.9)))], abs=1e-6)
    loss = spo_loss(torch.tensor([0.02, 0.5]), torch.tensor([-0.03, -0.5]), beta=10.0, clamp=0.0)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(-10.0))], abs=1e-7)
    assert spo_loss(torch.zeros(1), torch.zeros(1), 10.0, 0.1).item() == pytest.approx(math.log(2))


def test_loss_bounds_under_the_clamp():
    win, lose = torch.tensor([9.0, -9.0]), torch.tensor([-9.0, 9.0])
    assert spo_loss(win, lose, 10.0, 0.1).tolist() == pytest.approx([0.126, 2.133], abs=5e-4)


def test_gradient_is_exactly_zero_outside_the_clamp_and_right_inside():
    win = torch.tensor([0.3, -0.3, 0.05, 0.05], requires_grad=True)
    lose = torch.tensor([0.0, 0.02, 0.3, -0.02], requires_grad=True)
    spo_loss(win, lose, 10.0, 0.1).sum().backward()
    assert win.grad[:2].tolist() == [0, 0] and lose.grad[2].item() == 0
    assert win.grad[3].item() == pytest.approx(-10 / (1 + math.exp(10 * 0.07)), rel=1e-5)
    assert lose.grad[3].item() == pytest.approx(10 / (1 + math.exp(10 * 0.07)), rel=1e-5)
    assert lose.grad[0].item() == pytest.approx(10 / (1 + math.exp(10 * math.log(1.1))), rel=1e-5)


@settings(deadline=None, max_examples=100)
@given(count=st.integers(0, 200), size=st.integers(1, 50), seed=st.integers(0, 99))
def test_minibatches_hold_every_slot_once(count, size, seed):
    slots = [3 * i + 1 for i in range(count)]
    batches = cut_minibatches(slots, size, seed, "pairs", 0)
    assert sorted(s for b in batches for s in b) == sorted(slots)
    sizes = [len(b) for b in batches]
    assert all(sizes) and (not sizes or max(sizes) - min(sizes) <= 1)
    assert len(slots) < size or all(2 * size // 3 <= n <= math.ceil(3 * size / 2) for n in sizes)      # whole pairs
    assert batches == cut_minibatches(slots, size, seed, "pairs", 0)


def test_minibatches_are_shuffled_by_key():
    orders = {tuple(s for b in cut_minibatches(list(range(40)), 8, 0, "pairs", e, r) for s in b) for e in range(3) for r in range(3)}
    assert len(orders) == 9 and all(list(o) != sorted(o) for o in orders)


# Sampling on the random checkpoint

def setup(sd, spm, double: bool = False, **changes):
    """(pipe, judge, config, cond, uncond, text features) of the seven prompts.

    `double`: the UNet in fp64, so that results of differently batched forwards differ by mathematics alone, not by rounding.
    """
    config = SPOConfig(**(dict(model=str(sd), spm=str(spm), dtype="fp32", steps=6, k=3, threshold=0.0, lr=1e-3) | changes))
    torch.manual_seed(0)
    pipe, judge, observers = spo_train.prepare(config, ALONE)
    judge.decode = observers[0].pictures.decode             # `sample` watches with observers of its own
    if double:
        pipe.unet.double()
    cond = encode_prompts(pipe, PROMPTS)
    return pipe, judge, config, cond, negative(pipe, cond, encode_empty(pipe)), judge_features(pipe, judge.clip, PROMPTS)


def sample(parts, chosen=None, check=None, **changes) -> Pairs:
    """Pairs of some of the prompts; each prompt's generator is keyed by its place in the list.

    `check`: what decodes for a DecoderCheck.
    """
    pipe, judge, config, cond, uncond, text = parts
    config = dataclasses.replace(config, **changes)
    chosen = list(range(len(PROMPTS))) if chosen is None else chosen
    batch = Batch(cond[chosen], uncond[chosen], text[chosen], [generator(0, "pool", 0, i) for i in chosen])
    judge = dataclasses.replace(judge, chunk=config.decode_batch)
    observers = [Faults(judge)]
    if check:
        choose = functools.partial(choose_pair, threshold=config.threshold, how=config.pair)
        observers.append(DecoderCheck(judge, check, choose))
    pools = spo_train.sample_pools(pipe, judge, batch, config, observers)
    return dataclasses.replace(spo_train.collect(pools), cond=cond[chosen])


@pytest.fixture
def parts(sd, spm):
    """Fresh policy with LoRA at its start."""
    return setup(sd, spm)


@torch.no_grad()
def perturb(pipe, size: float, seed: int = 0) -> None:
    """Move the LoRA off its start, so that policy and reference differ."""
    for i, layer in enumerate(lora.layers(pipe.unet).values()):
        layer.lora_B.weight.copy_(size * torch.randn(layer.lora_B.weight.shape, generator=seeded(seed + i)))


def test_pairs_have_fixed_slots(parts):
    pairs = sample(parts, t_max=751, j=2)                   # 665, 499 | 333, 167, 1: the last step joins
    assert pairs.x_t.shape == pairs.x_next.shape == (7, 5, 2, 4, 8, 8) and pairs.valid.shape == (7, 5) and pairs.scores.shape == (7, 2, 3)
    assert torch.isfinite(pairs.x_next).all() and pairs.scores.std() > 0
    group = [0, 0, 1, 1, 1]
    best, worst = pairs.scores.amax(-1)[:, group], pairs.scores.amin(-1)[:, group]
    assert torch.equal(pairs.valid, torch.tanh((best - worst) / 2) > 0.0)


@pytest.mark.parametrize("j", [1, 3])
def test_paths_of_winner_and_loser_connect(parts, j):
    """MSPO: a group starts from one x_t, and each slot's x_next is the same candidate's next x_t (section 4.5)."""
    pairs = sample(parts, j=j)
    groups = pool_groups(STEPS_6, 0, 751, j)
    slot = 0
    for group in groups:
        assert torch.equal(pairs.x_t[:, slot, 0], pairs.x_t[:, slot, 1])
        assert not torch.equal(pairs.x_next[:, slot, 0], pairs.x_next[:, slot, 1])
        for inner in range(1, len(group)):
            assert torch.equal(pairs.x_t[:, slot + inner], pairs.x_next[:, slot + inner - 1])
        slot += len(group)
    assert slot == pairs.x_t.shape[1] == 5


@pytest.mark.parametrize("j", [1, 2])
def test_trajectory_goes_on_from_the_chosen_candidate(parts, j):
    ends = [i for i, g in enumerate(g for group in pool_groups(STEPS_6, 0, 751, j) for g in [0] * (len(group) - 1) + [1]) if g][:-1]
    for start, place in (("win", 0), ("lose", 1)):
        pairs = sample(parts, j=j, continue_from=start)
        for end in ends:
            assert torch.equal(pairs.x_t[:, end + 1, 0], pairs.x_next[:, end, place])
    pairs = sample(parts, j=j, k=2, continue_from="random")         # of two candidates one is the winner, the other the loser
    taken = torch.stack([(pairs.x_t[:, e + 1, :1] == pairs.x_next[:, e]).flatten(2).all(-1) for e in ends])
    assert (taken.sum(-1) == 1).all() and 0 < taken[..., 0].float().mean() < 1


def test_one_pool_recomputed_by_hand(parts):
    """Candidates are mean + sigma x noise of the keyed generator; the random start is the third kind of draw."""
    pipe, judge, config, cond, uncond, text = parts
    pairs, i = sample(parts, [2, 4, 5]), 1                  # the middle one of three prompts, prompt 4 of the list
    g, c, u = generator(0, "pool", 0, 4), cond.map(lambda v: v[4:5]), uncond.map(lambda v: v[4:5])
    step = lambda x, t: ddim.step_gaussian(pipe.schedule, x, guided_noise(pipe, x, t, c, u, 5.0), t, t - 166)
    with torch.no_grad():
        mean, std = step(torch.randn(1, 4, 8, 8, generator=g), 831)
        x_t = mean + std * torch.randn(1, 4, 8, 8, generator=g)
        for slot, t in enumerate(STEPS_6[1:]):
            assert_close(pairs.x_t[i, slot, :1], x_t, what=f"x_t at {t}")
            mean, std = step(x_t, t)
            noise, uniform = torch.randn(1, 3, 4, 8, 8, generator=g)[0], torch.rand(3, generator=g)
            pool = mean + std * noise
            win, lose = pairs.scores[i, slot].argmax(), pairs.scores[i, slot].argmin()
            assert_close(pairs.x_next[i, slot], pool[torch.stack([win, lose])], what=f"pool at {t}")
            x_t = pool[int(uniform[0] * 3)][None]


def test_scores_are_the_judge_on_the_next_timestep(parts):
    """x0 predicted at the next smaller timestep, decoded, with that timestep; after the last step the latent itself at 0."""
    from clip_spm import preprocess_decoded
    pipe, judge, config, cond, uncond, text = parts
    pairs = sample(parts, k=2)
    with torch.no_grad():
        for slot, t in enumerate(STEPS_6[2:] + [0]):
            x = pairs.x_next[:, slot].flatten(0, 1)
            c, u = (v.map(lambda w: w.repeat_interleave(2, 0)) for v in (cond, uncond))
            x0 = x if t == 0 else ddim.predict_x0(pipe.schedule, x, guided_noise(pipe, x, t, c, u, 5.0), t)
            features = judge.clip.image_features(preprocess_decoded(pipe.vae.decode(x0), 16), torch.full((14,), t))
            scores = judge.clip.score(features, text.repeat_interleave(2, 0)).view(7, 2)
            assert_close(scores, pairs.scores[:, slot].sort(descending=True).values, 1e-4)


def tensors(pairs: Pairs) -> list[torch.Tensor]:
    """Everything that a prompt's pools gave."""
    return [pairs.x_t, pairs.x_next, pairs.valid, pairs.scores, *pairs.notes.values()]


@pytest.mark.parametrize("changes", [{}, dict(j=2, pair="random")])
def test_pool_does_not_depend_on_the_batch(parts, changes):
    whole = sample(parts, [0, 3, 6], **changes)
    for place, i in enumerate([0, 3, 6]):
        alone = sample(parts, [i], **changes)
        for ours, theirs in zip(tensors(alone), tensors(whole), strict=True):
            assert_close(ours[0].float(), theirs[place].float())


def test_nothing_is_sampled_below_t_min(parts):
    """The walk ends with the last scored step."""
    pipe, calls = parts[0], []
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(int(torch.as_tensor(inputs[1]).max())))
    pairs = sample(parts, t_min=300, t_max=500)
    handle.remove()
    assert pairs.x_t.shape[1] == 2 and calls == [831, 665, 499, 333, 167]        # 167 scores the candidates of 333


# Training on the pairs

def train(parts, pairs, optimizer, times=1, processes=ALONE, **changes) -> list[dict]:
    """Several rounds of updates on the same pairs."""
    pipe, judge, config, cond, uncond, text = parts
    config = dataclasses.replace(config, **changes)
    trainer = bare_trainer(pipe, config, optimizer, processes)
    pairs = dataclasses.replace(pairs, cond=cond)
    return [spo_train.train_on_pairs(trainer, pairs, turn_of(range(len(PROMPTS)), i), config) for i in range(times)]


def ratios_of(parts, pairs, slot: int, t: int, shared: bool):
    """Log-ratios of all prompts at one slot, through the function under test."""
    pipe, judge, config, cond, uncond, text = parts
    apart = torch.arange(0 if shared else 7)
    steps = Steps(pairs.x_t[:, slot], pairs.x_next[:, slot], torch.full((7,), t), torch.full((7,), t - 1000 // config.steps), apart, cond, uncond)
    return spo_train.pair_log_ratios(pipe, steps, config)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_log_ratio_is_exactly_zero_at_the_start(sd, spm, dtype):
    parts = setup(sd, spm, dtype=dtype)
    pairs = sample(parts, j=2)
    for slot, t in enumerate(STEPS_6[1:]):
        for values in ratios_of(parts, pairs, slot, t, shared=slot in (0, 2, 4)):
            assert torch.equal(values, torch.zeros(7)) and values.requires_grad
    perturb(parts[0], 0.05)
    assert all(v.abs().min() > 0 for v in ratios_of(parts, pairs, 0, 665, True))


def fp16_gradients(sd, spm, pairs, dtype: str) -> list[torch.Tensor]:
    """What an optimizer step gets to see of the LoRA's gradients; B is small, as after a first update."""
    parts, seen = setup(sd, spm, dtype=dtype), []
    parameters = lora.parameters(parts[0].unet)
    for n, p in enumerate(parameters[1::2]):
        p.data = 1e-5 * torch.randn(p.shape, generator=seeded(n))
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in parameters))
    train(parts, pairs, optimizer, pairs_per_step=1000, clamp=0.0, clip_norm=1e9)
    return seen


def test_fp16_keeps_the_gradient(sd, spm, monkeypatch):
    """Cards without bf16 train in fp16: the loss is scaled, or most gradients of A are rounded to zero."""
    pairs = sample(setup(sd, spm))
    want = fp16_gradients(sd, spm, pairs, "fp32")
    got = fp16_gradients(sd, spm, pairs, "fp16")
    monkeypatch.setattr(helpers, "loss_scaler", lambda config, device: torch.amp.GradScaler("cpu", enabled=False))
    unscaled = fp16_gradients(sd, spm, pairs, "fp16")

    def cosine(gradients, which) -> float:
        flat = [torch.cat([g.flatten() for g in part[which]]) for part in (gradients, want)]
        return float(torch.nn.functional.cosine_similarity(*flat, dim=0))

    for which in (slice(None), slice(0, None, 2)):          # all, A alone
        assert cosine(got, which) > 0.999
    assert cosine(unscaled, slice(0, None, 2)) < 0.9, "this test could not fail"


def test_an_overflow_lowers_the_scale_and_is_no_fault(sd, spm, capsys):
    parts = setup(sd, spm, dtype="fp16", pairs_per_step=4)
    pipe, _, config, cond, *_ = parts
    perturb(pipe, 0.05)
    pairs = dataclasses.replace(sample(parts), cond=cond)
    optimizer = torch.optim.AdamW(lora.parameters(pipe.unet), lr=1e-3)
    trainer = bare_trainer(pipe, config, optimizer)
    trainer.scaler.update(2.0 ** 45)
    stats = spo_train.train_on_pairs(trainer, pairs, turn_of(range(len(PROMPTS))), config)
    assert stats["skipped"] > 3 and trainer.rounds.bad == 0 and "not finite" not in capsys.readouterr().err
    assert trainer.scaler.get_scale() == 2.0 ** (45 - stats["skipped"])
    trainer.scaler.update(0.5)                  # below 1 there is nothing left to lower
    next(iter(lora.parameters(pipe.unet))).data[0, 0] = torch.nan
    assert spo_train.train_on_pairs(trainer, pairs, turn_of(range(len(PROMPTS))), config)["skipped"] > 0 < trainer.rounds.bad


def test_reference_is_untouched_by_training(parts, sd):
    pipe = parts[0]
    base = load_pipeline(str(sd))
    train(parts, sample(parts), torch.optim.AdamW(lora.parameters(pipe.unet), lr=1e-2), 3, pairs_per_step=8)
    ours = {k: v for k, v in pipe.unet.state_dict().items() if ".lora_" not in k}
    assert ours.keys() == base.unet.state_dict().keys() and all(torch.equal(v, ours[k]) for k, v in base.unet.state_dict().items())
    x, cond = torch.randn(2, 4, 8, 8, generator=seeded(0)), parts[3].map(lambda v: v[:2])
    with torch.no_grad():
        plain = base.unet(x, 500, cond.prompt_embeds)
        with lora.disabled(pipe.unet):
            assert torch.equal(pipe.unet(x, 500, cond.prompt_embeds), plain)
        assert (pipe.unet(x, 500, cond.prompt_embeds) - plain).abs().max() > 1e-3


def four_forwards(parts, pairs, batch, t, config) -> torch.Tensor:
    """Eq. 4 as it stands: policy and reference, winner and loser, each on its own; the mean over a minibatch of (prompt, slot)."""
    pipe, judge, _, cond, uncond, text = parts
    total = 0.0
    for prompt, slot in batch:
        c, u, log_ratio = cond.map(lambda v: v[[prompt]]), uncond.map(lambda v: v[[prompt]]), []
        for x_t, x_next in zip(pairs.x_t[prompt, slot], pairs.x_next[prompt, slot]):
            log_p = []
            for off in (False, True):
                with lora.disabled(pipe.unet) if off else torch.enable_grad():
                    noise_pred = guided_noise(pipe, x_t[None], t[slot], c, u, config.guidance_scale)
                mean, std = ddim.step_gaussian(pipe.schedule, x_t[None], noise_pred, t[slot], t[slot] - 166)
                log_p.append(torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x_next).mean())
            log_ratio.append((log_p[0] - log_p[1].detach()).clamp(math.log(1 - config.clamp), math.log(1 + config.clamp)))
        total = total - torch.sigmoid(config.beta * (log_ratio[0] - log_ratio[1])).log() / len(batch)
    return total


@pytest.mark.parametrize("j, train_batch", [(1, 100), (3, 100), (3, 4)])
def test_shared_forward_equals_four_forwards(sd, spm, j, train_batch):
    """Same loss and same gradient of every LoRA weight, with one x_t per pair, and with two where paths have parted."""
    ours, plain = (setup(sd, spm, double=True, j=j, train_batch=train_batch, clip_norm=1e9) for _ in range(2))
    pairs = sample(ours)
    for parts in (ours, plain):
        perturb(parts[0], 0.05)
    pairs.valid[:] = False
    batch = [(0, 0), (0, 1), (2, 1), (3, 2), (1, 3), (2, 3), (5, 4), (6, 0)]
    for prompt, slot in batch:
        pairs.valid[prompt, slot] = True
    loss = four_forwards(plain, pairs, batch, STEPS_6[1:], plain[2])
    loss.backward()

    class Still(torch.optim.SGD):
        """Keeps the gradients, moves nothing."""

        def step(self):
            self.kept = [p.grad.clone() for p in lora.parameters(ours[0].unet)]

    optimizer = Still(lora.parameters(ours[0].unet), lr=1.0)
    stats = train(ours, pairs, optimizer, pairs_per_step=len(batch))[0]
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5) and stats["updates"] == 1 and stats["pairs"] == len(batch)
    for p, grad in zip(lora.parameters(ours[0].unet), optimizer.kept, strict=True):
        p.grad = grad
    assert 0 < stats["clipped"] < 1                         # some ratios inside, some outside the clamp
    assert_same_gradients(ours[0].unet, plain[0].unet)


def test_updates_move_winners_above_losers(parts):
    """On the pairs trained on: exact tie at the start, then the log-ratio of the winner is the larger one."""
    pairs = sample(parts, k=4)
    first, *_, last = train(parts, pairs, torch.optim.AdamW(lora.parameters(parts[0].unet), lr=1e-3), 6, pairs_per_step=100)
    assert first["margin"] == 0 and first["accuracy"] == 0 and first["loss"] == pytest.approx(math.log(2)) and first["updates"] == 1
    assert last["margin"] > 1e-3 and last["accuracy"] > 0.8 and last["loss"] < first["loss"] and last["ratio_win"] > last["ratio_lose"]


def test_gradient_is_really_clipped(parts):
    """What the optimizer sees is at most the bound, though the gradient itself is far above it."""
    pipe, seen = parts[0], []
    perturb(pipe, 0.02)
    optimizer = torch.optim.SGD(lora.parameters(pipe.unet), lr=0.0)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(
        math.sqrt(sum(float(p.grad.square().sum()) for g in o.param_groups for p in g["params"]))))
    stats = train(parts, sample(parts), optimizer, clip_norm=1e-3, pairs_per_step=10)[0]
    assert len(seen) == stats["updates"] >= 3 and stats["grad_norm"] > 2e-3 and all(n <= 1e-3 * (1 + 1e-4) for n in seen)


def test_minibatch_gradient_does_not_depend_on_train_batch(small, spm):
    gradients = []
    for size in (1, 5, 100):
        parts = setup(small, spm, double=True, train_batch=size)
        pairs = sample(parts, j=2)
        perturb(parts[0], 0.02)
        train(parts, pairs, torch.optim.SGD(lora.parameters(parts[0].unet), lr=1.0), clip_norm=1e9)
        gradients.append(torch.cat([p.detach().flatten() for p in lora.parameters(parts[0].unet)]))
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])


def test_no_valid_pair_is_no_update(parts):
    pairs = sample(parts, threshold=1.0)
    stats = train(parts, pairs, torch.optim.AdamW(lora.parameters(parts[0].unet), lr=1.0))[0]
    assert stats["pairs"] == stats["updates"] == stats["skipped"] == 0 and stats["valid_share"] == 0 and lora.norm(parts[0].unet) == 0


def test_a_gradient_that_is_not_finite_is_skipped(parts):
    pairs = sample(parts)
    pairs.x_next[0, 0] = float("nan")
    stats = train(parts, pairs, torch.optim.AdamW(lora.parameters(parts[0].unet), lr=1e-3), pairs_per_step=10)[0]
    assert stats["skipped"] == 1 and stats["updates"] >= 2 and math.isfinite(stats["loss"])
    assert all(torch.isfinite(p).all() for p in lora.parameters(parts[0].unet))


@pytest.mark.parametrize("broken, fault", [("unet", 1), ("decode", 2), ("features", 3)])
def test_what_is_not_finite_is_found_reported_and_not_used(parts, capsys, broken, fault):
    """The third pool of the second prompt only; everything else is as it was."""
    pipe, judge, config = parts[:3]
    owner, name = (pipe.unet, "forward") if broken == "unet" else (judge, broken)
    clean, original, calls = sample(parts), getattr(owner, name), []

    def poisoned(*args, **kwargs):
        out = original(*args, **kwargs)
        pools = 42 if broken == "unet" else 21              # 7 prompts x 3 candidates; the UNet's with and without the prompt
        calls.append(len(out))
        return out.index_fill(0, torch.tensor([4]), float("nan")) if len(out) == pools and calls.count(pools) == 3 else out

    setattr(owner, name, poisoned)
    pairs = sample(parts, decode_batch=64)
    found = pairs.notes["fault"]
    wrong = found.nonzero().tolist()
    assert wrong[0] == [1, 2] and found[1, 2] == fault and {p for p, _ in wrong} == {1}
    assert not pairs.valid[1, 2] and torch.equal(pairs.valid[0], clean.valid[0]) and not clean.notes["fault"].any()
    groups = spo_train.pool_groups(pipe.schedule.timesteps(6), config.t_min, config.t_max, 1)
    assert report(pairs, turn_of(range(7)), True)["not_finite"] == len(wrong)
    said = capsys.readouterr().err
    assert FAULTS[fault] in said and PROMPTS[1] in said and f"t = {pipe.schedule.timesteps(6)[groups[2][0]]}" in said


def test_a_loss_that_is_not_finite_is_reported_with_its_prompt(parts, capsys):
    pairs = sample(parts)
    pairs.x_next[3, 1] = float("inf")
    stats = train(parts, pairs, torch.optim.AdamW(lora.parameters(parts[0].unet), lr=1e-3))[0]
    said = capsys.readouterr().err
    assert stats["skipped"] == 1 and said.count("warning") == 1 and PROMPTS[3] in said and "the loss of a pair at t = " in said


def test_ten_in_a_row_stop_the_run_and_keep_the_last_good_lora(small, spm, prompts, tmp_path, monkeypatch, capsys):
    """Two sound rounds; then every loss is infinite."""
    true, rounds = spo_train.pair_log_ratios, []
    real = spo_train.sample_round

    def counted(*args, **kwargs):
        rounds.append(1)
        return real(*args, **kwargs)

    def broken(*args, **kwargs):
        win, lose = true(*args, **kwargs)
        return (win, lose) if len(rounds) <= 2 else (win * math.inf, lose)

    words = ("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, "--dtype", "fp32", "--steps", 4, "--k", 2, "--threshold", 0,
             "--prompts_per_round", 4, "--pairs_per_step", 4, "--lr", 0.01)
    call(*words, "--out", tmp_path / "good", "--rounds", 2)
    rounds.clear()
    monkeypatch.setattr(spo_train, "sample_round", counted)
    monkeypatch.setattr(spo_train, "pair_log_ratios", broken)
    with pytest.raises(InputError, match="10 optimizer steps in a row, or rounds, were not finite; the last good LoRA is in"):
        call(*words, "--out", tmp_path / "run", "--rounds", 50)
    good, kept = (load_file(tmp_path / f / "pytorch_lora_weights.safetensors") for f in ("good", "run"))
    assert all(torch.equal(v, kept[k]) for k, v in good.items()) and any(v.any() for k, v in good.items() if "lora_B" in k)
    assert sum(row["skipped"] for row in log_of(tmp_path / "run")) == 10


def test_only_the_main_process_keeps_copies_of_the_lora_and_a_checkpoint_makes_none(small, tmp_path):
    pipe = load_pipeline(str(small))
    lora.add(pipe.unet, 2)
    kept = bare_trainer(pipe, SPOConfig()).copy()
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(kept, lora.parameters(pipe.unet), strict=True))
    other = bare_trainer(pipe, SPOConfig(), torch.optim.AdamW(lora.parameters(pipe.unet)), Processes(1, 2, torch.device("cpu")))
    assert other.copy() == []
    saved = {}
    other.scaler = torch.amp.GradScaler("cpu", enabled=False)
    other.rounds = SimpleNamespace(take_score=lambda: None, save=lambda score, **state: saved.update(state))
    other.save()
    assert [p.data_ptr() for p in saved["lora"]] == [p.data_ptr() for p in other.weights] and not saved["lora"][0].requires_grad


def test_a_lora_that_draws_nothing_finite_is_not_the_last_good_one(small, spm, prompts, tmp_path, monkeypatch):
    """The second round's update ruins the pictures: what is left behind is the LoRA of after the first, and no checkpoint of the ruin."""
    words = ("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, "--dtype", "fp32", "--steps", 4, "--k", 2, "--threshold", 0,
             "--prompts_per_round", 4, "--pairs_per_step", 4, "--lr", 0.01, "--save_every", 1, "--epochs", 99)
    call(*words, "--out", tmp_path / "good", "--rounds", 1)
    real, rounds = spo_train.sample_round, []

    def ruined(*args, **kwargs):
        pairs = real(*args, **kwargs)
        rounds.append(1)
        if len(rounds) <= 2:
            return pairs
        return dataclasses.replace(pairs, notes=dict(fault=torch.full_like(pairs.notes["fault"], 2)), valid=torch.zeros_like(pairs.valid))

    monkeypatch.setattr(spo_train, "sample_round", ruined)
    with pytest.raises(InputError, match="round 12: 10 optimizer steps in a row, or rounds"):
        call(*words, "--out", tmp_path / "run", "--rounds", 50)
    good, kept = (load_file(tmp_path / f / "pytorch_lora_weights.safetensors") for f in ("good", "run"))
    assert all(torch.equal(v, kept[k]) for k, v in good.items()) and any(v.any() for k, v in good.items() if "lora_B" in k)
    assert max(p.name for p in (tmp_path / "run").glob("checkpoint-*.pt")) == "checkpoint-000002.pt"


def test_checkpointing_changes_nothing(small, spm):
    norms = []
    for on in (False, True):
        parts = setup(small, spm, checkpointing=on)
        pairs = sample(parts)
        perturb(parts[0], 0.02)
        norms.append(train(parts, pairs, torch.optim.AdamW(lora.parameters(parts[0].unet), lr=1e-3))[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0


# Memory

SMALL = dict(sample_batch=1, train_batch=1, decode_batch=1, checkpointing=True)


@pytest.mark.parametrize("words, device, size, wanted", [
    ("", "cpu", 0, dict(memory="normal", sample_batch=16, train_batch=28, decode_batch=64, checkpointing=False)),         # tiny
    ("", "cuda", 8, dict(memory="normal", sample_batch=16)),
    ("--memory low", "cpu", 0, dict(SMALL, memory="low", beta=100.0, prompts_per_round=16)),
    ("--model sd15", "cpu", 0, dict(memory="normal", sample_batch=10, train_batch=10, decode_batch=16, checkpointing=False)),
    ("--model sd15", "cuda", 80, dict(memory="normal", sample_batch=10, checkpointing=False)),
    ("--model sd15", "cuda", 40, dict(memory="normal", sample_batch=10, checkpointing=False)),
    ("--model sd15", "cuda", 24, dict(memory="low", sample_batch=2, train_batch=4, decode_batch=2, checkpointing=True)),
    ("--model sd15 --memory normal", "cuda", 12, dict(memory="normal", sample_batch=10)),
    ("--model sd15 --memory low --decode-batch 9", "cuda", 80, dict(memory="low", sample_batch=2, train_batch=4, decode_batch=9)),
    ("--model sd15 --sample_batch 10 --checkpointing=false --k 3", "cuda", 24, dict(sample_batch=10, decode_batch=2, checkpointing=False, k=3)),
    ("--model sdxl", "cuda", 80, dict(memory="normal", sample_batch=2, train_batch=1, decode_batch=4, checkpointing=False)),
    ("--model sdxl", "cuda", 24, dict(SMALL, memory="low", k=2, j=4, rank=64)),
    ("--model ./mine", "cuda", 24, dict(memory="low", sample_batch=2, train_batch=4, k=4)), ("--model ./mine", "cuda", 80, dict(memory="normal", sample_batch=10))])
def test_memory_decides_batches_that_the_command_line_does_not(monkeypatch, words, device, size, wanted):
    """Command line over --memory over the model's preset; nothing else changes."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(total_memory=size * 2 ** 30))
    given = parse_options(SPOConfig, spo_train.PRESETS, words.split())
    config = fit_memory(given, spo_train.PRESETS, torch.device(device), words.split())
    assert {name: getattr(config, name) for name in wanted} == wanted
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(given, f.name)}
    assert changed <= {"memory", *SMALL} <= set(FREE)


def test_a_model_of_ones_own_gets_the_settings_of_its_kind(sd, sdxl, tmp_path):
    """By a folder's UNet or a single file's tensors; a hub id does not tell, and --preset wins over all."""
    parse = lambda *words: parse_options(SPOConfig, spo_train.PRESETS, [str(w) for w in words])  # noqa: E731
    single = tmp_path / "mine.safetensors"
    save_file({"conditioner.embedders.1.model.ln_final.weight": torch.ones(1)}, single)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for words, want in (((sd,), "sd15"), ((sdxl,), "sdxl"), ((single,), "sdxl"), ((tmp_path / "broken.safetensors",), "sd15"), (("tiny",), "tiny"),
                        (("someone/sdxl-tune",), "sd15"), (("someone/sdxl-tune", "--preset", "sdxl"), "sdxl"), ((sdxl, "--preset", "sd15"), "sd15")):
        config = parse("--model", *words)
        assert config.preset == want and config == dataclasses.replace(parse("--model", want), model=str(words[0]))
        low = ["--model", *map(str, words), "--memory", "low"]
        small = fit_memory(parse(*low), spo_train.PRESETS, torch.device("cpu"), low)
        assert small.preset == want and small.train_batch == LOW.get(want, LOW[""])["train_batch"]
        assert {"tiny": "tiny/model/spm", "sd15": "sd-v1-5_step", "sdxl": "/sdxl_step"}[want] in judge_source(config.model, config.preset, config.judge)
    with pytest.raises(InputError, match="--preset mine: choose one of tiny, tiny-flow, sd15, sdxl"):
        parse("--preset", "mine")


@pytest.mark.parametrize("script", ["spo_train", "baselines"])
def test_only_tiny_brings_its_own_prompts(script, sd, spm, tmp_path):
    with pytest.raises(InputError, match="--prompts: name a file"):
        call(script, "--model", sd, "--out", tmp_path / "run")


@pytest.mark.parametrize("model", ["tiny", "small", "small_xl"])
def test_low_memory_trains_the_same_lora(request, spm, prompts, tmp_path, monkeypatch, model):
    """Small batches (one sample, but four for what goes by SD-1.5's preset), recomputed activations and moved text encoders; two rounds, so that the second starts from a trained LoRA."""
    monkeypatch.setattr(torch.optim, "AdamW", gentle.adamw)
    folder = None if model == "tiny" else request.getfixturevalue(model)
    kind = () if model == "tiny" else ("--model", folder, "--spm", spm, "--prompts", prompts, "--vae", folder)
    words = ("spo_train", *kind, *BASE, "--rounds", 2, "--lr", 0.005, "--prompts_per_round", 4)
    name = "pytorch_lora_weights.safetensors"
    assert "--memory normal" in call(*words, "--out", tmp_path / "normal")
    assert "--memory low --" in call(*words, "--out", tmp_path / "low", "--memory", "low")
    assert json.loads((tmp_path / "low/config.json").read_text())["train_batch"] == (4 if model == "small" else 1)
    normal, low = (load_file(tmp_path / f / name) for f in ("normal", "low"))
    assert max(float(v.abs().max()) for k, v in low.items() if "lora_B" in k) > 1e-4
    for key, value in normal.items():
        assert_close(low[key], value, what=key)
    call(*words, "--out", tmp_path / "low", "--rounds", 3)          # goes on with other batches


def test_text_encoders_are_on_the_device_only_while_they_encode(sdxl, spm):
    """With `offload`; without, nothing moves. A device that only says where it was asked to be."""
    pipe, judge, config = setup(sdxl, spm, memory="low")[:3]
    encoders = [*pipe.text_encoders, judge.clip]
    movers, places, used = [*pipe.text_encoders, judge.clip.text_model], {}, []
    for i, (mover, encoder) in enumerate(zip(movers, encoders)):
        mover.to = lambda place, i=i: places.update({i: str(place)})
        encoder.text_model.register_forward_pre_hook(lambda module, inputs, i=i: used.append((i, dict(places))))
    trainer, config = bare_trainer(pipe, config), dataclasses.replace(config, sample_batch=1)
    pipe.device = torch.device("cpu", 0)
    plan = lambda: spo_train.sample_round(trainer, judge, turn_of([0, 1, 2]), config)  # noqa: E731
    plan()
    assert used == [(0, {0: "cpu:0"}), (1, {0: "cpu", 1: "cpu:0"}), (2, {0: "cpu", 1: "cpu", 2: "cpu:0"})]     # once a round each
    assert places == {0: "cpu", 1: "cpu", 2: "cpu"}
    places.clear()
    pipe.offload = False
    plan()
    assert places == {} and len(used) == 6


# The command

BASE = ("--dtype", "fp32", "--steps", "4", "--k", "2", "--prompts_per_round", "3", "--pairs_per_step", "4", "--threshold", "0",
        "--grid_every", "0", "--rounds", "1")


@pytest.mark.parametrize("options", [
    ("--k", 3), ("--j", 2), ("--j", 99, "--k", 4), ("--t_min", 300, "--t_max", 600), ("--t_max", 1000), ("--continue_from", "win"),
    ("--start", "lose"), ("--pair", "random"), ("--dtype", "bf16"), ("--clamp", 0), ("--eta", 0.5), ("--rank", 8, "--targets", "to_q,to_v"),
    ("--guidance_scale", 1), ("--threshold", 1), ("--checkpointing",), ("--resolution", 32), ("--grid_every", 1), ("--start=win", "--j", 3)])
def test_every_option_runs_one_round(small, spm, prompts, tmp_path, options):
    call("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, "--out", tmp_path / "run", *BASE, *options)
    record, = log_of(tmp_path / "run", timing=True)
    assert record["round"] == 1 and all(math.isfinite(v) for v in record.values() if isinstance(v, float))
    trained = options != ("--threshold", 1)
    assert (record["updates"] > 0) == (record["lora_norm"] > 0) == trained and record["skipped"] == 0
    weights = load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values()) and (tmp_path / "run/lora_kohya.safetensors").is_file()
    assert (tmp_path / "run/samples-00001.png").is_file() == (options == ("--grid_every", 1))
    assert options[0] != "--rank" or all("attn" in k and w.shape["lora_B" in k] == 8 for k, w in weights.items())


@pytest.mark.parametrize("judge", ["step-blind", "pickscore"])
def test_other_judges(small, spm, pickscore, prompts, tmp_path, judge):
    kind = ("--model", small, "--prompts", prompts, "--out", tmp_path / "run", *BASE, "--judge", judge)
    call("spo_train", *kind, "--spm", pickscore)
    assert log_of(tmp_path / "run")[0]["updates"] > 0
    with pytest.raises(InputError, match="is step-aware"):
        call("spo_train", *kind, "--spm", spm, "--out", tmp_path / "other")
    with pytest.raises(InputError, match="not step-aware"):
        call("spo_train", *kind[:-2], "--spm", pickscore, "--judge", "spm", "--out", tmp_path / "third")


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    """Folder of a minuscule random TAESD for the reduced checkpoints, which have two pixels a side per latent position."""
    from diffusers import AutoencoderTiny
    folder = tmp_path_factory.mktemp("taesd")
    randomize(AutoencoderTiny(decoder_block_out_channels=[8, 8], num_decoder_blocks=[2, 1], encoder_block_out_channels=[8, 8],
                              num_encoder_blocks=[1, 1])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("j", [1, 3])
def test_the_judge_sees_what_the_small_decoder_draws(sd, spm, taesd, j):
    """Its scores make the pairs; whether the VAE's would make the same is noted for pools with a pair, and changes nothing."""
    small, vae = setup(sd, spm, decoder=str(taesd), j=j, threshold=0.1), setup(sd, spm, j=j, threshold=0.1)
    full = vae_decoder(small[0], small[2])
    z = torch.randn(3, 4, 8, 8, generator=seeded(0))
    assert torch.equal(full(z), vae[1].decode(z)) and (small[1].decode(z) - full(z)).abs().max() > 0.1
    checked = sample(small, check=full)
    plain, other = sample(small), sample(vae)
    for field in ("x_t", "x_next", "valid", "scores"):
        assert torch.equal(getattr(checked, field), getattr(plain, field)), field
    assert torch.equal(checked.notes["fault"], plain.notes["fault"])
    assert "agreement" not in plain.notes and "agreement" not in other.notes and not torch.equal(plain.scores, other.scores)
    # The first pool is the same candidates for both decoders, so both runs can be compared by hand.
    same = (plain.scores[:, 0].argmax(1) == other.scores[:, 0].argmax(1)) & (plain.scores[:, 0].argmin(1) == other.scores[:, 0].argmin(1))
    agreement = checked.notes["agreement"]
    assert agreement[:, 0].tolist() == [(1 if s else -1) if v else 0 for s, v in zip(same, plain.valid[:, 0])]
    first = [0, 1, 2, 3, 4] if j == 1 else [0, 3]
    assert torch.equal(agreement != 0, checked.valid[:, first]) and {-1, 0, 1} == set(agreement.flatten().tolist())


def test_a_run_with_the_small_decoder_says_how_often_it_agrees(small, spm, prompts, taesd, tmp_path):
    """In the first rounds only, over a stop too; the LoRA is the one of a run that was not asked."""
    words = ("--model", small, "--spm", spm, "--prompts", prompts, *BASE, "--decoder", taesd, "--k", 3)
    call("spo_train", *words, "--out", tmp_path / "plain", "--rounds", 3)
    said = call("spo_train", *words, "--out", tmp_path / "run", "--rounds", 3, "--decoder_check", 2)
    rows = log_of(tmp_path / "run")
    assert [("decoder_agreement" in r) for r in rows] == [True, True, False] and not any("decoder_agreement" in r for r in log_of(tmp_path / "plain"))
    pools = [r["pairs"] for r in rows[:2]]                  # j = 1: a pool is a pair
    share = sum(r["decoder_agreement"] * n for r, n in zip(rows, pools)) / sum(pools)
    assert 0 < share < 1 and f"--decoder {taesd}: of {sum(pools)} pairs, {share:.1%} are the VAE's too" in said
    call("spo_train", *words, "--out", tmp_path / "parts", "--rounds", 1, "--decoder_check", 2)
    assert f"of {sum(pools)} pairs, {share:.1%}" in call("spo_train", *words, "--out", tmp_path / "parts", "--rounds", 3, "--decoder_check", 2)
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "run" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_sdxl_shape_trains_too(small_xl, spm, prompts, tmp_path, monkeypatch):
    """Two text encoders, pooled text and picture sizes through sampling, exchange and training, with MSPO."""
    words = ("spo_train", "--model", small_xl, "--spm", spm, "--prompts", prompts, *BASE, "--j", 2)
    said = call(*words, "--out", tmp_path / "run", "--vae", small_xl)
    assert log_of(tmp_path / "run")[0]["updates"] > 0
    assert "settings of sdxl " in said and json.loads((tmp_path / "run/config.json").read_text())["preset"] == "sdxl"
    warned = []
    monkeypatch.setattr("training.warn", warned.append)
    assert "settings of sd15 " in call(*words, "--out", tmp_path / "other", "--preset", "sd15")
    assert len(warned) == 1 and "--preset sdxl, unless this is meant" in warned[0]


def test_as_a_user_runs_it(small, spm, prompts, tmp_path):
    """A process of its own; the second epoch draws other noise than the first."""
    words = ("--model", small, "--spm", spm, "--prompts", prompts, "--out", tmp_path / "run", *BASE, "--prompts-per-round=7", "--device=cpu")
    done = shell("spo_train.py", *words, "--rounds", 2)
    assert "pytorch_lora_weights.safetensors" in done.stdout and "Traceback" not in done.stderr
    rows = log_of(tmp_path / "run")
    assert [r["epoch"] for r in rows] == [0, 1] and rows[0]["score"] != rows[1]["score"]
    assert json.loads((tmp_path / "run/config.json").read_text())["prompts_per_round"] == 7


def test_the_best_lora_is_kept_and_survives_a_stop(small, spm, prompts, tmp_path):
    """best/ holds the LoRA after the rounds with the highest mean score; a run in two parts keeps the same."""
    words = ("--model", small, "--spm", spm, "--prompts", prompts, *BASE, "--prompts_per_round", 3, "--epochs", 9)
    call("spo_train", *words, "--out", tmp_path / "one", "--rounds", 6, "--save_every", 2)
    call("spo_train", *words, "--out", tmp_path / "two", "--rounds", 3, "--save_every", 2)
    for path in (tmp_path / "two").glob("checkpoint-000003.*"):
        path.unlink()                                           # its score is that of one round; as if killed before it
    call("spo_train", *words, "--out", tmp_path / "two", "--rounds", 6, "--save_every", 2)
    scores = [r["score"] for r in log_of(tmp_path / "one")]
    means = [sum(scores[i:i + 2]) / 2 for i in (0, 2, 4)]
    state = torch.load(tmp_path / f"one/checkpoint-{2 * means.index(max(means)) + 2:06d}.pt", weights_only=True)
    name = "best/pytorch_lora_weights.safetensors"
    best = load_file(tmp_path / "one" / name)
    assert sorted(v.double().norm().item() for v in best.values()) == sorted(v.double().norm().item() for v in state["lora"])
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_stop_right_after_a_checkpoint_keeps_its_score(small, spm, prompts, tmp_path, monkeypatch):
    """SIGTERM while the next round is being sampled: what was saved is not saved once more, without its score."""
    words = ("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, *BASE, "--rounds", 3, "--save_every", 1, "--out", tmp_path / "run")
    sample, rounds = spo_train.sample_pools, []

    def stopping(pipe, judge, batch, config, observers=()):
        rounds.append(len(log_of(tmp_path / "run")) if (tmp_path / "run/log.jsonl").exists() else 0)
        if rounds[-1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(pipe, judge, batch, config, observers)
    monkeypatch.setattr(spo_train, "sample_pools", stopping)
    with pytest.raises(SystemExit) as caught:
        call(*words)
    assert caught.value.code == 143 and rounds[-1] == 2
    scores = [json.loads((tmp_path / f"run/checkpoint-{i:06d}.json").read_text())["score"] for i in (1, 2)]
    assert scores == pytest.approx([row["score"] for row in log_of(tmp_path / "run")], rel=1e-5)


def test_training_leaves_the_callers_signals_and_random_state(small, spm, prompts, tmp_path, monkeypatch):
    """As from Python: the loop of main, with handlers and a random state of the caller's own."""
    monkeypatch.setattr(sys, "argv", ["spo_train.py", *map(str, ("--model", small, "--spm", spm, "--prompts", prompts, *BASE, "--grid_every", 1,
                                                                "--device", "cpu", "--out", tmp_path / "run"))])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    mine = {signal.SIGTERM: lambda *_: None, signal.SIGINT: signal.default_int_handler}
    threads, states = torch.get_num_threads(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    try:
        for number, handler in mine.items():
            signal.signal(number, handler)
        spo_train.main()
        assert {number: signal.getsignal(number) for number in mine} == mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert torch.get_num_threads() == threads


def test_validation_score_by_hand(small, spm, prompts, tmp_path):
    """The same prompts and seeds every time, from round 0 on, judged at t = 0 as finished pictures; best/ follows it, not the rounds' scores."""
    words = ("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, *BASE, "--save_every", 1, "--rounds", 4, "--lr", "2e-3", "--dtype", "fp32")
    call(*words, "--grid_every", 2, "--out", tmp_path / "run")
    call(*words, "--grid_every", 0, "--out", tmp_path / "without")
    rows, plain = log_of(tmp_path / "run"), log_of(tmp_path / "without")
    assert ["validation_score" in row for row in rows] == [False, True, False, True] and ["validation_score_at_start" in row for row in rows] == [True, False, False, False]
    assert [{k: v for k, v in row.items() if "validation" not in k} for row in rows] == plain, "watching changes nothing"
    assert [(tmp_path / f"run/samples-{i:05d}.png").exists() for i in range(5)] == [True, False, True, False, True]
    pipe, clip, texts = load_pipeline(str(small)), load_clip(str(spm)), prompts.read_text().splitlines()
    for done, row in ((0, rows[0]["validation_score_at_start"]), (4, rows[3]["validation_score"])):
        if done:
            lora.load(pipe.unet, load_file(tmp_path / "run/pytorch_lora_weights.safetensors"))
        some = [texts[i] for i in permutation(len(texts), 0, "preview")[:16]]
        images = generate(pipe, some, list(range(len(some))), steps=4, guidance_scale=5.0)
        features = clip.image_features(preprocess_decoded(images * 2 - 1, clip.config.vision.image_size), torch.zeros(len(some), dtype=torch.long))
        assert row == pytest.approx(float(clip.score(features, judge_features(pipe, clip, some)).mean()), rel=1e-3)
    scores = [json.loads(path.read_text())["score"] for path in sorted((tmp_path / "run").glob("checkpoint-*.json"))]
    assert scores[-1] == pytest.approx(rows[3]["validation_score"], rel=1e-5) and scores[-2] is None


def test_a_grid_that_a_killed_run_owes_is_drawn_on_resuming(small, spm, prompts, tmp_path, monkeypatch):
    """Killed while it draws the grid: the round is made again, and the same pictures are there in the end."""
    words = ("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, *BASE, "--save_every", 1, "--grid_every", 1)
    call(*words, "--rounds", 2, "--out", tmp_path / "whole")
    real, drawn = finetune.draw_samples, []

    def second_time_killed(*words):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(words[3].name)
        return real(*words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("finetune.draw_samples", second_time_killed)
        call(*words, "--rounds", 1, "--out", tmp_path / "run")
    assert drawn == ["samples-00000.png"] and not (tmp_path / "run/checkpoint-000001.pt").exists()
    call(*words, "--rounds", 2, "--out", tmp_path / "run")
    assert all((tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in ("samples-00000.png", "samples-00001.png", "samples-00002.png"))
    assert [row.get("validation_score") for row in log_of(tmp_path / "run")] == [row["validation_score"] for row in log_of(tmp_path / "whole")]
    monkeypatch.setattr("finetune.draw_samples", pytest.fail)
    call(*words, "--rounds", 2, "--out", tmp_path / "run")


@pytest.mark.parametrize("change", [
    dict(lora=None), dict(lora=lambda v: v[:-1]), dict(lora=lambda v: [w.t() for w in v]), dict(lora=lambda v: [w[:1] for w in v]),
    dict(lora=lambda v: [w.int() for w in v]), dict(lora="x"), dict(optimizer=None), dict(optimizer={}), dict(optimizer=3),
    dict(optimizer=lambda o: o | dict(state={k: v | dict(exp_avg=v["exp_avg"][:1]) for k, v in o["state"].items()})),
    dict(optimizer=lambda o: o | dict(state={k: dict(step=v["step"]) for k, v in o["state"].items()})), dict(recent="abc"), dict(bad=[1])],
    ids=lambda c: f"{c}"[:30])
def test_a_checkpoint_of_another_content_is_one_line(trained, tmp_path, change):
    """Its checksum is right: somebody wrote it so."""
    words, run = trained
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/checkpoint-000001.pt"
    state = torch.load(path, weights_only=True)
    for key, value in change.items():
        state[key] = value(state[key]) if callable(value) else value
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    path.with_suffix(".json").write_text(json.dumps(dict(step=1, score=None, sha256=hashlib.sha256(path.read_bytes()).hexdigest())))
    lora = (tmp_path / "run/pytorch_lora_weights.safetensors").read_bytes()
    with pytest.raises(InputError, match="newest checkpoint is whole, but not of such a run") as caught:
        call(*words, "--rounds", 2, "--out", tmp_path / "run")
    assert "\n" not in str(caught.value) and (tmp_path / "run/pytorch_lora_weights.safetensors").read_bytes() == lora


@pytest.fixture(scope="module")
def trained(small, spm, tmp_path_factory):
    """A command, and the folder of its one round."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    words = ("spo_train", "--model", small, "--spm", spm, "--prompts", folder / "prompts.txt", *BASE)
    call(*words, "--out", folder / "run")
    return words, folder / "run"


def test_a_run_of_tiny_can_be_moved(trained, tmp_path):
    """Its folder names no place on the machine; one of before, which does, goes on all the same."""
    words = ("spo_train", "--spm", "tiny/model/spm", *BASE[2:], "--sample_prompts", 3)
    call(*words, "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["prompts"] == "tiny/model/train_prompts.txt" and not any(str(v).startswith("/") for k, v in config.items() if k != "out")
    config |= dict(prompts="/elsewhere/spo/tiny/model/train_prompts.txt", start=config.pop("continue_from"), compile=True)
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    call(*words, "--rounds", 2, "--out", tmp_path / "run")
    assert len(log_of(tmp_path / "run")) == 2


def test_the_configuration_is_printed_before_anything_is_loaded(small, spm, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("finetune.load_pipeline", lambda *_, **__: (_ for _ in ()).throw(InputError("loading")))
    done = command("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, "--out", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 2 and "loading" in done.stderr and done.stdout == f"settings of sd15 --model {small} --out {tmp_path}/run --device cpu --compile false --prompts {prompts} --memory normal --spm {spm} (all: {tmp_path}/run/config.json)\n"


@pytest.mark.parametrize("words, says", [
    (("--thresold", "0.2"), "did you mean --threshold?"), (("--k", "four"), "--k four"), (("--start", "best"), "choose one of random, win, lose"),
    (("--k", "1"), "at least 2"), (("--eta", "0"), "--eta 0"), (("--prompts", "no.txt"), "no.txt"), (("--k",), "--k"),
    (("--t_max", "0"), "0..0"), (("--t_min", "801", "--t_max", "800"), "--t_min 801"), (("--lr", "-1"), "--lr -1.0"), (("--targets", "to_x"), "to_x"), (("--steps", "1000"), "--steps 1000"), (("--model", "nowhere/at-all"), "nowhere"), (("--model", "sd51"), "--model sd51: neither"),
    (("--decoder_check", "1"), "without --decoder"), (("--decoder", "taesd", "--model", "tiny"), "not those of tiny"), (("--decoder", "no.pth"), "no.pth")])
def test_mistakes_are_one_line(small, spm, prompts, tmp_path, words, says):
    with pytest.raises(InputError) as caught:
        call("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, "--out", tmp_path / "run", *BASE, *words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_ends_the_process_with_status_2():
    done = command("spo_train", "--pairs_per_stop", "3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown option '--pairs_per_stop'; did you mean --pairs_per_step?\n"


def test_help_names_every_option():
    done = command("spo_train", "--help")
    assert all(f"--{f.name}" in done.stdout for f in dataclasses.fields(SPOConfig)) and "[runs/spo]" in done.stdout


def test_trace_draws_every_pool(parts):
    """The paper's Figure 3: a row per pool, a cell per candidate."""
    pipe, judge, config = parts[:3]
    image = draw_trace(trace_prompt(pipe, judge, PROMPTS[0], config))
    assert image.size == (64 + 3 * 108, 5 * 124 + 16) and len(image.getcolors(10 ** 6)) > 50


def test_trace_marks_winner_loser_and_the_chosen():
    """Two rows of three grey pictures: frames green around winners and red around losers, a blue dot under the chosen; grey without a pair."""
    row = dict(opened=51, timestep=1, images=torch.zeros(3, 3, 8, 8), scores=[3.0, 2.0, 1.0], win=0, lose=2, chosen=1, valid=True)
    image = draw_trace([row, dict(row, win=1, lose=0, chosen=2, valid=False)], 256)
    assert image.size == (64 + 3 * 268, 2 * 284 + 16)
    frame = lambda r, c: image.getpixel((64 + 268 * c + 6 - 3, 284 * r + 6 + 100))  # noqa: E731
    dot = lambda r, c: image.getpixel((64 + 268 * c + 6 + 256 - 8, 284 * r + 6 + 256 + 10))  # noqa: E731
    white, green, red, blue, grey = (255, 255, 255), (0x1a, 0x98, 0x50), (0xd7, 0x30, 0x27), (0x2b, 0x6c, 0xff), (0x99, 0x99, 0x99)
    assert [frame(0, c) for c in range(3)] == [green, white, red] and [frame(1, c) for c in range(3)] == [grey, grey, white]
    assert [dot(0, c) for c in range(3)] == [white, blue, white] and [dot(1, c) for c in range(3)] == [white, white, blue]
    assert image.getpixel((64 + 6 + 128, 6 + 128)) == (128, 128, 128)


# Without waiting for the device

@pytest.mark.parametrize("j", [1, 2])
def test_a_round_never_waits_for_the_device(request, small, spm, monkeypatch, j):
    """Neither the walk nor a microbatch. The meta device stands for a GPU, where there is none."""
    pipe, judge, config, cond, uncond, text = setup(small, spm)
    config, place = dataclasses.replace(config, j=j), "cuda" if torch.cuda.is_available() else "meta"
    if place == "meta":
        monkeypatch.setattr(spo_train, "upload", unpinned)
    trainer = bare_trainer(pipe, config)
    pipe.device = torch.device(place)
    for module in (pipe.unet, pipe.vae, judge.clip):
        module.to(place)
    cond, uncond = (c.map(lambda v: v.to(place)) for c in (cond, uncond))
    trainer.empty = uncond[:1]

    class One(list):
        """A minibatch of one part, of whose loss only the gradient is asked."""

        def backward(self, loss, logged):
            loss.sum().backward()

        def step(self):
            pass

    monkeypatch.setattr(trainer, "minibatches", lambda *_: [One([list(range(1, 6))])])
    monkeypatch.setattr(trainer, "totals", Totals(()), raising=False)

    def round_(text: torch.Tensor) -> None:
        batch = Batch(cond, uncond, text, [generator(0, i) for i in range(len(PROMPTS))])
        pairs = spo_train.collect(spo_train.sample_pools(pipe, judge, batch, config))
        every = dataclasses.replace(pairs, valid=torch.ones(pairs.valid.shape), cond=cond)
        spo_train.train_on_pairs(trainer, every, turn_of(range(len(PROMPTS))), config)

    text = text.to(place)
    round_(text)                                            # tables are copied to a device once
    if place == "meta":
        with NoWaiting():
            return round_(text)
    torch.cuda.set_sync_debug_mode("error")
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    round_(text)


@pytest.mark.parametrize("preset, prompts, on, why", [
    ("sd15", 120, False, "takes about 120 s and saves about 113 s"), ("sd15", 130, True, "saves about 122 s"), ("sdxl", 38, False, "170 s"), ("sdxl", 40, True, "saves about 176 s"),
    ("tiny", 1e9, False, "tiny is too small")])
def test_compiling_is_worth_it_in_long_runs(preset, prompts, on, why, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("CC", "gcc")
    found, words = finetune.repays(preset, prompts)
    assert found is on and why in words
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert preset == "tiny" or finetune.repays(preset, prompts) == (False, "it needs Triton and a C compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert preset == "tiny" or finetune.repays(preset, prompts) == (False, "it needs Triton and a C compiler")


def test_what_compile_auto_decides(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")         # put back after the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr("finetune.fit_memory", lambda config, *_: config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("CC", "gcc")
    parse = lambda *words: parse_options(SPOConfig, spo_train.PRESETS, ["--out", str(tmp_path / "run"), *map(str, words)])  # noqa: E731
    decide = lambda device, world, *words: finetune.fit_machine(parse(*words), spo_train.PRESETS, Processes(0, world, torch.device(device)), 4000).compile  # noqa: E731
    assert parse().compile == "auto" and parse("--compile").compile is True and parse("--compile", "false").compile is False and parse("--compile=auto").compile == "auto"
    assert decide("cpu", 1, "--model", "sd15") is False and decide("cuda", 1, "--model", "sd15", "--compile", "false") is False
    assert capsys.readouterr().out == "" and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert decide("cuda", 4, "--model", "sd15") is True and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "spo/compiled") and (tmp_path / "spo/compiled").is_dir()
    assert capsys.readouterr().out == "--compile auto: on, it takes about 120 s and saves about 9400 s in what is left of the run\n"
    assert decide("cuda", 1, "--model", "sd15", "--rounds", 3) is False and decide("cuda", 1, "--model", "sd15", "--rounds", 4) is True and decide("cuda", 2, "--model", "sd15", "--rounds", 4) is False
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint-000998.pt").touch()
    assert decide("cuda", 1, "--model", "sd15") is False and "off, it takes about 120 s and saves about 75 s" in capsys.readouterr().out
    assert decide("cpu", 1, "--compile") is True


# Compiled

@pytest.mark.parametrize("train_batch", [10, 1])
def test_nothing_is_compiled_anew_after_the_first_round(small, spm, prompts, tmp_path, monkeypatch, compilations, train_batch):
    """Rounds of three prompts, of three and of one, whatever number of pairs, grids: the same graphs serve, and train what eager does."""
    after, end = [], Trainer.end

    def counted(*arguments, **settings):
        after.append(len(compilations))
        return end(*arguments, **settings)

    monkeypatch.setattr(Trainer, "end", counted)
    words = ("--model", small, "--spm", spm, "--prompts", prompts, "--dtype", "fp32", "--steps", 4, "--k", 2, "--j", 2, "--prompts_per_round", 3,
             "--pairs_per_step", 10, "--train_batch", train_batch, "--decode_batch", 4, "--threshold", 0.05, "--lr", "2e-3", "--grid_every", 1)
    call("spo_train", *words, "--rounds", 3, "--compile", "--out", tmp_path / "compiled")
    rows = log_of(tmp_path / "compiled")
    assert len({row["pairs"] for row in rows}) > 1 and after[0] >= 6 and set(after) == {after[0]} == {len(compilations)}
    call("spo_train", *words, "--rounds", 3, "--out", tmp_path / "eager")
    for ours, theirs in zip(rows, log_of(tmp_path / "eager"), strict=True):        # but for filled-up rows, which are evaluations too
        assert ours.pop("evaluations") >= theirs.pop("evaluations") and ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_profile_of_one_round(small, spm, prompts, tmp_path):
    call("spo_train", "--model", small, "--spm", spm, "--prompts", prompts, "--dtype", "fp32", "--steps", 4, "--k", 2, "--prompts_per_round", 2,
         "--grid_every", 0, "--rounds", 2, "--profile", "--out", tmp_path / "run")
    events = json.loads((tmp_path / "run/profile.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "aten::conv2d" for e in events) > 10
    assert "aten::" in (tmp_path / "run/profile.txt").read_text()
