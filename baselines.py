"""SPO's rivals on SPO's own sampler, model, LoRA and command line (paper, section 3 and Tables 1 and 2).

    python baselines.py --method d3po                                                     # the embedded tiny model
    python baselines.py --method ddpo --model sd15 --prompts 4k_training_prompts.json
    torchrun --nproc_per_node=4 baselines.py --method diffusion-dpo --model sdxl --pairs FOLDER

Online, from prompts alone; PickScore is the reward, seen only at the end of a trajectory:
    ddpo            policy gradient on the reward, clipped as in PPO (Black et al. 2023)
    d3po            the better and the worse of k trajectories, all their steps, in Eq. 4's form (Yang et al. 2023)
Offline, from pictures that people compared:
    diffusion-dpo   DPO with the denoising error in place of the log-probability (Wallace et al. 2023)
    mapo            no reference model; winners are also imitated (Hong et al. 2024)

The online two are SPO's walk with one pool over the whole trajectory: candidates leave x_T, go down on their own, are
judged as finished pictures. So what separates them from SPO is exactly what the paper changes: when preference is asked.

Shapes: N pairs or slots, S steps, C H W latent.
"""
import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ddim
import lora
import pairs as preference_pairs
import spo_train
from diffusion import Conditioning, encode_empty, encode_prompts, guided_noise, negative
from loading import Pipeline
from spm_train import encode_pairs, readable, stack_pictures
from spo_train import Models, RunConfig, SPOConfig, prepare, prepare_policy, run_rounds, sample_round, spo_round, train_minibatches
from training import Clock, Processes, Run, fill_up, generator, opt, parse_options, run_script, start_processes, upload
from weights import InputError

METHODS = {         # where each starts from unless the command line says otherwise
    "ddpo": dict(lr=3e-4, beta=0.0),                # ddpo-pytorch
    "d3po": dict(lr=3e-5, beta=0.1),                # the authors' code
    "diffusion-dpo": dict(lr=2e-5, beta=5000.0),    # 1e-8 x an effective batch of 2048
    "mapo": dict(lr=2e-5, beta=0.1),                # rate as for diffusion-dpo
}
OFFLINE = ("diffusion-dpo", "mapo")


@dataclass
class BaselineConfig(RunConfig):
    """Every option of a baseline: those of a run, and its own. D = the method's own released code."""
    method: str = opt("d3po", "which rival", tuple(METHODS))
    out: str = opt("runs/baseline", "run folder: LoRA files, log.jsonl, config.json, checkpoints, sample grids")
    lr: float = opt(0.0, "AdamW learning rate; 0: the method's own (ddpo 3e-4, d3po 3e-5, diffusion-dpo and mapo 2e-5)", least=0)
    prompts_per_round: int = opt(40, "global batch of prompts (online) or of preference pairs (offline) per round", least=1)
    # ddpo, d3po
    reward: str = opt("", "PickScore's file or folder; empty: the one that belongs to the model")
    k: int = opt(2, "d3po: trajectories per prompt, of which best and worst are compared; ddpo uses 2", least=2)
    clamp: float = opt(0.1, "d3po: each probability ratio is clamped to 1 +- this (D)", least=0, below=1)
    clip_range: float = opt(1e-4, "ddpo: the probability ratio is clipped to 1 +- this (D)", above=0)
    advantage_clip: float = opt(5.0, "ddpo: advantages, in standard deviations of the round's rewards, stay within +- this (D)", above=0)
    # diffusion-dpo, mapo
    pairs: str = opt("", "offline: folder with pairs.jsonl or Parquet, a .parquet file or a hub data set; empty: the tiny world's")
    count: int = opt(44_000, "offline, tiny: size of the world's set of pairs", least=1)
    beta: float = opt(0.0, "strength of regularization (D: d3po 0.1, diffusion-dpo 5000, mapo 0.1); 0: the method's own", least=0)


PRESETS = {model: {k: v for k, v in preset.items() if k in {f.name for f in dataclasses.fields(RunConfig)}}
           for model, preset in spo_train.PRESETS.items()}


def d3po_as_spo(config: BaselineConfig) -> SPOConfig:
    """Trajectory-level preference as a special case of MSPO: one group of all steps, judged once, at the end, by PickScore."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}
    every = config.method == "ddpo"                 # which learns from pictures that tie, too
    return SPOConfig(**shared, spm=config.reward, judge="pickscore", k=2 if every else config.k, j=config.steps, t_min=0, t_max=999,
                     threshold=-1.0 if every else 0.0, beta=config.beta, clamp=config.clamp)


def advantages(scores: torch.Tensor, bound: float) -> torch.Tensor:
    """Rewards [B, 2] of a round -> how many of its standard deviations above its mean, within +- bound, better one first [B, 2]."""
    both = torch.stack([scores.amax(1), scores.amin(1)], 1)
    return ((both - both.mean()) / (both.std() + 1e-8)).clamp(-bound, bound)


def ddpo_loss(log_ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """PPO's clipped surrogate per sample: log p_theta / p_old and advantage, same shape -> loss."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def ddpo_round(pipe: Pipeline, models: Models, prompts: list[str], empty: Conditioning | None, config: BaselineConfig,
               processes: Processes, optimizer: torch.optim.Optimizer, indices: list[int], key: tuple, clock: Clock, bad: int) -> dict:
    """Two trajectories a prompt; every step of both is one policy-gradient sample. As `run_rounds` wants it."""
    walk = d3po_as_spo(config)
    pairs, cond = sample_round(pipe, models, prompts, indices, empty, walk, processes, clock, key[0])
    timesteps, count = pipe.schedule.timesteps(config.steps), config.steps
    stride = len(pipe.schedule.alphas_cumprod) // count
    texts, sound = [prompts[i] for i in indices], pairs.scores[:, 0][pairs.fault[:, 0] == 0]            # [B', 2]
    gain = torch.zeros(len(indices), 2, device=pipe.device)
    if len(sound):
        gain[pairs.fault[:, 0] == 0] = advantages(sound, config.advantage_clip)

    def loss_of(part: list[int]) -> torch.Tensor:
        """Slots (prompt, step) -> [4, n]; the two samples of a slot are averaged."""
        slots = fill_up(part, config.train_batch if config.compile else 0)
        index = [(s // count, s % count, which, timesteps[s % count]) for which in (0, 1) for s in slots]
        prompt, step, which, t = upload(torch.tensor(index).t(), pipe.device)
        x_t, c = pairs.x_t[prompt, step, which], cond.map(lambda v: v[prompt])
        noise_pred = guided_noise(models.unet, x_t, t, c, negative(pipe, c, empty), config.guidance_scale)
        mean, std = ddim.step_gaussian(pipe.schedule, x_t, noise_pred, t, t - stride, config.eta)
        log_ratio = ddim.log_prob(pairs.x_next[prompt, step, which], mean, std) - pairs.log_prob[prompt, step, which]
        advantage = gain[prompt, which]
        rows = [ddpo_loss(log_ratio, advantage, config.clip_range), advantage * log_ratio.detach(), log_ratio.detach().exp(),
                ((log_ratio.detach().exp() - 1).abs() > config.clip_range).float()]
        return torch.stack(rows).unflatten(1, (2, len(slots))).mean(1)[:, :len(part)]

    faults = spo_train.report_faults(pairs, texts, [list(range(count))], timesteps, key) if processes.main else 0
    stats = train_minibatches(
        pipe, optimizer, pairs.valid.flatten().nonzero()[:, 0].tolist(), ("loss", "margin", "ratio", "clipped"), loss_of,
        lambda s: f"a step at t = {timesteps[s % count]}, prompt {texts[s // count]!r}", config, processes, clock, key, bad)
    return stats | dict(bad=stats.pop("in_a_row") + (not len(sound)), score=float(sound.mean()) if len(sound) else None, not_finite=faults)


def diffusion_dpo_loss(win: torch.Tensor, lose: torch.Tensor, win_ref: torch.Tensor, lose_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Per pair [N], from denoising errors (mean squares per sample) of policy and reference: smaller than the reference's on winners."""
    return -F.logsigmoid(-beta / 2 * ((win - win_ref) - (lose - lose_ref)))


def mapo_loss(win: torch.Tensor, lose: torch.Tensor, beta: float, snr: float = 0.5, scale: float = 1000.0) -> torch.Tensor:
    """Per pair [N]: the winner's denoising error, less beta times the log-odds that the winner is the likelier one."""
    def phi(error: torch.Tensor) -> torch.Tensor:           # falls from 1 as the error grows
        return snr * error / torch.expm1(snr * error)
    return win - beta * F.logsigmoid(scale * (phi(win) - phi(lose)))


def denoising_errors(unet, schedule: ddim.Schedule, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor,
                     cond: Conditioning) -> torch.Tensor:
    """Mean squared error of the network's output [N] on clean latents [N, C, H, W] noised to timesteps [N]; no guidance."""
    alpha = ddim.alphas_at(schedule, timestep)
    target = noise if schedule.prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    output = unet(ddim.add_noise(schedule, latents, noise, timestep), timestep, cond.prompt_embeds, cond.pooled, cond.time_ids)
    return (output.float() - target).square().mean(dim=(1, 2, 3))


def offline_round(pipe: Pipeline, models: Models, data: preference_pairs.Pairs, used: list[int], config: BaselineConfig,
                  processes: Processes, optimizer: torch.optim.Optimizer, indices: list[int], key: tuple, clock: Clock, bad: int) -> dict:
    """Each of `indices` (into `used`) is a pair of pictures, noised alike at one random timestep. As `run_rounds` wants it."""
    names = ("loss", "margin", "accuracy", "error_win", "error_lose")

    def loss_of(part: list[int]) -> torch.Tensor:
        """Places in `indices` -> [5, n]: the loss, and what is only logged."""
        size = config.train_batch if config.compile else 0
        rows = fill_up([used[indices[i]] for i in part], size)
        images, seen = stack_pictures(fill_up([readable(data, i) for i in rows[:len(part)]], size), pipe.side(config.resolution))
        generators = [generator(config.seed, "noise", key[0], i) for i in rows]
        last = len(pipe.schedule.alphas_cumprod)
        t = upload(torch.stack([torch.randint(last, (1,), generator=g) for g in generators]), pipe.device)       # [N, 1]
        mean, std = (m.flatten(0, 1).float() for m in encode_pairs(pipe, images).unbind(1))                 # [2 N, C, H, W] each
        draws = upload(torch.stack([torch.randn(3, *mean.shape[1:], generator=g) for g in generators]), pipe.device)
        latents = (mean + std * draws[:, 1:].flatten(0, 1)) * pipe.vae.config.scaling_factor
        noise, t = draws[:, :1].expand(-1, 2, *mean.shape[1:]).flatten(0, 1), t.expand(-1, 2).flatten()
        cond = encode_prompts(pipe, [data.captions[i] for i in rows], config.resolution or None).map(lambda v: v.repeat_interleave(2, 0))
        label = upload(data.label[rows], pipe.device)
        order = torch.stack([torch.where(label > 0.5, 0, 1), torch.where(label > 0.5, 1, 0)], 1)            # [N, 2]: winner, loser

        def errors() -> torch.Tensor:                                                                       # [2, N]
            return denoising_errors(models.unet, pipe.schedule, latents, noise, t, cond).view(-1, 2).gather(1, order).t()

        win, lose = errors()
        if config.method == "mapo":
            margin, loss = lose - win, mapo_loss(win, lose, config.beta)
        else:
            with torch.no_grad(), lora.disabled(pipe.unet):
                win_ref, lose_ref = errors()
            margin, loss = (lose - lose_ref) - (win - win_ref), diffusion_dpo_loss(win, lose, win_ref, lose_ref, config.beta)
        values = torch.stack([loss, margin.detach(), (margin > 0).float(), win.detach(), lose.detach()])
        return (values * upload(seen, pipe.device))[:, :len(part)]

    stats = train_minibatches(pipe, optimizer, list(range(len(indices))), names, loss_of,
                              lambda i: f"the pair of caption {data.captions[used[indices[i]]]!r}", config, processes, clock, key, bad)
    return stats | dict(bad=stats.pop("in_a_row"), score=None)


def main() -> None:
    """Train as the command line says; continue if the run folder holds the same run."""
    config = parse_options(BaselineConfig, PRESETS, description=__doc__)
    processes = start_processes(config.device or None)
    config, own = spo_train.fit_memory(config, PRESETS, processes.device), METHODS[config.method]
    config = dataclasses.replace(config, lr=config.lr or own["lr"], beta=config.beta or own["beta"])
    walk = d3po_as_spo(config)
    spo_train.check(walk)
    offline = config.method in OFFLINE
    prompts = [] if offline else spo_train.training_prompts(config)
    run = Run(config.out, config, processes, spo_train.FREE)
    if not offline:
        pipe, models = prepare(walk, processes)
        arguments = (pipe, models, prompts, encode_empty(pipe))
        one_round = functools.partial(*((spo_round, *arguments, walk) if config.method == "d3po" else (ddpo_round, *arguments, config)),
                                      processes)
    else:
        if not config.pairs and config.preset != "tiny":
            raise InputError(f"--method {config.method} learns from pictures; give --pairs a folder or Parquet file of preference pairs")
        pipe, models = prepare_policy(config, processes)
        data = preference_pairs.load_pairs(config.pairs, pipe.side(config.resolution)) if config.pairs else \
            preference_pairs.world_pairs(config.count, config.seed)
        used = [i for i, label in enumerate(data.label.tolist()) if label != 0.5]               # a tie has no winner
        if not used:
            raise InputError(f"{config.pairs}: every pair is a tie")
        prompts = [data.captions[i] for i in used]
        one_round = functools.partial(offline_round, pipe, models, data, used, config, processes)
    run_rounds(config, run, processes, prompts, pipe, models, one_round, config.method)


if __name__ == "__main__":
    run_script(main)
