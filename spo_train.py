"""SPO and MSPO: step-by-step preference optimization of a text-to-image model (paper, sections 4.1 and 4.3 to 4.5).

    python spo_train.py                                             # the embedded tiny model, two to three minutes
    python spo_train.py --model sd15 --spm SPM.bin --prompts 4k_training_prompts.json          # one GPU
    torchrun --nproc_per_node=4 spo_train.py --model sdxl --spm SPM.bin --prompts prompts.txt  # four

One round:
    sample   walk down the DDIM trajectory of every prompt; where t_min <= t <= t_max draw k candidates of x_{t-1} from one x_t,
             let the step-aware preference model score their predicted clean pictures, keep best and worst as a pair,
             and go on from a candidate chosen at random (section 4.3)
    train    DPO on the pairs (Eq. 4), each exactly once, in shuffled minibatches over all timesteps (Eq. 5)

Shapes: B prompts, K candidates, J inner steps, S steps that give pairs, C H W latent, L tokens,
D width, P width of the judge's text and picture features, N pairs.
"""
import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import ddim
import lora
from clip_spm import CLIP, preprocess_decoded
from diffusion import (
    Conditioning,
    encode_empty,
    encode_prompts,
    generate,
    grid,
    guided_noise,
    negative,
    on_device,
)
from loading import (
    DTYPES,
    NEGATIVE,
    SDXL_VAE,
    TINY,
    Pipeline,
    load_clip,
    load_pipeline,
    load_tiny_decoder,
)
from training import (
    TOO_MANY,
    Clock,
    Processes,
    Run,
    Stopped,
    check_preset,
    fill_up,
    fingerprint,
    generator,
    opt,
    parse_options,
    permutation,
    profiled,
    run_script,
    say_compiling,
    start_processes,
    upload,
    warn,
    write_atomic,
)
from prompt_sets import read_prompts
from unet import compile_blocks
from weights import InputError, preset_of


@dataclass
class RunConfig:
    """What every online method needs. Sources: P = the paper, O = the released official code, T = measured on the tiny model."""
    model: str = opt("tiny", "tiny, sd15, sdxl, a folder or hub id in the diffusers layout, or a single-file checkpoint")
    preset: str = opt("", "whose settings are the defaults: tiny, sd15 or sdxl; empty: the model's own, or what a local folder or single "
                      "file turns out to be, else sd15", ("", "tiny", "sd15", "sdxl"))
    out: str = opt("runs/spo", "run folder: LoRA files, log.jsonl, config.json, checkpoints, sample grids")
    prompts: str = opt("", "training prompts: .txt, .json, .jsonl, .parquet or a hub data set (P: 4k Pick-a-Pic captions); empty: "
                       "tiny's own")
    sample_prompts: int = opt(0, "use this many of them, drawn by the seed (P: 4000); 0: all", least=0)
    seed: int = opt(0, "every random number of the run is keyed by it", least=0)
    device: str = opt("", "cpu or cuda; empty: a GPU if there is one")
    dtype: str = opt("bf16", "of the frozen weights; LoRA, schedule and loss are always fp32", tuple(DTYPES))
    vae: str = opt("", "another VAE, folder or hub id; empty: the model's own (sdxl: the fp16-safe one)")
    decoder: str = opt("", "small decoder of the pictures that the judge sees: taesd, a folder, file or hub id; empty: the VAE's")
    prediction_type: str = opt("", "single files: epsilon or v_prediction; empty: epsilon, or as the folder says",
                               ("", "epsilon", "v_prediction"))
    negative: str = opt("", "guidance's other side: zeros, or the empty prompt encoded; empty: as the model was trained",
                        ("", "zeros", "encoded"))
    tokenizer: str = opt("", "single files: folder or hub id with tokenizer/ (and tokenizer_2/); empty: the official one")
    # Sampling (P 5.1)
    steps: int = opt(20, "DDIM steps of a trajectory (P: 20)", least=1, most=999)
    eta: float = opt(1.0, "DDIM stochasticity; 0 would leave a step without a probability (P: 1)", above=0, most=1)
    guidance_scale: float = opt(5.0, "classifier-free guidance, in sampling and in both training forwards (P: 5)")
    resolution: int = opt(0, "picture side in pixels; 0: the model's own", least=0)
    # Optimization (P 5.1)
    lr: float = opt(6e-5, "AdamW learning rate (P: 6e-5 SD-1.5, 1e-5 SDXL)", least=0)
    weight_decay: float = opt(1e-4, "AdamW weight decay (O)", least=0)
    clip_norm: float = opt(1.0, "bound on the gradient norm (O: 1.0, though theirs clips nothing)", above=0)
    rank: int = opt(4, "LoRA rank (P: 4 SD-1.5, 64 SDXL); alpha = rank", least=1)
    targets: str = opt(",".join(lora.TARGETS), "linear layers that get LoRA, by the end of their names (O)")
    epochs: int = opt(10, "passes over the prompts (P: 10)", least=1)
    rounds: int = opt(0, "stop after this many rounds; 0: when the epochs are done", least=0)
    prompts_per_round: int = opt(40, "global batch of prompts per round (O: 4 x 10 SD-1.5, 4 x 2 SDXL)", least=1)
    pairs_per_step: int = opt(40, "global batch of pairs per optimizer step (P: 40 SD-1.5; 8 x 2 SDXL)", least=1)
    # What fits, and how often; none of these changes the mathematics
    memory: str = opt("auto", "low: small batches, checkpointing, text encoders on the card only while they encode; normal: the batches "
                      "below; auto: low on cards under 32 GB (sd15) or 64 GB (sdxl)", ("auto", "normal", "low"))
    sample_batch: int = opt(10, "prompts that one process samples at a time", least=1)
    train_batch: int = opt(10, "pairs in one forward and backward", least=1)
    decode_batch: int = opt(16, "latents that the VAE decodes at a time", least=1)
    checkpointing: bool = opt(False, "recompute the UNet's activations in the backward: less memory, slower")
    decoder_check: int = opt(0, "with --decoder: for this many rounds decode with the VAE too and log how often it names the same pair",
                             least=0)
    compile: bool = opt(False, "torch.compile the UNet's blocks, the decoder and the judge")
    profile: bool = opt(False, "write what the second round spends its time on: profile.json (for Perfetto), profile.txt")
    save_every: int = opt(10, "rounds between checkpoints; the last two stay, and that of the highest mean score (LoRA: best/)", least=1)
    grid_every: int = opt(10, "rounds between sample grids; 0: never", least=0)
    snapshot_every: int = opt(0, "rounds between LoRAs that stay, in loras/; 0: none", least=0)


@dataclass
class SPOConfig(RunConfig):
    """Every option of SPO: those of a run, and its own."""
    spm: str = opt("", "the judge's file or folder; empty: the one that belongs to the model and --judge")
    judge: str = opt("spm", "who compares candidates (P, Table 5)", ("spm", "step-blind", "pickscore"))
    k: int = opt(4, "candidates per pool (P Table 6: 4; O: 2 for SDXL)", least=2)
    j: int = opt(1, "inner steps from a pool to its scores; more than 1 is MSPO (P Table 7: 4 for SDXL)", least=1)
    t_max: int = opt(751, "pools open at timesteps up to this (P: kappa = 750, Table 8; O: from t = 751)", least=0)
    t_min: int = opt(0, "and down to this (P Table 8)", least=0)
    start: str = opt("random", "which candidate the trajectory goes on from (P Table 4)", ("random", "win", "lose"))
    pair: str = opt("best-worst", "which two candidates are compared (P Table 9)", ("best-worst", "random"))
    threshold: float = opt(0.3, "a pair counts if softmax(best, worst) differ by more (O: 0.3 SD-1.5, 0.4 SDXL)", most=1)
    beta: float = opt(10.0, "strength of regularization in Eq. 4 (P: 10, for the mean log-density)", above=0)
    clamp: float = opt(0.1, "each probability ratio is clamped to 1 +- this; 0: not at all (O: 0.1)", least=0, below=1)


PRESETS = {
    # Its latents have 256 numbers, not 16,384: what counts as far from the reference, in mean log-density, is smaller (beta),
    # and a picture is settled earlier: pools above t = 751 help, those below 501 only make the colours drift.
    "tiny": dict(prompts=str(TINY / "train_prompts.txt"), dtype="fp32", guidance_scale=3.0, threshold=0.1, t_min=501, t_max=951, beta=100.0,
                 lr=4e-4, prompts_per_round=16, pairs_per_step=24, rounds=9, sample_batch=16, train_batch=28, decode_batch=64,
                 save_every=3),
    "sd15": dict(),
    "sdxl": dict(vae=SDXL_VAE, k=2, j=4, threshold=0.4, lr=1e-5, rank=64,
                 prompts_per_round=8, pairs_per_step=16, sample_batch=2, train_batch=1, decode_batch=4),
}
LOW = {         # estimated, not measured: sd15 within 10 GB at 512 pixels, sdxl within 24 GB at 1024
    "sd15": dict(sample_batch=2, train_batch=4, decode_batch=2, checkpointing=True),
    "": dict(sample_batch=1, train_batch=1, decode_batch=1, checkpointing=True),            # every other preset
}
# What a preset sets is compared itself.
FREE = ("out", "preset", "device", "epochs", "rounds", "memory", "sample_batch", "train_batch", "decode_batch", "checkpointing",
        "compile", "decoder_check", "profile", "save_every", "grid_every", "snapshot_every")


@dataclass
class Pairs:
    """Fixed slots, one per prompt and scored-trajectory step; index 0 of the pair axis is the winner, 1 the loser."""
    x_t: torch.Tensor           # [B, S, 2, C, H, W]; both equal at the first step of a group
    x_next: torch.Tensor        # [B, S, 2, C, H, W]
    valid: torch.Tensor         # [B, S] bool: the scores differ by more than the threshold
    scores: torch.Tensor        # [B, G, K] of each of the G groups
    fault: torch.Tensor         # [B, G] index into FAULTS: what was not finite first; such a pool is not used
    log_prob: torch.Tensor      # [B, S, 2] of x_next under the policy that drew it
    agreement: torch.Tensor     # [B, G] 1: the VAE's pictures would give the same pair, -1: another; 0: no pair, or not asked


FAULTS = ("", "the UNet's prediction", "a decoded picture", "the judge's score")


def pool_groups(timesteps: list[int], t_min: int, t_max: int, j: int) -> list[list[int]]:
    """Indices into `timesteps` where t_min <= t <= t_max, cut into groups of j (the last may be shorter).

    20 steps, t <= 751, j = 4: [[4, 5, 6, 7], [8, ..], [12, ..], [16, 17, 18, 19]]; j = 1: sixteen groups of one.
    """
    inside = [i for i, t in enumerate(timesteps) if t_min <= t <= t_max]
    if not inside:
        raise InputError(f"no timestep lies in {t_min}..{t_max}; the {len(timesteps)} steps are {timesteps}")
    return [inside[i:i + j] for i in range(0, len(inside), j)]


def choose_pair(scores: torch.Tensor, threshold: float, how: str,
                uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [B, K] -> (win [B], lose [B], valid [B]): indices of the pair, and whether it counts.

    Best and worst of the pool (section 4.1), or two at random (Table 9), which the keyed `uniform` [B, 2] decides.
    """
    k = scores.shape[1]
    if how == "best-worst":
        win, lose = scores.argmax(1), scores.argmin(1)
    else:
        first = (uniform[:, 0] * k).long().clamp(max=k - 1)
        second = (first + 1 + (uniform[:, 1] * (k - 1)).long().clamp(max=k - 2)) % k
        rows = torch.arange(len(scores), device=scores.device)
        better = scores[rows, first] >= scores[rows, second]
        win, lose = torch.where(better, first, second), torch.where(better, second, first)
    both = torch.stack([scores.gather(1, win[:, None])[:, 0], scores.gather(1, lose[:, None])[:, 0]], 1).softmax(1)
    return win, lose, both[:, 0] - both[:, 1] > threshold


@dataclass
class Counted:
    """A UNet that counts what it is asked for: 1 for each sample, 3 where a full backward follows (frozen weights spare half of it)."""
    unet: object
    evaluations: int = 0

    def __call__(self, latents: torch.Tensor, *rest):
        self.evaluations += len(latents) * (3 if torch.is_grad_enabled() else 1)
        return self.unet(latents, *rest)


@dataclass
class Models:
    """The networks as the loop calls them; compiled or not."""
    unet: object                # policy with LoRA on, reference with LoRA off
    decode: object              # latents -> pictures
    judge: CLIP | None = None
    image_features: object = None       # of the judge
    check: object = None                # latents -> pictures with the VAE, where `decode` is a smaller decoder and the two are compared


@torch.no_grad()
def sample_pairs(pipe: Pipeline, models: Models, cond: Conditioning, uncond: Conditioning, text: torch.Tensor,
                 generators: list[torch.Generator], config: SPOConfig, clock: Clock, trace: list | None = None) -> Pairs:
    """Walk down B trajectories and collect win-lose pairs (section 4.1, Figures 3 and 4).

    `cond`, `uncond`: conditioning of the B prompts; `text` [B, P]: the judge's text features; `generators`: one
    per prompt, so that a prompt's pools do not depend on the batch. `trace`: collects each pool for a picture.
    """
    schedule, device, b, k = pipe.schedule, pipe.device, len(generators), config.k
    shape = pipe.latent_shape(config.resolution or None)
    timesteps = schedule.timesteps(config.steps)
    stride = len(schedule.alphas_cumprod) // config.steps
    groups = pool_groups(timesteps, config.t_min, config.t_max, config.j)
    opens = {group[0]: group for group in groups}

    def draw(*lead: int) -> torch.Tensor:                                           # [B, *lead, C, H, W]
        return upload(torch.stack([torch.randn(*lead, *shape, generator=g) for g in generators]), device)

    def noise_of(latents: torch.Tensor, t: int, repeat: int = 1) -> torch.Tensor:
        with clock("sampling"):
            c, u = (x.map(lambda v: v.repeat_interleave(repeat, 0)) for x in (cond, uncond))
            return guided_noise(models.unet, latents, t, c, u, config.guidance_scale)

    def finite(values: torch.Tensor) -> torch.Tensor:                                # [B * K, ...] -> [B]
        return torch.isfinite(values).reshape(b, -1).all(1)

    def score(x0: torch.Tensor, t: int, decode) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Predicted clean latents [B * K, C, H, W] -> (scores [B, K], index into FAULTS [B], pictures if they are traced)."""
        features, sound, images = [], [], []
        for part in x0.split(config.decode_batch):              # no more pictures at a time than are decoded
            with clock("decoding"):
                pictures = decode(part)
            with clock("scoring"):
                pixels = preprocess_decoded(pictures, models.judge.config.vision.image_size)
                features.append(models.image_features(pixels, torch.full((len(part),), max(t, 0), device=device)))
                sound.append(torch.isfinite(pictures).flatten(1).all(1))
            images += [pictures] if trace is not None else []
        scores = models.judge.score(torch.cat(features), text.repeat_interleave(k, 0)).view(b, k)
        fault = 3 * ~finite(scores)
        for code, fine in ((2, torch.cat(sound).view(b, k).all(1)), (1, finite(x0))):       # the earlier cause explains the later
            fault = torch.where(fine, fault, code)
        return scores, fault, torch.cat(images) if images else None

    slots_x, slots_next, slots_density, valid, all_scores, faults, agreements = [], [], [], [], [], [], []
    rows = torch.arange(b, device=device)
    latents, i = draw(), 0
    noise_pred = noise_of(latents, timesteps[0])
    while i <= groups[-1][-1]:                  # below t_min nothing is scored, so nothing is sampled
        t = timesteps[i]
        if i not in opens:                      # t > kappa: an ordinary step (section 4.3)
            mean, std = ddim.step_gaussian(schedule, latents, noise_pred, t, t - stride, config.eta)
            latents, i = mean + std * draw(), i + 1
            noise_pred = noise_of(latents, timesteps[i])
            continue
        # K candidates from one Gaussian; with J > 1 each goes J steps on its own (section 4.5).
        group = opens[i]
        noise, uniform = draw(len(group), k), upload(torch.stack([torch.rand(3, generator=g) for g in generators]), device)
        path, density = [latents[:, None].expand(-1, k, *shape)], []                # [B, K, C, H, W] each; [B, K] each
        for inner, step in enumerate(group):
            t = timesteps[step]
            if inner == 0:
                mean, std = ddim.step_gaussian(schedule, latents, noise_pred, t, t - stride, config.eta)
                mean = mean[:, None]                                                # [B, 1, C, H, W]
            else:
                flat = path[-1].flatten(0, 1)
                mean, std = ddim.step_gaussian(schedule, flat, noise_of(flat, t, k), t, t - stride, config.eta)
                mean = mean.unflatten(0, (b, k))
            path.append(mean + std * noise[:, inner])
            density.append(ddim.log_prob((std * noise[:, inner]).flatten(0, 1), 0.0, std).view(b, k))
        i, candidates, last = group[-1] + 1, path[-1].flatten(0, 1), group[-1] + 1 == len(timesteps)
        if last:                                # the candidates are clean latents themselves
            t_next, x0 = 0, candidates
        else:
            t_next = timesteps[i]
            noise_pred = noise_of(candidates, t_next, k)
            x0 = ddim.predict_x0(schedule, candidates, noise_pred, t_next)
        scores, fault, images = score(x0, t_next, models.decode)                    # [B, K], [B]
        win, lose, keep = choose_pair(scores, config.threshold, config.pair, uniform[:, 1:])
        keep = keep & (fault == 0)
        agreement = torch.zeros_like(fault)
        if models.check:
            win_vae, lose_vae, _ = choose_pair(score(x0, t_next, models.check)[0], config.threshold, config.pair, uniform[:, 1:])
            agreement = keep * torch.where((win == win_vae) & (lose == lose_vae), 1, -1)
        for before, after, dense in zip(path, path[1:], density):
            slots_x.append(torch.stack([before[rows, win], before[rows, lose]], 1))     # [B, 2, C, H, W]
            slots_next.append(torch.stack([after[rows, win], after[rows, lose]], 1))
            slots_density.append(torch.stack([dense[rows, win], dense[rows, lose]], 1))     # [B, 2]
            valid.append(keep)
        all_scores.append(scores)
        faults.append(fault)
        agreements.append(agreement)
        chosen = {"random": (uniform[:, 0] * k).long().clamp(max=k - 1), "win": win, "lose": lose}[config.start]
        latents = path[-1][rows, chosen]
        if not last:                            # the chosen candidate's noise prediction is already there
            noise_pred = noise_pred.unflatten(0, (b, k))[rows, chosen]
        if trace is not None:
            trace.append(dict(opened=timesteps[group[0]], timestep=t_next, images=images.unflatten(0, (b, k))[0].cpu(),
                              scores=scores[0].tolist(), win=int(win[0]), lose=int(lose[0]), chosen=int(chosen[0]), valid=bool(keep[0])))
    return Pairs(*(torch.stack(v, 1) for v in (slots_x, slots_next, valid, all_scores, faults, slots_density, agreements)))


def pair_log_ratios(unet, model: torch.nn.Module, schedule: ddim.Schedule, x_t: torch.Tensor, x_next: torch.Tensor,
                    timestep: torch.Tensor, previous: torch.Tensor, shared: list[bool], cond: Conditioning,
                    uncond: Conditioning, guidance_scale: float, eta: float = 1.0, size: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """log p_theta / p_ref of winner and loser, [N] each (the two logarithms inside Eq. 4).

    x_t, x_next [N, 2, C, H, W]; timestep, previous [N]. Where a pair shares its x_t (`shared`), one policy and one
    reference forward give both ratios; the official code runs four. `model` is the UNet that carries the LoRA,
    `unet` what to call (the same, counted); forwards are filled up to `size` rows.
    """
    n, apart = len(shared), [i for i, s in enumerate(shared) if not s]
    rows = fill_up(list(range(n)) + apart, size)                        # the winners' x_t, then losers' that differ
    lose_row = list(range(n))
    for place, i in enumerate(apart):
        lose_row[i] = n + place
    spare = len(rows) - n - len(apart)
    rows, lose_row = upload(torch.tensor(rows + lose_row), x_t.device).split([len(rows), n])     # a list as an index would wait for the GPU
    latents = torch.cat([x_t[:, 0], x_t[rows[n:n + len(apart)], 1], x_t[:1, 0].expand(spare, *x_t.shape[2:])])
    t, t_prev = timestep[rows], previous[rows]
    c, u = cond.map(lambda v: v[rows]), uncond.map(lambda v: v[rows])
    noise_pred = guided_noise(unet, latents, t, c, u, guidance_scale)
    with torch.no_grad(), lora.disabled(model):
        noise_ref = guided_noise(unet, latents, t, c, u, guidance_scale)
    mean, std = ddim.step_gaussian(schedule, latents, noise_pred, t, t_prev, eta)
    mean_ref, _ = ddim.step_gaussian(schedule, latents, noise_ref, t, t_prev, eta)

    def ratio(sample: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return ddim.log_prob(sample, mean[index], std[index]) - ddim.log_prob(sample, mean_ref[index], std[index])

    return ratio(x_next[:, 0], rows[:n]), ratio(x_next[:, 1], lose_row)


def spo_loss(win: torch.Tensor, lose: torch.Tensor, beta: float, clamp: float) -> torch.Tensor:
    """Eq. 4 per pair [N], from the two log-ratios, each ratio clamped to 1 +- `clamp` (0: not clamped).

    Outside the clamp the gradient is exactly zero, and with beta 10, clamp 0.1 the loss lies within 0.126..2.133.
    """
    if clamp > 0:
        win, lose = (r.clamp(math.log(1 - clamp), math.log(1 + clamp)) for r in (win, lose))
    return -F.logsigmoid(beta * (win - lose))                                                       # Eq. 4


def cut_minibatches(slots: list[int], size: int, *key) -> list[list[int]]:
    """Shuffle all valid slots and cut them into about equal minibatches of about `size`; no tiny remainder."""
    order = [slots[i] for i in permutation(len(slots), *key)]
    count = max(1, round(len(order) / size)) if order else 0
    return [order[len(order) * i // count: len(order) * (i + 1) // count] for i in range(count)]


def train_minibatches(pipe: Pipeline, optimizer: torch.optim.Optimizer, slots: list[int], names: tuple[str, ...], loss_of, place_of,
                      config: RunConfig, processes: Processes, clock: Clock, key: tuple, in_a_row: int = 0) -> dict:
    """Use each of the `slots` once, in shuffled minibatches. Returns means over the round's slots and optimizer steps.

    `loss_of(part)`: slots -> [len(names), n], the loss first, then what is only logged. `place_of(slot)`: where, for messages.
    `slots` are the same on every process; each takes its share of each minibatch. A gradient that is not finite is
    reported and its step skipped; TOO_MANY skipped `in_a_row` end the round.
    """
    weights, sums, used, skipped, norms = lora.parameters(pipe.unet), torch.zeros(len(names)), 0, 0, []
    for batch in cut_minibatches(slots, config.pairs_per_step, config.seed, "pairs", *key):
        mine, stats, losses = batch[processes.rank::processes.world], torch.zeros(len(names), device=pipe.device), []
        for begin in range(0, len(mine), config.train_batch):
            with clock("training"):
                values = loss_of(mine[begin:begin + config.train_batch])
                losses.append(values[0].detach())
                (values[0].sum() / len(batch)).backward()           # normalised by the global minibatch
                stats += values.detach().sum(1)
        for p in weights:                       # a process without pairs still takes part
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        processes.sum([p.grad for p in weights] + [stats])
        norm = float(torch.nn.utils.clip_grad_norm_(weights, config.clip_norm))
        if math.isfinite(norm):
            optimizer.step()
            used += len(batch)
            in_a_row = 0
            norms.append(norm)
            sums += stats.cpu()
        else:
            skipped += 1
            in_a_row += 1
            where = [s for s, finite in zip(mine, torch.isfinite(torch.cat(losses)).tolist()) if not finite] if losses else []
            round_ = f"epoch {key[0]}, round {key[1]} of it: "
            if where:
                warn(f"{round_}the loss of {place_of(where[0])} is not finite; optimizer step skipped")
            elif processes.main and math.isfinite(float(stats[0])):
                broken = (n for n, p in pipe.unet.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all())
                name = next(broken, "all weights together")         # finite numbers may have an infinite norm
                warn(f"{round_}the gradient of {name} is not finite; optimizer step skipped")
        optimizer.zero_grad(set_to_none=True)
        if in_a_row >= TOO_MANY:
            break
    return dict({name: float(v) / max(used, 1) for name, v in zip(names, sums)}, pairs=len(slots), updates=len(norms), skipped=skipped,
                in_a_row=in_a_row, grad_norm=sum(norms) / max(len(norms), 1))


def train_on_pairs(pipe: Pipeline, models: Models, optimizer: torch.optim.Optimizer, pairs: Pairs, cond: Conditioning,
                   empty: Conditioning | None, config: SPOConfig, processes: Processes, clock: Clock, key: tuple,
                   prompts: list[str] | None = None, in_a_row: int = 0) -> dict:
    """Use every valid pair of the round once (Eq. 5). `pairs` and `cond` hold the whole round and are the same on every process."""
    timesteps = pipe.schedule.timesteps(config.steps)
    stride = len(pipe.schedule.alphas_cumprod) // config.steps
    groups = pool_groups(timesteps, config.t_min, config.t_max, config.j)
    steps = [i for group in groups for i in group]
    first = [i == group[0] for group in groups for i in group]
    count = len(steps)
    # One pair at a time has one x_t or two: two shapes, no rows to spare.
    size = config.train_batch * (1 if all(first) else 2) if config.compile and config.train_batch > 1 else 0

    def loss_of(part: list[int]) -> torch.Tensor:
        """Slots (prompt, step) -> [6, n]: Eq. 4, and what is only logged."""
        places = [s % count for s in part]
        prompt, slot, t = upload(torch.tensor([[s // count for s in part], places, [timesteps[steps[s]] for s in places]]), pipe.device)
        c = cond.map(lambda v: v[prompt])
        win, lose = pair_log_ratios(
            models.unet, pipe.unet, pipe.schedule, pairs.x_t[prompt, slot], pairs.x_next[prompt, slot], t, t - stride,
            [first[s] for s in places], c, negative(pipe, c, empty), config.guidance_scale, config.eta, size)
        loss = spo_loss(win, lose, config.beta, config.clamp)
        with torch.no_grad():
            outside = [((r.exp() - 1).abs() > (config.clamp or math.inf)).float() for r in (win, lose)]
            more = [win - lose, (win > lose).float(), win.exp(), lose.exp(), (outside[0] + outside[1]) / 2]
        return torch.stack([loss, *more])

    def place_of(slot: int) -> str:
        prompt, place = divmod(slot, count)
        return f"a pair at t = {timesteps[steps[place]]}, prompt {prompts[prompt] if prompts else prompt!r}"

    slots = pairs.valid.flatten().nonzero()[:, 0].tolist()
    names = ("loss", "margin", "accuracy", "ratio_win", "ratio_lose", "clipped")
    stats = train_minibatches(pipe, optimizer, slots, names, loss_of, place_of, config, processes, clock, key, in_a_row)
    return stats | dict(valid_share=len(slots) / max(pairs.valid.numel(), 1))


def report_faults(pairs: Pairs, prompts: list[str], groups: list[list[int]], timesteps: list[int], key: tuple) -> int:
    """How many pools hold something that is not finite; the earliest is reported with what, where and for which prompt."""
    places = pairs.fault.t().nonzero().tolist()             # by group, then by prompt
    if places:
        group, prompt = places[0]
        warn(f"epoch {key[0]}, round {key[1]} of it: {FAULTS[int(pairs.fault[prompt, group])]} is not finite after the step at "
             f"t = {timesteps[groups[group][-1]]}, prompt {prompts[prompt]!r}; {len(places)} pools are not used (try --dtype fp32, or "
             "another --vae)")
    return len(places)


def judge_features(pipe: Pipeline, judge: CLIP, prompts: list[str]) -> torch.Tensor:
    """The judge's text features [B, P]. All CLIPs here share one vocabulary; what pads a text does not matter."""
    length = judge.config.text.max_position_embeddings
    ids = pipe.tokenizers[0](prompts, padding="max_length", truncation=True, max_length=length).input_ids
    with torch.no_grad(), on_device(judge.text_model, pipe.device, pipe.offload):
        return judge.text_features(torch.tensor(ids, device=pipe.device))


def judge_source(config: SPOConfig) -> str:
    """Where the judge's weights are."""
    if config.spm:
        return config.spm
    preset = config.preset or preset_of(config.model)
    if preset == "tiny":
        return str(TINY / {"spm": "spm", "step-blind": "spm_step_blind", "pickscore": "pickscore"}[config.judge])
    if config.judge == "pickscore":
        return "yuvalkirstain/PickScore_v1"
    if config.judge == "spm":
        return {"sd15": "SPO-Diffusion-Models/Step-Aware_Preference_Models/sd-v1-5_step-aware_preference_model.bin",
                "sdxl": "SPO-Diffusion-Models/Step-Aware_Preference_Models/sdxl_step-aware_preference_model.bin"}[preset]
    raise InputError(f"--judge {config.judge} with --preset {preset}: say with --spm where its weights are")


def fit_memory(config: RunConfig, presets: dict[str, dict], device: torch.device, arguments: list[str] | None = None) -> RunConfig:
    """The configuration with `memory` decided, normal or low, and low's batches where the command line does not name others.

    `arguments` is the command line that gave `config`; None: this process's own.
    """
    low = config.memory == "low"
    if config.memory == "auto":
        needs = {"tiny": 0, "sd15": 32e9, "sdxl": 64e9}[config.preset]          # sd15 takes 22.5 GB (README); sdxl is estimated
        low = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < needs
    if low:
        presets = {config.preset: presets.get(config.preset, {}) | LOW.get(config.preset, LOW[""])}
        config = parse_options(type(config), presets, arguments)
    return dataclasses.replace(config, memory="low" if low else "normal")


def check(config: SPOConfig) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    if config.t_min > config.t_max:
        raise InputError(f"--t_min {config.t_min}: must be at most --t_max, {config.t_max}")
    if config.decoder_check and not config.decoder:
        raise InputError(f"--decoder_check {config.decoder_check}: there is nothing to compare without --decoder")
    if config.decoder == "taesd" and config.preset == "tiny":
        raise InputError("--decoder taesd: knows the latents of SD-1.5 and SDXL, not those of tiny")


def training_prompts(config: RunConfig) -> list[str]:
    """The prompts to train on."""
    if not config.prompts:
        raise InputError("--prompts: name a file of training prompts, e.g. SPO's own 4k_training_prompts.json (only tiny brings its own)")
    return read_prompts(config.prompts, config.sample_prompts, config.seed)


def prepare_policy(config: RunConfig, processes: Processes) -> tuple[Pipeline, Models]:
    """Load the model, put the LoRA on, compile if asked."""
    dtype = DTYPES[config.dtype]
    pipe = load_pipeline(config.model, dtype, processes.device, vae=config.vae or None, prediction_type=config.prediction_type,
                         tokenizer=config.tokenizer, zero_negative=NEGATIVE[config.negative])
    pipe.check_resolution(config.resolution)
    if processes.main:
        check_preset(config, pipe.is_sdxl)
    pipe.offload = config.memory == "low"
    try:
        lora.add(pipe.unet, config.rank, targets=tuple(config.targets.split(",")), seed=config.seed)
    except ValueError as error:
        raise InputError(f"--targets {config.targets}: {error}") from None
    pipe.unet.checkpointing = config.checkpointing
    if config.compile:
        compile_blocks(pipe.unet)
        pipe.vae.to(memory_format=torch.channels_last)
    vae_decode = torch.compile(pipe.vae.decode, dynamic=False) if config.compile else pipe.vae.decode
    models = Models(Counted(pipe.unet), lambda z: vae_decode(z.to(pipe.vae.post_quant_conv.weight.dtype)).float())
    if config.decoder:
        small = load_tiny_decoder(config.decoder, pipe, dtype)
        models.check, models.decode = models.decode, lambda z: small(z.to(dtype)).float()
        if config.compile:
            small.compile(dynamic=False)
    return pipe, models


def load_judge(config: SPOConfig, device: torch.device) -> CLIP:
    """The judge; InputError where it is step-aware and should not be, or the other way round."""
    judge = load_clip(judge_source(config), DTYPES[config.dtype], device)
    if (config.judge == "spm") != judge.config.step_aware:
        raise InputError(f"--judge {config.judge}: {judge_source(config)} is {'' if judge.config.step_aware else 'not '}step-aware")
    return judge


def prepare(config: SPOConfig, processes: Processes) -> tuple[Pipeline, Models]:
    """The policy and its judge."""
    pipe, models = prepare_policy(config, processes)
    last = pipe.schedule.timesteps(config.steps)[-1]
    if last >= config.t_min and last - len(pipe.schedule.alphas_cumprod) // config.steps < 0 and pipe.schedule.final_alpha_cumprod == 1:
        raise InputError(f"{config.model}: its scheduler sets set_alpha_to_one, so the step from t = {last} has no spread and no "
                         f"probability; set it to false in scheduler_config.json, or --t_min {last + 1}")
    models.judge = load_judge(config, processes.device)
    models.image_features = torch.compile(models.judge.image_features, dynamic=False) if config.compile else models.judge.image_features
    return pipe, models


def sample_round(pipe: Pipeline, models: Models, prompts: list[str], indices: list[int], empty: Conditioning | None,
                 config: SPOConfig, processes: Processes, clock: Clock, epoch: int) -> tuple[Pairs, Conditioning]:
    """This process's share of a round's prompts, sampled; then everybody's, in the order of `indices`."""
    mine, parts = [indices[i] for i in processes.share(len(indices))], []
    texts = [prompts[i] for i in mine or indices[:1]]           # a process without prompts needs the shapes
    conds = encode_prompts(pipe, texts, config.resolution or None).map(lambda v: v[:len(mine)])
    text = judge_features(pipe, models.judge, texts)
    size = min(config.sample_batch, -(-config.prompts_per_round // processes.world)) if config.compile else 0

    def sample() -> None:
        """Fill `parts`, `sample_batch` prompts at a time."""
        for begin in range(0, len(mine), config.sample_batch):
            rows = list(range(begin, min(begin + config.sample_batch, len(mine))))
            whole_rows = fill_up(rows, size)
            generators = [generator(config.seed, "pool", epoch, mine[i]) for i in whole_rows]
            index = upload(torch.tensor(whole_rows), pipe.device)
            cond = conds.map(lambda v: v[index])
            part = sample_pairs(pipe, models, cond, negative(pipe, cond, empty), text[index], generators, config, clock)
            parts.append(Pairs(*(getattr(part, f.name)[:len(rows)] for f in dataclasses.fields(Pairs))))

    processes.droppable(sample)                 # until the exchange nothing has changed: whoever is told to stop need not finish
    # Every process contributes equally many prompts, so that the messages have fixed shapes: pad with invalid ones.
    count, slots = -(-len(indices) // processes.world), sum(map(len, pool_groups(
        pipe.schedule.timesteps(config.steps), config.t_min, config.t_max, config.j)))
    groups = -(-slots // config.j)
    shape = pipe.latent_shape(config.resolution or None)
    if not parts:
        blank = torch.zeros(0, slots, 2, *shape, device=pipe.device)
        parts.append(Pairs(blank, blank, torch.zeros(0, slots, dtype=torch.bool, device=pipe.device),
                           torch.zeros(0, groups, config.k, device=pipe.device),
                           torch.zeros(0, groups, dtype=torch.long, device=pipe.device),
                           torch.zeros(0, slots, 2, device=pipe.device),
                           torch.zeros(0, groups, dtype=torch.long, device=pipe.device)))

    def whole(tensors: list[torch.Tensor]) -> torch.Tensor:
        tensor = torch.cat(tensors)
        padding = tensor.new_zeros(count - len(tensor), *tensor.shape[1:])
        return processes.gather(torch.cat([tensor, padding]))[:len(indices)]

    with clock("exchange"):
        pairs = Pairs(*(whole([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Pairs)))
        return pairs, conds.map(lambda v: whole([v]))


def trace_prompt(pipe: Pipeline, models: Models, prompt: str, config: SPOConfig, seed: int = 0) -> list[dict]:
    """Sample one trajectory of `prompt` as in training -> its pools, for report.draw_trace."""
    cond = encode_prompts(pipe, [prompt], config.resolution or None)
    trace: list[dict] = []
    sample_pairs(pipe, models, cond, negative(pipe, cond, encode_empty(pipe)), judge_features(pipe, models.judge, [prompt]),
                 [generator(seed, "trace", prompt)], config, Clock(pipe.device), trace)
    return trace


def save_lora(pipe: Pipeline, folder: Path) -> None:
    """The LoRA in both formats: diffusers (`load_lora_weights(folder)`) and kohya (ComfyUI, A1111)."""
    weights = lora.state(pipe.unet)
    write_atomic(folder / "pytorch_lora_weights.safetensors", lambda p: save_file(weights, p, metadata={"format": "pt"}))
    write_atomic(folder / "lora_kohya.safetensors", lambda p: save_file(lora.to_kohya(weights), p, metadata={"format": "pt"}))


def draw_samples(pipe: Pipeline, prompts: list[str], config: RunConfig, path: Path) -> None:
    """A grid of the same 16 training prompts and seeds every time."""
    some = [prompts[i] for i in permutation(len(prompts), 0, "preview")[:16]]
    with torch.compiler.set_stance("force_eager"):          # its batches have other shapes
        images = generate(pipe, some, list(range(len(some))), min(config.sample_batch, config.decode_batch), steps=config.steps,
                          guidance_scale=config.guidance_scale, resolution=config.resolution or None)
    write_atomic(path, functools.partial(grid(images, 8).save, format="PNG"))


def copied(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights on the CPU, as they are now."""
    return [p.detach().to("cpu", copy=True) for p in weights]


@torch.no_grad()
def put(weights: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Put values into the weights."""
    for p, value in zip(weights, values, strict=True):
        p.copy_(value)


def run_rounds(config: RunConfig, run: Run, processes: Processes, prompts: list[str], pipe: Pipeline, models: Models, one_round,
               name: str = "spo") -> None:
    """The loop around any online method: rounds of prompts, log, checkpoints, snapshots, sample grids; resumes and stops cleanly.

    `one_round(optimizer, indices, key, clock, bad)` trains on the prompts `indices`; `key` is (epoch, place in it), `bad` how many
    optimizer steps in a row (and rounds without one sound pool) were not finite before. It returns its part of the log line,
    `score` and the new `bad` among it.
    """
    rounds_per_epoch = -(-len(prompts) // config.prompts_per_round)
    total = min(config.rounds or math.inf, config.epochs * rounds_per_epoch)
    weights = lora.parameters(pipe.unet)
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay)
    begin, bad, recent, took = 0, 0, [], []
    judge = [models.judge] if models.judge else []
    if state := run.resume(prompts=fingerprint(prompts), model=fingerprint(pipe.unet, pipe.vae, *pipe.text_encoders),
                           judge=fingerprint(*judge)):
        put(weights, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        begin, recent, bad = state["step"], state.get("recent", []), state.get("bad", 0)
    if processes.main:
        print("\n".join(f"{name:18} {value}" for name, value in dataclasses.asdict(config).items()))
        print(f"{len(prompts)} prompts, {total} rounds of {config.prompts_per_round}, LoRA of {sum(p.numel() for p in weights):,} "
              f"parameters, {processes.world} x {pipe.device}, starting at round {begin}", flush=True)
    progress = tqdm(total=total, initial=begin, desc=name, unit="round", disable=not processes.main)
    good = copied(weights)                      # the last LoRA that drew finite pictures, as far as is known

    def save(done: int, score: float | None = None) -> None:
        if processes.main:                      # before the checkpoint: whoever is killed in between writes it again
            save_lora(pipe, run.folder)
            if run.is_best(score):
                save_lora(pipe, run.folder / "best")
        run.save(done, dict(lora=copied(weights), optimizer=optimizer.state_dict(), recent=recent, bad=bad), score)

    for step in range(begin, total):
        started, clock, models.unet.evaluations = time.perf_counter(), Clock(pipe.device), 0
        epoch, place = divmod(step, rounds_per_epoch)
        order = permutation(len(prompts), config.seed, "order", epoch)
        indices = order[place * config.prompts_per_round:(place + 1) * config.prompts_per_round]
        if step >= config.decoder_check:
            models.check = None
        before = copied(weights)
        try:
            with profiled(run.folder, pipe.device, config.profile and processes.main and step == min(begin + 1, total - 1)):
                stats = one_round(optimizer, indices, (epoch, place), clock, bad)
        except Stopped:
            if step > begin:
                save(step)
            progress.close()
            processes.leave(step, total, "rounds")
        bad = stats.pop("bad")
        good = before if stats["score"] is not None or not bad else good
        evaluations = torch.tensor([float(models.unet.evaluations)], device=pipe.device, dtype=torch.float64)
        processes.sum([evaluations])
        seconds, done = time.perf_counter() - started, step + 1
        card = dict(peak_memory_gb=torch.cuda.max_memory_allocated(pipe.device) / 1e9) if pipe.device.type == "cuda" else {}
        run.log(dict(round=done, epoch=epoch, **stats, lora_norm=lora.norm(pipe.unet), evaluations=int(evaluations),
                     prompts_per_second=len(indices) / seconds, seconds={k: round(v, 3) for k, v in clock.seconds().items()},
                     eta_minutes=(total - done) * seconds / 60, **card))
        progress.set_postfix({k: f"{stats[k]:.4g}" for k in ("score", "pairs", "margin") if stats[k] is not None}, refresh=False)
        progress.update()
        took.append(seconds)
        if config.compile and processes.main:
            say_compiling(took, "round")
        recent += [] if stats["score"] is None else [stats["score"]]
        ending, due = processes.any(bool(processes.stop)), done % config.save_every == 0 and not bad or done == total
        if processes.main and config.snapshot_every and done % config.snapshot_every == 0:
            save_lora(pipe, run.folder / "loras" / f"{done:05d}")
        if bad >= TOO_MANY:
            put(weights, good)
            if processes.main:
                save_lora(pipe, run.folder)
            raise InputError(f"round {done}: {TOO_MANY} optimizer steps in a row, or rounds, were not finite; the last good LoRA is in "
                             f"{run.folder} (try a lower --lr, or --dtype fp32)")
        if due or ending:
            score, recent = (sum(recent) / len(recent), []) if due and recent else (None, recent)
            save(done, score)
        if processes.main and config.grid_every and (done % config.grid_every == 0 or done == total):
            draw_samples(pipe, prompts, config, run.folder / f"samples-{done:05d}.png")
        processes.barrier()
        if ending and done < total:
            progress.close()
            processes.leave(done, total, "rounds")
    progress.close()
    if processes.main:
        checked = [row for row in run.read_log() if "decoder_pairs" in row]
        if count := sum(row["decoder_pairs"] for row in checked):
            same = sum(row["decoder_pairs"] * row["decoder_agreement"] for row in checked)
            print(f"--decoder {config.decoder}: of {count} pairs, {same / count:.1%} are the VAE's too")
        print(f"LoRA in {run.folder / 'pytorch_lora_weights.safetensors'} (diffusers) and lora_kohya.safetensors (ComfyUI, A1111)")


def spo_round(pipe: Pipeline, models: Models, prompts: list[str], empty: Conditioning | None, config: SPOConfig, processes: Processes,
              optimizer: torch.optim.Optimizer, indices: list[int], key: tuple, clock: Clock, bad: int) -> dict:
    """One round of SPO, as `run_rounds` wants it."""
    timesteps = pipe.schedule.timesteps(config.steps)
    groups = pool_groups(timesteps, config.t_min, config.t_max, config.j)
    pairs, cond = sample_round(pipe, models, prompts, indices, empty, config, processes, clock, key[0])
    texts, sound = [prompts[i] for i in indices], pairs.scores[pairs.fault == 0]                        # [G', K]
    faults = report_faults(pairs, texts, groups, timesteps, key) if processes.main else 0
    stats = train_on_pairs(pipe, models, optimizer, pairs, cond, empty, config, processes, clock, key, texts, bad)
    gap = sound.amax(-1) - sound.amin(-1)
    if checked := int(pairs.agreement.abs().sum()):
        stats |= dict(decoder_pairs=checked, decoder_agreement=int((pairs.agreement == 1).sum()) / checked)
    return stats | dict(bad=stats.pop("in_a_row") + (not len(sound)), score=float(sound.mean()) if len(sound) else None,
                        score_gap=float(gap.mean()) if len(sound) else None, not_finite=faults)


def main() -> None:
    """Train as the command line says; continue if the run folder holds the same run."""
    config = parse_options(SPOConfig, PRESETS, description=__doc__)
    check(config)
    processes = start_processes(config.device or None)
    config = fit_memory(config, PRESETS, processes.device)
    prompts = training_prompts(config)
    run = Run(config.out, config, processes, FREE)
    pipe, models = prepare(config, processes)
    run_rounds(config, run, processes, prompts, pipe, models,
               functools.partial(spo_round, pipe, models, prompts, encode_empty(pipe), config, processes))


if __name__ == "__main__":
    run_script(main)
