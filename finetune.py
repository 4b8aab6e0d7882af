"""What every method that trains a LoRA shares: options, rounds of prompts, minibatches, samples.

    with Trainer(config, run, pipe, prompts, judge) as trainer:
        for turn in trainer.turns():            # rounds of prompts, from the last checkpoint on
            for minibatch in trainer.minibatches(slots, names, turn, place_of):
                for part in minibatch:
                    minibatch.backward(loss, logged)
                minibatch.step()
            trainer.end(turn, stats)            # log, checkpoint, samples; leaves on a signal

SPO (spo_train.py) and its rivals (baselines.py) differ in what stands inside. Each writes the
loop itself.

Shapes: N slots, a slot being whatever a method learns from: a step of a pair, a pair of pictures.
"""
import contextlib
import dataclasses
import functools
import importlib.util
import math
import time
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import lora
import tracking
from calls import Calls
from card import write_card
from clip_spm import CLIP, preprocess_decoded
from diffusion import encode_empty, generate, grid, judge_features, repaired
from loading import (
    DTYPES,
    JUDGES,
    NAMES,
    Pipeline,
    load_clip,
    load_pipeline,
    load_tiny_decoder,
    option,
    resolve,
)
from prompt_sets import read_prompts
from training import (
    TOO_MANY,
    Processes,
    Run,
    Stopped,
    check_preset,
    fingerprint,
    last_step,
    opt,
    parse_options,
    permutation,
    restore_optimizer,
    warn,
    write_atomic,
)
from unet import compile_blocks
from weights import InputError, hub_id


@dataclass
class ModelConfig:
    """Which model, and in what form. P = the paper, O = the official code, T = found on tiny."""
    model: str = opt("tiny", "tiny, tiny-flow, sd15, sdxl, a folder or hub id in the diffusers "
                     "layout, or a single-file checkpoint")
    out: str = opt("runs/spo", "run folder: LoRA, log.jsonl, config.json, checkpoints, samples")
    seed: int = opt(0, "every random number of the run is keyed by it", least=0)
    device: str = opt("", "cpu or cuda; empty: a GPU if there is one")
    dtype: str = opt("bf16", "of the frozen weights; what is trained is fp32", tuple(DTYPES))
    vae_dtype: str = opt("", "of the VAE's weights; empty: fp16 where --dtype is bf16, as fast and "
                         "less rounded; else as --dtype; fp32 where fp16 would overflow",
                         ("", *DTYPES))
    vae: str = opt("", "another VAE: name of a model, folder, hub id or file; empty: the model's "
                   "own (sdxl: one that is safe in fp16)")
    prediction_type: str = opt("", "empty: as the folder or file says, else epsilon",
                               ("", "epsilon", "v_prediction"))
    negative: str = opt("", "guidance's other side: zeros, or the empty prompt encoded; empty: as "
                        "the model was trained", ("", "zeros", "encoded"))
    tokenizer: str = opt("", "of single files: folder or hub id with tokenizer/ (and "
                         "tokenizer_2/); empty: the official one")
    guidance_scale: float = opt(5.0, "classifier-free guidance, in sampling and training (P: 5)")
    resolution: int = opt(0, "picture side in pixels; 0: the model's own", least=0)


@dataclass
class TrainConfig(ModelConfig):
    """What a training run also says of its model."""
    preset: str = opt("", "whose settings are the defaults; empty: the model's own, or what a "
                      "local folder or single file turns out to be, else sd15",
                      ("", "tiny", "tiny-flow", "sd15", "sdxl"))
    compile: bool | str = opt("auto", "torch.compile the UNet's blocks, the decoder and the judge; "
                              "auto: on a GPU, if the run is long enough to repay it",
                              ("auto", True, False))
    profile: bool = opt(False, "write what the second round or step spends its time on: "
                        "profile.json (for Perfetto), profile.txt")
    track: str = opt("", "show the run there while it runs; the package is extra. Without it, too, "
                     "report.html in the run folder is kept up to date",
                     ("", *tracking.MODULES))


@dataclass
class RunConfig(TrainConfig):
    """What every method that trains a LoRA needs."""
    prompts: str = opt("", "training prompts: .txt, .json, .jsonl, .csv, .tsv, .parquet or a hub "
                       "data set (P: 4k Pick-a-Pic captions); empty: tiny's own")
    sample_prompts: int = opt(0, "use so many of them, drawn by the seed (P: 4000); 0: all",
                              least=0)
    judge_dtype: str = opt("fp32", "of the judge's weights (O: fp32, on a GPU with TF32 products)",
                           tuple(DTYPES))
    decoder: str = opt("", "small decoder of the pictures that the judge sees: taesd, a folder, "
                       "file or hub id; empty: the VAE's")
    # Sampling (P 5.1)
    steps: int = opt(20, "DDIM steps of a trajectory (P: 20)", least=1, most=999)
    eta: float = opt(1.0, "DDIM stochasticity; 0 would leave a step without a probability (P: 1)",
                     above=0, most=1)
    # Optimization (P 5.1)
    lr: float = opt(6e-5, "AdamW learning rate (P: 6e-5 SD-1.5, 1e-5 SDXL)", least=0)
    weight_decay: float = opt(1e-4, "AdamW weight decay (O)", least=0)
    clip_norm: float = opt(1.0, "bound on the gradient norm (O: 1.0, though theirs clips nothing)",
                           above=0)
    rank: int = opt(4, "LoRA rank (P: 4 SD-1.5, 64 SDXL); alpha = rank", least=1)
    targets: str = opt(",".join(lora.TARGETS), "linear layers that get LoRA, by the end of their "
                       "names (O)")
    epochs: int = opt(10, "passes over the prompts (P: 10)", least=1)
    rounds: int = opt(0, "stop after this many rounds; 0: when the epochs are done", least=0)
    prompts_per_round: int = opt(40, "global batch of prompts per round (O: 4 x 10 SD-1.5, 4 x 2 "
                                 "SDXL)", least=1)
    pairs_per_step: int = opt(40, "global batch of pairs, with MSPO of their steps, per optimizer "
                              "step (P: 40 SD-1.5; 8 x 2 SDXL)", least=1)
    # What fits, and how often; none of these changes the mathematics
    memory: str = opt("auto", "low: small batches, checkpointing, text encoders on the card only "
                      "while they encode; normal: the batches below; auto: low on cards under "
                      "32 GB (sd15) or 64 GB (sdxl)", ("auto", "normal", "low"))
    sample_batch: int = opt(10, "prompts that one process samples at a time", least=1)
    train_batch: int = opt(10, "pairs in one forward and backward", least=1)
    decode_batch: int = opt(16, "latents that the VAE decodes at a time", least=1)
    checkpointing: bool = opt(False, "recompute the UNet's activations in the backward: less "
                              "memory, slower")
    decoder_check: int = opt(0, "with --decoder: for this many rounds decode with the VAE too and "
                             "log how often it names the same pair", least=0)
    save_every: int = opt(10, "rounds between checkpoints; the last two stay, and that of the "
                          "highest validation_score (LoRA: best/), without grids of the highest "
                          "mean score", least=1)
    grid_every: int = opt(10, "rounds between sample grids, from round 0 on; their mean score by "
                          "the judge is the log's validation_score; 0: never", least=0)
    snapshot_every: int = opt(0, "rounds between LoRAs that stay, in loras/; 0: none", least=0)


LOW = {         # estimates: sd15 within 10 GB at 512 pixels, sdxl within 24 GB at 1024
    "sd15": dict(sample_batch=2, train_batch=4, decode_batch=2, checkpointing=True),
    "": dict(sample_batch=1, train_batch=1, decode_batch=1, checkpointing=True),    # all others
}
# Seconds that compiling takes, and saves a prompt, on an H100 (benchmarks/README.md); what SDXL
# saves is calculated with SD-1.5's ratio. Other cards are slower, so they save more.
COMPILING = {"sd15": (120, 0.94), "sdxl": (170, 4.4)}
# May differ when a run is resumed. A preset may, because what it sets is compared itself.
FREE = ("out", "preset", "device", "epochs", "rounds", "memory", "sample_batch", "train_batch",
        "decode_batch", "checkpointing", "compile", "decoder_check", "profile", "save_every",
        "grid_every", "snapshot_every", "track")


def fit_machine(config: RunConfig, presets: dict[str, dict], processes: Processes,
                count: int) -> RunConfig:
    """The configuration with `memory` and `compile` decided, for a run over `count` prompts.

    Raises InputError where what --track needs is missing: before anything is loaded.
    """
    if config.track:
        tracking.load(config.track)
    config = fit_memory(config, presets, processes.device)
    rounds = config.epochs * -(-count // config.prompts_per_round)
    rounds = min(config.rounds or rounds, rounds) - last_step(Path(config.out))
    return decide_compiling(config, processes, rounds * config.prompts_per_round)


def decide_compiling(config: TrainConfig, processes: Processes, prompts: float) -> TrainConfig:
    """The configuration with `compile` decided, for so many prompts over all processes."""
    if config.compile == "auto":
        on, why = processes.device.type == "cuda", ""
        if on:
            on, why = repays(config.preset, prompts / processes.world)
        config = dataclasses.replace(config, compile=on)
        if why and processes.main:
            print(f"--compile auto: {'on' if on else 'off'}, {why}", flush=True)
    if config.compile:
        keep_compiled()
    return config


def keep_compiled() -> None:
    """Let later starts find what is compiled, also after a reboot: torch has it in /tmp."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "spo", "compiled")
    with contextlib.suppress(OSError):          # a home that cannot be written
        os.makedirs(folder, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)


def repays(preset: str, prompts: float) -> tuple[bool, str]:
    """Does compiling repay its time over so many prompts of one process? And why, in words."""
    if preset not in COMPILING:
        return False, f"{preset} is too small to gain by it"
    compiler = os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))
    if not importlib.util.find_spec("triton") or not compiler:
        return False, "it needs Triton and a C compiler"
    takes, saves = COMPILING[preset]
    return prompts * saves > takes, (f"it takes about {takes} s and saves about "
                                     f"{prompts * saves:.0f} s in what is left of the run")


def fit_memory(config: RunConfig, presets: dict[str, dict], device: torch.device,
               arguments: list[str] | None = None) -> RunConfig:
    """The configuration with `memory` decided, normal or low.

    Low's batches hold where the command line, `arguments` (None: this process's own), names none.
    """
    low = config.memory == "low"
    if config.memory == "auto" and device.type == "cuda":
        needs = {"sd15": 32e9, "sdxl": 64e9}.get(config.preset, 0)          # sdxl is estimated
        low = torch.cuda.get_device_properties(device).total_memory < needs
    if low:
        small = LOW.get(config.preset, LOW[""])
        presets = {config.preset: presets.get(config.preset, {}) | small}
        config = parse_options(type(config), presets, arguments)
    return dataclasses.replace(config, memory="low" if low else "normal")


def training_prompts(config: RunConfig) -> list[str]:
    """The prompts to train on; InputError where none are named."""
    if not config.prompts:
        with option("model"):           # of a mistyped path nobody knows the prompts
            if not os.path.exists(config.model):
                hub_id(NAMES.get(config.model, config.model))
        raise InputError("--prompts: name a file of training prompts, e.g. SPO's own "
                         "4k_training_prompts.json (only tiny brings its own)")
    return read_prompts(config.prompts, config.sample_prompts, config.seed)


def load_model(config: ModelConfig, processes: Processes) -> Pipeline:
    """The model that the options name, after a look at all other sources that they name."""
    with processes.agreed():
        resolve(config)
    pipe = load_pipeline(
        config.model, DTYPES[config.dtype], processes.device, vae=config.vae or None,
        prediction_type=config.prediction_type, tokenizer=config.tokenizer,
        vae_dtype=DTYPES.get(config.vae_dtype))
    if config.negative:
        pipe.zero_negative = config.negative == "zeros"
    pipe.calls = Calls(processes.device)
    pipe.check_resolution(config.resolution)
    if processes.main and isinstance(config, TrainConfig):
        check_preset(config, pipe.is_sdxl)
    return pipe


def prepare_policy(config: RunConfig, processes: Processes) -> Pipeline:
    """Load the model, put the LoRA on its UNet, compile if asked."""
    pipe = load_model(config, processes)
    pipe.offload = config.memory == "low"
    try:
        lora.add(pipe.unet, config.rank, targets=tuple(config.targets.split(",")), seed=config.seed)
    except ValueError as error:
        raise InputError(f"--targets {config.targets}: {error}") from None
    pipe.unet.checkpointing = config.checkpointing
    if config.compile is True:
        compile_blocks(pipe.unet)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def vae_decoder(pipe: Pipeline, config: RunConfig) -> Callable:
    """Latents [N, C, h, w] -> pictures [N, 3, H, W] in about [-1, 1], fp32."""
    decode, dtype = pipe.vae.decode, pipe.vae.post_quant_conv.weight.dtype
    if config.compile is True:
        decode = torch.compile(decode, dynamic=False)
    return pipe.calls.wrap(lambda latents: decode(latents.to(dtype)).float(), "decoding")


def small_decoder(pipe: Pipeline, config: RunConfig) -> Callable:
    """The same by the decoder that --decoder names."""
    usual = "fp16" if config.dtype == "bf16" else config.dtype      # as the VAE's
    dtype = DTYPES[config.vae_dtype or usual]
    decode = load_tiny_decoder(config.decoder, pipe, dtype)
    if config.compile is True:
        decode.compile(dynamic=False)
    return pipe.calls.wrap(lambda latents: decode(latents.to(dtype)).float(), "decoding")


def compiled_sizes(config: RunConfig, world: int, k: int, rows: int) -> dict[str, tuple[int, ...]]:
    """How many samples compiled networks see in each phase: k candidates, up to `rows` a slot."""
    if config.compile is not True:
        return {}
    prompts = min(config.sample_batch, -(-config.prompts_per_round // world))
    latents = (config.decode_batch, prompts * k % config.decode_batch)
    # Slots one at a time take one row or two; more of them are always filled up.
    training = (config.train_batch * rows,) if config.train_batch > 1 else (1, 2)
    sampling = (prompts, prompts * k)
    return dict(sampling=sampling, training=training, decoding=latents, scoring=latents)


def loss_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Multiplies the loss so that fp16 does not round its gradients to zero; elsewhere idle.

    An overflow halves the factor, 2,000 steps without one double it.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")
    scaler.scale(torch.zeros(1, device=device))         # begins; a process may never have a loss
    return scaler


def make_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer,
              rounds: tracking.Rounds, sound: bool, loss: float) -> bool:
    """An optimizer step, skipped unless its gradients are `sound` -> was it skipped by fault?

    Gradients that are infinite only because they were scaled are no fault: the next step mends it.
    `rounds.bad` counts the faults in a row.
    """
    fault = not (sound or scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() >= 1)
    if sound:
        scaler.step(optimizer)
    scaler.update()
    rounds.bad = 0 if sound else rounds.bad + fault
    return fault


def save_lora(pipe: Pipeline, folder: Path) -> None:
    """The LoRA for diffusers (`load_lora_weights(folder)`) and as kohya's (ComfyUI, A1111)."""
    weights = lora.state(pipe.unet)
    lora.save(weights, folder / "pytorch_lora_weights.safetensors", {})
    lora.save(lora.to_kohya(weights), folder / "lora_kohya.safetensors",
              lora.kohya_header(weights, pipe.unet, Path(pipe.name).name))


def previewed(prompts: list[str]) -> list[str]:
    """The 16 prompts of the samples, the same every time."""
    return [prompts[i] for i in permutation(len(prompts), 0, "preview")[:16]]


def draw_samples(pipe: Pipeline, prompts: list[str], config: RunConfig, path: Path,
                 judges: dict[str, CLIP] | None = None) -> dict[str, float]:
    """A grid of the same 16 training prompts and seeds every time -> each judge's mean score.

    The pictures are finished, so the judges are told t = 0. What is not finite is left out.
    """
    some = previewed(prompts)
    batch = min(config.sample_batch, config.decode_batch)
    with torch.compiler.set_stance("force_eager"):          # its batches have other shapes
        images = generate(
            pipe, some, list(range(len(some))), batch, steps=config.steps,
            guidance_scale=config.guidance_scale, resolution=config.resolution or None)
        scores = {name: judged(pipe, judge, images, some)
                  for name, judge in (judges or {}).items()}
    write_atomic(path, functools.partial(grid(images, 4, captions=some).save, format="PNG"))
    return {name: score for name, score in scores.items() if math.isfinite(score)}


@torch.no_grad()
def judged(pipe: Pipeline, judge: CLIP, images: torch.Tensor, prompts: list[str]) -> float:
    """Mean score of finished pictures [N, 3, H, W] in [0, 1]."""
    pixels = preprocess_decoded(images.to(pipe.device) * 2 - 1, judge.config.vision.image_size)
    timestep = torch.zeros(len(pixels), dtype=torch.long, device=pipe.device)
    features = judge.image_features(pixels, timestep)
    return float(judge.score(features, judge_features(pipe, judge, prompts)).mean())


def copied(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights on the CPU, as they are now."""
    return [p.detach().to("cpu", copy=True) for p in weights]


@torch.no_grad()
def put(weights: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Put values into the weights; ValueError where they have other shapes or types."""
    for p, value in zip(weights, values, strict=True):
        if (p.shape, p.dtype) != (value.shape, value.dtype):
            raise ValueError(f"{value.dtype} {list(value.shape)} for weights {list(p.shape)}")
        p.copy_(value)


@dataclass
class Turn:
    """One round: which prompts, and what keys its random numbers."""
    step: int               # of the run, from 0
    epoch: int
    place: int              # within the epoch
    indices: list[int]      # of its prompts
    texts: list[str]        # the prompts themselves

    @property
    def name(self) -> str:
        """How messages speak of it."""
        return f"epoch {self.epoch}, round {self.place} of it"


class Trainer:
    """A LoRA in training: rounds of prompts, minibatches, checkpoints; resumes and stops."""

    def __init__(self, config: RunConfig, run: Run, pipe: Pipeline, prompts: list[str],
                 judge: CLIP | None = None, name: str = "spo", **identity: str):
        self.config, self.run, self.processes = config, run, run.processes
        self.pipe, self.prompts = pipe, prompts
        # Without a judge nothing is drawn, so nothing is guided.
        self.empty = encode_empty(pipe) if judge else None
        # By the names of their scores in the log.
        self.judges = {"validation_score": judge} if judge else {}
        if config.model in ("tiny", "tiny-flow") and config.grid_every and self.processes.main:
            pickscore = load_clip(JUDGES["tiny"]["pickscore"], device=pipe.device)
            self.judges["validation_pickscore"] = pickscore
        self.rounds_per_epoch = -(-len(prompts) // config.prompts_per_round)
        total = min(config.rounds or math.inf, config.epochs * self.rounds_per_epoch)
        self.rounds = tracking.Rounds(run, total, "round", config, pipe.calls, name)
        self.rounds.prompts = previewed(prompts)
        self.weights = lora.parameters(pipe.unet)
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=config.lr, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=config.weight_decay)
        self.totals = Totals(())
        self.scaler = loss_scaler(config, pipe.device)
        state = run.resume(
            prompts=fingerprint([repaired(p) for p in prompts]),
            base_model=fingerprint(*pipe.identity),
            judge_model=fingerprint(*[judge] if judge else []), **identity)
        if state:
            with run.restoring():
                put(self.weights, state["lora"])
                restore_optimizer(self.optimizer, state["optimizer"])
                self.scaler.load_state_dict(state.get("scaler") or self.scaler.state_dict())
                self.rounds.restore(state)
        self.before = self.good = self.copy()               # good: it drew finite pictures
        self.rounds.begin(
            f"{len(prompts)} prompts, {total} rounds of {config.prompts_per_round}, LoRA of "
            f"{sum(p.numel() for p in self.weights):,} parameters, {self.processes.world} x "
            f"{pipe.device}")

    def copy(self) -> list[torch.Tensor]:
        """The LoRA as it is now; the main process alone keeps any, SDXL's has 0.37 GB."""
        return copied(self.weights) if self.processes.main else []

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """A signal during work that may be dropped: save what is done, and leave."""
        if kind is Stopped and self.rounds.done > self.rounds.saved:    # its score would be lost
            self.save()
        self.rounds.close()
        if kind is Stopped:
            self.rounds.leave()
        if kind is None and self.processes.main:
            self.conclude()

    def turns(self) -> Iterator[Turn]:
        """The rounds, each with its share of the epoch's shuffled prompts."""
        at_start = {}
        if not self.rounds.done:
            at_start = self.validate(0)
            self.rounds.track(at_start)
        self.at_start = {f"{name}_at_start": score for name, score in at_start.items()}
        for step in self.rounds:
            epoch, place = divmod(step, self.rounds_per_epoch)
            order = permutation(len(self.prompts), self.config.seed, "order", epoch)
            first = place * self.config.prompts_per_round
            indices = order[first:first + self.config.prompts_per_round]
            self.before, self.pipe.calls.evaluations = self.copy(), 0
            yield Turn(step, epoch, place, indices, [self.prompts[i] for i in indices])

    def minibatches(self, slots: list[int], names: tuple[str, ...], turn: Turn,
                    place_of: Callable[[int], str]) -> "Iterator[Minibatch]":
        """Each of the `slots` once, in shuffled minibatches, the same on every process.

        `names`: of what is logged, the loss first. `place_of(slot)`: where it is from, in words.
        """
        self.totals = Totals(names)
        key = (self.config.seed, "pairs", turn.epoch, turn.place)
        for batch in cut_minibatches(slots, self.config.pairs_per_step, *key):
            yield Minibatch(self, batch, turn, place_of)
            if self.rounds.bad >= TOO_MANY:
                break

    def end(self, turn: Turn, stats: dict, sound: bool = True) -> None:
        """Log a round; save, draw samples, leave, as is due. `sound`: was any picture finite?

        Raises InputError after TOO_MANY that were not.
        """
        config, pipe, rounds = self.config, self.pipe, self.rounds
        rounds.bad += not sound
        if stats["score"] is not None or not rounds.bad:    # the LoRA before it drew this round
            self.good = self.before
        evaluations = torch.tensor([pipe.calls.evaluations], device=pipe.device)        # int64
        self.processes.sum([evaluations])
        record = dict(round=turn.step + 1, epoch=turn.epoch, **stats,
                      lora_norm=lora.norm(pipe.unet), evaluations=int(evaluations))
        shown = {k: f"{stats[k]:.4g}" for k in ("score", "pairs", "margin") if stats[k] is not None}
        validation = self.validate(rounds.done + 1)
        record |= validation | self.at_start
        self.at_start = {}
        score = stats["score"]
        if "validation_score" in self.judges and config.grid_every:
            score = validation.get("validation_score")
        rounds.end(record, "prompts", len(turn.indices), score, shown)
        if self.processes.main and is_due(rounds.done, config.snapshot_every):
            save_lora(pipe, self.run.folder / "loras" / f"{rounds.done:05d}")
        if rounds.bad >= TOO_MANY:
            self.give_up()
        if rounds.due or rounds.ending:
            self.save()
        if rounds.ending and rounds.done < rounds.total:
            rounds.leave()

    def validate(self, done: int) -> dict[str, float]:
        """Draw and judge the samples that are due after `done` rounds; the main process alone.

        Before the log and the checkpoint: whoever is killed in between does it again.
        """
        scores, began = {}, time.perf_counter()
        if self.processes.main and is_due(done, self.config.grid_every, done == self.rounds.total):
            scores = draw_samples(self.pipe, self.prompts, self.config, self.rounds.grid(done),
                                  self.judges)
        self.processes.barrier()
        self.rounds.started += time.perf_counter() - began      # it is no part of the round
        return scores

    def save(self) -> None:
        """LoRA files, card, then the checkpoint: whoever is killed in between writes them again."""
        score = self.rounds.take_score()
        if self.processes.main:
            save_lora(self.pipe, self.run.folder)
            write_card(self.run.folder)
            if self.run.is_best(score):
                save_lora(self.pipe, self.run.folder / "best")
        weights = [p.detach() for p in self.weights]
        self.rounds.save(score, lora=weights, optimizer=self.optimizer.state_dict(),
                         scaler=self.scaler.state_dict())

    def give_up(self) -> None:
        """Leave the last good LoRA behind, and say so."""
        if self.processes.main:
            put(self.weights, self.good)
            save_lora(self.pipe, self.run.folder)
        raise InputError(
            f"round {self.rounds.done}: {TOO_MANY} optimizer steps in a row, or rounds, were not "
            f"finite; the last good LoRA is in {self.run.folder} (try a lower --lr, or "
            "--dtype fp32)")

    def conclude(self) -> None:
        """What is left behind, and where."""
        checked = [row for row in self.run.read_log() if "decoder_pairs" in row]
        if count := sum(row["decoder_pairs"] for row in checked):
            same = sum(row["decoder_pairs"] * row["decoder_agreement"] for row in checked)
            print(f"--decoder {self.config.decoder}: of {count} pairs, {same / count:.1%} are the "
                  "VAE's too")
        print(f"LoRA in {self.run.folder / 'pytorch_lora_weights.safetensors'} (diffusers) and "
              "lora_kohya.safetensors (ComfyUI, A1111); README.md beside them says how to use it")


def is_due(done: int, every: int, last: bool = False) -> bool:
    """Is it due, as every `every` rounds (0: never), or because this is the last one?"""
    return every > 0 and (done % every == 0 or last)


def cut_minibatches(slots: list[int], size: int, *key) -> list[list[int]]:
    """Shuffle all slots and cut them into about equal minibatches of about `size`; none is tiny."""
    order = [slots[i] for i in permutation(len(slots), *key)]
    count = max(1, round(len(order) / size)) if order else 0
    return [order[len(order) * i // count: len(order) * (i + 1) // count] for i in range(count)]


class Totals:
    """What a round's minibatches add up to."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.sums = names, torch.zeros(len(names))
        self.used = self.skipped = 0        # slots; optimizer steps
        self.norms: list[float] = []

    def means(self) -> dict:
        """Means over the slots used and the optimizer steps made."""
        sums = zip(self.names, self.sums.tolist())
        means = {name: value / max(self.used, 1) for name, value in sums}
        return means | dict(updates=len(self.norms), skipped=self.skipped,
                            grad_norm=sum(self.norms) / max(len(self.norms), 1))


class Minibatch:
    """Slots that make one optimizer step; every process has its share of them, possibly none."""

    def __init__(self, trainer: Trainer, slots: list[int], turn: Turn,
                 place_of: Callable[[int], str]):
        self.trainer, self.turn, self.place_of = trainer, turn, place_of
        self.size = len(slots)
        self.mine = slots[trainer.processes.rank::trainer.processes.world]
        self.losses: list[torch.Tensor] = []
        self.sums = torch.zeros(len(trainer.totals.names), device=trainer.pipe.device)

    def __iter__(self) -> Iterator[list[int]]:
        """This process's share, `train_batch` slots at a time."""
        for begin in range(0, len(self.mine), self.trainer.config.train_batch):
            with self.trainer.pipe.calls.phase("training"):
                yield self.mine[begin:begin + self.trainer.config.train_batch]

    def backward(self, loss: torch.Tensor, logged: list[torch.Tensor]) -> None:
        """Add the gradients of loss [N] / minibatch size; add up what is logged, [N] each."""
        self.trainer.scaler.scale(loss.sum() / self.size).backward()
        self.losses.append(loss.detach())
        self.sums += torch.stack([loss, *logged]).detach().sum(1)

    def step(self) -> None:
        """Sum gradients over the processes, clip, update; one that is not finite is reported."""
        trainer, totals = self.trainer, self.trainer.totals
        for p in trainer.weights:               # a process without slots still takes part
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        trainer.processes.sum([p.grad for p in trainer.weights] + [self.sums])
        trainer.scaler.unscale_(trainer.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(trainer.weights, trainer.config.clip_norm))
        sound = math.isfinite(norm)
        if make_step(trainer.scaler, trainer.optimizer, trainer.rounds, sound, float(self.sums[0])):
            self.report()
        if sound:
            totals.used += self.size
            totals.norms.append(norm)
            totals.sums += self.sums.cpu()
        else:
            totals.skipped += 1
        trainer.optimizer.zero_grad(set_to_none=True)

    def report(self) -> None:
        """Say which slot's loss is not finite or, if every loss is, which gradient is not."""
        finite = torch.isfinite(torch.cat(self.losses)).tolist() if self.losses else []
        broken = [slot for slot, sound in zip(self.mine, finite) if not sound]
        if broken:
            what = f"the loss of {self.place_of(broken[0])}"
        elif self.trainer.processes.main and math.isfinite(float(self.sums[0])):
            # Finite numbers may have an infinite norm.
            names = (name for name, p in self.trainer.pipe.unet.named_parameters()
                     if p.grad is not None and not torch.isfinite(p.grad).all())
            what = f"the gradient of {next(names, 'all weights together')}"
        else:
            return
        warn(f"{self.turn.name}: {what} is not finite; optimizer step skipped")
