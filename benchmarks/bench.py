"""The official recipe against this program: one process, taking turns, medians, equal mathematics.

    python benchmarks/bench.py                          # tiny: minutes on a CPU, mostly compiling
    python benchmarks/bench.py --model sd15             # full size, random weights, a GPU; or sdxl
    python benchmarks/bench.py --sides official eager   # without compiling
    python benchmarks/bench.py --model sd15 --parts     # a round's parts, each timed alone
    python benchmarks/bench.py --settings all           # instead: this program's settings compared
    python benchmarks/bench.py --model sd15 --lead NAME # instead: one of leads.py's, off and on

Sides:
    official    diffusers' UNet with peft's LoRA, a second UNet as reference, four forwards a pair;
                diffusers' VAE, a whole pool at a time; on a CPU fp32, on a GPU fp16, the policy
                under autocast with a gradient scaler as accelerate puts it, the judge in fp32
                with TF32. Needs requirements-dev.txt; left out, in one line, without
    eager       this program, its decoder and judge in the official precision as well
    compiled    this program with --compile
    taesd       the same with --decoder taesd, random weights in its layout; SD-1.5 and SDXL only
All walk down the same number of trajectories with the same batches, decode and score the same
candidates with one SPM, and train on every pair. First both recipes' losses on the same pairs and
weights are compared. --settings measures peak memory and speed, with any --model. --lead gives each
of our sides a twin to which the lead was applied: LEADS in leads.py names functions that apply one
to a pipeline, in place, before anything is compiled; a docstring's first line says what it does.
The lead "batch" is a setting instead: as many pairs at a time as the card's free memory takes.
Writes benchmarks/results/bench_MODEL_DEVICE.json, or parts_..., settings_...
"""
import contextlib
import copy
import gc
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from torch.utils.flop_counter import FlopCounterMode

import ddim
import lora
from calls import Calls
from clip_spm import CLIP, clip_h, preprocess_decoded
from diffusion import (
    Conditioning, decode, encode_empty, encode_prompts, guided_noise, judge_features, negative,
)
from finetune import LOW, Trainer, Turn, compiled_sizes, loss_scaler
from loading import DTYPES, SINGLE_UNETS, TINY, Pipeline, load_clip, load_pipeline
from observers import Faults
from prompt_sets import read_prompts
from spo_train import (
    PRESETS, Batch, Judge, Pairs, SPOConfig, Steps, collect, pair_log_ratios, pool_groups,
    sample_pools, spo_loss, take, train_on_pairs,
)
from training import Processes, generator, opt, parse_options, profiled, run_script, write_json
from leads import LEADS, bytes_per_pair, fitting_batch
from unet import UNet, compile_blocks
from vae import VAE, TinyDecoder, TinyDecoderConfig, VAEConfig

PHASES = ("sampling", "decoding", "scoring", "training")
SIDES = ("official", "eager", "compiled", "taesd")
BATCHES = ("sample_batch", "train_batch", "decode_batch")
SETTINGS = ("all", "normal", "checkpointing", "8", "4", "1", "low")


@dataclass
class BenchConfig:
    """Every option."""
    model: str = opt("tiny", "tiny, or sd15 or sdxl at full size with random weights (a GPU)",
                     ("tiny", "sd15", "sdxl"))
    sides: tuple[str, ...] = opt(SIDES, "what to compare", SIDES)
    settings: tuple[str, ...] = opt((), "a table of settings instead, each in a process of its own:"
                                    " peak memory, seconds per prompt", SETTINGS)
    prompts: int = opt(0, "prompts in a round; 0: 16 tiny, 10 sd15, 2 sdxl", least=0)
    parts: bool = opt(False, "time each part of a round alone and add up how often a round does "
                      "it, instead of whole rounds")
    repeats: int = opt(3, "rounds of each side, of which the median counts", least=1)
    profile: bool = opt(False, "in a folder beside the JSON file, what one more round, compiled if "
                        "that is a side, spends its time on")
    lead: str = opt("", "this program without and with one of leads.py's: "
                    f"{', '.join(LEADS)}, or batch", ("", *LEADS, "batch"))
    decoder_dtype: str = opt("fp16", "our VAE's at full size (O: fp16)", tuple(DTYPES))
    judge_dtype: str = opt("fp32", "our judge's at full size (O: fp32, its products in TF32)",
                           tuple(DTYPES))
    out: str = opt("", "the JSON file; empty: benchmarks/results/bench_MODEL_DEVICE.json, or "
                   "parts_..., settings_...")


@dataclass
class Task:
    """What all sides work on: a model with its LoRA, its judge, B prompts, and the settings."""
    pipe: Pipeline
    clip: CLIP
    cond: Conditioning
    empty: Conditioning | None          # guidance's other side: "" encoded (N = 1), None: zeros
    text: torch.Tensor                  # [B, P] the judge's features of the prompts
    config: SPOConfig


@dataclass
class Side:
    """One of the things compared."""
    pipe: Pipeline                              # with calls of its own, so with a clock
    judge: Judge
    train: Callable[[Pairs], object]            # on the pairs of a round
    modules: list[torch.nn.Module]              # what must be on the card for it
    optimizer: torch.optim.Optimizer
    compiled: bool | None = None                # None: knows nothing of it
    loss_of: Callable | None = None             # the official loss, for the comparison with ours


def tiny_task(device: torch.device) -> Task:
    """The embedded model with the demo's settings."""
    config = SPOConfig(**PRESETS["tiny"])
    pipe = load_pipeline("tiny", torch.float32, device)
    clip = load_clip(str(TINY / "spm"), torch.float32, device)
    prompts = read_prompts(config.prompts)[:64]
    cond, text = encode_prompts(pipe, prompts), judge_features(pipe, clip, prompts)
    return Task(pipe, clip, cond, encode_empty(pipe), text, config)


def full_task(model: str, device: torch.device, given: BenchConfig) -> Task:
    """SD-1.5 or SDXL at full size; random weights and conditioning cost what real ones cost."""
    config = SPOConfig(**PRESETS[model] | dict(model=model))
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        unet, vae = UNet(SINGLE_UNETS[model]), VAE(VAEConfig())
        clip = CLIP(clip_h(step_aware=True))
        torch.set_default_dtype(torch.float32)
    vae, clip = vae.to(DTYPES[given.decoder_dtype]), clip.to(DTYPES[given.judge_dtype])
    for module in (unet, vae, clip):
        module.requires_grad_(False).eval()
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000).square()
    schedule = ddim.Schedule((1 - betas).cumprod(0), 0.9991)
    pipe = Pipeline(model, [], [], unet, vae, schedule, device=device)
    draw = lambda *shape: torch.randn(16, *shape, device=device, dtype=torch.bfloat16)
    extra = ()
    if model == "sdxl":
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024.0]], device=device)
        extra = draw(1280), sizes.repeat(16, 1)
    width = unet.config.cross_attention_dim
    cond, empty = (Conditioning(draw(77, width), *extra) for _ in range(2))
    text = torch.nn.functional.normalize(draw(1024).float(), dim=-1)
    return Task(pipe, clip, cond, empty[:1], text, config)


def load_task(given: BenchConfig, prompts: int, device: torch.device, **changes) -> Task:
    """A model with its LoRA, `prompts` prompts, its settings with `changes`; every pair counts."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in training
    task = tiny_task(device) if given.model == "tiny" else full_task(given.model, device, given)
    config = replace(task.config, threshold=-1.0, **changes)
    lora.add(task.pipe.unet, config.rank)
    task.pipe.unet.checkpointing = config.checkpointing
    return replace(task, cond=task.cond[:prompts], text=task.text[:prompts], config=config)


def official_module(cls, config: dict, ours: UNet | VAE, dtype: torch.dtype) -> torch.nn.Module:
    """One of diffusers' networks, frozen, with the weights of ours but its LoRA."""
    with torch.device("meta"):
        module = cls(**config)
    module = module.to_empty(device=next(ours.parameters()).device)
    module.load_state_dict({k: v for k, v in ours.state_dict().items() if ".lora_" not in k})
    return module.to(dtype).requires_grad_(False).eval()


def add_official_lora(unet: torch.nn.Module, ours: UNet, rank: int) -> None:
    """Give diffusers' UNet a LoRA by peft, in fp32, with the numbers of our UNet's."""
    import peft
    unet.add_adapter(peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(lora.TARGETS)
    ))
    for name, p in unet.named_parameters():
        if ".lora_" in name:
            name = name.replace(".base_layer", "").replace(".default", "")
            p.data = ours.get_parameter(name).data.float().clone()
            p.requires_grad_(True)


class OfficialUNet:
    """diffusers' UNet in `dtype`, called as ours; `mixed`: under autocast."""

    def __init__(self, unet: torch.nn.Module, dtype: torch.dtype, mixed: bool):
        self.unet, self.dtype, self.mixed, self.config = unet, dtype, mixed, unet.config

    def __call__(self, latents, timestep, prompt_embeds, pooled=None, time_ids=None):
        added = None
        if pooled is not None:
            added = dict(text_embeds=pooled.to(self.dtype), time_ids=time_ids)
        with torch.autocast(latents.device.type, self.dtype, enabled=self.mixed):
            return self.unet(
                latents.to(self.dtype), timestep, added_cond_kwargs=added,
                encoder_hidden_states=prompt_embeds.to(self.dtype),
            ).sample


class Official:
    """The official recipe, diffusers and peft, with the very weights of `task` and of its LoRA."""

    def __init__(self, task: Task, unet_json: dict, vae_json: dict):
        import diffusers
        self.task, self.config, pipe = task, task.config, task.pipe
        self.dtype = torch.float16 if pipe.device.type == "cuda" else torch.float32
        policy, reference = (
            official_module(diffusers.UNet2DConditionModel, unet_json, pipe.unet, self.dtype)
            for _ in range(2)
        )
        called = OfficialUNet(policy, self.dtype, mixed=self.dtype == torch.float16)
        self.policy = replace(pipe, unet=called, calls=Calls(pipe.device))
        self.reference = replace(self.policy, unet=OfficialUNet(reference, self.dtype, mixed=False))
        self.vae = official_module(diffusers.AutoencoderKL, vae_json, pipe.vae, self.dtype)
        add_official_lora(policy, pipe.unet, self.config.rank)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6)
        self.scaler = torch.amp.GradScaler(enabled=self.dtype == torch.float16)

    def side(self) -> Side:
        """The recipe as one of the sides."""
        calls, clip = self.policy.calls, copy.deepcopy(self.task.clip).float()
        judge = Judge(
            clip, calls.wrap(self.draw, "decoding"), calls.wrap(clip.image_features, "scoring"),
            self.config.sample_batch * self.config.k, self.policy.schedule,     # a whole pool
        )
        modules = [self.policy.unet.unet, self.reference.unet.unet, self.vae, clip]
        return Side(
            self.policy, judge, self.train, modules, self.optimizer, loss_of=self.loss_of
        )

    def draw(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents -> pictures in about [-1, 1], fp32."""
        scale = self.task.pipe.vae.config.scaling_factor
        return self.vae.decode(latents.to(self.dtype) / scale).sample.float()

    def loss_of(self, steps: Steps) -> torch.Tensor:
        """Four forwards, of policy and reference, of winner and loser: losses [N]."""
        schedule, config = self.policy.schedule, self.config
        ratios = []
        for place in (0, 1):
            x_t, densities = steps.x_t[:, place], []
            for pipe in (self.policy, self.reference):
                with torch.set_grad_enabled(pipe is self.policy):
                    noise_pred = guided_noise(
                        pipe, x_t, steps.t, steps.cond, steps.uncond, config.guidance_scale
                    )
                mean, std = ddim.step_gaussian(
                    schedule, x_t, noise_pred, steps.t, steps.t_prev, config.eta
                )
                densities.append(ddim.log_prob(steps.x_next[:, place], mean, std))
            ratios.append(densities[0] - densities[1])
        return spo_loss(*ratios, config.beta, config.clamp)

    def train(self, pairs: Pairs) -> None:
        """Train on every pair, in the order of the slots."""
        config, pipe = self.config, self.policy
        slots = pairs.valid.flatten().nonzero()[:, 0].cpu()
        for batch in slots.split(config.pairs_per_step):
            with pipe.calls.phase("training"):
                for part in batch.split(config.train_batch):
                    steps = take(pairs, part.tolist(), pipe, self.task.empty, config.steps)
                    self.scaler.scale(self.loss_of(steps).sum() / len(batch)).backward()
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad(set_to_none=True)


def pool_timesteps(pipe: Pipeline, config: SPOConfig) -> list[int]:
    """The timesteps at which pairs are collected, in the order of the slots."""
    return [t for t in pipe.schedule.timesteps(config.steps) if config.t_min <= t <= config.t_max]


def forwards(pipe: Pipeline, config: SPOConfig) -> tuple[int, int, int, int]:
    """Of one trajectory: forwards at one latent, at k candidates; groups judged; slots of pairs."""
    timesteps = pipe.schedule.timesteps(config.steps)
    groups = pool_groups(timesteps, config.t_min, config.t_max, config.j)
    early, after = groups[0][0], groups[-1][-1] + 1
    return early + 1, after - early - (after == len(timesteps)), len(groups), after - early


class BareTrainer(Trainer):
    """A trainer without a run folder: it only trains on pairs."""

    def __init__(self, pipe: Pipeline, empty: Conditioning | None, config: SPOConfig):
        self.pipe, self.empty, self.config = pipe, empty, config
        self.processes = Processes(0, 1, pipe.device)
        self.rounds = SimpleNamespace(bad=0)
        self.scaler = loss_scaler(config, pipe.device)
        self.weights = lora.parameters(pipe.unet)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-6)


def our_side(task: Task, compiled: bool, small: TinyDecoder | None = None) -> Side:
    """This program's own functions; pictures by the VAE or by a `small` decoder.

    The UNet's blocks are compiled already, for all sides.
    """
    config, clip = replace(task.config, compile=compiled), task.clip
    pipe = replace(task.pipe, calls=Calls(task.pipe.device))
    pipe.calls.sizes = compiled_sizes(config, 1, config.k, 1 if config.j == 1 else 2)
    draw, features = small or pipe.vae.decode, clip.image_features
    if compiled:
        draw, features = (torch.compile(f, dynamic=False) for f in (draw, features))
    dtype = pipe.vae.post_quant_conv.weight.dtype
    judge = Judge(
        clip, pipe.calls.wrap(lambda latents: draw(latents.to(dtype)).float(), "decoding"),
        pipe.calls.wrap(features, "scoring"), config.decode_batch, pipe.schedule,
    )
    trainer = BareTrainer(pipe, task.empty, config)
    numbers = range(len(task.text))                     # in place of the prompts
    turn = Turn(0, 0, 0, list(numbers), [str(i) for i in numbers])
    return Side(
        pipe, judge, lambda pairs: train_on_pairs(trainer, pairs, turn, config),
        [pipe.unet, small or pipe.vae, clip], trainer.optimizer, compiled,
    )


def sample(task: Task, side: Side, rows: slice, key: tuple, config: SPOConfig) -> Pairs:
    """Pairs of some of the prompts, sampled as a run does."""
    cond, text = task.cond[rows], task.text[rows]
    generators = [generator(*key, i) for i in range(len(task.text))[rows]]
    batch = Batch(cond, negative(side.pipe, cond, task.empty), text, generators)
    judge = replace(side.judge)                         # Faults listens to a copy
    with side.pipe.calls.phase("sampling"):
        pools = sample_pools(side.pipe, judge, batch, config, [Faults(judge)])
        return replace(collect(pools), cond=cond)


def one_round(task: Task, side: Side, seed: int) -> None:
    """Sample the prompts, `sample_batch` at a time, and train on all their pairs."""
    config, size = task.config, task.config.sample_batch
    parts = [
        sample(task, side, slice(begin, begin + size), (seed, "bench"), config)
        for begin in range(0, len(task.text), size)
    ]
    x_t, x_next = (torch.cat([getattr(p, name) for p in parts]) for name in ("x_t", "x_next"))
    valid = torch.ones(x_t.shape[:2], dtype=torch.bool, device=x_t.device)
    side.train(replace(parts[0], x_t=x_t, x_next=x_next, valid=valid, cond=task.cond))


def seconds_of(function: Callable, device: torch.device) -> float:
    """How long the device takes for one call."""
    wait(device)
    begin = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(given: BenchConfig, changes: dict, prompts: int) -> tuple[int, float] | None:
    """Rounds of one setting, alone in a process: (peak bytes, seconds a prompt); None if too large.

    The peak is the card's, or else the process's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = load_task(given, prompts, device, **changes)
    side = our_side(task, compiled=False)
    try:
        seconds = [
            seconds_of(lambda: one_round(task, side, seed), device)
            for seed in range(given.repeats + 1)
        ]
    except torch.cuda.OutOfMemoryError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return peak, statistics.median(seconds[1:]) / prompts


def compare_settings(given: BenchConfig, prompts: int, head: dict, path: Path) -> None:
    """The table of settings.

    Low memory also moves the text encoders off the card, which are no part of this measurement.
    """
    rows = {
        "normal": ("normal", {}),
        "checkpointing": ("--checkpointing", dict(checkpointing=True)),
        **{n: (f"batches of {n}", dict.fromkeys(BATCHES, int(n))) for n in ("8", "4", "1")},
        "low": ("--memory low", LOW.get(given.model, LOW[""])),
    }
    lines = ["| setting | peak memory | s / prompt |", "|---|---|---|"]
    head["settings"] = {}
    for name, changes in [rows[k] for k in rows if k in given.settings or "all" in given.settings]:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            found = process.apply(measure, (given, changes, prompts))
        peak, seconds = found or (None, None)
        head["settings"][name] = dict(changes, peak_bytes=peak, seconds_per_prompt=seconds)
        cells = f"{peak / 1e9:.2f} GB | {seconds:.3f}" if found else "does not fit | "
        lines.append(f"| {name} | {cells} |")
        print(lines[-1], flush=True)
    write_json(path, head)
    print("\n".join(lines), path, sep="\n")


def flops_of(function: Callable) -> float:
    """Floating-point operations of one call, multiply-add counted as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return float(counter.get_total_flops())


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """The device's matrix product, measured: TFLOP/s, best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(4):
            a @ b

    return 4 * 2 * n ** 3 / min(seconds_of(products, device) for _ in range(8)) / 1e12


def build_sides(task: Task, given: BenchConfig) -> tuple[dict[str, Side], TinyDecoder | None]:
    """The sides by name, and the small decoder if one of them uses it."""
    pipe = task.pipe
    torch.manual_seed(1)
    with torch.no_grad():       # policy and reference apart, or there would be nothing to compare
        for layer in lora.layers(pipe.unet).values():
            layer.lora_B.weight.normal_(std=0.01)
    sides, small, tasks = {}, None, {"": task}
    missing = [name for name in ("diffusers", "peft") if not find_spec(name)]
    if "official" in given.sides and missing:
        print(f"official: needs {' and '.join(missing)} (requirements-dev.txt); left out",
              flush=True)
    elif "official" in given.sides:
        sides["official"] = Official(task, *official_configs(given.model)).side()
    if given.lead:
        other = tasks[f" {given.lead}"] = replace(task, pipe=copy.deepcopy(pipe))
        if given.lead == "batch":
            other.config = replace(task.config, train_batch=fitted(other))
            print(f"batch: {other.config.train_batch} pairs at a time", flush=True)
        else:
            LEADS[given.lead](other.pipe)
    for one in tasks.values():
        compile_blocks(one.pipe.unet)                               # the eager side goes around it
    for name in ("eager", "compiled"):
        if name in given.sides:
            sides |= {name + lead: our_side(one, name == "compiled") for lead, one in tasks.items()}
    if "taesd" in given.sides and given.model == "tiny":
        print("taesd: knows the latents of SD-1.5 and SDXL, not those of tiny; left out",
              flush=True)
    elif "taesd" in given.sides:
        small = TinyDecoder(TinyDecoderConfig()).requires_grad_(False)
        dtype = pipe.vae.post_quant_conv.weight.dtype
        small = small.to(pipe.device, dtype, memory_format=torch.channels_last)
        sides["taesd"] = our_side(task, True, small)
    return sides, small


def official_configs(model: str) -> list[dict]:
    """What diffusers builds the UNet and the VAE from."""
    if model == "tiny":
        files = [TINY / part / "config.json" for part in ("unet", "vae")]
        configs = [json.loads(file.read_text()) for file in files]
        return [{k: v for k, v in c.items() if not k.startswith("_")} for c in configs]
    return [asdict(SINGLE_UNETS[model]), dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )]


@torch.no_grad()
def loss_difference(task: Task, sides: dict[str, Side]) -> float:
    """Largest difference of both recipes' losses on the same pairs and weights.

    SystemExit on a CPU where they are not the same.
    """
    pipe, n = task.pipe, min(len(task.text), task.config.train_batch)
    config = replace(task.config, t_min=pool_timesteps(pipe, task.config)[0], j=1)  # one pool
    with torch.compiler.set_stance("force_eager"):
        pairs = sample(task, sides["eager"], slice(n), (0, "check"), config)
        steps = take(pairs, list(range(n)), pipe, task.empty, config.steps)
        ours = spo_loss(*pair_log_ratios(pipe, steps, config), config.beta, config.clamp)
        theirs = sides["official"].loss_of(steps)
    difference = float((ours - theirs).abs().max())
    print(
        f"loss of {n} pairs, official against ours: largest difference {difference:.1e} "
        f"(losses {float(ours.min()):.3f} to {float(ours.max()):.3f})", flush=True,
    )
    if pipe.device.type == "cpu" and not (difference < 1e-4 and ours.std() > 1e-3):
        raise SystemExit("the two recipes do not compute the same loss; "
                         "nothing that follows would mean anything")
    return difference


def bytes_of(side: Side) -> int:
    """What a side keeps on the card between rounds: its networks, and its optimizer's state."""
    tensors = [t for module in side.modules for t in (*module.parameters(), *module.buffers())]
    for state in side.optimizer.state.values():
        tensors += [v for v in state.values() if torch.is_tensor(v) and v.is_cuda]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def alone(pipe: Pipeline, side: Side, sides: dict[str, Side]) -> Iterator[int]:
    """This side's networks are on the card, in their layout, and run as they should.

    Beside the official side's, which are many, they are there alone. Yields what was allocated
    before.
    """
    cuda = pipe.device.type == "cuda"
    for other in sides.values() if "official" in sides else ():     # who rests, rests elsewhere
        for module in other.modules:
            module.to(pipe.device if module in side.modules else "cpu")
    if cuda and side.compiled is not None:
        layout = torch.channels_last if side.compiled else torch.contiguous_format
        for module in (side.pipe.unet, side.pipe.vae):
            module.to(memory_format=layout)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.compiler.set_stance("force_eager" if side.compiled is False else "default"):
        yield torch.cuda.memory_allocated() if cuda else 0


def peak_of(side: Side, before: int, device: torch.device) -> int | None:
    """Peak of the card's memory, were the side alone on it."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated() - before + bytes_of(side)


Round = tuple[dict[str, float], float, int | None]      # seconds by phase, in all; peak of memory


def timed_round(task: Task, side: Side, sides: dict[str, Side], seed: int) -> Round:
    """One round of one side."""
    device, calls = task.pipe.device, side.pipe.calls
    with alone(task.pipe, side, sides) as before:
        calls.seconds()                         # forgets what came before
        seconds = seconds_of(lambda: one_round(task, side, seed), device)
    return calls.seconds(), seconds, peak_of(side, before, device)


def parts_of(task: Task, side: Side) -> dict[str, tuple[str, float, Callable]]:
    """{part of a round: (phase, how often a round does it, a function that does it)}."""
    pipe, judge, config, b = side.pipe, side.judge, task.config, len(task.text)
    device, shape = pipe.device, pipe.latent_shape()
    at_one, at_k, judged, slots = forwards(pipe, config)
    steps = pipe.schedule.timesteps(config.steps)
    groups = pool_groups(steps, config.t_min, config.t_max, config.j)
    timesteps, n = pool_timesteps(pipe, config), min(config.pairs_per_step, b * slots)
    t, uncond = timesteps[0], negative(pipe, task.cond, task.empty)
    latents = torch.randn(b * config.k, *shape, device=device)
    x_t, noise = torch.randn(2, b, slots, 2, *shape, device=device)
    pairs = Pairs(
        x_t, x_t + 0.01 * noise,        # so near that the ratio is not clamped
        torch.arange(b * slots, device=device).view(b, -1) < n,
        scores=torch.zeros(0), notes={}, timesteps=timesteps,
        apart=[i != group[0] for group in groups for i in group], ends=[], cond=task.cond,
    )
    drawn = torch.randn(b * config.k, 3, *[shape[-1] * pipe.vae.factor] * 2, device=device)

    def predict(k: int) -> None:
        guided_noise(
            pipe, latents[:b * k], t, task.cond.repeat(k), uncond.repeat(k), config.guidance_scale
        )

    def draw() -> list[torch.Tensor]:
        return [judge.decode(part) for part in latents.split(judge.chunk)]

    def score() -> None:
        for part in drawn.split(judge.chunk):
            pixels = preprocess_decoded(part, judge.clip.config.vision.image_size)
            judge.features(pixels, torch.full((len(part),), t, device=device))

    return {
        "a step of the walk": ("sampling", at_one, lambda: predict(1)),
        "a pool's candidates": ("sampling", at_k, lambda: predict(config.k)),
        "a pool decoded": ("decoding", judged, draw),
        "a pool scored": ("scoring", judged, score),
        f"an optimizer step, {n} pairs": ("training", b * slots / n, lambda: side.train(pairs)),
    }


def train_once(task: Task, pairs: int) -> None:
    """One optimizer step over so many pairs, in one part, not compiled."""
    alike = replace(task, config=replace(task.config, train_batch=pairs, pairs_per_step=pairs))
    *_, (_, _, step) = parts_of(alike, our_side(alike, compiled=False)).values()
    step()


def fitted(task: Task) -> int:
    """--train_batch from what is free on the card and what a pair takes; all pairs on a CPU."""
    most = task.config.pairs_per_step
    if task.pipe.device.type == "cpu":
        return most
    per_pair = bytes_per_pair(partial(train_once, task))
    torch.cuda.empty_cache()
    return fitting_batch(torch.cuda.mem_get_info()[0], per_pair, most)


def timed_parts(task: Task, name: str, sides: dict[str, Side], repeats: int) -> list[Round]:
    """What a round would take: the first, with the first call of each part; one from medians."""
    side, device = sides[name], task.pipe.device
    parts = parts_of(task, side)
    first, usual = ({p: 0.0 for p in PHASES} for _ in range(2))
    with alone(task.pipe, side, sides) as before:
        for what, (phase, times, function) in parts.items():
            with torch.set_grad_enabled(phase == "training"):
                cold, *warm = (seconds_of(function, device) for _ in range(1 + repeats))
            median = statistics.median(warm)
            first[phase] += cold + (times - 1) * median         # compiled once, not each time
            usual[phase] += times * median
            print(
                f"{name}, {what}: {median:.4f} s, the first {cold:.1f} s; {times:g} in a round",
                flush=True,
            )
        peak = peak_of(side, before, device)
    return [(phases, sum(phases.values()), peak) for phases in (first, usual)]


def costs(task: Task, small: TinyDecoder | None) -> dict[str, float | None]:
    """Floating-point operations of one forward of each network, counted.

    The official decoder's are those of ours on the meta device: on a CPU ours takes fewer for its
    enlargements.
    """
    pipe, clip = task.pipe, task.clip
    for module in (pipe.unet, pipe.vae, clip, *([small] if small else [])):
        module.to(pipe.device)
    z = torch.zeros(1, *pipe.latent_shape(), device=pipe.device)
    t = torch.zeros(1, device=pipe.device)
    c = task.cond[:1]
    dtype = pipe.vae.post_quant_conv.weight.dtype
    official = copy.deepcopy(pipe.vae).to("meta")
    with torch.no_grad(), lora.disabled(pipe.unet), torch.compiler.set_stance("force_eager"):
        pixels = preprocess_decoded(decode(pipe, z), clip.config.vision.image_size)
        return dict(
            unet_flops=flops_of(lambda: pipe.unet(z, t, c.prompt_embeds, c.pooled, c.time_ids)),
            official_decode_flops=flops_of(lambda: official.decode(z.to("meta", dtype))),
            decode_flops=flops_of(lambda: decode(pipe, z)),
            small_decode_flops=flops_of(lambda: small(z.to(dtype))) if small else None,
            judge_flops=flops_of(lambda: clip.image_features(pixels, t)),
        )


def work(name: str, task: Task, cost: dict[str, float | None]) -> float:
    """Operations that a side does for one prompt.

    Forwards to walk; then per pair forward and backward of the policy (frozen weights need no
    gradient: about one forward more) and the reference's forward, with the guidance's two sides,
    once where winner and loser share x_t.
    """
    at_one, at_k, groups, slots = forwards(task.pipe, task.config)
    # x_t's per prompt: ours shares a group's first one between winner and loser.
    visits = 2 * slots if name == "official" else 2 * slots - groups
    passes = 2 * (at_one + task.config.k * at_k) + visits * 2 * 3
    decoders = dict(official="official_decode_flops", taesd="small_decode_flops")
    drawn = cost[decoders.get(name, "decode_flops")]
    judged = groups * task.config.k * (drawn + cost["judge_flops"])
    return passes * cost["unet_flops"] + judged


def summary(
    rounds: dict[str, list[Round]], tflop: dict[str, float], top: float, prompts: int
) -> dict[str, dict]:
    """Medians of each side's rounds but the first, which was cold.

    `tflop`: of each side for one prompt; `top`: the ceiling in TFLOP/s.
    """
    sides = {}
    for name, ((_, cold, _), *warm) in rounds.items():
        phases, seconds, peaks = zip(*warm)
        total = statistics.median(seconds) / prompts
        sides[name] = dict(
            seconds_per_prompt=total,
            phases={p: statistics.median(r.get(p, 0.0) for r in phases) / prompts for p in PHASES},
            peak_bytes=max(filter(None, peaks), default=None), tflop_per_prompt=tflop[name],
            tflops=tflop[name] / total, share_of_ceiling=tflop[name] / total / top,
            first_round_seconds=cold,
        )
    base = sides.get("official")
    for row in sides.values() if base else ():
        row["speedup"] = base["seconds_per_prompt"] / row["seconds_per_prompt"]
        row["memory_ratio"] = (
            row["peak_bytes"] / base["peak_bytes"] if base["peak_bytes"] else None
        )
    return sides


def table(sides: dict[str, dict]) -> list[str]:
    """The record's sides as Markdown."""
    lines = [
        f"| side | s / prompt | {' | '.join(PHASES)} | peak memory | TFLOP/s | "
        "of the matrix ceiling | first round |", "|---" * 9 + "|",
    ]
    for name, row in sides.items():
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else "not measured"
        cells = [
            name, f"{row['seconds_per_prompt']:.3f}", *(f"{row['phases'][p]:.3f}" for p in PHASES),
            memory, f"{row['tflops']:.3g}", f"{100 * row['share_of_ceiling']:.0f} %",
            f"{row['first_round_seconds']:.1f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if "official" in sides:
        faster = ", ".join(f"{name} {row['speedup']:.2f} x" for name, row in sides.items())
        lines.append(f"\nfaster than the official recipe: {faster}")
    return lines


def measurements(
    task: Task, sides: dict[str, Side], given: BenchConfig
) -> Iterator[tuple[dict, dict[str, list[Round]]]]:
    """What is known so far, worth writing down: ({how it was measured}, {side: its rounds})."""
    rounds: dict[str, list[Round]] = {}
    if given.parts:
        for name in sides:
            rounds[name] = timed_parts(task, name, sides, given.repeats)
            yield dict(parts=True), rounds
        return
    for repeat in range(given.repeats + 1):     # the first: allocations, autotuning, compiling
        for name, side in sides.items():
            found = timed_round(task, side, sides, repeat)
            rounds.setdefault(name, []).append(found)
            print(f"{name}, round {repeat}: {found[1]:.1f} s", flush=True)
        if repeat:
            yield dict(repeats=repeat), rounds


def compare_sides(given: BenchConfig, prompts: int, head: dict, path: Path) -> None:
    """Build the sides, check that they agree, take turns, and write down what is known."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = load_task(given, prompts, device, sample_batch=prompts, prompts_per_round=prompts)
    sides, small = build_sides(task, given)
    difference = loss_difference(task, sides) if {"official", "eager"} <= set(sides) else None
    cost = costs(task, small)
    top = ceiling(device, DTYPES["bf16" if device.type == "cuda" else "fp32"])
    head |= {name: version(name) for name in ("diffusers", "peft") if "official" in sides}
    head |= dict(
        k=task.config.k, j=task.config.j, train_batch=task.config.train_batch,
        ceiling_tflops=top, loss_difference=difference, **cost,
    )
    tflop = {name: work(name, task, cost) / 1e12 for name in sides}
    for how, rounds in measurements(task, sides, given):
        record = head | how | dict(sides=summary(rounds, tflop, top, prompts))
        write_json(path, record)
    print("\n".join(table(record["sides"])))
    print(path)
    if given.profile:
        name = "compiled" if "compiled" in sides else list(sides)[-1]
        with profiled(path.with_name(f"{path.stem}_{name}"), device):
            timed_round(task, sides[name], sides, 0)


def main() -> None:
    """Compare what the command line asks for."""
    given = parse_options(BenchConfig, {}, description=__doc__)
    cuda = torch.cuda.is_available()
    prompts = given.prompts or {"tiny": 16, "sd15": 10, "sdxl": 2}[given.model]
    kind = "settings" if given.settings else "parts" if given.parts else "bench"
    path = ROOT / f"benchmarks/results/{kind}_{given.model}_{'gpu' if cuda else 'cpu'}.json"
    path = Path(given.out or path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cpu = platform.processor() or platform.machine()
    head = dict(
        date=time.strftime("%Y-%m-%d"), device=torch.cuda.get_device_name() if cuda else cpu,
        threads=torch.get_num_threads(), torch=torch.__version__, model=given.model,
        prompts=prompts, repeats=given.repeats,
    )
    if given.settings:
        compare_settings(given, prompts, head, path)
    else:
        compare_sides(given, prompts, head, path)


if __name__ == "__main__":
    run_script(main)
