"""What watches SPO's pools without taking part: faults, the decoder's check, the trace.

An observer is called with a pool (spo_train.Pool) and the batch that it came from. It may leave
notes in `pool.notes`, [B, n, ...] each, which travel with the pool's pairs.

Shapes: B prompts, K candidates, G pools of a trajectory.
"""
import dataclasses
from collections.abc import Callable

import torch

from training import warn

FAULTS = ("", "the UNet's prediction", "a decoded picture", "the judge's score")


class Pictures:
    """Looks at what a judge decodes: `decode`, and in `seen` what `look` made of each part."""

    def __init__(self, judge, look: Callable):
        self.decode, self.look = judge.decode, look
        self.seen: list[torch.Tensor] = []
        judge.decode = self

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        pictures = self.decode(latents)
        self.seen.append(self.look(pictures))
        return pictures

    def take(self, shape: tuple[int, int]) -> torch.Tensor:
        """What was made of the last pool's pictures, [B, K, ...]."""
        seen = torch.cat(self.seen).unflatten(0, shape)
        self.seen.clear()
        return seen


class Faults:
    """Finds what is not finite; such a pool gives no pair. `fault`: the cause's place in FAULTS."""

    def __init__(self, judge):
        self.pictures = Pictures(judge, lambda images: torch.isfinite(images).flatten(1).all(1))

    def __call__(self, pool, batch) -> None:
        sound = torch.isfinite(pool.x0).flatten(1).all(1)
        drawn = self.pictures.take(pool.scores.shape).all(1)
        fault = 3 * ~torch.isfinite(pool.scores).all(1)
        fault = torch.where(drawn, fault, 2)        # the earlier cause explains the later one
        fault = torch.where(sound, fault, 1)
        pool.valid = pool.valid & (fault == 0)
        pool.notes["fault"] = fault[:, None]                # [B, 1]


class DecoderCheck:
    """Would the VAE's pictures give the same pair? `agreement`: 1, -1, or 0 without a pair."""

    def __init__(self, judge, decode: Callable, choose: Callable):
        self.judge = dataclasses.replace(judge, decode=decode)
        self.choose = choose                # (scores, uniform=) -> win, lose, valid

    def __call__(self, pool, batch) -> None:
        scores = self.judge(pool.x0, pool.t, batch.text)
        win, lose, _ = self.choose(scores, uniform=pool.uniform[:, 1:])
        same = torch.where((pool.win == win) & (pool.lose == lose), 1, -1)
        pool.notes["agreement"] = (pool.valid * same)[:, None]                      # [B, 1]


class Trace:
    """Keeps the pools of one trajectory with their pictures, for report.draw_trace."""

    def __init__(self, judge):
        self.pictures = Pictures(judge, lambda images: images)
        self.rows: list[dict] = []

    def __call__(self, pool, batch) -> None:
        images = self.pictures.take(pool.scores.shape)[0].cpu()
        self.rows.append(dict(
            opened=pool.timesteps[0], timestep=pool.t, images=images,
            scores=pool.scores[0].tolist(), win=int(pool.win[0]), lose=int(pool.lose[0]),
            chosen=int(pool.chosen[0]), valid=bool(pool.valid[0])))


def sound_scores(pairs) -> torch.Tensor:
    """Scores [G', K] of the pools in which everything is finite."""
    return pairs.scores[pairs.notes["fault"] == 0]


def report(pairs, turn, aloud: bool) -> dict:
    """What the log says of a round's pools; the earliest fault is reported in words if `aloud`."""
    fault, scores = pairs.notes["fault"], sound_scores(pairs)
    places = fault.t().nonzero().tolist()                   # by pool, then by prompt
    if places and aloud:
        group, prompt = places[0]
        warn(f"{turn.name}: {FAULTS[int(fault[prompt, group])]} is not finite after the step at "
             f"t = {pairs.ends[group]:g}, prompt {turn.texts[prompt]!r}; {len(places)} pools are "
             "not used (try --dtype fp32, or another --vae)")
    stats = dict(score=None, score_gap=None, not_finite=len(places))
    if len(scores):
        gap = scores.amax(-1) - scores.amin(-1)
        stats |= dict(score=float(scores.mean()), score_gap=float(gap.mean()))
    agreement = pairs.notes.get("agreement", torch.zeros(0))
    checked = int(agreement.abs().sum())
    if checked:
        same = int((agreement == 1).sum())
        stats |= dict(decoder_pairs=checked, decoder_agreement=same / checked)
    return stats
