"""The official recipe against this program: one process, interleaved, medians, at equal mathematics.

    python benchmarks/bench.py                          # the embedded tiny model; a few minutes on a CPU, most of them compiling
    python benchmarks/bench.py --model sd15             # full size, random weights, one GPU; or sdxl
    python benchmarks/bench.py --sides official eager   # without compiling
    python benchmarks/bench.py --model sd15 --parts     # each part of a round alone, printed at once: for a GPU that one has for minutes
    python benchmarks/bench.py --settings all           # instead: peak memory and speed of this program's settings; any --model

Sides:
    official    diffusers' UNet with peft's LoRA, a second UNet as reference, four forwards per pair; diffusers' VAE, a whole pool at
                a time; on a GPU fp16, the policy under autocast as accelerate puts it, the judge in fp32 with TF32; fp32 on a CPU
    eager       this program
    compiled    this program with --compile
    taesd       the same with --decoder taesd, random weights in its layout; SD-1.5 and SDXL only
All walk down the same number of trajectories with the same batches, decode and score the same candidates with one SPM, and train
on every pair. Before it measures, the program checks that both recipes give the same loss on the same pairs and weights.
Needs requirements-dev.txt. Writes benchmarks/results/bench_MODEL_DEVICE.json, or parts_..., settings_...
"""
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import diffusers  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import ddim  # noqa: E402
import lora  # noqa: E402
from clip_spm import CLIP, clip_h, preprocess_decoded  # noqa: E402
from conftest import sd15_shaped, sdxl_shaped  # noqa: E402
from diffusion import Conditioning, decode, encode_prompts, guided_noise  # noqa: E402
from loading import DTYPES, Pipeline  # noqa: E402
from diffusion import negative  # noqa: E402
from loading import load_clip, load_pipeline  # noqa: E402
from spo_train import LOW, PRESETS, Counted, Models, Pairs, SPOConfig, judge_features  # noqa: E402
from spo_train import pair_log_ratios, sample_pairs, spo_loss, train_on_pairs  # noqa: E402
from test_unet import SD15_FULL, SDXL_FULL  # noqa: E402
from training import Clock, Processes, generator, opt, parse_options, profiled, run_script, write_json  # noqa: E402
from prompt_sets import read_prompts  # noqa: E402
from unet import UNet, UNetConfig, compile_blocks  # noqa: E402
from vae import VAE, TinyDecoder, TinyDecoderConfig, VAEConfig  # noqa: E402

PHASES = ("sampling", "decoding", "scoring", "training")


@dataclass
class BenchConfig:
    """Every option."""
    model: str = opt("tiny", "tiny, or sd15 or sdxl at full size with random weights (a GPU)", ("tiny", "sd15", "sdxl"))
    sides: tuple[str, ...] = opt(("official", "eager", "compiled", "taesd"), "what to compare",
                                 ("official", "eager", "compiled", "taesd"))
    settings: tuple[str, ...] = opt((), "a table of settings instead, each in a process of its own: peak memory, seconds per prompt",
                                    ("all", "normal", "checkpointing", "8", "4", "1", "low"))
    prompts: int = opt(0, "prompts in a round; 0: 16 tiny, 10 sd15, 2 sdxl", least=0)
    parts: bool = opt(False, "time each part of a round alone and add up how often a round does it, instead of whole rounds")
    repeats: int = opt(3, "rounds of each side, of which the median counts", least=1)
    profile: bool = opt(False, "in a folder beside the JSON file, what one more round, compiled if that is a side, spends its time on")
    out: str = opt("", "the JSON file; empty: benchmarks/results/bench_MODEL_DEVICE.json, or parts_..., settings_...")


@dataclass
class Side:
    """One of the things compared: its networks, how it trains on the pairs of a round, and what must be on the card for it."""
    models: Models
    train: object                       # (pairs, clock) -> None
    modules: list[torch.nn.Module]
    optimizer: torch.optim.Optimizer
    config: SPOConfig
    compiled: bool | None = None        # None: knows nothing of it
    loss_of: object = None              # the official side's loss, for the comparison with ours


def tiny_parts(device: torch.device) -> tuple[Pipeline, CLIP, Conditioning, Conditioning, torch.Tensor, SPOConfig]:
    """The embedded model with the demo's settings."""
    config = SPOConfig(**PRESETS["tiny"])
    pipe = load_pipeline("tiny", torch.float32, device)
    judge = load_clip(str(ROOT / "tiny/model/spm"), torch.float32, device)
    prompts = read_prompts(config.prompts)[:64]
    cond = encode_prompts(pipe, prompts)
    return pipe, judge, cond, negative(pipe, cond, encode_prompts(pipe, [""])), judge_features(pipe, judge, prompts), config


def full_parts(model: str, device: torch.device) -> tuple[Pipeline, CLIP, Conditioning, Conditioning, torch.Tensor, SPOConfig]:
    """SD-1.5 or SDXL at full size; random weights and conditioning, which cost what real ones cost."""
    config = SPOConfig(**PRESETS[model] | dict(model=model))
    shape = sd15_shaped(**SD15_FULL) if model == "sd15" else sdxl_shaped(**SDXL_FULL)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        unet, vae, judge = UNet(UNetConfig.from_json(shape)), VAE(VAEConfig()), CLIP(clip_h(step_aware=True))
        torch.set_default_dtype(torch.float32)
    for module in (unet, vae, judge):
        module.requires_grad_(False).eval()
    tables = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000).square()
    pipe = Pipeline(model, [], [], unet, vae, ddim.Schedule((1 - tables).cumprod(0), 0.9991), device=device)
    wide, n = unet.config.cross_attention_dim, 16
    draw = lambda *s: torch.randn(*s, device=device, dtype=torch.bfloat16)          # noqa: E731
    extra = (draw(n, 1280), torch.tensor([[1024, 1024, 0, 0, 1024, 1024.0]], device=device).repeat(n, 1)) if model == "sdxl" else ()
    cond, uncond = (Conditioning(draw(n, 77, wide), *extra) for _ in range(2))
    return pipe, judge, cond, uncond, torch.nn.functional.normalize(draw(n, 1024).float(), dim=-1), config


def loaded(model: str, prompts: int, device: torch.device,
           **changes) -> tuple[Pipeline, CLIP, Conditioning, Conditioning, torch.Tensor, SPOConfig]:
    """A model with its LoRA, its judge, the conditioning of `prompts` prompts, and its settings with `changes`; every pair counts."""
    pipe, judge, cond, uncond, text, config = tiny_parts(device) if model == "tiny" else full_parts(model, device)
    config = dataclasses.replace(config, threshold=-1.0, **changes)
    lora.add(pipe.unet, config.rank)
    pipe.unet.checkpointing = config.checkpointing
    return pipe, judge, cond.map(lambda v: v[:prompts]), uncond.map(lambda v: v[:prompts]), text[:prompts], config


def official_side(pipe: Pipeline, judge: CLIP, cond: Conditioning, uncond: Conditioning, config: SPOConfig, unet_json: dict,
                  vae_json: dict) -> Side:
    """diffusers + peft, with the very weights of `pipe` and of its LoRA."""
    dtype = torch.float16 if pipe.device.type == "cuda" else torch.float32
    weights = {k: v for k, v in pipe.unet.state_dict().items() if ".lora_" not in k}
    unets = []
    for _ in range(2):
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**unet_json)
        unet = unet.to_empty(device=pipe.device)
        unet.load_state_dict(weights)
        unets.append(unet.to(dtype).requires_grad_(False).eval())
    policy, reference = unets
    policy.add_adapter(peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(lora.TARGETS)))
    for name, p in policy.named_parameters():
        if ".lora_" in name:
            p.data = pipe.unet.get_parameter(name.replace(".base_layer", "").replace(".default", "")).data.float().clone()
            p.requires_grad_(True)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**vae_json)
    vae = vae.to_empty(device=pipe.device)
    vae.load_state_dict(pipe.vae.state_dict())
    vae = vae.to(dtype).requires_grad_(False).eval()

    def call(unet):
        mixed = dtype == torch.float16 and unet is policy

        def forward(latents, timestep, prompt_embeds, pooled=None, time_ids=None):
            added = dict(text_embeds=pooled.to(dtype), time_ids=time_ids) if pooled is not None else None
            with torch.autocast(pipe.device.type, dtype, enabled=mixed):
                return unet(latents.to(dtype), timestep, encoder_hidden_states=prompt_embeds.to(dtype), added_cond_kwargs=added).sample
        return forward

    scale, parameters = pipe.vae.config.scaling_factor, [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def loss_of(x_t, x_next, t, c, u):
        """Four forwards: policy and reference, winner and loser."""
        stride, ratios = len(pipe.schedule.alphas_cumprod) // config.steps, []
        for place in (0, 1):
            densities = []
            for unet, grad in ((policy, True), (reference, False)):
                with torch.set_grad_enabled(grad):
                    noise_pred = guided_noise(call(unet), x_t[:, place], t, c, u, config.guidance_scale)
                mean, std = ddim.step_gaussian(pipe.schedule, x_t[:, place], noise_pred, t, t - stride, config.eta)
                densities.append(ddim.log_prob(x_next[:, place], mean, std))
            ratios.append(densities[0] - densities[1])
        return spo_loss(*ratios, config.beta, config.clamp)

    def train(pairs: Pairs, clock: Clock) -> None:
        count, timesteps = pairs.valid.shape[1], pool_timesteps(pipe, config)
        slots = pairs.valid.flatten().nonzero()[:, 0].tolist()
        for first in range(0, len(slots), config.pairs_per_step):
            batch = slots[first:first + config.pairs_per_step]
            with clock("training"):
                for begin in range(0, len(batch), config.train_batch):
                    part = batch[begin:begin + config.train_batch]
                    prompt, slot = [s // count for s in part], [s % count for s in part]
                    t = torch.tensor([timesteps[s] for s in slot], device=pipe.device)
                    c, u = (v.map(lambda w, prompt=prompt: w[prompt]) for v in (cond, uncond))
                    (loss_of(pairs.x_t[prompt, slot], pairs.x_next[prompt, slot], t, c, u).sum() / len(batch)).backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def draw(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(dtype) / scale).sample.float()

    judge = copy.deepcopy(judge).float()
    return Side(Models(Counted(call(policy)), draw, judge, judge.image_features), train, [policy, reference, vae, judge], optimizer,
                dataclasses.replace(config, decode_batch=config.sample_batch * config.k), loss_of=loss_of)


def pool_timesteps(pipe: Pipeline, config: SPOConfig) -> list[int]:
    """The timesteps at which pairs are collected, in the order of the slots."""
    return [t for t in pipe.schedule.timesteps(config.steps) if config.t_min <= t <= config.t_max]


def forwards(pipe: Pipeline, config: SPOConfig) -> tuple[int, int, int, int]:
    """Of one trajectory: (forwards at one latent, forwards at k candidates, groups that are judged, slots that give a pair)."""
    timesteps, pools = pipe.schedule.timesteps(config.steps), pool_timesteps(pipe, config)
    slots, early = len(pools), sum(t > config.t_max for t in timesteps)
    return early + 1, slots - (pools[-1] == timesteps[-1]), -(-slots // config.j), slots


def our_side(pipe: Pipeline, judge: CLIP, cond: Conditioning, uncond: Conditioning, config: SPOConfig, compiled: bool,
             small: TinyDecoder | None = None) -> Side:
    """This program's own functions; pictures by the VAE or by a `small` decoder. The UNet's blocks are compiled already, for all sides."""
    config = dataclasses.replace(config, compile=compiled, lr=1e-6)
    build = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
    draw, features = build(small or pipe.vae.decode), build(judge.image_features)
    dtype = pipe.vae.post_quant_conv.weight.dtype
    optimizer = torch.optim.AdamW(lora.parameters(pipe.unet), lr=1e-6)
    models = Models(Counted(pipe.unet), lambda z: draw(z.to(dtype)).float(), judge, features)

    def train(pairs: Pairs, clock: Clock) -> None:
        empty = None if pipe.zero_negative else uncond.map(lambda v: v[:1])
        train_on_pairs(pipe, models, optimizer, pairs, cond, empty, config, Processes(0, 1, pipe.device), clock, (0, 0))

    return Side(models, train, [pipe.unet, small or pipe.vae, judge], optimizer, config, compiled)


def one_round(pipe: Pipeline, side: Side, cond: Conditioning, uncond: Conditioning, text: torch.Tensor, seed: int, config: SPOConfig,
              clock: Clock) -> None:
    """Sample the prompts, `sample_batch` at a time, and train on all their pairs."""
    parts = []
    for begin in range(0, len(text), config.sample_batch):
        rows = slice(begin, begin + config.sample_batch)
        c, u = (v.map(lambda w, rows=rows: w[rows]) for v in (cond, uncond))
        generators = [generator(seed, "bench", i) for i in range(len(text))[rows]]
        parts.append(sample_pairs(pipe, side.models, c, u, text[rows], generators, config, clock))
    pairs = Pairs(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Pairs)))
    pairs.valid[:] = True
    side.train(pairs, clock)


def measure(model: str, changes: dict, prompts: int, repeats: int) -> tuple[int, float] | None:
    """Rounds of one setting, alone in a process: (peak bytes, of the card or else of the process; seconds a prompt); None if too large."""
    device, seconds = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    pipe, judge, cond, uncond, text, config = loaded(model, prompts, device, **changes)
    side = our_side(pipe, judge, cond, uncond, config, compiled=False)
    try:
        for repeat in range(repeats + 1):
            begin = time.perf_counter()
            one_round(pipe, side, cond, uncond, text, repeat, config, Clock(device))
            wait(device)
            seconds.append(time.perf_counter() - begin)
    except torch.cuda.OutOfMemoryError:
        return None
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, statistics.median(seconds[1:]) / prompts


def compare_settings(given: BenchConfig, prompts: int, head: dict, path: Path) -> None:
    """The table of settings. Low memory also moves the text encoders off the card, which are no part of this measurement."""
    batches = {n: (f"batches of {n}", dict(sample_batch=int(n), train_batch=int(n), decode_batch=int(n))) for n in ("8", "4", "1")}
    rows = {"normal": ("normal", {}), "checkpointing": ("--checkpointing", dict(checkpointing=True)), **batches,
            "low": ("--memory low", LOW.get(given.model, LOW[""]))}
    rows = dict(row for key, row in rows.items() if key in given.settings or "all" in given.settings)
    lines, head["settings"] = ["| setting | peak memory | s / prompt |", "|---|---|---|"], {}
    for name, changes in rows.items():
        with multiprocessing.get_context("spawn").Pool(1) as process:
            found = process.apply(measure, (given.model, changes, prompts, given.repeats))
        head["settings"][name] = dict(changes, peak_bytes=found and found[0], seconds_per_prompt=found and found[1])
        lines.append(f"| {name} | {found[0] / 1e9:.2f} GB | {found[1]:.3f} |" if found else f"| {name} | does not fit | |")
        print(lines[-1], flush=True)
    write_json(path, head)
    print("\n".join(lines), path, sep="\n")


def flops_of(function) -> float:
    """Floating-point operations of one call, multiply-add counted as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return float(counter.get_total_flops())


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """The device's matrix product, measured: TFLOP/s, best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        wait(device)
        begin = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        best = max(best, 4 * 2 * n ** 3 / (time.perf_counter() - begin) / 1e12)
    return best


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def build_sides(given: BenchConfig, prompts: int, device: torch.device):
    """-> (pipe, judge, cond, uncond, text, config, the sides by name, the small decoder if one of them uses it)."""
    pipe, judge, cond, uncond, text, config = loaded(given.model, prompts, device, sample_batch=prompts)
    if given.model == "tiny":
        unet_json, vae_json = (json.loads((ROOT / f"tiny/model/{part}/config.json").read_text()) for part in ("unet", "vae"))
        unet_json, vae_json = ({k: v for k, v in j.items() if not k.startswith("_")} for j in (unet_json, vae_json))
    else:
        unet_json = sd15_shaped(**SD15_FULL) if given.model == "sd15" else sdxl_shaped(**SDXL_FULL)
        vae_json = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    torch.manual_seed(1)
    with torch.no_grad():                                           # policy and reference apart, or the check below would check nothing
        for layer in lora.layers(pipe.unet).values():
            layer.lora_B.weight.normal_(std=0.01)
    sides, small = {}, None
    if "official" in given.sides:
        sides["official"] = official_side(pipe, judge, cond, uncond, config, unet_json, vae_json)
    compile_blocks(pipe.unet)                                       # which the eager side steps around
    for name in ("eager", "compiled"):
        if name in given.sides:
            sides[name] = our_side(pipe, judge, cond, uncond, config, name == "compiled")
    if "taesd" in given.sides and given.model == "tiny":
        print("taesd: knows the latents of SD-1.5 and SDXL, not those of tiny; left out", flush=True)
    elif "taesd" in given.sides:
        small = TinyDecoder(TinyDecoderConfig()).to(device, pipe.vae.post_quant_conv.weight.dtype, memory_format=torch.channels_last)
        sides["taesd"] = our_side(pipe, judge, cond, uncond, config, True, small.requires_grad_(False))
    return pipe, judge, cond, uncond, text, config, sides, small


@torch.no_grad()
def loss_difference(pipe: Pipeline, sides: dict[str, Side], cond: Conditioning, uncond: Conditioning, text: torch.Tensor,
                    config: SPOConfig) -> float:
    """Largest difference of both recipes' losses on the same pairs and weights; on a CPU, SystemExit where they are not the same."""
    device, n, first = pipe.device, min(len(text), config.train_batch), pool_timesteps(pipe, config)[0]
    c, u = (v.map(lambda w: w[:n]) for v in (cond, uncond))
    t, stride = torch.full((n,), first, device=device), len(pipe.schedule.alphas_cumprod) // config.steps
    with torch.compiler.set_stance("force_eager"):
        pairs = sample_pairs(pipe, sides["eager"].models, c, u, text[:n], [generator(0, "check", i) for i in range(n)],
                             dataclasses.replace(config, t_min=first, j=1), Clock(device))
        ours = spo_loss(*pair_log_ratios(pipe.unet, pipe.unet, pipe.schedule, pairs.x_t[:n, 0], pairs.x_next[:n, 0], t, t - stride,
                                         [True] * n, c, u, config.guidance_scale, config.eta), config.beta, config.clamp)
        theirs = sides["official"].loss_of(pairs.x_t[:n, 0], pairs.x_next[:n, 0], t, c, u)
    difference = float((ours - theirs).abs().max())
    print(f"loss of {n} pairs, official against ours: largest difference {difference:.1e} "
          f"(losses {float(ours.min()):.3f} to {float(ours.max()):.3f})", flush=True)
    if device.type == "cpu" and not (difference < 1e-4 and ours.std() > 1e-3):
        raise SystemExit("the two recipes do not compute the same loss; nothing that follows would mean anything")
    return difference


def bytes_of(side: Side) -> int:
    """What a side keeps on the card between rounds: its networks, and its optimizer's state."""
    tensors = [*itertools.chain(*(itertools.chain(m.parameters(), m.buffers()) for m in side.modules)),
               *(v for state in side.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.is_cuda)]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def alone(pipe: Pipeline, name: str, sides: dict[str, Side]):
    """Inside, only this side's networks are on the card, in their layout, and run as they should; yields what was allocated before."""
    side, device = sides[name], pipe.device
    for other in sides.values():                    # whoever rests, rests elsewhere
        for module in other.modules:
            module.to(device if module in side.modules else "cpu")
    if device.type == "cuda" and side.compiled is not None:
        for module in (pipe.unet, pipe.vae):
            module.to(memory_format=torch.channels_last if side.compiled else torch.contiguous_format)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.compiler.set_stance("force_eager" if side.compiled is False else "default"):
        yield torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak_of(side: Side, before: int, device: torch.device) -> int | None:
    """Peak of the card's memory, were the side alone on it."""
    return torch.cuda.max_memory_allocated() - before + bytes_of(side) if device.type == "cuda" else None


def timed_round(pipe: Pipeline, name: str, sides: dict[str, Side], cond: Conditioning, uncond: Conditioning, text: torch.Tensor,
                seed: int) -> tuple[dict[str, float], float, int | None]:
    """One round of one side: seconds by phase, in all, and the peak of memory."""
    side, clock = sides[name], Clock(pipe.device)
    with alone(pipe, name, sides) as before:
        wait(pipe.device)
        begin = time.perf_counter()
        one_round(pipe, side, cond, uncond, text, seed, side.config, clock)
        wait(pipe.device)
        seconds = time.perf_counter() - begin
    return clock.seconds(), seconds, peak_of(side, before, pipe.device)


def timed_parts(pipe: Pipeline, name: str, sides: dict[str, Side], cond: Conditioning, uncond: Conditioning, text: torch.Tensor,
                repeats: int) -> list[tuple[dict[str, float], float, int | None]]:
    """What a round would take, as timed_round says it: the first one, with the first call of each part, and another, from medians."""
    side, device, b, k = sides[name], pipe.device, len(text), sides[name].config.k
    config, models, shape = side.config, side.models, pipe.latent_shape()
    at_one, at_k, groups, slots = forwards(pipe, config)
    t, size, n = pool_timesteps(pipe, config)[0], models.judge.config.vision.image_size, min(config.pairs_per_step, b * slots)
    pool = tuple(v.map(lambda w: w.repeat_interleave(k, 0)) for v in (cond, uncond))
    latents = torch.randn(b * k, *shape, device=device)
    x_t, noise = torch.randn(2, b, slots, 2, *shape, device=device)        # the next latents near their x_t: inside the clamp
    valid = torch.arange(b * slots, device=device).view(b, -1) < n
    pairs = Pairs(x_t, x_t + 0.01 * noise, valid, *(torch.zeros(0, device=device) for _ in range(4)))
    drawn = torch.randn(b * k, 3, *[shape[-1] * pipe.vae.factor] * 2, device=device)

    def score() -> None:
        for pictures in drawn.split(config.decode_batch):
            models.image_features(preprocess_decoded(pictures, size), torch.full((len(pictures),), t, device=device))

    parts = {           # phase, how often a round does it, what
        "a step of the walk": ("sampling", at_one, lambda: guided_noise(models.unet, latents[:b], t, cond, uncond, config.guidance_scale)),
        "a pool's candidates": ("sampling", at_k, lambda: guided_noise(models.unet, latents, t, *pool, config.guidance_scale)),
        "a pool decoded": ("decoding", groups, lambda: [models.decode(z) for z in latents.split(config.decode_batch)]),
        "a pool scored": ("scoring", groups, score),
        f"an optimizer step, {n} pairs": ("training", b * slots / n, lambda: side.train(pairs, Clock(device))),
    }
    first, median = ({p: 0.0 for p in PHASES} for _ in range(2))
    with alone(pipe, name, sides) as before:
        for what, (phase, times, function) in parts.items():
            seconds = []
            for _ in range(1 + repeats):
                wait(device)
                begin = time.perf_counter()
                with torch.set_grad_enabled(phase == "training"):
                    function()
                wait(device)
                seconds.append(time.perf_counter() - begin)
            first[phase] += seconds[0] + (times - 1) * statistics.median(seconds[1:])       # compiled once, not each time
            median[phase] += times * statistics.median(seconds[1:])
            print(f"{name}, {what}: {statistics.median(seconds[1:]):.4f} s, the first {seconds[0]:.1f} s; {times:g} in a round", flush=True)
        peak = peak_of(side, before, device)
    return [(phases, sum(phases.values()), peak) for phases in (first, median)]


def costs(pipe: Pipeline, judge: CLIP, small: TinyDecoder | None, cond: Conditioning) -> dict[str, float | None]:
    """Floating-point operations of one forward of each network, counted."""
    device = pipe.device
    for module in (pipe.unet, pipe.vae, judge, *([small] if small else [])):
        module.to(device)
    one, t, c = torch.zeros(1, *pipe.latent_shape(), device=device), torch.zeros(1, device=device), cond.map(lambda v: v[:1])
    with torch.no_grad(), lora.disabled(pipe.unet), torch.compiler.set_stance("force_eager"):
        pixels = preprocess_decoded(decode(pipe, one), judge.config.vision.image_size)
        return dict(unet_flops=flops_of(lambda: pipe.unet(one, t, c.prompt_embeds, c.pooled, c.time_ids)),
                    decode_flops=flops_of(lambda: decode(pipe, one)),
                    small_decode_flops=flops_of(lambda: small(one.to(pipe.vae.post_quant_conv.weight.dtype))) if small else None,
                    judge_flops=flops_of(lambda: judge.image_features(pixels, t)))


def work(name: str, pipe: Pipeline, config: SPOConfig, cost: dict[str, float | None]) -> float:
    """Operations that a side does for one prompt.

    Forwards to walk; then per pair forward and backward of the policy (frozen weights need no gradient: about one forward more) and
    the reference's forward, with the guidance's two sides, once where winner and loser share x_t.
    """
    at_one, at_k, groups, slots = forwards(pipe, config)
    walk = 2 * (at_one + config.k * at_k)
    visits = 2 * slots if name == "official" else 2 * slots - groups            # x_t's per prompt; a group's first one is shared
    drawn = cost["small_decode_flops" if name == "taesd" else "decode_flops"]
    return walk * cost["unet_flops"] + groups * config.k * (drawn + cost["judge_flops"]) + visits * 2 * 3 * cost["unet_flops"]


def summary(rounds: dict[str, list], tflop: dict[str, float], top: float, prompts: int) -> dict[str, dict]:
    """Medians of each side's rounds but the first, which was cold; `tflop`: of each side for one prompt, `top`: the ceiling in TFLOP/s."""
    sides = {}
    for name, ((_, cold, _), *warm) in rounds.items():
        total = statistics.median(r[1] for r in warm) / prompts
        sides[name] = dict(
            seconds_per_prompt=total, phases={p: statistics.median(r[0].get(p, 0.0) for r in warm) / prompts for p in PHASES},
            peak_bytes=max((r[2] for r in warm if r[2]), default=None), tflop_per_prompt=tflop[name], tflops=tflop[name] / total,
            share_of_ceiling=tflop[name] / total / top, first_round_seconds=cold)
    base = sides.get("official")
    for row in sides.values() if base else ():
        row["speedup"] = base["seconds_per_prompt"] / row["seconds_per_prompt"]
        row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"] if base["peak_bytes"] else None
    return sides


def table(sides: dict[str, dict]) -> list[str]:
    """The record's sides as Markdown."""
    lines = ["| side | s / prompt | " + " | ".join(PHASES) + " | peak memory | TFLOP/s | of the matrix ceiling | first round |",
             "|---" * 9 + "|"]
    for name, row in sides.items():
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else "not measured"
        lines.append(f"| {name} | {row['seconds_per_prompt']:.3f} | " + " | ".join(f"{row['phases'][p]:.3f}" for p in PHASES) +
                     f" | {memory} | {row['tflops']:.3g} | {100 * row['share_of_ceiling']:.0f} % | {row['first_round_seconds']:.1f} s |")
    if "official" in sides:
        lines.append("\nfaster than the official recipe: " + ", ".join(f"{n} {row['speedup']:.2f} x" for n, row in sides.items()))
    return lines


def main() -> None:
    """Build the sides, check that they agree, and take turns."""
    given = parse_options(BenchConfig, {}, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True      # as in training, here and there
    prompts = given.prompts or {"tiny": 16, "sd15": 10, "sdxl": 2}[given.model]
    kind = "settings" if given.settings else "parts" if given.parts else "bench"
    path = Path(given.out or ROOT / f"benchmarks/results/{kind}_{given.model}_{'gpu' if device.type == 'cuda' else 'cpu'}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    head = dict(date=time.strftime("%Y-%m-%d"), device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or
                platform.machine(), threads=torch.get_num_threads(), torch=torch.__version__, model=given.model, prompts=prompts,
                repeats=given.repeats)
    if given.settings:
        return compare_settings(given, prompts, head, path)
    pipe, judge, cond, uncond, text, config, sides, small = build_sides(given, prompts, device)
    difference = loss_difference(pipe, sides, cond, uncond, text, config) if {"official", "eager"} <= set(sides) else None
    cost, top = costs(pipe, judge, small, cond), ceiling(device, DTYPES["bf16" if device.type == "cuda" else "fp32"])
    head |= dict(diffusers=diffusers.__version__, peft=peft.__version__, k=config.k, j=config.j, train_batch=config.train_batch,
                 ceiling_tflops=top, loss_difference=difference, **cost)
    flops = {name: work(name, pipe, config, cost) / 1e12 for name in sides}
    rounds: dict[str, list] = {name: [] for name in sides}
    for name in sides if given.parts else ():
        rounds[name] = timed_parts(pipe, name, sides, cond, uncond, text, given.repeats)
        record = dict(head, parts=True, sides=summary({n: r for n, r in rounds.items() if r}, flops, top, prompts))
        write_json(path, record)
    for repeat in range(0 if given.parts else given.repeats + 1):   # the first warms up: allocations, autotuning, compiling
        for name in sides:
            rounds[name].append(timed_round(pipe, name, sides, cond, uncond, text, repeat))
            print(f"{name}, round {repeat}: {rounds[name][-1][1]:.1f} s", flush=True)
        if repeat:
            record = dict(head, repeats=repeat, sides=summary(rounds, flops, top, prompts))
            write_json(path, record)
    print("\n".join(table(record["sides"])))
    print(path)
    if given.profile:
        name = "compiled" if "compiled" in sides else list(sides)[-1]
        with profiled(path.with_name(f"{path.stem}_{name}"), device, True):
            timed_round(pipe, name, sides, cond, uncond, text, 0)


if __name__ == "__main__":
    run_script(main)
