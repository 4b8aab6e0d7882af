"""SPO and MSPO: step-by-step preference optimization of a text-to-image model (paper, section 4).

    python spo_train.py                                 # the embedded tiny model, two minutes
    python spo_train.py --model sd15 --prompts PROMPTS.json --out runs/sd15             # one GPU
    torchrun --nproc_per_node=4 spo_train.py --model sdxl --prompts PROMPTS.json --out runs/sdxl

One round:
    sample   Walk down the DDIM trajectory of every prompt. Where t_min <= t <= t_max, draw k
             candidates of x_{t-1} from one x_t and let the step-aware preference model score
             their predicted clean pictures. The best and the worst are a pair. Go on from a
             candidate chosen at random. MSPO (j > 1): every candidate goes j steps on its own
             before it is judged, and each step of winner's and loser's path is a pair.
    train    DPO on the pairs (Eq. 4), each once, in minibatches over all timesteps (Eq. 5).

Shapes: B prompts, K candidates, J inner steps, G pools of a trajectory, S steps that give pairs,
C H W latent, L tokens, D width, P width of the judge's features, N pairs.
"""
import needs  # noqa: F401
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import ddim
import lora
from calls import upload
from clip_spm import CLIP, preprocess_decoded
from diffusion import Conditioning, encode_prompts, guided_noise, judge_features, negative
from finetune import (
    FREE,
    RunConfig,
    Trainer,
    Turn,
    compiled_sizes,
    fit_machine,
    prepare_policy,
    small_decoder,
    training_prompts,
    vae_decoder,
)
from loading import DTYPES, SDXL_VAE, TINY, Pipeline, judge_source, load_judging
from observers import DecoderCheck, Faults, report
from training import Processes, Run, generator, opt, parse_options, run_script, start_processes
from weights import InputError


@dataclass
class SPOConfig(RunConfig):
    """The options of SPO, beside those of every run. P = the paper, O = the official code."""
    spm: str = opt("", "the judge's file or folder; empty: the one that belongs to the model")
    judge: str = opt("spm", "who compares candidates (P Table 5)",
                     ("spm", "step-blind", "pickscore"))
    k: int = opt(4, "candidates per pool (P Table 6: 4; O: 2 for SDXL)", least=2)
    j: int = opt(1, "inner steps from a pool to its scores; more than 1 is MSPO (P Table 7: 4 for "
                 "SDXL)", least=1)
    t_max: int = opt(751, "pools open at timesteps up to this (P: kappa = 750, Table 8; O: from "
                     "t = 751)", least=0)
    t_min: int = opt(0, "and down to this (P Table 8)", least=0)
    continue_from: str = opt("random", "which candidate the trajectory goes on from (P Table 4)",
                             ("random", "win", "lose"), old="start")
    pair: str = opt("best-worst", "which two candidates are compared (P Table 9)",
                    ("best-worst", "random"))
    threshold: float = opt(0.3, "a pair counts if the softmax of its two scores differs by more "
                           "(O: 0.3 SD-1.5, 0.4 SDXL); the paper's kappa is --t_max", most=1)
    beta: float = opt(10.0, "regularization in Eq. 4 (P: 10, for the mean log-density)", above=0)
    clamp: float = opt(0.1, "each probability ratio is clamped to 1 +- this; 0: not at all (O: "
                       "0.1)", least=0, below=1)


PRESETS = {
    # Tiny latents have 256 numbers, not 16,384: a smaller change of the mean log-density is already
    # far from the reference, hence the larger beta. Pictures are settled earlier: pools above
    # t = 751 help, pools below 501 only make the colours drift.
    "tiny": dict(
        prompts=str(TINY / "train_prompts.txt"), dtype="fp32", guidance_scale=3.0, threshold=0.1,
        t_min=501, t_max=951, beta=100.0, lr=4e-4, prompts_per_round=16, pairs_per_step=24,
        rounds=9, sample_batch=16, train_batch=28, decode_batch=64, save_every=3, grid_every=3),
    "sd15": dict(),
    "sdxl": dict(
        vae=SDXL_VAE, k=2, j=4, threshold=0.4, lr=1e-5, rank=64, prompts_per_round=8,
        pairs_per_step=16, sample_batch=2, train_batch=1, decode_batch=4),
}
PRESETS["tiny-flow"] = PRESETS["tiny"] | dict(guidance_scale=2.0, t_min=550, t_max=950)


@dataclass
class Batch:
    """B prompts as the networks want them."""
    cond: Conditioning
    uncond: Conditioning
    text: torch.Tensor                  # [B, P] the judge's text features
    generators: list[torch.Generator]   # one per prompt: its pools do not depend on the batch

    def draw(self, function: Callable, *shape: int) -> torch.Tensor:
        """torch.randn or torch.rand of `shape` for every prompt -> [B, *shape]."""
        rows = [function(*shape, generator=g) for g in self.generators]
        return upload(torch.stack(rows), self.text.device)


@dataclass
class Judge:
    """The step-aware preference model looks at predicted clean pictures (section 4.2)."""
    clip: CLIP
    decode: Callable                    # latents -> pictures
    features: Callable                  # the CLIP's, of pixels and timestep
    chunk: int                          # latents that are decoded at a time
    schedule: ddim.Schedule             # of the model whose pictures they are

    def __call__(self, x0: torch.Tensor, t: float, text: torch.Tensor) -> torch.Tensor:
        """Predicted clean latents [B, K, C, H, W] at timestep t, text [B, P] -> scores [B, K]."""
        features = []
        for latents in x0.flatten(0, 1).split(self.chunk):
            pixels = preprocess_decoded(self.decode(latents), self.clip.config.vision.image_size)
            timestep = torch.full((len(latents),), t, device=x0.device)
            timestep = ddim.told(self.schedule, timestep, self.clip.config.flow)
            features.append(self.features(pixels, timestep))
        features = torch.cat(features).unflatten(0, x0.shape[:2])               # [B, K, P]
        return self.clip.score(features, text[:, None])


@dataclass
class Pool:
    """K candidates that left one x_t together and went J steps (section 4.1; J > 1: MSPO, 4.5)."""
    timesteps: list[float]              # J
    noise: torch.Tensor                 # [B, J, K, C, H, W], of each step (for observers)
    path: list[torch.Tensor]            # J + 1 times [B, K, C, H, W]; the first, shared, has K = 1
    x0: torch.Tensor                    # [B, K, C, H, W] predicted clean latents: what is judged
    t: float                            # their timestep; 0 after the last step
    uniform: torch.Tensor               # [B, 3] decides the start, and the two of a random pair
    scores: torch.Tensor                # [B, K]
    win: torch.Tensor                   # [B] which candidate
    lose: torch.Tensor                  # [B]
    valid: torch.Tensor                 # [B] bool: the two differ by more than the threshold
    chosen: torch.Tensor                # [B] which one the trajectory goes on from
    notes: dict[str, torch.Tensor] = field(default_factory=dict)        # observers'


def pool_groups(timesteps: list[float], t_min: int, t_max: int, j: int) -> list[list[int]]:
    """Indices into `timesteps` where t_min <= t <= t_max, in groups of j; the last may be shorter.

    20 steps, t <= 751, j = 4: [[4, 5, 6, 7], [8, ..], [12, ..], [16, ..]]; j = 1: sixteen of one.
    With MSPO no pool opens at the very last step, which joins the group before (O).
    """
    inside = [i for i, t in enumerate(timesteps) if t_min <= t <= t_max]        # t <= kappa
    if not inside:
        raise InputError(f"no step with a spread lies in {t_min}..{t_max}; they are at t = "
                         f"{[round(t, 1) for t in timesteps]}")
    groups = [inside[i:i + j] for i in range(0, len(inside), j)]
    if j > 1 and len(groups) > 1 and groups[-1] == [len(timesteps) - 1]:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def choose_pair(scores: torch.Tensor, threshold: float, how: str,
                uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [B, K] -> (win [B], lose [B], valid [B]): indices of the pair, and whether it counts.

    Best and worst of the pool (section 4.1), or two at random (Table 9), which the keyed
    `uniform` [B, 2] decides.
    """
    k = scores.shape[1]
    win, lose = scores.argmax(1), scores.argmin(1)
    if how == "random":
        first = (uniform[:, 0] * k).long().clamp(max=k - 1)
        other = (uniform[:, 1] * (k - 1)).long().clamp(max=k - 2)
        second = (first + 1 + other) % k
        better = pick(scores, first) >= pick(scores, second)
        win, lose = torch.where(better, first, second), torch.where(better, second, first)
    both = torch.stack([pick(scores, win), pick(scores, lose)], 1).softmax(1)
    return win, lose, both[:, 0] - both[:, 1] > threshold


def pick(candidates: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One of K for each prompt: [B, K, ...], [B] -> [B, ...]."""
    return candidates[torch.arange(len(index), device=index.device), index]


@torch.no_grad()
def sample_pools(pipe: Pipeline, judge: Judge, batch: Batch, config: SPOConfig,
                 observers: Sequence[Callable] = ()) -> list[Pool]:
    """Walk down B trajectories: spread into K candidates, judge, go on from one (Figures 3, 4)."""
    schedule, shape = pipe.schedule, pipe.latent_shape(config.resolution or None)
    timesteps, previous = schedule.timesteps(config.steps), schedule.previous(config.steps)
    groups = pool_groups(ddim.spread(schedule, config.steps), config.t_min, config.t_max, config.j)
    early = [[i] for i in range(groups[0][0])]          # t > kappa: ordinary steps (section 4.3)

    def predict(latents: torch.Tensor, t: float) -> torch.Tensor:   # [B, K, C, H, W] -> the same
        k = latents.shape[1]
        noise_pred = guided_noise(pipe, latents.flatten(0, 1), t, batch.cond.repeat(k),
                                  batch.uncond.repeat(k), config.guidance_scale)
        return noise_pred.unflatten(0, (-1, k))

    pools = []
    latents = batch.draw(torch.randn, 1, *shape)        # x_T, a pool of one
    noise_pred = predict(latents, timesteps[0])
    for group in early + groups:
        k = 1 if group in early else config.k
        noise = batch.draw(torch.randn, len(group), k, *shape)          # [B, J, K, C, H, W]
        path = [latents]
        for j, i in enumerate(group):                   # the first step spreads, others follow
            if j > 0:
                noise_pred = predict(path[-1], timesteps[i])
            mean, std = ddim.step_gaussian(schedule, path[-1], noise_pred, timesteps[i],
                                           previous[timesteps[i]], config.eta)
            path.append(mean + std * noise[:, j])       # [B, K, C, H, W] ~ p_theta of Eq. 4
        latents, after = path[-1], group[-1] + 1
        last = after == len(timesteps)
        t_next = 0 if last else timesteps[after]
        if not last:
            noise_pred = predict(latents, t_next)
        if group in early:
            continue
        # Candidates of the last step are clean latents themselves.
        x0 = latents if last else ddim.predict_x0(schedule, latents, noise_pred, t_next)
        uniform = batch.draw(torch.rand, 3)
        scores = judge(x0, t_next, batch.text)
        win, lose, valid = choose_pair(scores, config.threshold, config.pair, uniform[:, 1:])
        anyone = (uniform[:, 0] * k).long().clamp(max=k - 1)            # random start, section 4.3
        chosen = dict(random=anyone, win=win, lose=lose)[config.continue_from]  # Table 4
        pools.append(Pool([timesteps[i] for i in group], noise, path, x0, t_next, uniform, scores,
                          win, lose, valid, chosen))
        for observe in observers:
            observe(pools[-1], batch)
        latents = pick(latents, chosen)[:, None]
        if not last:                                    # its prediction is already there
            noise_pred = pick(noise_pred, chosen)[:, None]
    return pools


@dataclass
class Pairs:
    """Fixed slots, one per prompt and step of a pool; index 0 is the winner's, 1 the loser's."""
    x_t: torch.Tensor                   # [B, S, 2, C, H, W]; both equal at the first step of a pool
    x_next: torch.Tensor                # [B, S, 2, C, H, W]
    valid: torch.Tensor                 # [B, S] bool
    scores: torch.Tensor                # [B, G, K]
    notes: dict[str, torch.Tensor]      # observers', [B, G or S, ...]
    timesteps: list[float]              # S
    apart: list[bool]                   # S: have the paths parted before this step (MSPO)?
    ends: list[float]                   # G: the last timestep of each pool
    cond: Conditioning | None = None    # of the B prompts


def collect(pools: list[Pool]) -> Pairs:
    """Every step of the winners' and losers' paths."""
    def both(latents: torch.Tensor, pool: Pool) -> torch.Tensor:    # [B, K, ...] -> [B, 2, ...]
        latents = latents.expand(-1, pool.scores.shape[1], *latents.shape[2:])
        return torch.stack([pick(latents, pool.win), pick(latents, pool.lose)], 1)

    steps = [(pool, j) for pool in pools for j in range(len(pool.timesteps))]
    return Pairs(
        x_t=torch.stack([both(pool.path[j], pool) for pool, j in steps], 1),
        x_next=torch.stack([both(pool.path[j + 1], pool) for pool, j in steps], 1),
        valid=torch.stack([pool.valid for pool, _ in steps], 1),
        scores=torch.stack([pool.scores for pool in pools], 1),
        notes={name: torch.cat([pool.notes[name] for pool in pools], 1) for name in pools[0].notes},
        timesteps=[pool.timesteps[j] for pool, j in steps],
        apart=[j > 0 for _, j in steps],
        ends=[pool.timesteps[-1] for pool in pools])


def sample_round(trainer: Trainer, judge: Judge, turn: Turn, config: SPOConfig,
                 observers: Sequence[Callable] = ()) -> Pairs:
    """This process's share of a round's prompts, sampled; then everybody's, in their order."""
    pipe, processes, total = trainer.pipe, trainer.processes, len(turn.indices)
    mine = processes.share(total)
    share = mine or [0]                         # a process without prompts still needs the shapes
    texts = [turn.texts[i] for i in share]
    cond = encode_prompts(pipe, texts, config.resolution or None)
    text = judge_features(pipe, judge.clip, texts)
    parts = []
    with processes.droppable():                 # until the exchange nothing has changed
        for begin in range(0, len(share), config.sample_batch):
            rows = slice(begin, begin + config.sample_batch)
            generators = [generator(config.seed, "pool", turn.epoch, turn.indices[i])
                          for i in share[rows]]
            uncond = negative(pipe, cond[rows], trainer.empty)
            with pipe.calls.phase("sampling"):
                batch = Batch(cond[rows], uncond, text[rows], generators)
                parts.append(collect(sample_pools(pipe, judge, batch, config, observers)))
    if not mine:
        pipe.calls.evaluations = 0              # thrown away, so not counted

    def whole(*tensors: torch.Tensor) -> torch.Tensor:
        return processes.gather_rows(torch.cat(tensors)[:len(mine)], total)

    with pipe.calls.phase("exchange"):
        tensors = {name: whole(*[getattr(part, name) for part in parts])
                   for name in ("x_t", "x_next", "valid", "scores")}
        notes = {name: whole(*[part.notes[name] for part in parts]) for name in parts[0].notes}
        cond = cond.map(whole)
    return dataclasses.replace(parts[0], **tensors, notes=notes, cond=cond)


@dataclass
class Steps:
    """N slots to train on."""
    x_t: torch.Tensor                   # [N, 2, C, H, W]
    x_next: torch.Tensor                # [N, 2, C, H, W]
    t: torch.Tensor                     # [N]
    t_prev: torch.Tensor                # [N]
    apart: torch.Tensor                 # [M]: which of the N have an x_t each
    cond: Conditioning
    uncond: Conditioning


def take(pairs: Pairs, slots: list[int], pipe: Pipeline, empty: Conditioning | None,
         steps: int) -> Steps:
    """Slots, numbered prompt by prompt, as the networks want them, of a walk of `steps`."""
    count = len(pairs.timesteps)
    places = [slot % count for slot in slots]
    prompt, place = upload(torch.tensor([[slot // count for slot in slots], places]), pipe.device)
    times = pipe.schedule.both_ends([pairs.timesteps[p] for p in places], steps)
    t, t_prev = upload(times, pipe.device)
    apart = torch.tensor([n for n, p in enumerate(places) if pairs.apart[p]], dtype=torch.long)
    apart, cond = upload(apart, pipe.device), pairs.cond[prompt]
    return Steps(pairs.x_t[prompt, place], pairs.x_next[prompt, place], t, t_prev, apart, cond,
                 negative(pipe, cond, empty))


def pair_log_ratios(pipe: Pipeline, steps: Steps,
                    config: SPOConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """log p_theta / p_ref of winner and loser, [N] each: the two logarithms of Eq. 4.

    Winner and loser share x_t, so one policy and one reference forward serve both; the official
    code runs four. Only pairs whose paths have parted need a second row, for the loser.
    """
    n, m, device = len(steps.x_t), len(steps.apart), steps.x_t.device
    win_row = torch.arange(n, device=device)
    lose_row = win_row.index_copy(0, steps.apart, torch.arange(n, n + m, device=device))
    rows = torch.cat([win_row, steps.apart])                                # [N + M]
    latents = torch.cat([steps.x_t[:, 0], steps.x_t[steps.apart, 1]])
    t, t_prev = steps.t[rows], steps.t_prev[rows]
    cond, uncond = steps.cond[rows], steps.uncond[rows]

    def gaussian() -> tuple[torch.Tensor, torch.Tensor]:
        noise_pred = guided_noise(pipe, latents, t, cond, uncond, config.guidance_scale)
        return ddim.step_gaussian(pipe.schedule, latents, noise_pred, t, t_prev, config.eta)

    mean, std = gaussian()
    with torch.no_grad(), lora.disabled(pipe.unet):         # p_ref: the same UNet, LoRA off
        mean_ref, _ = gaussian()
    ratios = []
    for x_next, row in ((steps.x_next[:, 0], win_row), (steps.x_next[:, 1], lose_row)):
        log_p = ddim.log_prob(x_next, mean[row], std[row])
        ratios.append(log_p - ddim.log_prob(x_next, mean_ref[row], std[row]))
    return ratios[0], ratios[1]


def spo_loss(win: torch.Tensor, lose: torch.Tensor, beta: float, clamp: float) -> torch.Tensor:
    """Eq. 4 per pair [N], from the two log-ratios, each ratio clamped to 1 +- `clamp` (0: not).

    Outside the clamp the gradient is exactly zero. With beta 10, clamp 0.1 the loss lies in
    0.126..2.133.
    """
    if clamp > 0:
        low, high = math.log(1 - clamp), math.log(1 + clamp)
        win, lose = win.clamp(low, high), lose.clamp(low, high)
    return -F.logsigmoid(beta * (win - lose))                                           # Eq. 4


@torch.no_grad()
def watched(win: torch.Tensor, lose: torch.Tensor, clamp: float) -> list[torch.Tensor]:
    """What is only logged, [N] each: margin, accuracy, both ratios, the share outside the clamp."""
    bound = clamp or math.inf
    outside = [((r.exp() - 1).abs() > bound).float() for r in (win, lose)]
    return [win - lose, (win > lose).float(), win.exp(), lose.exp(), (outside[0] + outside[1]) / 2]


def train_on_pairs(trainer: Trainer, pairs: Pairs, turn: Turn, config: SPOConfig) -> dict:
    """Use every valid pair of the round once, whatever its timestep (Eq. 5) -> log entries."""
    pipe, count = trainer.pipe, len(pairs.timesteps)

    def place_of(slot: int) -> str:
        prompt, place = divmod(slot, count)
        return f"a pair at t = {pairs.timesteps[place]:g}, prompt {turn.texts[prompt]!r}"

    slots = pairs.valid.flatten().nonzero()[:, 0].tolist()
    names = ("loss", "margin", "accuracy", "ratio_win", "ratio_lose", "clipped")
    for minibatch in trainer.minibatches(slots, names, turn, place_of):
        for part in minibatch:
            batch = take(pairs, part, pipe, trainer.empty, config.steps)
            win, lose = pair_log_ratios(pipe, batch, config)
            loss = spo_loss(win, lose, config.beta, config.clamp)
            minibatch.backward(loss, watched(win, lose, config.clamp))
        minibatch.step()
    return trainer.totals.means() | dict(pairs=len(slots),
                                         valid_share=len(slots) / max(pairs.valid.numel(), 1))


def check(config: SPOConfig) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    if config.t_min > config.t_max:
        raise InputError(f"--t_min {config.t_min}: must be at most --t_max, {config.t_max}")
    if config.decoder_check and not config.decoder:
        raise InputError(f"--decoder_check {config.decoder_check}: there is nothing to compare "
                         "without --decoder")
    if config.decoder == "taesd" and config.preset.startswith("tiny"):
        raise InputError("--decoder taesd: knows the latents of SD-1.5 and SDXL, not those of tiny")


def load_judge(config: SPOConfig, pipe: Pipeline) -> Judge:
    """The judge of a model's pictures; InputError if --judge and the file differ on timesteps."""
    source = config.spm or judge_source(config.model, config.preset, config.judge)
    dtype = DTYPES[config.judge_dtype]
    clip = load_judging(f"judge {config.judge}:", source, dtype, pipe, config.judge == "spm")
    features = clip.image_features
    if config.compile is True:
        features = torch.compile(features, dynamic=False)
    decode = small_decoder(pipe, config) if config.decoder else vae_decoder(pipe, config)
    features = pipe.calls.wrap(features, "scoring")
    return Judge(clip, decode, features, config.decode_batch, pipe.schedule)


def prepare(config: SPOConfig, processes: Processes) -> tuple[Pipeline, Judge, list[Callable]]:
    """The policy, its judge, and what observes its pools: faults and, if asked, the decoder."""
    pipe = prepare_policy(config, processes)
    judge = load_judge(config, pipe)
    pipe.calls.sizes = compiled_sizes(config, processes.world, config.k, 1 if config.j == 1 else 2)
    observers = [Faults(judge)]                 # which looks at what the judge decodes
    if config.decoder_check:
        choose = functools.partial(choose_pair, threshold=config.threshold, how=config.pair)
        observers.append(DecoderCheck(judge, vae_decoder(pipe, config), choose))
    return pipe, judge, observers


def main() -> None:
    """Train as the command line says; continue if the run folder holds the same run."""
    config = parse_options(SPOConfig, PRESETS, description=__doc__)
    check(config)
    processes = start_processes(config.device or None)
    prompts = training_prompts(config)
    config = fit_machine(config, PRESETS, processes, len(prompts))
    run = Run(config.out, config, processes, FREE, PRESETS)
    pipe, judge, observers = prepare(config, processes)
    with Trainer(config, run, pipe, prompts, judge.clip) as trainer:
        for turn in trainer.turns():
            watching = observers if turn.step < config.decoder_check else observers[:1]
            pairs = sample_round(trainer, judge, turn, config, watching)    # sections 4.1 to 4.3
            seen = report(pairs, turn, processes.main)
            stats = train_on_pairs(trainer, pairs, turn, config)            # section 4.4
            trainer.end(turn, stats | seen, sound=seen["score"] is not None)


if __name__ == "__main__":
    run_script(main)
