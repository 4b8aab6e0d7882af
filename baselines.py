"""SPO's rivals on SPO's own sampler, model, LoRA and command line (paper, section 3, Tables 1, 2).

    python baselines.py --method d3po                           # the embedded tiny model
    python baselines.py --method ddpo --model sd15 --prompts PROMPTS.json --out runs/ddpo
    torchrun --nproc_per_node=4 baselines.py --method diffusion-dpo --model sdxl --pairs FOLDER \\
        --out runs/dpo

Online, from prompts alone; PickScore is the reward, seen only at the end of a trajectory:
    ddpo            policy gradient on the reward, clipped as in PPO (Black et al. 2023)
    flow-grpo       the same of k trajectories a prompt, each against the others, with a penalty
                    for leaving the reference; of flows in its authors' hands (Liu et al. 2025)
    d3po            the better and the worse of k trajectories, all their steps (Eq. 2; Yang et al.
                    2023)
Offline, from pictures that people compared:
    diffusion-dpo   DPO with the denoising error in place of the log-probability (Wallace et al.
                    2023)
    mapo            no reference model; winners are also imitated (Hong et al. 2024)

The online three are SPO's walk with one pool over the whole trajectory: candidates leave x_T, go
down on their own and are judged as finished pictures. So they differ from SPO in just what the
paper changes: when the preference is asked for.

Shapes: B prompts, K trajectories, N pairs or slots, S steps, C H W latent.
"""
import needs  # noqa: F401
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ddim
import lora
import spo_train
from calls import upload
from diffusion import Conditioning, encode_prompts, guided_noise, negative
from finetune import (
    FREE,
    RunConfig,
    Trainer,
    Turn,
    compiled_sizes,
    fit_machine,
    prepare_policy,
    training_prompts,
)
from loading import Pipeline, resolve
from observers import report, sound_scores
from pairs import (
    Pairs,
    draw_latents,
    encode_pairs,
    list_unreadable,
    load_pairs,
    read_or_leave,
    readable,
    stack_pictures,
    too_many_unreadable,
    unpainted_pairs,
)
from spo_train import SPOConfig, pick, prepare, sample_round, train_on_pairs
from training import (
    Processes,
    Run,
    fingerprint,
    generator,
    opt,
    parse_options,
    run_script,
    start_processes,
)
from weights import InputError

METHODS = {         # where each starts from unless the preset or the command line says otherwise
    "ddpo": dict(lr=3e-4, beta=0.0),                # ddpo-pytorch
    "flow-grpo": dict(lr=3e-4, beta=0.01),          # the authors' code, for PickScore
    "d3po": dict(lr=3e-5, beta=0.1),                # the authors' code
    "diffusion-dpo": dict(lr=2e-5, beta=5000.0),    # 1e-8 x an effective batch of 2048
    "mapo": dict(lr=2e-5, beta=0.1),                # rate as for diffusion-dpo
}
OFFLINE = ("diffusion-dpo", "mapo")
POLICY_GRADIENT = ("ddpo", "flow-grpo")
NARROW = 0.01       # a flow's steps of less spread are not trained: ratios there have no bounds


@dataclass
class BaselineConfig(RunConfig):
    """The options of a rival, beside those of every run. D = the method's own released code."""
    method: str = opt("d3po", "which rival", tuple(METHODS))
    out: str = opt("runs/baseline", "run folder: LoRA, log.jsonl, config.json, checkpoints, "
                   "samples")
    lr: float = opt(0.0, "AdamW learning rate; 0: the method's own (ddpo and flow-grpo "
                    "3e-4, d3po 3e-5, diffusion-dpo and mapo 2e-5)", least=0)
    prompts_per_round: int = opt(40, "global batch of prompts (online) or of preference pairs "
                                 "(offline) per round", least=1)
    # ddpo, flow-grpo, d3po
    reward: str = opt("", "PickScore's file or folder; empty: the one that belongs to the model")
    k: int = opt(2, "trajectories per prompt; d3po compares best and worst, flow-grpo (D: 24) each "
                 "with all, ddpo uses 2", least=2)
    clamp: float = opt(0.1, "d3po: each probability ratio is clamped to 1 +- this (D)",
                       least=0, below=1)
    clip_range: float = opt(1e-4, "ddpo, flow-grpo: the probability ratio is clipped to 1 +- this "
                            "(D)", above=0)
    advantage_clip: float = opt(5.0, "ddpo, flow-grpo: advantages, in standard deviations of the "
                                "round's or the prompt's rewards, stay within +- this (D)", above=0)
    # diffusion-dpo, mapo
    pairs: str = opt("", "offline: folder with pairs.jsonl or Parquet, a .parquet file or a hub "
                     "data set; empty: the tiny world's")
    count: int = opt(44_000, "offline, tiny: size of the world's set of pairs", least=1)
    max_unreadable: float = opt(0.01, "offline: share of the pairs read so far whose pictures may "
                                "be damaged; they are skipped and listed", least=0, most=1)
    beta: float = opt(0.0, "strength of regularization (D: flow-grpo 0.01, d3po 0.1, "
                      "diffusion-dpo 5000, mapo 0.1); 0: the method's own", least=0)


SHARED = [field.name for field in dataclasses.fields(RunConfig)]
PRESETS = {model: {name: preset[name] for name in SHARED if name in preset}
           for model, preset in spo_train.PRESETS.items()}


def d3po_as_spo(config: BaselineConfig) -> SPOConfig:
    """The online rivals' walk: MSPO with one group of all steps, judged once, by PickScore."""
    shared = {name: getattr(config, name) for name in SHARED}
    every = config.method in POLICY_GRADIENT        # which learn from pictures that tie, too
    k = 2 if config.method == "ddpo" else config.k
    return SPOConfig(
        **shared, spm=config.reward, judge="pickscore", k=k, j=config.steps, t_min=0, t_max=1000,
        threshold=-1.0 if every else 0.0, beta=config.beta, clamp=config.clamp)


def advantages(scores: torch.Tensor, bound: float) -> torch.Tensor:
    """Rewards [B, 2] of a round -> advantages [B, 2], the better one first.

    They say how many of its standard deviations a reward is above the mean, within +- bound.
    """
    both = torch.stack([scores.amax(1), scores.amin(1)], 1)
    return ((both - both.mean()) / (both.std() + 1e-8)).clamp(-bound, bound)


def group_advantages(scores: torch.Tensor, bound: float) -> torch.Tensor:
    """Rewards [B, K] -> advantages [B, K]: how far each lies above the mean of its own prompt's.

    In their standard deviations, within +- bound.
    """
    spread = scores.std(1, keepdim=True)
    return ((scores - scores.mean(1, keepdim=True)) / (spread + 1e-4)).clamp(-bound, bound)


def ddpo_loss(log_ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """PPO's clipped surrogate per sample: log p_theta / p_old and advantage, same shape -> loss."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def density(schedule: ddim.Schedule, config: BaselineConfig) -> Callable:
    """An observer of pools: each step's log-density under the policy that drew it, [B, J, 2].

    Of all K with flow-grpo, [B, J, K], and the steps' two ends [B, J, K, C, H, W].
    """
    previous = schedule.previous(config.steps)

    def observe(pool, batch) -> None:
        """Notes `log_prob`, and with flow-grpo `x_t` and `x_next`."""
        values, every = [], config.method == "flow-grpo"
        for j, t in enumerate(pool.timesteps):
            noise = pool.noise[:, j]                                        # [B, K, C, H, W]
            std = ddim.step_std(schedule, t, previous[t], config.eta)
            log_prob = ddim.log_prob((std * noise).flatten(0, 1), 0.0, std).view(noise.shape[:2])
            if not every:
                log_prob = torch.stack([pick(log_prob, pool.win), pick(log_prob, pool.lose)], 1)
            values.append(log_prob)
        pool.notes["log_prob"] = torch.stack(values, 1)
        if every:
            path = [latents.expand_as(pool.path[-1]) for latents in pool.path]
            pool.notes |= dict(x_t=torch.stack(path[:-1], 1), x_next=torch.stack(path[1:], 1))
    return observe


def policy_values(trainer: Trainer, pairs: spo_train.Pairs, gain: torch.Tensor,
                  slots: list[int], config: BaselineConfig) -> list[torch.Tensor]:
    """All K samples of each slot, averaged: the loss [N], then what is only logged.

    `gain` [B, K] are the advantages of a prompt's trajectories.
    """
    pipe, count, k = trainer.pipe, len(pairs.timesteps), gain.shape[1]
    index = [(s // count, s % count, which) for which in range(k) for s in slots]
    place = tuple(upload(torch.tensor(index).t(), pipe.device))     # prompt, step, which: [K N]
    times = pipe.schedule.both_ends([pairs.timesteps[s % count] for s in slots] * k, config.steps)
    t, t_prev = upload(times, pipe.device)
    ends = vars(pairs) | pairs.notes                                # all K's where they are kept
    x_t, cond = ends["x_t"][place], pairs.cond[place[0]]
    uncond = negative(pipe, cond, trainer.empty)

    def gaussian() -> tuple[torch.Tensor, torch.Tensor]:
        noise_pred = guided_noise(pipe, x_t, t, cond, uncond, config.guidance_scale)
        return ddim.step_gaussian(pipe.schedule, x_t, noise_pred, t, t_prev, config.eta)

    mean, std = gaussian()
    log_ratio = ddim.log_prob(ends["x_next"][place], mean, std) - pairs.notes["log_prob"][place]
    advantage, now = gain[place[0], place[2]], log_ratio.detach()
    loss = ddpo_loss(log_ratio, advantage, config.clip_range)
    if config.method == "flow-grpo":
        with torch.no_grad(), lora.disabled(pipe.unet):
            mean_ref, _ = gaussian()
        divergence = (mean - mean_ref).square() / (2 * std ** 2)    # KL of the two Gaussians
        loss = loss + config.beta * divergence.mean(dim=(1, 2, 3))
    outside = ((now.exp() - 1).abs() > config.clip_range).float()
    values = [loss, advantage * now, now.exp(), outside]
    return list(torch.stack(values).unflatten(1, (k, len(slots))).mean(1))


def policy_round(trainer: Trainer, pairs: spo_train.Pairs, turn: Turn,
                 config: BaselineConfig) -> dict:
    """K trajectories a prompt (ddpo: 2); every step of each is one policy-gradient sample."""
    gain = torch.zeros(len(turn.indices), pairs.scores.shape[-1], device=trainer.pipe.device)
    sound, scores = pairs.notes["fault"][:, 0] == 0, sound_scores(pairs)
    if len(scores):
        compare = advantages if config.method == "ddpo" else group_advantages
        gain[sound] = compare(scores, config.advantage_clip)

    def place_of(slot: int) -> str:
        prompt, step = divmod(slot, len(pairs.timesteps))
        return f"a step at t = {pairs.timesteps[step]:g}, prompt {turn.texts[prompt]!r}"

    schedule, count = trainer.pipe.schedule, len(pairs.timesteps)
    t, t_prev = schedule.both_ends(pairs.timesteps, config.steps)
    least = NARROW if schedule.flow else 0.0
    wide = ddim.step_std(schedule, t, t_prev, config.eta).flatten() > least
    slots = [slot for slot in pairs.valid.flatten().nonzero()[:, 0].tolist() if wide[slot % count]]
    names = ("loss", "margin", "ratio", "clipped")
    for minibatch in trainer.minibatches(slots, names, turn, place_of):
        for part in minibatch:
            loss, *logged = policy_values(trainer, pairs, gain, part, config)
            minibatch.backward(loss, logged)
        minibatch.step()
    return trainer.totals.means() | dict(pairs=len(slots))


def diffusion_dpo_loss(win: torch.Tensor, lose: torch.Tensor, win_ref: torch.Tensor,
                       lose_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Per pair [N], from denoising errors, mean squares per sample, of policy and reference."""
    return -F.logsigmoid(-beta / 2 * ((win - win_ref) - (lose - lose_ref)))


def mapo_loss(win: torch.Tensor, lose: torch.Tensor, beta: float, snr: float = 0.5,
              scale: float = 1000.0) -> torch.Tensor:
    """Per pair [N]: the winner's denoising error, less beta x log p(it is the likelier one)."""
    def phi(error: torch.Tensor) -> torch.Tensor:           # falls from 1 as the error grows
        return snr * error / torch.expm1(snr * error)
    return win - beta * F.logsigmoid(scale * (phi(win) - phi(lose)))


def denoising_errors(pipe: Pipeline, latents: torch.Tensor, noise: torch.Tensor,
                     timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
    """Mean squared error of the network's output [N], without guidance.

    It sees clean latents [N, C, H, W] noised to timesteps [N].
    """
    target = ddim.target(pipe.schedule, latents, noise, timestep)
    x_t = ddim.add_noise(pipe.schedule, latents, noise, timestep)
    output = guided_noise(pipe, x_t, timestep, cond, None, 1.0)
    return (output - target).square().mean(dim=(1, 2, 3))


def noised_pairs(trainer: Trainer, rows: list[int], images: torch.Tensor,
                 epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures of N pairs -> clean latents and noise [2 N, C, H, W], timesteps [2 N].

    Both pictures of a pair get the same noise at the same timestep.
    """
    pipe, seed = trainer.pipe, trainer.config.seed
    generators = [generator(seed, "noise", epoch, i) for i in rows]
    last = pipe.schedule.count
    t = torch.stack([torch.randint(last, (1,), generator=g) for g in generators])       # [N, 1]
    latents, noise = draw_latents(encode_pairs(pipe, images), generators)
    timesteps = upload(t, pipe.device).expand(-1, 2).flatten()
    return latents * pipe.vae.config.scaling_factor, noise, timesteps


def offline_values(trainer: Trainer, data: Pairs, rows: list[int], got: list[torch.Tensor | str],
                   epoch: int) -> list[torch.Tensor]:
    """Some pairs, by their numbers, and what `readable` got of them: the loss [N], then what is
    only logged."""
    pipe, config = trainer.pipe, trainer.config
    images, seen = stack_pictures(got, pipe.side(config.resolution))
    latents, noise, t = noised_pairs(trainer, rows, images, epoch)
    cond = encode_prompts(pipe, [data.captions[i] for i in rows],
                          config.resolution or None).repeat(2)
    loser = (upload(data.label[rows], pipe.device) > 0.5).long()            # [N], which of the two
    order = torch.stack([1 - loser, loser], 1)                              # [N, 2]: winner, loser

    def errors() -> torch.Tensor:                                           # [2, N]
        return denoising_errors(pipe, latents, noise, t, cond).view(-1, 2).gather(1, order).t()

    win, lose = errors()
    if config.method == "mapo":
        margin = lose - win
        loss = mapo_loss(win, lose, config.beta)
    else:
        with torch.no_grad(), lora.disabled(pipe.unet):
            win_ref, lose_ref = errors()
        margin = (lose - lose_ref) - (win - win_ref)
        loss = diffusion_dpo_loss(win, lose, win_ref, lose_ref, config.beta)
    values = [loss, margin.detach(), (margin > 0).float(), win.detach(), lose.detach()]
    return list(torch.stack(values) * upload(seen, pipe.device))


def offline_round(trainer: Trainer, data: Pairs, used: list[int], turn: Turn) -> tuple[dict, dict]:
    """Each of the round's indices (into `used`) is a pair, noised at one random timestep.

    Returns what is logged, and why pairs cannot be read.
    """
    def place_of(place: int) -> str:
        return f"the pair of caption {turn.texts[place]!r}"

    slots, broken = list(range(len(turn.indices))), {}
    names = ("loss", "margin", "accuracy", "error_win", "error_lose")
    for minibatch in trainer.minibatches(slots, names, turn, place_of):
        for part in minibatch:
            rows = [used[turn.indices[place]] for place in part]
            got = [readable(data, i) for i in rows]
            broken |= {why: why for why in got if isinstance(why, str)}
            loss, *logged = offline_values(trainer, data, rows, got, turn.epoch)
            minibatch.backward(loss, logged)
        minibatch.step()
    return trainer.totals.means() | dict(pairs=len(slots)), trainer.processes.union(broken)


def train_online(config: BaselineConfig, run: Run, processes: Processes,
                 prompts: list[str]) -> None:
    """DDPO, Flow-GRPO or D3PO, from prompts."""
    walk = d3po_as_spo(config)
    resolve(config)                                 # its judge is --reward
    pipe, judge, observers = prepare(walk, processes)
    with Trainer(config, run, pipe, prompts, judge.clip, config.method) as trainer:
        for turn in trainer.turns():
            watching = observers if turn.step < config.decoder_check else observers[:1]
            if config.method in POLICY_GRADIENT:
                watching = [density(pipe.schedule, config), *watching]
            pairs = sample_round(trainer, judge, turn, walk, watching)
            seen = report(pairs, turn, processes.main)
            if config.method in POLICY_GRADIENT:
                stats = policy_round(trainer, pairs, turn, config)
                seen = dict(score=seen["score"], not_finite=seen["not_finite"])
            else:
                stats = train_on_pairs(trainer, pairs, turn, walk)
            trainer.end(turn, stats | seen, sound=seen["score"] is not None)


def train_offline(config: BaselineConfig, run: Run, processes: Processes) -> None:
    """Diffusion-DPO or MAPO, from pictures that people compared."""
    if not config.pairs and not config.preset.startswith("tiny"):
        raise InputError(f"--method {config.method} learns from pictures; give --pairs a folder or "
                         "Parquet file of preference pairs")
    pipe = prepare_policy(config, processes)
    pipe.calls.sizes = compiled_sizes(config, processes.world, 1, 2)
    read = (functools.partial(load_pairs, config.pairs, pipe.side(config.resolution))
            if config.pairs else functools.partial(unpainted_pairs, config.count, config.seed))
    data = read_or_leave(processes, read)
    labels = data.label.tolist()
    used = [i for i, label in enumerate(labels) if label != 0.5]            # a tie has no winner
    if not used:
        raise InputError(f"{config.pairs}: every pair is a tie")
    captions, listed = [data.captions[i] for i in used], run.folder / "unreadable.txt"
    with Trainer(config, run, pipe, captions, None, config.method,
                 pair_labels=fingerprint([str(labels[i]) for i in used])) as trainer:
        resumed = trainer.rounds.done and listed.exists()
        before = listed.read_text(encoding="utf-8") if resumed else ""
        unreadable = {why: why for why in before.splitlines()}
        for turn in trainer.turns():
            stats, broken = offline_round(trainer, data, used, turn)
            if broken:
                unreadable = list_unreadable(unreadable, broken, run)
            trainer.end(turn, stats | dict(score=None, unreadable=len(unreadable)))
            spoilt = too_many_unreadable(
                unreadable, (turn.step + 1) * config.prompts_per_round, len(used),
                config.max_unreadable, run.folder)
            if spoilt:
                trainer.save()
                raise spoilt


def main() -> None:
    """Train as the command line says; continue if the run folder holds the same run."""
    config = parse_options(BaselineConfig, PRESETS, description=__doc__)
    processes = start_processes(config.device or None)
    offline = config.method in OFFLINE
    prompts = [] if offline else training_prompts(config)
    config = fit_machine(config, PRESETS, processes, len(prompts) or config.count)
    own = METHODS[config.method]
    config = dataclasses.replace(config, lr=config.lr or own["lr"], beta=config.beta or own["beta"])
    spo_train.check(d3po_as_spo(config))
    run = Run(config.out, config, processes, (*FREE, "max_unreadable"), PRESETS)
    if offline:
        train_offline(config, run, processes)
    else:
        train_online(config, run, processes, prompts)


if __name__ == "__main__":
    run_script(main)
