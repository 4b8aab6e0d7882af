"""Train the step-aware preference model (SPM): which of two noisy latents will look better? (paper, section 4.2)

    python spm_train.py                                                   # tiny: on the embedded world's preferences
    torchrun --nproc_per_node=4 spm_train.py --model sd15 --pairs FOLDER  # pairs.jsonl with pictures, or Parquet

Both pictures of a pair are encoded and get the same noise at the same t; the frozen UNet predicts their clean latents;
these are decoded and shown to a CLIP that starts out equal to PickScore and also knows t. Eq. 3 gives the loss.
A step-blind twin (Table 5) can be trained on the very same inputs.

Shapes: N pairs, C H W latent, S x S pixels of the CLIP.
"""
import dataclasses
import math
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.optim import ZeroRedundancyOptimizer
from tqdm import tqdm

import ddim
from clip_spm import CLIP, make_step_aware, preference_loss, preprocess_decoded
from diffusion import Conditioning, decode, encode_empty, encode_prompts, guided_noise, negative
from loading import DTYPES, NEGATIVE, SDXL_VAE, TINY, Pipeline, load_clip, load_pipeline
from calls import Clock, upload
from pairs import Pairs, encode_pairs, epoch_order, hold_out, load_pairs, readable, stack_pictures, world_pairs
from training import (
    TOO_MANY,
    Processes,
    Run,
    check_preset,
    fingerprint,
    generator,
    learning_rate,
    opt,
    parse_options,
    profiled,
    run_script,
    say_compiling,
    start_processes,
    warn,
    write_atomic,
    write_json,
)
from unet import compile_blocks
from weights import InputError

REPORT_AT = (0, 251, 501, 701, 951)


@dataclass
class SPMConfig:
    """Every option of a run. Sources: P = the paper, O = the released official code, T = measured on the tiny model."""
    model: str = opt("tiny", "whose latents and noise: tiny, sd15, sdxl, a folder, hub id, or single-file checkpoint")
    preset: str = opt("", "whose settings are the defaults: tiny, sd15 or sdxl; empty: the model's own, or what a local folder or single "
                      "file turns out to be, else sd15", ("", "tiny", "sd15", "sdxl"))
    out: str = opt("runs/spm", "run folder: model.safetensors, log.jsonl, config.json, results.json, checkpoints")
    pickscore: str = opt("yuvalkirstain/PickScore_v1", "the CLIP to start from (P: PickScore), folder or hub id")
    pairs: str = opt("", "folder with pairs.jsonl or Parquet, a .parquet file or a hub data set (see pairs.py); empty: the tiny world's")
    labels: str = opt("human", "who says what is better (O: human for SD-1.5, pickscore for SDXL)", ("human", "pickscore"))
    seed: int = opt(0, "every random number of the run is keyed by it", least=0)
    device: str = opt("", "cpu or cuda; empty: a GPU if there is one")
    dtype: str = opt("bf16", "of the frozen UNet and VAE, and of the CLIP's arithmetic; its weights stay fp32", tuple(DTYPES))
    vae: str = opt("", "another VAE, folder or hub id; empty: the model's own")
    prediction_type: str = opt("", "single files: epsilon or v_prediction; empty: epsilon, or as the folder says",
                               ("", "epsilon", "v_prediction"))
    negative: str = opt("", "guidance's other side: zeros, or the empty prompt encoded; empty: as the model was trained",
                        ("", "zeros", "encoded"))
    tokenizer: str = opt("", "single files: folder or hub id with tokenizer/ (and tokenizer_2/); empty: the official one")
    resolution: int = opt(0, "picture side in pixels; 0: the model's own", least=0)
    guidance_scale: float = opt(5.0, "classifier-free guidance of the x0 prediction (O: 5)")
    lr: float = opt(3e-6, "AdamW learning rate (P: 3e-6 SD-1.5, 1e-6 SDXL)", least=0)
    adaln_lr: float = opt(1.0, "the timestep's own layers, which start from zero, learn this many times as fast (T)", least=0)
    decay: bool = opt(False, "let the learning rate fall linearly to zero (T)")
    warmup: int = opt(500, "steps of linear warm-up (O: 500)", least=0)
    weight_decay: float = opt(0.3, "AdamW weight decay (O: 0.3)", least=0)
    clip_norm: float = opt(1.0, "bound on the gradient norm", above=0)
    steps: int = opt(8000, "optimizer steps (O: 8000 SD-1.5, 7000 SDXL)", least=1)
    batch: int = opt(64, "global batch of pairs per optimizer step (O: 4 x 16)", least=1)
    micro_batch: int = opt(16, "pairs in one forward and backward of one process", least=1)
    count: int = opt(8000, "tiny: size of the training set of pairs", least=1)
    validation: int = opt(512, "pairs held back for the table of accuracies, with all pairs of the same caption", least=0)
    max_unreadable: float = opt(0.01, "share of the pairs read so far whose pictures may be damaged; they are skipped and listed",
                                least=0, most=1)
    step_blind: bool = opt(False, "also train a twin without the timestep, on the same inputs (P Table 5)")
    cache_latents: bool = opt(False, "keep encoded pictures in the run folder's latents.bin (SD-1.5, bf16: 13 GB for 100,000 pairs); with "
                               "human labels a pair's pictures are then read once")
    compile: bool = opt(False, "torch.compile the UNet's blocks, the VAE and the CLIPs")
    profile: bool = opt(False, "write what the second step spends its time on: profile.json (for Perfetto), profile.txt")
    save_every: int = opt(500, "steps between checkpoints; the last two stay, and that of the highest mean accuracy (SPM: best/)", least=1)


PRESETS = {
    "tiny": dict(pickscore=str(TINY / "pickscore"), dtype="fp32", guidance_scale=3.0, lr=1.5e-4, adaln_lr=10.0, decay=True,
                 warmup=20, weight_decay=0.05, steps=2600, batch=32, micro_batch=32, step_blind=True, save_every=250, count=44_000,
                 validation=2048),
    "sd15": dict(),
    "sdxl": dict(vae=SDXL_VAE, lr=1e-6, steps=7000, labels="pickscore", micro_batch=4),
}
FREE = ("out", "preset", "device", "micro_batch", "cache_latents", "compile", "profile", "save_every", "max_unreadable")


@torch.no_grad()
def relabel(clip: CLIP, images: torch.Tensor, text: torch.Tensor, threshold: float = 0.1) -> torch.Tensor:
    """PickScore's own opinion of clean pairs [N, 2, 3, H, W] uint8 -> 1, 0, or 0.5 if its softmax differs by at most 0.1."""
    pixels = preprocess_decoded(upload(images, text.device).flatten(0, 1) / 127.5 - 1, clip.config.vision.image_size, antialias=True)
    first, second = clip.score(clip.image_features(pixels), text.repeat_interleave(2, 0)).view(-1, 2).softmax(1).unbind(1)
    gap = first - second
    return torch.where(gap.abs() <= threshold, 0.5, (gap > 0).float())


def open_latents(folder: Path, pipe: Pipeline, side: int, count: int) -> torch.Tensor:
    """What encode_pairs gives for `count` pairs, as a file that all processes of a machine share; zero where nothing was encoded yet."""
    path, dtype = folder / "latents.bin", pipe.vae.quant_conv.weight.dtype
    shape = (count, 2, 2, pipe.vae.config.latent_channels, side // pipe.vae.factor, side // pipe.vae.factor)
    size = math.prod(shape) * dtype.itemsize
    try:
        there, written = (path.stat().st_size, path.stat().st_blocks * 512) if path.exists() else (size, 0)
        if there != size:
            raise InputError(f"{path}: holds the latents of other pairs; delete it")
        if (free := shutil.disk_usage(folder).free) < size - written:
            raise InputError(f"{path}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; leave out --cache_latents")
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be used as a cache ({str(error).splitlines()[0]})") from None


def is_encoded(latents: torch.Tensor, i: int) -> bool:
    """Is pair i there? Its standard deviations, none of which is zero, are written last."""
    return bool(latents[i, 1].all())


def cached_pairs(pipe: Pipeline, latents: torch.Tensor, index: list[int], images: torch.Tensor, seen: torch.Tensor,
                 size: int = 0) -> torch.Tensor:
    """encode_pairs of the pairs `index`; those that `latents` lacks are encoded, filled up to `size`, and, where `seen`, written there."""
    moments, new = upload(latents[index], pipe.device), [n for n, i in enumerate(index) if not is_encoded(latents, i)]
    if new:
        moments[new] = encode_pairs(pipe, images[fill_up(new, size)])[:len(new)]
        for n in new:
            if seen[n]:
                latents[index[n], 0], latents[index[n], 1] = moments[n].cpu()
    return moments


@torch.no_grad()
def predicted_pixels(pipe: Pipeline, moments: torch.Tensor, index: list[int], timestep: torch.Tensor, cond: Conditioning,
                     empty: Conditioning | None, guidance_scale: float, key: tuple, size: int) -> torch.Tensor:
    """What the SPM sees of N encoded pairs [N, 2, 2, C, H, W] at timesteps [N]: decoded x0 predictions -> CLIP pixels [2 N, 3, S, S].

    Both pictures of a pair get the same noise (section 4.2), keyed by the pair's number in `index`.
    """
    mean, std = (m.flatten(0, 1).float() * pipe.vae.config.scaling_factor for m in moments.unbind(1))         # [2 N, C, H, W] each
    draws = upload(torch.stack([torch.randn(3, *mean.shape[1:], generator=generator(*key, i)) for i in index]), pipe.device)
    latents = mean + std * draws[:, 1:].flatten(0, 1)
    noise = draws[:, :1].expand(-1, 2, *mean.shape[1:]).flatten(0, 1)
    t = upload(timestep, pipe.device).repeat_interleave(2)
    x_t = ddim.add_noise(pipe.schedule, latents, noise, t)
    both = cond.map(lambda v: v.repeat_interleave(2, 0))
    noise_pred = guided_noise(pipe.unet, x_t, t, both, negative(pipe, both, empty), guidance_scale)
    x0 = ddim.predict_x0(pipe.schedule, x_t, noise_pred, t)
    return preprocess_decoded(decode(pipe, x0), size, clamp_first=True)


def pair_scores(clip: CLIP, pixels: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor,
                dtype: torch.dtype) -> torch.Tensor:
    """Scores [N, 2] of pairs whose pixels are [2 N, 3, S, S]."""
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype != torch.float32):
        images = clip.image_features(pixels, upload(timestep, pixels.device).repeat_interleave(2))
        text = clip.text_features(ids).repeat_interleave(2, 0)
    return clip.score(images, text).view(-1, 2)


def whole_batch(config: SPMConfig, processes: Processes) -> int:
    """To how many pairs microbatches are filled up; 0: to none, since nothing is compiled."""
    return min(config.micro_batch, -(-config.batch // processes.world)) if config.compile else 0


@torch.no_grad()
def accuracy_table(pipe: Pipeline, models: dict[str, CLIP], pairs: Pairs, labels_of, index: list[int], config: SPMConfig,
                   empty: Conditioning | None, ids: torch.Tensor, processes: Processes) -> dict[str, dict[int, list[float]]]:
    """Share of validation pairs ordered as labelled, per model and timestep; ties and unreadable pairs left out.

    {model: {t: [accuracy, standard error, pairs, paired difference from the first model, its standard error]}}
    Every model sees the same inputs, so the paired error of a difference is smaller than two errors together.
    """
    size, whole = next(iter(models.values())).config.vision.image_size, whole_batch(config, processes)
    hits, counted = torch.zeros(len(REPORT_AT), len(models), len(index), device=pipe.device), torch.zeros(len(index), device=pipe.device)
    mine, chunk = processes.share(len(index)), whole or 2 * config.micro_batch
    for begin in range(0, len(mine), chunk):
        place = mine[begin:begin + chunk]
        n, part = len(place), fill_up([index[i] for i in place], whole)
        images, seen = stack_pictures(fill_up([readable(pairs, i) for i in part[:n]], whole), pipe.side(config.resolution))
        label = labels_of(part, images)
        counted[place] = ((label != 0.5) & seen.to(pipe.device)).float()[:n]
        cond, moments = encode_prompts(pipe, [pairs.captions[i] for i in part], config.resolution or None), encode_pairs(pipe, images)
        for row, t in enumerate(REPORT_AT):
            steps = torch.full((len(part),), t)
            pixels = predicted_pixels(pipe, moments, part, steps, cond, empty, config.guidance_scale, (config.seed, "report", t), size)
            for m, clip in enumerate(models.values()):
                scores = pair_scores(clip, pixels, steps, ids[part].to(pipe.device), torch.float32)
                hits[row, m, place] = ((scores[:, 0] > scores[:, 1]) == (label > 0.5)).float()[:n]
    processes.sum([hits, counted])
    hits, out = hits[:, :, counted > 0], {name: {} for name in models}
    n = max(hits.shape[-1], 1)
    for row, t in zip(hits, REPORT_AT):
        for name, right in zip(models, row):
            change, share = right - row[0], float(right.sum()) / n
            out[name][t] = [share, (share * (1 - share) / n) ** 0.5, right.numel(),
                            float(change.sum()) / n, float(change.square().sum() / n - (change.sum() / n) ** 2) ** 0.5 / n ** 0.5]
    return out


def print_table(table: dict[str, dict[int, list[float]]]) -> None:
    """The table of accuracies as text, and how far each model is from the first, pair by pair."""
    print(f"{'pair accuracy at t =':22}" + "".join(f"{t:>16}" for t in REPORT_AT))
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{row[t][0]:>9.3f} ± {row[t][1]:.3f}" for t in REPORT_AT))
    for name, row in list(table.items())[1:]:
        print(f"{'  ' + name + ', more':22}" + "".join(f"{row[t][3]:>+9.3f} ± {row[t][4]:.3f}" for t in REPORT_AT))


def report_fault(step: int, models: dict[str, CLIP], finite: list[torch.Tensor], pairs: list[tuple[str, int]], gradients: bool) -> None:
    """Say on stderr where a step that was not finite went wrong.

    `finite`: [2, N] per microbatch, are the pair's predicted pictures finite, and its losses; `pairs`: its caption and timestep.
    `gradients`: speak of them if nothing is wrong before.
    """
    drawn, judged = torch.cat(finite, 1).tolist() if finite else ([], [])
    if not all(judged):
        place = judged.index(False)
        caption, t = pairs[place]
        what = f"{'the judge' if drawn[place] else 'a predicted picture'} is not finite at t = {t}, caption {caption!r}"
    elif gradients:
        named = ((f"{key} ({name})", p.grad) for name, clip in models.items() for key, p in clip.named_parameters())
        names = (name for name, grad in named if not torch.isfinite(grad).all())
        what = f"the gradient of {next(names, 'all weights together')} is not finite"
    else:
        return
    warn(f"step {step}: {what}; optimizer step skipped")


def list_unreadable(known: dict[int, str], new: dict[int, str], run: Run) -> dict[int, str]:
    """{pair: why} so far and of this step -> both; the first ten are said on stderr, all stand in unreadable.txt."""
    both = known | new
    if run.processes.main:
        for place, i in enumerate(sorted(new.keys() - known.keys()), len(known)):
            if place < 10:
                warn(f"{new[i]}; the pair is skipped" + (" (further ones: see unreadable.txt)" if place == 9 else ""))
        write_atomic(run.folder / "unreadable.txt", lambda p: p.write_text("".join(f"{both[i]}\n" for i in sorted(both)), encoding="utf-8"))
    return both


def save_spm(clip: CLIP, folder: Path) -> None:
    """An SPM with the official files' names (prefix `model.`), and the configuration that theirs lack."""
    config = clip.config
    write_json(folder / "config.json", dict(text_config=dataclasses.asdict(config.text), projection_dim=config.projection_dim,
                                            vision_config=dataclasses.asdict(config.vision)))
    weights = {"model." + k: v.detach().cpu().contiguous() for k, v in clip.state_dict().items()}
    write_atomic(folder / "model.safetensors", lambda p: save_file(weights, p, metadata={"format": "pt"}))


def build_models(pickscore: CLIP, config: SPMConfig, processes: Processes) -> tuple[dict[str, CLIP], torch.optim.Optimizer]:
    """The SPM, equal to PickScore, its step-blind twin if wanted, and one AdamW for both, its state sharded over the processes."""
    torch.manual_seed(config.seed)
    models = {"SPM": make_step_aware(pickscore)}
    if config.step_blind:
        models["step-blind SPM"] = CLIP(pickscore.config).to(processes.device)
        models["step-blind SPM"].load_state_dict(pickscore.state_dict())
    old, named = set(pickscore.state_dict()), [item for clip in models.values() for item in clip.requires_grad_(True).named_parameters()]
    groups = [dict(params=[p for name, p in named if name in old]), dict(params=[p for name, p in named if name not in old])]
    kind = dict(lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
    return models, (ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **kind) if processes.world > 1
                    else torch.optim.AdamW(groups, **kind))


def compile_all(pipe: Pipeline, models: dict[str, CLIP]) -> None:
    """torch.compile for whatever the loop calls, each for one shape."""
    compile_blocks(pipe.unet)
    pipe.vae.to(memory_format=torch.channels_last)
    for module, *methods in ((pipe.vae, "moments", "decode"), *((clip, "image_features", "text_features") for clip in models.values())):
        for name in methods:
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))


def batches(pairs: Pairs, used: set[int], needed, config: SPMConfig, processes: Processes, begin: int):
    """Yield (step, its pairs, futures of this process's pictures); `needed(pair)` is called by threads, one step ahead.

    The pairs are the same on every process, of which each takes every world-th.
    """
    per_epoch, shuffled = max(1, len(used) // config.batch), {}

    def batch_of(step: int) -> list[int]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in shuffled:
            shuffled.clear()
            shuffled[epoch] = epoch_order(pairs, used, config.seed, epoch)
        return shuffled[epoch][place * config.batch:(place + 1) * config.batch]

    with ThreadPoolExecutor(4) as readers:
        def read(step: int) -> list[Future]:
            rows = batch_of(step) if step < config.steps else []
            return [readers.submit(needed, i) for i in rows[processes.rank::processes.world]]

        coming = read(begin)
        try:
            for step in range(begin, config.steps):
                here, coming = coming, read(step + 1)
                yield step, batch_of(step), here
        finally:
            readers.shutdown(cancel_futures=True)


@dataclass
class Gradients:
    """What one process found in its share of a step."""
    stats: torch.Tensor         # [2 M] loss and accuracy of each of the M models, shares of the whole batch
    finite: list[torch.Tensor]  # [2, N] per microbatch: are the pair's pictures finite, and its losses
    broken: dict[int, str]      # pair -> why its pictures cannot be read


def backward(pipe: Pipeline, models: dict[str, CLIP], pairs: Pairs, ids: torch.Tensor, labels_of, latents: torch.Tensor | None,
             empty: Conditioning | None, batch: list[int], timesteps: torch.Tensor, pictures: list[Future], config: SPMConfig,
             processes: Processes, step: int, clock: Clock) -> Gradients:
    """Eq. 3 on this process's share of `batch`, whose pair n is noised to `timesteps[n]`; gradients add up in the models."""
    mine, side = list(range(processes.rank, len(batch), processes.world)), pipe.side(config.resolution)
    size, dtype = next(iter(models.values())).config.vision.image_size, DTYPES[config.dtype]
    total_weight, out = float(pairs.weight[batch].sum()), Gradients(torch.zeros(2 * len(models), device=pipe.device), [], {})
    whole = whole_batch(config, processes)
    for start in range(0, len(mine), config.micro_batch):
        n = len(mine[start:start + config.micro_batch])
        rows = fill_up(mine[start:start + n], whole)                # of what follows only the first n count
        index, t = [batch[r] for r in rows], timesteps[rows]
        with clock("reading"):
            got = fill_up([p.result() for p in pictures[start:start + n]], whole)
            out.broken |= {i: g for i, g in zip(index, got) if isinstance(g, str)}
            images, seen = stack_pictures(got, side)
        with clock("encoding"):
            cond = encode_prompts(pipe, [pairs.captions[i] for i in index], side)
            moments = encode_pairs(pipe, images) if latents is None else cached_pairs(pipe, latents, index, images, seen, whole)
        with clock("predicting"):
            pixels = predicted_pixels(pipe, moments, index, t, cond, empty, config.guidance_scale, (config.seed, "noise", step), size)
        with clock("training"):
            target, w = labels_of(index[:n], images[:n]), upload((pairs.weight[index] * seen)[:n], pipe.device)
            drawn = judged = torch.isfinite(pixels[:2 * n]).reshape(n, -1).all(1)          # [n]
            for m, clip in enumerate(models.values()):
                scores = pair_scores(clip, pixels, t, upload(ids[index], pipe.device), dtype)[:n]
                each = preference_loss(scores[:, 0], scores[:, 1], target)                                    # Eq. 3
                loss = (each * w).sum() / total_weight
                loss.backward()
                judged = judged & torch.isfinite(each.detach())
                out.stats[2 * m] += loss.detach()
                out.stats[2 * m + 1] += ((scores[:, 0] > scores[:, 1]).float() == target).float().sum() / len(batch)
        out.finite.append(torch.stack([drawn, judged]))
    return out


def main() -> None:
    """Train as the command line says; continue if the run folder holds the same run."""
    config = parse_options(SPMConfig, PRESETS, description=__doc__)
    processes = start_processes(config.device or None)
    run = Run(config.out, config, processes, FREE)
    pipe = load_pipeline(config.model, DTYPES[config.dtype], processes.device, vae=config.vae or None,
                         prediction_type=config.prediction_type, tokenizer=config.tokenizer, zero_negative=NEGATIVE[config.negative])
    if processes.main:
        check_preset(config, pipe.is_sdxl)
    pickscore = load_clip(config.pickscore, torch.float32, processes.device)
    pipe.check_resolution(config.resolution)
    side = pipe.side(config.resolution)
    if config.pairs:
        pairs = load_pairs(config.pairs, side)
    elif config.preset == "tiny":
        pairs = world_pairs(config.count + config.validation, config.seed)
    else:
        raise InputError("--pairs: a folder with pairs.jsonl or Parquet files is needed (only tiny brings its own preferences)")
    length = pickscore.config.text.max_position_embeddings
    ids = torch.tensor(pipe.tokenizers[0](pairs.captions, padding="max_length", truncation=True, max_length=length).input_ids)

    @torch.no_grad()
    def labels_of(index: list[int], images: torch.Tensor) -> torch.Tensor:
        """[N] of these pairs, on the device: people's, or PickScore's opinion of the clean pictures."""
        if config.labels == "human":
            return upload(pairs.label[index], pipe.device)
        return relabel(pickscore, images, pickscore.text_features(upload(ids[index], pipe.device)))

    held, used = hold_out(pairs, config.validation, config.seed)
    models, optimizer = build_models(pickscore, config, processes)
    parameters = [p for clip in models.values() for p in clip.parameters()]
    if config.compile:
        compile_all(pipe, models)
    empty, begin, unreadable, recent, bad, skipped = encode_empty(pipe), 0, {}, [], 0, 0
    if state := run.resume(pairs=fingerprint(pairs.captions, [str(v) for v in pairs.label.tolist()]), pickscore=fingerprint(pickscore),
                           model=fingerprint(pipe.unet, pipe.vae, *pipe.text_encoders)):
        for clip, weights in zip(models.values(), state["models"], strict=True):
            clip.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        begin, unreadable, recent = state["step"], state.get("unreadable", {}), state.get("recent", [])
        bad, skipped = state.get("bad", 0), state.get("skipped", 0)
    if processes.main:
        print("\n".join(f"{name:18} {value}" for name, value in dataclasses.asdict(config).items()))
        print(f"{len(used)} training and {len(held)} validation pairs, {processes.world} x {pipe.device}, "
              f"starting at step {begin}", flush=True)
    latents = open_latents(run.folder, pipe, side, len(ids)) if config.cache_latents else None

    def needed(i: int) -> torch.Tensor | str | None:
        """Pair i's pictures as `readable` gives them, or None where its latents will do."""
        return None if latents is not None and config.labels == "human" and is_encoded(latents, i) else readable(pairs, i)

    took: list[float] = []
    progress = tqdm(total=config.steps, initial=begin, desc="spm", unit="step", disable=not processes.main)
    for step, batch, pictures in batches(pairs, used, needed, config, processes, begin):
        started, clock = time.perf_counter(), Clock(pipe.device)
        timesteps = torch.randint(0, 1000, (len(batch),), generator=generator(config.seed, "timestep", step))     # t ~ U{0..999}
        with profiled(run.folder, pipe.device, config.profile and processes.main and step == min(begin + 1, config.steps - 1)):
            found = backward(pipe, models, pairs, ids, labels_of, latents, empty, batch, timesteps, pictures, config, processes, step,
                             clock)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        stats, broken = found.stats, torch.tensor([float(len(found.broken))], device=pipe.device)
        processes.sum([p.grad for p in parameters] + [stats, broken])
        if broken.item():
            unreadable = list_unreadable(unreadable, processes.union(found.broken), run)
        norms = [float(torch.nn.utils.clip_grad_norm_(list(clip.parameters()), config.clip_norm)) for clip in models.values()]
        lr = learning_rate(step, config.lr, config.warmup) * ((1 - step / config.steps) if config.decay else 1)
        for group, factor in zip(optimizer.param_groups, (1.0, config.adaln_lr), strict=True):
            group["lr"] = lr * factor
        if sound := all(map(math.isfinite, norms + stats[::2].tolist())):
            optimizer.step()
            bad = 0
        else:
            bad, skipped = bad + 1, skipped + 1
            mine = [(pairs.captions[batch[r]], int(timesteps[r])) for r in range(processes.rank, len(batch), processes.world)]
            report_fault(step + 1, models, found.finite, mine, processes.main and bool(torch.isfinite(stats[::2]).all()))
        optimizer.zero_grad(set_to_none=True)
        done, seconds = step + 1, time.perf_counter() - started
        run.log(dict(step=done, epoch=step // max(1, len(used) // config.batch), loss=float(stats[0]) if sound else None,
                     accuracy=float(stats[1]), grad_norm=norms[0] if sound else None, lr=lr, skipped=skipped, unreadable=len(unreadable),
                     pairs_per_second=len(batch) / seconds, seconds={k: round(v, 3) for k, v in clock.seconds().items()},
                     eta_minutes=(config.steps - done) * seconds / 60))
        progress.set_postfix(loss=f"{float(stats[0]):.3f}", pairs_per_second=f"{len(batch) / seconds:.1f}", refresh=False)
        progress.update()
        took.append(seconds)
        if config.compile and processes.main:
            say_compiling(took, "step")
        seen_so_far = min(done * config.batch, len(used))
        spoilt = len(unreadable) > max(3, config.max_unreadable * seen_so_far)
        ending = processes.any(bool(processes.stop)) or bad >= TOO_MANY or spoilt
        recent.append(float(stats[1]))
        due = done % config.save_every == 0 and not bad or done == config.steps
        if due or ending:
            score, recent = (sum(recent) / len(recent), []) if due else (None, recent)
            if processes.world > 1:
                optimizer.consolidate_state_dict(to=0)
            if processes.main and run.is_best(score):
                save_spm(models["SPM"], run.folder / "best")
            run.save(done, dict(models=[{k: v.cpu() for k, v in clip.state_dict().items()} for clip in models.values()],
                                optimizer=optimizer.state_dict() if processes.main else None,
                                unreadable=unreadable, recent=recent, bad=bad, skipped=skipped), score)
        if spoilt:
            raise InputError(f"{len(unreadable)} of the {seen_so_far} pairs read so far have damaged pictures, listed in "
                             f"{run.folder / 'unreadable.txt'}; mend them, or allow more with --max_unreadable")
        if bad >= TOO_MANY:
            raise InputError(f"step {done}: {TOO_MANY} optimizer steps in a row were not finite; the last good SPM is in "
                             f"{run.folder}'s checkpoint (try --dtype fp32, another --vae, or a lower --lr)")
        if ending and done < config.steps:
            progress.close()
            processes.leave(done, config.steps, "steps")
    progress.close()
    for clip in models.values():
        clip.requires_grad_(False)
        for name in ("image_features", "text_features"):        # as PickScore's, which is not compiled
            vars(clip).pop(name, None)
    table = accuracy_table(pipe, {"PickScore": pickscore, **models}, pairs, labels_of, held, config, empty, ids, processes)
    if processes.main:
        for name, clip in models.items():
            save_spm(clip, run.folder / ("spm" if name == "SPM" else "spm_step_blind"))
        write_json(run.folder / "results.json", table)
        print_table(table)
        print(f"SPM in {run.folder / 'spm'}; use it with spo_train.py --spm {run.folder / 'spm'}")


if __name__ == "__main__":
    run_script(main)
