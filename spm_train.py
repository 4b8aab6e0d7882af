"""Train the step-aware preference model (SPM): which of two noisy latents will look better?

    python spm_train.py                                     # tiny: the embedded world's preferences
    torchrun --nproc_per_node=4 spm_train.py --model sd15 --pairs FOLDER --out runs/spm15

Both pictures of a pair are encoded and get the same noise at the same t. The frozen UNet predicts
their clean latents; these are decoded and shown to a CLIP that starts out equal to PickScore and
also knows t. Eq. 3 gives the loss (paper, section 4.2). A step-blind twin (Table 5) can be trained
on the very same inputs.

Shapes: N pairs, C H W latent, L tokens, S x S pixels of the CLIP, M models.
"""
import needs  # noqa: F401
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import ddim
import tracking
from calls import upload
from clip_spm import CLIP, make_step_aware, preference_loss, preprocess_decoded
from diffusion import (
    Conditioning,
    decode,
    encode_empty,
    encode_prompts,
    guided_noise,
    negative,
    tokenize,
)
from finetune import TrainConfig, decide_compiling, load_model, loss_scaler, make_step
from loading import DTYPES, SDXL_VAE, TINY, Pipeline, load_judging
from pairs import (
    Pairs,
    draw_latents,
    encode_cached,
    epoch_order,
    hold_out,
    is_encoded,
    list_unreadable,
    load_pairs,
    open_latents,
    read_or_leave,
    readable,
    stack_pictures,
    too_many_unreadable,
    world_pairs,
)
from prompt_sets import VALIDATION
from training import (
    TOO_MANY,
    Processes,
    Run,
    fingerprint,
    generator,
    last_step,
    opt,
    parse_options,
    run_script,
    start_processes,
    warn,
    write_atomic,
    write_json,
)
from unet import compile_blocks
from weights import InputError

PAIRS = 32                              # as much work as one prompt of SPO: 64 pictures
REPORT_AT = (0, 251, 501, 701, 951)     # timesteps of the table of accuracies


@dataclass
class SPMConfig(TrainConfig):
    """The options, beside the model's. P: the paper, O: the released code, T: measured on tiny."""
    out: str = opt("runs/spm", "run folder: spm/, log.jsonl, config.json, results.json, "
                   "checkpoints, report.html")
    pickscore: str = opt("yuvalkirstain/PickScore_v1",
                         "the CLIP to start from (P: PickScore), folder or hub id")
    pairs: str = opt("", "folder with pairs.jsonl or Parquet, a .parquet file or a hub data set "
                     "(see pairs.py); empty: the tiny world's")
    labels: str = opt("human", "who says what is better (O: human for SD-1.5, pickscore for SDXL)",
                      ("human", "pickscore"))
    dtype: str = opt("bf16", "of the frozen UNet and VAE, and of the CLIP's arithmetic; its "
                     "weights stay fp32", tuple(DTYPES))
    guidance_scale: float = opt(5.0, "classifier-free guidance of the x0 prediction (O: 5)")
    lr: float = opt(3e-6, "AdamW learning rate (P: 3e-6 SD-1.5, 1e-6 SDXL)", least=0)
    adaln_lr: float = opt(1.0, "the timestep's own layers, which start from zero, learn this many "
                          "times as fast (T)", least=0)
    rate: str = opt("released", "how the learning rate moves: warmed up by a logarithm, then "
                    "falling linearly to zero (released, O); linear warm-up of a rate that falls "
                    "from the start (linear, T); linear warm-up only (constant)",
                    ("released", "linear", "constant"))
    warmup: int = opt(500, "steps of warm-up (O: 500)", least=0)
    weight_decay: float = opt(0.3, "AdamW weight decay (O: 0.3)", least=0)
    clip_norm: float = opt(1.0, "bound on the gradient norm", above=0)
    steps: int = opt(8000, "optimizer steps (O: 8000 SD-1.5, 7000 SDXL)", least=1)
    batch: int = opt(64, "global batch of pairs per optimizer step (O: 4 x 16)", least=1)
    micro_batch: int = opt(16, "pairs in one forward and backward of one process", least=1)
    count: int = opt(8000, "tiny: size of the training set of pairs", least=1)
    validation: int | str = opt(512, "the pairs of the table of accuracies: so many, held back "
                                "with all pairs of the same caption, or a source of their own, as "
                                "for --pairs (O: Pick-a-Pic's validation_unique)", least=0)
    ties: str = opt("skip", "in that table ties are left out, or count half (O: half, with human "
                    "labels)", ("skip", "half"))
    max_unreadable: float = opt(0.01, "share of the pairs read so far whose pictures may be "
                                "damaged; they are skipped and listed", least=0, most=1)
    step_blind: bool = opt(False, "also train a twin without the timestep, on the same inputs "
                           "(P Table 5)")
    cache_latents: bool = opt(False, "keep encoded pictures in the run folder's latents.bin "
                              "(SD-1.5, bf16: 13 GB for 100,000 pairs); with human labels a "
                              "pair's pictures are then read once")
    save_every: int = opt(500, "steps between checkpoints; the last two stay, and that of the "
                          "highest mean accuracy (SPM: best/)", least=1)


PRESETS = {
    "tiny": dict(pickscore=str(TINY / "pickscore"), dtype="fp32", guidance_scale=3.0, lr=1.5e-4,
                 adaln_lr=10.0, rate="linear", warmup=20, weight_decay=0.05, steps=2600, batch=32,
                 micro_batch=32, step_blind=True, save_every=250, count=44_000, validation=2048),
    "sd15": dict(),
    "sdxl": dict(vae=SDXL_VAE, lr=1e-6, steps=7000, labels="pickscore", micro_batch=4),
}
PRESETS["tiny-flow"] = PRESETS["tiny"] | dict(guidance_scale=2.0)
FREE = ("out", "preset", "device", "micro_batch", "cache_latents", "compile", "profile",
        "save_every", "max_unreadable", "ties", "track")


# What a judge sees of a pair, and what it says

class Setting:
    """The pairs, and the frozen networks that label them and show them to a judge."""

    def __init__(self, pipe: Pipeline, pickscore: CLIP, pairs: Pairs, config: SPMConfig,
                 processes: Processes):
        self.pipe, self.pickscore, self.pairs = pipe, pickscore, pairs
        self.config, self.processes = config, processes
        self.side = pipe.side(config.resolution)            # of the pictures
        self.ids = tokenize(pipe.tokenizers[0], pairs.captions, pickscore)          # [pairs, L]
        self.empty = encode_empty(pipe)
        self.latents: torch.Tensor | None = None            # the cache, see pairs.open_latents
        self.scaler = loss_scaler(config, pipe.device)

    def read(self, i: int) -> torch.Tensor | str | None:
        """Pair i's pictures as `readable` gives them, or None where its latents will do."""
        if self.config.labels == "human" and is_encoded(self.latents, i):
            return None
        return readable(self.pairs, i)

    @torch.no_grad()
    def labels(self, index: list[int], images: torch.Tensor) -> torch.Tensor:
        """[N] of these pairs, on the device: people's, or PickScore's."""
        if self.config.labels == "human":
            return upload(self.pairs.label[index], self.pipe.device)
        return relabel(self.pickscore, images, self.pickscore.text_features(
            upload(self.ids[index], self.pipe.device)))


@torch.no_grad()
def relabel(clip: CLIP, images: torch.Tensor, text: torch.Tensor,
            threshold: float = 0.1) -> torch.Tensor:
    """PickScore's own opinion of clean pairs [N, 2, 3, H, W] uint8 -> 1, 0, or 0.5 for a tie.

    A tie: its softmax over the pair differs by at most `threshold`.
    """
    pictures = upload(images, text.device).flatten(0, 1) / 127.5 - 1
    pixels = preprocess_decoded(pictures, clip.config.vision.image_size, antialias=True)
    scores = clip.score(clip.image_features(pixels), text.repeat_interleave(2, 0))
    first, second = scores.view(-1, 2).softmax(1).unbind(1)
    gap = first - second
    return torch.where(gap.abs() <= threshold, 0.5, (gap > 0).float())


@torch.no_grad()
def predicted_pixels(setting: Setting, index: list[int], moments: torch.Tensor, cond: Conditioning,
                     timestep: torch.Tensor, key: tuple) -> torch.Tensor:
    """What the SPM sees of N pairs at timesteps [N]: decoded x0 predictions [N, 2, 3, S, S].

    `moments` as encode_pairs gives them. Both pictures of a pair get the same noise (section 4.2),
    keyed by the pair's number in `index`.
    """
    pipe, size = setting.pipe, setting.pickscore.config.vision.image_size
    scaled = moments.float() * pipe.vae.config.scaling_factor
    latents, noise = draw_latents(scaled, [generator(*key, i) for i in index])  # [2 N, C, H, W]
    t, cond = upload(timestep, pipe.device).repeat_interleave(2), cond.repeat(2)
    x_t = ddim.add_noise(pipe.schedule, latents, noise, t)
    noise_pred = guided_noise(pipe, x_t, t, cond, negative(pipe, cond, setting.empty),
                              setting.config.guidance_scale)
    x0 = ddim.predict_x0(pipe.schedule, x_t, noise_pred, t)
    return preprocess_decoded(decode(pipe, x0), size, clamp_first=True).unflatten(0, (-1, 2))


def pair_scores(pipe: Pipeline, clip: CLIP, pixels: torch.Tensor, timestep: torch.Tensor,
                ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scores [N, 2] of pairs whose pixels are [N, 2, 3, S, S], captions [N, L]."""
    n, device = len(pixels), pixels.device
    timestep = ddim.told(pipe.schedule, timestep, clip.config.flow)
    pixels, timestep, ids = map(pipe.calls.fill, (pixels, timestep, ids))
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        images = clip.image_features(pixels.flatten(0, 1),
                                     upload(timestep, device).repeat_interleave(2))
        text = clip.text_features(upload(ids, device)).repeat_interleave(2, 0)
    return clip.score(images, text).view(-1, 2)[:n]


# One step

def batches(setting: Setting, used: set[int],
            begin: int) -> Iterator[tuple[int, list[int], Iterator]]:
    """Yield (epoch, pairs, this process's pictures) of each step from `begin` on.

    The pairs are the same on every process. Threads read the pictures one step ahead.
    """
    config, processes = setting.config, setting.processes
    per_epoch = max(1, len(used) // config.batch)
    order_of = functools.lru_cache(1)(
        functools.partial(epoch_order, setting.pairs, used, config.seed))

    def read(step: int) -> tuple[int, list[int], Iterator]:
        epoch, place = divmod(step, per_epoch)
        batch = order_of(epoch)[place * config.batch:(place + 1) * config.batch]
        return epoch, batch, readers.map(setting.read, batch[processes.rank::processes.world])

    with ThreadPoolExecutor(4) as readers:
        coming = read(begin)
        for step in range(begin + 1, config.steps):
            here, coming = coming, read(step)
            yield here
        yield coming


@dataclass
class Found:
    """What one process found in its share of a step."""
    stats: torch.Tensor                 # [M, 2] loss and accuracy, shares of the whole batch
    places: list[tuple[str, int]]       # caption and timestep of each pair
    finite: list[torch.Tensor]          # [2, N] per microbatch: are pictures and losses finite?
    broken: dict[int, str]              # pair -> why its pictures cannot be read


def backward(setting: Setting, models: dict[str, CLIP], batch: list[int], timesteps: torch.Tensor,
             pictures: Iterator, step: int) -> Found:
    """Eq. 3 on this process's share of `batch`; gradients add up in the models.

    Pair n is noised to `timesteps[n]`.
    """
    config, pipe, pairs = setting.config, setting.pipe, setting.pairs
    dtype, mine = DTYPES[config.dtype], setting.processes.share(len(batch))
    total_weight = float(pairs.weight[batch].sum())
    found = Found(stats=torch.zeros(len(models), 2, device=pipe.device), finite=[], broken={},
                  places=[(pairs.captions[batch[r]], int(timesteps[r])) for r in mine])
    for begin in range(0, len(mine), config.micro_batch):
        rows = mine[begin:begin + config.micro_batch]
        index, t = [batch[r] for r in rows], timesteps[rows]
        with pipe.calls.phase("reading"):
            got = [next(pictures) for _ in rows]
            images, seen = stack_pictures(got, setting.side)
            found.broken |= {i: why for i, why in zip(index, got) if isinstance(why, str)}
        with pipe.calls.phase("encoding"):
            cond = encode_prompts(pipe, [pairs.captions[i] for i in index], setting.side)
            moments = encode_cached(pipe, images, setting.latents, index, seen)
        with pipe.calls.phase("predicting"):
            pixels = predicted_pixels(setting, index, moments, cond, t,
                                      (config.seed, "noise", step))
        with pipe.calls.phase("training"):
            label = setting.labels(index, images)
            weight = upload(pairs.weight[index] * seen, pipe.device)
            drawn = judged = torch.isfinite(pixels).flatten(1).all(1)
            for m, clip in enumerate(models.values()):
                scores = pair_scores(pipe, clip, pixels, t, setting.ids[index], dtype)
                each = preference_loss(scores[:, 0], scores[:, 1], label)                   # Eq. 3
                loss = (each * weight).sum() / total_weight
                setting.scaler.scale(loss).backward()
                judged = judged & torch.isfinite(each.detach())
                right = ((scores[:, 0] > scores[:, 1]).float() == label).float()    # ties: wrong
                found.stats[m] += torch.stack([loss.detach(), right.sum() / len(batch)])
        found.finite.append(torch.stack([drawn, judged]))
    return found


def report_fault(step: int, models: dict[str, CLIP], found: Found, main: bool) -> None:
    """Say on stderr where a step that was not finite went wrong.

    If nothing is wrong before the gradients, the `main` process speaks of them.
    """
    finite = torch.cat(found.finite, 1).t().tolist() if found.finite else []
    faults = [f"{'the judge' if drawn else 'a predicted picture'} is not finite at t = {t}, "
              f"caption {caption!r}"
              for (drawn, judged), (caption, t) in zip(finite, found.places) if not judged]
    if main and not faults and torch.isfinite(found.stats).all():
        faults = [f"the gradient of {key} ({name}) is not finite" for name, clip in models.items()
                  for key, p in clip.named_parameters() if not torch.isfinite(p.grad).all()]
        faults.append("the gradient of all weights together is not finite")
    if faults:
        warn(f"step {step}: {faults[0]}; optimizer step skipped")


# The run

def save_spm(clip: CLIP, folder: Path) -> None:
    """An SPM with the official files' names (prefix `model.`), and the config that theirs lack."""
    config = clip.config
    told = dict(flow=True) if config.flow else {}
    write_json(folder / "config.json", dict(
        text_config=dataclasses.asdict(config.text), projection_dim=config.projection_dim,
        vision_config=dataclasses.asdict(config.vision), **told))
    weights = {"model." + k: v.detach().cpu().contiguous() for k, v in clip.state_dict().items()}
    write_atomic(folder / "model.safetensors",
                 lambda p: save_file(weights, p, metadata={"format": "pt"}))


def build_models(pickscore: CLIP, config: SPMConfig, processes: Processes,
                 flow: bool = False) -> tuple[dict[str, CLIP], torch.optim.Optimizer]:
    """The SPM, equal to PickScore, its step-blind twin if wanted, and one AdamW for both.

    The optimizer's state is sharded over the processes.
    """
    with torch.random.fork_rng(devices=[]):         # the caller's random state stays as it was
        torch.manual_seed(config.seed)
        models = {"SPM": make_step_aware(pickscore, flow)}
        if config.step_blind:
            models["step-blind SPM"] = CLIP(pickscore.config).to(processes.device)
            models["step-blind SPM"].load_state_dict(pickscore.state_dict())
    named = [item for clip in models.values()
             for item in clip.requires_grad_(True).named_parameters()]
    known = set(pickscore.state_dict())
    groups = [dict(params=[p for name, p in named if name in known]),
              dict(params=[p for name, p in named if name not in known])]
    adamw = torch.optim.AdamW
    if processes.world > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer         # slow to import
        adamw = functools.partial(ZeroRedundancyOptimizer, optimizer_class=adamw)
    return models, adamw(groups, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)


def learning_rate(step: int, config: SPMConfig) -> float:
    """The rate of a step, counted from 0.

    `released` is DeepSpeed's WarmupDecayLR as the official training runs it: nothing at step 0.
    """
    lr, steps, warmup = config.lr, config.steps, config.warmup
    warmed = lr * min(1.0, (step + 1) / max(warmup, 1))
    return dict(
        released=lr * math.log(step + 1) / math.log(max(warmup, 2)) if step < warmup else
        lr * (steps - step) / max(steps - warmup, 1),
        linear=warmed * (1 - step / steps), constant=warmed)[config.rate]


class Trainer:
    """The SPM in training, and its twin: optimizer, log, checkpoints. Resumes and stops cleanly."""

    def __init__(self, setting: Setting, run: Run, used: int):
        config, pipe, pairs = setting.config, setting.pipe, setting.pairs
        self.config, self.run, self.used = config, run, used        # used: pairs to train on
        self.models, self.optimizer = build_models(
            setting.pickscore, config, run.processes, setting.pipe.schedule.flow)
        self.scaler = setting.scaler
        self.rounds = tracking.Rounds(run, config.steps, "step", config, pipe.calls, "spm")
        state = run.resume(
            pairs=fingerprint(pairs.captions, [str(v) for v in pairs.label.tolist()]),
            pair_weights=fingerprint(pairs.weight),
            pickscore_model=fingerprint(setting.pickscore),
            base_model=fingerprint(*pipe.identity)) or {}
        self.unreadable: dict[int, str] = state.get("unreadable", {})       # pair -> why
        self.skipped = state.get("skipped", 0)                              # optimizer steps
        if state:
            with run.restoring():
                for clip, weights in zip(self.models.values(), state["models"], strict=True):
                    clip.load_state_dict(weights)
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state.get("scaler") or self.scaler.state_dict())
                self.rounds.restore(state)

    def update(self, found: Found, step: int) -> dict:
        """Sum the gradients over the processes, clip, and update -> what the log says.

        A step that is not finite is reported instead.
        """
        config, models, processes = self.config, self.models, self.run.processes
        weights = [p for clip in models.values() for p in clip.parameters()]
        for p in weights:                       # a process without pairs still takes part
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        broken = torch.tensor([float(len(found.broken))], device=processes.device)
        processes.sum([p.grad for p in weights] + [found.stats, broken])
        if broken.item():
            self.unreadable = list_unreadable(self.unreadable, processes.union(found.broken),
                                              self.run)
        self.scaler.unscale_(self.optimizer)
        norms = [float(torch.nn.utils.clip_grad_norm_(list(clip.parameters()), config.clip_norm))
                 for clip in models.values()]
        lr = learning_rate(step, config)
        for group, factor in zip(self.optimizer.param_groups, (1.0, config.adaln_lr), strict=True):
            group["lr"] = lr * factor
        losses = found.stats[:, 0].tolist()
        sound = all(map(math.isfinite, norms + losses))
        if make_step(self.scaler, self.optimizer, self.rounds, sound, sum(losses)):
            report_fault(step + 1, models, found, processes.main)
        self.skipped += not sound
        self.optimizer.zero_grad(set_to_none=True)
        return dict(loss=losses[0] if sound else None, accuracy=float(found.stats[0, 1]),
                    grad_norm=norms[0] if sound else None, lr=lr, skipped=self.skipped,
                    unreadable=len(self.unreadable))

    def end(self, record: dict, count: int) -> None:
        """Log a step of `count` pairs; save, stop, leave, as is due."""
        rounds, folder = self.rounds, self.run.folder
        shown = {k: f"{record[k]:.3f}" for k in ("loss", "accuracy") if record[k] is not None}
        rounds.end(record, "pairs", count, record["accuracy"], shown)
        spoilt = too_many_unreadable(self.unreadable, rounds.done * self.config.batch, self.used,
                                     self.config.max_unreadable, folder)
        if not spoilt and rounds.bad >= TOO_MANY:
            spoilt = InputError(
                f"step {rounds.done}: {TOO_MANY} optimizer steps in a row were not finite; the "
                f"last good SPM is in {folder}'s checkpoint (try --dtype fp32, another --vae, or a "
                "lower --lr)")
        if rounds.due or rounds.ending or spoilt:
            self.save()
        if spoilt:
            raise spoilt
        if rounds.ending and rounds.done < rounds.total:
            rounds.leave()

    def save(self) -> None:
        """The best SPM so far, if this is it; then the checkpoint."""
        score, models = self.rounds.take_score(), self.models
        if self.run.processes.world > 1:
            self.optimizer.consolidate_state_dict(to=0)
        if self.run.processes.main and self.run.is_best(score):
            save_spm(models["SPM"], self.run.folder / "best")
        self.rounds.save(
            score, unreadable=self.unreadable, skipped=self.skipped,
            models=[{k: v.cpu() for k, v in clip.state_dict().items()} for clip in models.values()],
            optimizer=self.optimizer.state_dict() if self.run.processes.main else None,
            scaler=self.scaler.state_dict())


# The table of accuracies

@torch.no_grad()
def accuracy_table(setting: Setting, models: dict[str, CLIP],
                   index: list[int]) -> dict[str, dict[int, list[float]]]:
    """How often each model orders the pairs `index` as labelled -> {model: {timestep: `share`}}.

    Unreadable pairs are left out, and ties, unless `--ties half`. Every model sees the same inputs.
    """
    config, pipe, pairs = setting.config, setting.pipe, setting.pairs
    hits = torch.zeros(len(models), len(REPORT_AT), len(index), device=pipe.device)
    counted = torch.zeros(len(index), device=pipe.device)
    mine = setting.processes.share(len(index))
    # As many as were compiled for, or twice what fits with gradients.
    chunk = pipe.calls.sizes.get("encoding", (2 * config.micro_batch,))[0]
    for begin in range(0, len(mine), chunk):
        places = mine[begin:begin + chunk]
        rows = [index[place] for place in places]
        images, seen = stack_pictures([readable(pairs, i) for i in rows], setting.side)
        label = setting.labels(rows, images)
        tie = label == 0.5
        counted[places] = ((~tie | (config.ties == "half")) & seen.to(pipe.device)).float()
        cond = encode_prompts(pipe, [pairs.captions[i] for i in rows], setting.side)
        moments = encode_cached(pipe, images, None, rows, seen)
        for n, t in enumerate(REPORT_AT):
            timestep = torch.full((len(rows),), t)
            with pipe.calls.phase("predicting"):
                pixels = predicted_pixels(setting, rows, moments, cond, timestep,
                                          (config.seed, "report", t))
            for m, clip in enumerate(models.values()):
                with torch.compiler.set_stance("force_eager"):      # PickScore is not compiled
                    scores = pair_scores(pipe, clip, pixels, timestep, setting.ids[rows],
                                         torch.float32)
                right = ((scores[:, 0] > scores[:, 1]) == (label > 0.5)).float()
                hits[m, n, places] = torch.where(tie, 0.5, right)
    setting.processes.sum([hits, counted])
    hits = hits[:, :, counted > 0]
    return {name: {t: share(right, first) for t, right, first in zip(REPORT_AT, row, hits[0])}
            for name, row in zip(models, hits)}


def share(right: torch.Tensor, first: torch.Tensor) -> list[float]:
    """Pairs [N] that a model and the first one got right, 1 or 0 -> what the table says.

    [accuracy, its standard error, N, difference from the first model, its standard error]; the last
    is of paired differences, so usually smaller than both models' errors together.
    """
    n, change = max(len(right), 1), right - first
    accuracy = float(right.sum()) / n
    variance = float(change.square().sum() / n - (change.sum() / n) ** 2)
    return [accuracy, (accuracy * (1 - accuracy) / n) ** 0.5, len(right),
            float(change.sum()) / n, variance ** 0.5 / n ** 0.5]


def print_table(table: dict[str, dict[int, list[float]]]) -> None:
    """The table of accuracies as text, and how far each model is from the first, pair by pair."""
    print(f"{'pair accuracy at t =':22}" + "".join(f"{t:>16}" for t in REPORT_AT))
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{right:>9.3f} ± {error:.3f}"
                                     for right, error, *_ in row.values()))
    for name, row in list(table.items())[1:]:
        print(f"{'  ' + name + ', more':22}" + "".join(f"{more:>+9.3f} ± {error:.3f}"
                                                       for *_, more, error in row.values()))


# How it is launched

def read_pairs(config: SPMConfig, side: int) -> Pairs:
    """The pairs that the options name, to train on and to hold out."""
    if config.pairs:
        return load_pairs(config.pairs, side, unlabelled=config.labels == "pickscore")
    if config.preset.startswith("tiny"):
        held = config.validation if isinstance(config.validation, int) else 0
        return world_pairs(config.count + held, config.seed)
    raise InputError("--pairs: a folder with pairs.jsonl or Parquet files is needed (only tiny "
                     "brings its own preferences)")


def compile_all(setting: Setting, models: dict[str, CLIP]) -> None:
    """torch.compile for whatever the loop calls, which is filled up to one shape each."""
    pipe, config = setting.pipe, setting.config
    compile_blocks(pipe.unet)
    pipe.vae.to(memory_format=torch.channels_last)
    judging = [(clip, name) for clip in models.values()
               for name in ("image_features", "text_features")]
    for module, name in [(pipe.vae, "moments"), (pipe.vae, "decode"), *judging]:
        setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
    pipe.vae.decode = pipe.calls.wrap(pipe.vae.decode, "predicting")
    pairs = min(config.micro_batch, -(-config.batch // setting.processes.world))
    # The UNet sees all pictures of these pairs at once, the decoder 64 at most.
    pipe.calls.sizes = dict(encoding=(pairs,), predicting=(min(64, 2 * pairs), 2 * pairs),
                            training=(pairs,))


def conclude(setting: Setting, models: dict[str, CLIP], held: list[int], folder: Path) -> None:
    """Leave the trained judges behind, and the table of their accuracies on the pairs held out."""
    table = accuracy_table(setting, {"PickScore": setting.pickscore, **models}, held)
    if setting.processes.main:
        for name, clip in models.items():
            save_spm(clip, folder / ("spm" if name == "SPM" else "spm_step_blind"))
        write_json(folder / "results.json", table)
        print_table(table)
        print(f"SPM in {folder / 'spm'}; use it with spo_train.py --spm {folder / 'spm'}")


def main() -> None:
    """Train as the command line says; continue if the run folder holds the same run."""
    config = parse_options(SPMConfig, PRESETS, description=__doc__)
    processes = start_processes(config.device or None)
    if config.track:
        tracking.load(config.track)
    left = (config.steps - last_step(Path(config.out))) * config.batch
    config = decide_compiling(config, processes, left / PAIRS)
    run = Run(config.out, config, processes, FREE, PRESETS)
    pipe = load_model(config, processes)
    pickscore = load_judging("pickscore", config.pickscore, torch.float32, pipe, False)
    side = pipe.side(config.resolution)
    pairs = read_or_leave(processes, functools.partial(read_pairs, config, side))
    setting = judged = Setting(pipe, pickscore, pairs, config, processes)
    if isinstance(config.validation, int):
        held, used = hold_out(pairs, config.validation, config.seed)
    else:
        judged = Setting(pipe, pickscore, load_pairs(config.validation, side, splits=VALIDATION),
                         config, processes)
        held, used = list(range(len(judged.ids))), set(range(len(setting.ids)))
    trainer = Trainer(setting, run, len(used))
    models, rounds = trainer.models, trainer.rounds
    if config.compile is True:
        compile_all(setting, models)
    if config.cache_latents:
        with processes.agreed():
            setting.latents = open_latents(run.folder, pipe, side, len(pairs.captions))
    rounds.begin(f"{len(used)} training and {len(held)} validation pairs, {processes.world} x "
                 f"{pipe.device}")
    coming = batches(setting, used, rounds.done)
    with contextlib.closing(rounds):
        for step in rounds:
            epoch, batch, pictures = next(coming)
            timesteps = torch.randint(0, 1000, (len(batch),),                       # t ~ U{0..999}
                                      generator=generator(config.seed, "timestep", step))
            found = backward(setting, models, batch, timesteps, pictures, step)
            stats = trainer.update(found, step)
            trainer.end(dict(step=step + 1, epoch=epoch, **stats), len(batch))
        conclude(judged, models, held, run.folder)


if __name__ == "__main__":
    run_script(main)
