"""Train the step-aware preference model (SPM): which of two noisy latents will look better? (paper, section 4.2)

    python spm_train.py                                                   # tiny: on the embedded world's preferences
    torchrun --nproc_per_node=4 spm_train.py --model sd15 --pairs FOLDER  # FOLDER/pairs.jsonl and its pictures

Both pictures of a pair are encoded and get the same noise at the same t; the frozen UNet predicts their clean latents;
these are decoded and shown to a CLIP that starts out equal to PickScore and also knows t. Eq. 3 gives the loss.
A step-blind twin (Table 5) can be trained on the very same inputs.

Shapes: N pairs, C H W latent, S x S pixels of the CLIP.
"""
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.optim import ZeroRedundancyOptimizer
from tqdm import tqdm

import ddim
from clip_spm import CLIP, make_step_aware, preference_loss, preprocess_decoded
from diffusion import (
    DTYPES,
    NEGATIVE,
    SDXL_VAE,
    TINY,
    Conditioning,
    Pipeline,
    decode,
    encode_empty,
    encode_prompts,
    guided_noise,
    load_clip,
    load_pipeline,
    negative,
)
from training import (
    Processes,
    Run,
    generator,
    learning_rate,
    opt,
    parse_options,
    permutation,
    run_script,
    start_processes,
    write_atomic,
    write_json,
)
from weights import InputError

REPORT_AT = (0, 251, 501, 701, 951)


@dataclass
class SPMConfig:
    """Every option of a run. Sources: P = the paper, O = the released official code, T = measured on the tiny model."""
    model: str = opt("tiny", "whose latents and noise: tiny, sd15, sdxl, a folder, hub id, or single-file checkpoint")
    out: str = opt("runs/spm", "run folder: model.safetensors, log.jsonl, config.json, results.json, checkpoints")
    pickscore: str = opt("yuvalkirstain/PickScore_v1", "the CLIP to start from (P: PickScore), folder or hub id")
    pairs: str = opt("", "folder with pairs.jsonl (caption, image_0, image_1, label_0, label_1); empty: the tiny world's own")
    labels: str = opt("human", "who says what is better (O: human for SD-1.5, pickscore for SDXL)", ("human", "pickscore"))
    seed: int = opt(0, "every random number of the run is keyed by it")
    device: str = opt("", "cpu or cuda; empty: a GPU if there is one")
    dtype: str = opt("bf16", "of the frozen UNet and VAE, and of the CLIP's arithmetic; its weights stay fp32", tuple(DTYPES))
    vae: str = opt("", "another VAE, folder or hub id; empty: the model's own")
    prediction_type: str = opt("", "single files: epsilon or v_prediction; empty: epsilon, or as the folder says",
                               ("", "epsilon", "v_prediction"))
    negative: str = opt("", "guidance's other side: zeros, or the empty prompt encoded; empty: as the model was trained",
                        ("", "zeros", "encoded"))
    tokenizer: str = opt("", "single files: folder or hub id with tokenizer/ (and tokenizer_2/); empty: the official one")
    resolution: int = opt(0, "picture side in pixels; 0: the model's own")
    guidance_scale: float = opt(5.0, "classifier-free guidance of the x0 prediction (O: 5)")
    lr: float = opt(3e-6, "AdamW learning rate (P: 3e-6 SD-1.5, 1e-6 SDXL)")
    decay: bool = opt(False, "let the learning rate fall linearly to zero (T)")
    warmup: int = opt(500, "steps of linear warm-up (O: 500)")
    weight_decay: float = opt(0.3, "AdamW weight decay (O: 0.3)")
    clip_norm: float = opt(1.0, "bound on the gradient norm")
    steps: int = opt(8000, "optimizer steps (O: 8000 SD-1.5, 7000 SDXL)")
    batch: int = opt(64, "global batch of pairs per optimizer step (O: 4 x 16)")
    micro_batch: int = opt(16, "pairs in one forward and backward of one process")
    count: int = opt(8000, "tiny: size of the training set of pairs")
    validation: int = opt(512, "pairs held back for the table of accuracies")
    step_blind: bool = opt(False, "also train a twin without the timestep, on the same inputs (P Table 5)")
    save_every: int = opt(500, "steps between checkpoints")


PRESETS = {
    "tiny": dict(pickscore=str(TINY / "pickscore"), dtype="fp32", guidance_scale=3.0, lr=1.5e-4, decay=True, warmup=20,
                 weight_decay=0.05, steps=1000, batch=32, micro_batch=32, step_blind=True, save_every=250, count=16_000, validation=2048),
    "sd15": dict(),
    "sdxl": dict(vae=SDXL_VAE, lr=1e-6, steps=7000, labels="pickscore", micro_batch=4),
}
FREE = ("out", "device", "micro_batch", "save_every")


@dataclass
class Dataset:
    """Preference pairs in memory as latents; `label` is 1, 0 or 0.5 (tie), `weight` 1 / pairs of the same prompt."""
    mean: torch.Tensor          # [N, 2, C, H, W] of the encoder's Gaussian, scaled
    std: torch.Tensor           # [N, 2, C, H, W]
    captions: list[str]
    label: torch.Tensor         # [N]
    weight: torch.Tensor        # [N]


@torch.no_grad()
def encode_dataset(pipe: Pipeline, images: torch.Tensor, captions: list[str], label: torch.Tensor, weight: torch.Tensor,
                   chunk: int = 64) -> Dataset:
    """Pictures uint8 [N, 2, 3, H, W] -> latents, encoded once since the data never change."""
    dtype, parts = pipe.vae.quant_conv.weight.dtype, []
    for part in images.flatten(0, 1).split(chunk):
        mean, std = pipe.vae.moments(part.to(pipe.device, dtype) / 127.5 - 1)
        parts.append((mean.float().cpu(), std.float().cpu()))
    mean, std = (torch.cat(p).unflatten(0, (-1, 2)) * pipe.vae.config.scaling_factor for p in zip(*parts))
    return Dataset(mean, std, captions, label, weight)


def load_pairs(config: SPMConfig, side: int) -> tuple[torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
    """Pictures uint8 [N, 2, 3, H, W], captions, label [N], weight [N]; from a folder's pairs.jsonl or the tiny world.

    A folder's pictures are cut to squares of `side` pixels. Raises InputError that names the file and the line.
    """
    if not config.pairs:
        if config.model != "tiny":
            raise InputError("--pairs: a folder with pairs.jsonl is needed (only tiny brings its own preferences)")
        from tiny.world import preference_pairs
        images, captions, label = preference_pairs(config.count + config.validation, seed=config.seed + 1000)
        return images, captions, label, torch.ones(len(captions))
    import json

    import numpy as np
    from PIL import Image
    folder = Path(config.pairs)
    try:
        lines = [line for line in (folder / "pairs.jsonl").read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'pairs.jsonl'}: cannot be read ({error})") from None
    for i, row in enumerate(rows):
        missing = [k for k in ("caption", "image_0", "image_1", "label_0") if not isinstance(row, dict) or k not in row]
        if missing:
            raise InputError(f"{folder / 'pairs.jsonl'}: line {i + 1} lacks {', '.join(missing)}")
    if not rows:
        raise InputError(f"{folder / 'pairs.jsonl'}: holds no pairs")

    def picture(name: str) -> torch.Tensor:
        try:
            image = Image.open(folder / name).convert("RGB")
        except OSError as error:
            raise InputError(f"{folder / name}: not a readable picture ({error})") from None
        scale = side / min(image.size)
        image = image.resize((max(side, round(image.width * scale)), max(side, round(image.height * scale))), Image.Resampling.LANCZOS)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return torch.from_numpy(np.asarray(image.crop((left, top, left + side, top + side))).copy()).permute(2, 0, 1)

    images = torch.stack([torch.stack([picture(row["image_0"]), picture(row["image_1"])]) for row in rows])
    counts = {}
    for row in rows:
        counts[row["caption"]] = counts.get(row["caption"], 0) + 1
    return (images, [row["caption"] for row in rows], torch.tensor([float(row["label_0"]) for row in rows]),
            torch.tensor([1 / row.get("num_example_per_prompt", counts[row["caption"]]) for row in rows]))


@torch.no_grad()
def relabel(clip: CLIP, data_images: torch.Tensor, text: torch.Tensor, threshold: float = 0.1) -> torch.Tensor:
    """PickScore's own opinion of clean pairs [N, 2, 3, H, W] uint8 -> 1, 0, or 0.5 if its softmax differs by at most 0.1."""
    size = clip.config.vision.image_size
    scores = []
    for pictures, words in zip(data_images.split(16), text.split(16)):
        pixels = preprocess_decoded(pictures.flatten(0, 1).to(text.device) / 127.5 - 1, size)
        scores.append(clip.score(clip.image_features(pixels), words.repeat_interleave(2, 0)).view(-1, 2))
    gap = torch.cat(scores).softmax(1) @ torch.tensor([1.0, -1.0], device=text.device)
    return torch.where(gap.abs() <= threshold, 0.5, (gap > 0).float()).cpu()


@torch.no_grad()
def predicted_pixels(pipe: Pipeline, data: Dataset, index: list[int], timestep: torch.Tensor, cond: Conditioning,
                     empty: Conditioning | None, guidance_scale: float, key: tuple, size: int) -> torch.Tensor:
    """What the SPM sees of N pairs at timesteps [N]: decoded x0 predictions -> CLIP pixels [2 N, 3, S, S].

    Both pictures of a pair get the same noise (section 4.2), keyed by the pair.
    """
    shape = data.mean.shape[2:]
    draws = [torch.randn(3, *shape, generator=generator(*key, i)) for i in index]
    draws = torch.stack(draws)                                                          # [N, 3, C, H, W]
    latents = (data.mean[index] + data.std[index] * draws[:, 1:]).flatten(0, 1).to(pipe.device)
    noise = draws[:, :1].expand(-1, 2, *shape).flatten(0, 1).to(pipe.device)
    t = timestep.to(pipe.device).repeat_interleave(2)
    x_t = ddim.add_noise(pipe.schedule, latents, noise, t)
    both = cond.map(lambda v: v.repeat_interleave(2, 0))
    noise_pred = guided_noise(pipe.unet, x_t, t, both, negative(pipe, both, empty), guidance_scale)
    x0 = ddim.predict_x0(pipe.schedule, x_t, noise_pred, t)
    return preprocess_decoded(decode(pipe, x0), size, clamp_first=True)


def pair_scores(clip: CLIP, pixels: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor,
                dtype: torch.dtype) -> torch.Tensor:
    """Scores [N, 2] of pairs whose pixels are [2 N, 3, S, S]."""
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype != torch.float32):
        images = clip.image_features(pixels, timestep.to(pixels.device).repeat_interleave(2))
        text = clip.text_features(ids).repeat_interleave(2, 0)
    return clip.score(images, text).view(-1, 2)


@torch.no_grad()
def accuracy_table(pipe: Pipeline, models: dict[str, CLIP], data: Dataset, index: list[int], config: SPMConfig,
                   empty: Conditioning | None, ids: torch.Tensor, processes: Processes) -> dict[str, dict[int, list[float]]]:
    """Share of validation pairs ordered as labelled, per model and timestep; ties left out.

    {model: {t: [accuracy, standard error, pairs, paired difference from the first model, its standard error]}}
    Every model sees the same inputs, so the paired error of a difference is smaller than two errors together.
    """
    index = [i for i in index if float(data.label[i]) != 0.5]
    out, n = {name: {} for name in models}, max(len(index), 1)
    size = next(iter(models.values())).config.vision.image_size
    for t in REPORT_AT:
        hits = torch.zeros(len(models), len(index), device=pipe.device)
        mine = processes.share(len(index))
        for begin in range(0, len(mine), 64):
            place = mine[begin:begin + 64]
            part, steps = [index[i] for i in place], torch.full((len(place),), t)
            cond = encode_prompts(pipe, [data.captions[i] for i in part], config.resolution or None)
            pixels = predicted_pixels(pipe, data, part, steps, cond, empty, config.guidance_scale, (config.seed, "report", t), size)
            for m, clip in enumerate(models.values()):
                scores = pair_scores(clip, pixels, steps, ids[part].to(pipe.device), torch.float32)
                hits[m, place] = ((scores[:, 0] > scores[:, 1]) == (data.label[part] > 0.5).to(pipe.device)).float()
        processes.sum([hits])
        for name, row in zip(models, hits):
            change, share = row - hits[0], float(row.mean())
            out[name][t] = [share, (share * (1 - share) / n) ** 0.5, len(index),
                            float(change.mean()), float(change.std(correction=0)) / n ** 0.5]
    return out


def print_table(table: dict[str, dict[int, list[float]]]) -> None:
    """The table of accuracies as text, and how far each model is from the first, pair by pair."""
    print(f"{'pair accuracy at t =':22}" + "".join(f"{t:>16}" for t in REPORT_AT))
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{row[t][0]:>9.3f} ± {row[t][1]:.3f}" for t in REPORT_AT))
    for name, row in list(table.items())[1:]:
        print(f"{'  ' + name + ', more':22}" + "".join(f"{row[t][3]:>+9.3f} ± {row[t][4]:.3f}" for t in REPORT_AT))


def save_spm(clip: CLIP, folder: Path) -> None:
    """An SPM with the official files' names (prefix `model.`), and the configuration that theirs lack."""
    folder.mkdir(parents=True, exist_ok=True)
    config = clip.config
    write_json(folder / "config.json", dict(text_config=dataclasses.asdict(config.text), projection_dim=config.projection_dim,
                                            vision_config=dataclasses.asdict(config.vision)))
    weights = {"model." + k: v.detach().cpu().contiguous() for k, v in clip.state_dict().items()}
    write_atomic(folder / "model.safetensors", lambda p: save_file(weights, p, metadata={"format": "pt"}))


def main() -> None:
    """Train as the command line says; continue if the run folder holds the same run."""
    config = parse_options(SPMConfig, PRESETS, description=__doc__)
    processes = start_processes(config.device or None)
    run = Run(config.out, dataclasses.asdict(config), processes, FREE)
    dtype = DTYPES[config.dtype]
    pipe = load_pipeline(config.model, dtype, processes.device, vae=config.vae or None, prediction_type=config.prediction_type,
                         tokenizer=config.tokenizer, zero_negative=NEGATIVE[config.negative])
    pickscore = load_clip(config.pickscore, torch.float32, processes.device)
    side = config.resolution or pipe.unet.config.sample_size * pipe.vae.factor
    images, captions, label, weight = load_pairs(config, side)
    length = pickscore.config.text.max_position_embeddings
    ids = torch.tensor(pipe.tokenizers[0](captions, padding="max_length", truncation=True, max_length=length).input_ids)
    if config.labels == "pickscore":
        with torch.no_grad():
            text = torch.cat([pickscore.text_features(part.to(processes.device)) for part in ids.split(64)])
        label = relabel(pickscore, images, text)
    data = encode_dataset(pipe, images, captions, label, weight)
    order = permutation(len(captions), config.seed, "validation")
    held, used = order[:min(config.validation, len(order) // 4)], order[min(config.validation, len(order) // 4):]

    torch.manual_seed(config.seed)
    models = {"SPM": make_step_aware(pickscore)}
    if config.step_blind:
        models["step-blind SPM"] = CLIP(pickscore.config).to(processes.device)
        models["step-blind SPM"].load_state_dict(pickscore.state_dict())
    parameters = [p for clip in models.values() for p in clip.requires_grad_(True).parameters()]
    kind = dict(lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
    optimizer = (ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **kind) if processes.world > 1
                 else torch.optim.AdamW(parameters, **kind))
    empty, begin = encode_empty(pipe), 0
    if state := run.resume():
        for clip, weights in zip(models.values(), state["models"], strict=True):
            clip.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    if processes.main:
        print("\n".join(f"{name:18} {value}" for name, value in dataclasses.asdict(config).items()))
        print(f"{len(used)} training and {len(held)} validation pairs, {processes.world} x {pipe.device}, "
              f"starting at step {begin}", flush=True)

    per_epoch = max(1, len(used) // config.batch)
    progress = tqdm(total=config.steps, initial=begin, desc="spm", unit="step", disable=not processes.main)
    for step in range(begin, config.steps):
        started = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        shuffled = permutation(len(used), config.seed, "order", epoch)
        batch = [used[i] for i in shuffled[place * config.batch:(place + 1) * config.batch]]
        timesteps = torch.randint(0, 1000, (len(batch),), generator=generator(config.seed, "timestep", step))     # t ~ U{0..999}
        mine, stats = list(range(processes.rank, len(batch), processes.world)), torch.zeros(2 * len(models), device=pipe.device)
        total_weight = float(data.weight[batch].sum())
        for start in range(0, len(mine), config.micro_batch):
            rows = mine[start:start + config.micro_batch]
            index, t = [batch[r] for r in rows], timesteps[rows]
            cond = encode_prompts(pipe, [captions[i] for i in index], side)
            pixels = predicted_pixels(pipe, data, index, t, cond, empty, config.guidance_scale, (config.seed, "noise", step),
                                      pickscore.config.vision.image_size)
            target, w = data.label[index].to(pipe.device), data.weight[index].to(pipe.device)
            for m, clip in enumerate(models.values()):
                scores = pair_scores(clip, pixels, t, ids[index].to(pipe.device), dtype)
                loss = (preference_loss(scores[:, 0], scores[:, 1], target) * w).sum() / total_weight             # Eq. 3
                loss.backward()
                stats[2 * m] += loss.detach()
                stats[2 * m + 1] += ((scores[:, 0] > scores[:, 1]).float() == target).float().sum() / len(batch)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        processes.sum([p.grad for p in parameters] + [stats])
        norms = [float(torch.nn.utils.clip_grad_norm_(list(clip.parameters()), config.clip_norm)) for clip in models.values()]
        lr = learning_rate(step, config.lr, config.warmup) * ((1 - step / config.steps) if config.decay else 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        run.log(dict(step=step + 1, epoch=epoch, loss=float(stats[0]), accuracy=float(stats[1]), grad_norm=norms[0], lr=lr,
                     pairs_per_second=len(batch) / seconds, eta_minutes=(config.steps - step - 1) * seconds / 60))
        progress.set_postfix(loss=f"{float(stats[0]):.3f}", refresh=False)
        progress.update()
        ending = processes.any(run.stop)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps or ending:
            if processes.world > 1:
                optimizer.consolidate_state_dict(to=0)
            run.save(step + 1, dict(models=[{k: v.cpu() for k, v in clip.state_dict().items()} for clip in models.values()],
                                    optimizer=optimizer.state_dict() if processes.main else None))
        if ending:
            return
    progress.close()
    for clip in models.values():
        clip.requires_grad_(False)
    table = accuracy_table(pipe, {"PickScore": pickscore, **models}, data, held, config, empty, ids, processes)
    if processes.main:
        for name, clip in models.items():
            save_spm(clip, run.folder / ("spm" if name == "SPM" else "spm_step_blind"))
        write_json(run.folder / "results.json", table)
        print_table(table)
        print(f"SPM in {run.folder / 'spm'}; use it with spo_train.py --spm {run.folder / 'spm'}")


if __name__ == "__main__":
    run_script(main)
