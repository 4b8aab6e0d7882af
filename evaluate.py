"""Generate, score and compare: one row per model, same prompts and seeds for all (paper, section 5).

    python evaluate.py --lora base= spo=runs/spo                                  # tiny, on its held-out prompts
    python evaluate.py --model sdxl --lora base= spo=spo.safetensors --prompts prompts.txt --metrics pickscore
    python evaluate.py --prompt "a red circle above a blue cross" --lora spo=runs/spo     # pictures only
    python evaluate.py --trace "two green squares" --lora spo=runs/spo                    # one SPO trajectory, drawn

The defaults are the paper's protocol (DDIM, 20 steps, guidance 5); it is written into every result.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import lora
from diffusion import DTYPES, NEGATIVE, SDXL_VAE, TINY, Pipeline, decode, generate, generate_latents, grid, load_clip, load_pipeline, to_pil
from metrics import Metric, load_metric
from training import Processes, opt, parse_options, read_prompts, run_script, start_processes, write_atomic, write_json
from weights import InputError, fetch, read_weights


@dataclass
class EvaluateConfig:
    """Every option."""
    model: str = opt("tiny", "tiny, sd15, sdxl, a folder or hub id in the diffusers layout, or a single-file checkpoint")
    lora: tuple[str, ...] = opt(("base=",), "candidates as name=LORA (file or run folder; nothing after = is the base model)")
    prompts: str = opt(str(TINY / "held_out_prompts.txt"), "prompts to draw: .txt, .json or .jsonl")
    metrics: tuple[str, ...] = opt(("pickscore",), "what to score by, see metrics.py")
    out: str = opt("runs/evaluate", "folder for images/, results.json, results.md, grid.png")
    images_per_prompt: int = opt(1, "pictures of each prompt")
    limit: int = opt(0, "only the first so many prompts; 0: all")
    seed: int = opt(0, "picture i of every model starts from seed + i")
    steps: int = opt(20, "DDIM steps (P: 20; 50 for GenEval)")
    guidance_scale: float = opt(5.0, "classifier-free guidance (P: 5)")
    eta: float = opt(0.0, "DDIM stochasticity; the paper does not say, 0 is diffusers' default")
    resolution: int = opt(0, "picture side in pixels; 0: the model's own")
    batch: int = opt(4, "pictures drawn and scored at a time")
    dtype: str = opt("bf16", "of the weights", tuple(DTYPES))
    device: str = opt("", "cpu or cuda; empty: a GPU if there is one")
    vae: str = opt("", "another VAE, folder or hub id; empty: the model's own")
    prediction_type: str = opt("", "single files: epsilon or v_prediction; empty: epsilon, or as the folder says",
                               ("", "epsilon", "v_prediction"))
    negative: str = opt("", "guidance's other side: zeros, or the empty prompt encoded; empty: as the model was trained",
                        ("", "zeros", "encoded"))
    tokenizer: str = opt("", "single files: folder or hub id with tokenizer/ (and tokenizer_2/); empty: the official one")
    prompt: str = opt("", "only draw this prompt with every candidate, no scores")
    trace: str = opt("", "only draw one SPO trajectory of this prompt with its candidates and scores")


PRESETS = {
    "tiny": dict(metrics=("aesthetics", "alignment", "pickscore"), guidance_scale=3.0, dtype="fp32", batch=64),
    "sd15": dict(prompts="prompts.txt"),
    "sdxl": dict(prompts="prompts.txt", vae=SDXL_VAE),
}


def candidates(config: EvaluateConfig) -> dict[str, str]:
    """Name -> LoRA file or "" for the base; a run folder stands for the LoRA in it."""
    out = {}
    for word in config.lora:
        name, equals, source = word.partition("=")
        if not equals or not name or "/" in name or name in out:
            raise InputError(f"--lora {word}: write name=FILE, each name once (base= for the model as it is)")
        if source:
            path = fetch(source, ["*.safetensors"])
            if path.is_dir():
                path = path / "pytorch_lora_weights.safetensors"
            source = str(path)
        out[name] = source
    return out


def wear(pipe: Pipeline, source: str) -> None:
    """Put a LoRA file on the UNet, or take off whatever is there."""
    if not source:
        return lora.remove(pipe.unet)
    try:
        lora.load(pipe.unet, read_weights(Path(source)), source)
    except ValueError as error:
        raise InputError(str(error)) from None


def load_images(paths: list[Path]) -> torch.Tensor:
    """PNG files of one size -> [N, 3, H, W] in [0, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(Image.open(p).convert("RGB")).copy()) for p in paths]).permute(0, 3, 1, 2) / 255


def draw_all(pipe: Pipeline, models: dict[str, str], prompts: list[str], config: EvaluateConfig, processes: Processes,
             folder: Path) -> None:
    """Draw this process's share of all pictures into folder/NAME/00000.png; what is there already is not drawn again."""
    for name, source in models.items():
        wear(pipe, source)
        (folder / name).mkdir(parents=True, exist_ok=True)
        todo = [i for i in processes.share(len(prompts)) if not (folder / name / f"{i:05d}.png").exists()]
        for begin in tqdm(range(0, len(todo), config.batch), desc=f"draw {name}", disable=not processes.main):
            part = todo[begin:begin + config.batch]
            latents = generate_latents(pipe, [prompts[i] for i in part], [config.seed + i for i in part], config.steps,
                                       config.guidance_scale, config.eta, config.resolution or None)
            images = (decode(pipe, latents, config.batch) / 2 + 0.5).clamp(0, 1)
            for i, image in zip(part, to_pil(images)):
                write_atomic(folder / name / f"{i:05d}.png", lambda p, image=image: image.save(p, format="PNG"))
    wear(pipe, "")


def score_all(metrics: list[Metric], models: dict[str, str], prompts: list[str], config: EvaluateConfig, processes: Processes,
              folder: Path) -> dict[str, dict[str, list[float]]]:
    """{model: {metric: one score per picture}}, on every process."""
    out = {}
    for name in models:
        scores = torch.zeros(len(metrics), len(prompts), dtype=torch.float64, device=processes.device)
        mine = processes.share(len(prompts))
        for begin in tqdm(range(0, len(mine), config.batch), desc=f"score {name}", disable=not processes.main):
            part = mine[begin:begin + config.batch]
            images = load_images([folder / name / f"{i:05d}.png" for i in part])
            for m, metric in enumerate(metrics):
                scores[m, part] = metric.score(images, [prompts[i] for i in part]).double().to(processes.device)
        processes.sum([scores])
        out[name] = {metric.name: row for metric, row in zip(metrics, scores.tolist())}
    return out


def compare(scores: list[float], first: list[float], resamples: int = 2000) -> dict:
    """Mean, standard error, and against the first row: paired difference and win rate (ties count half) with 95 % intervals.

    The interval of the win rate is a percentile bootstrap over pictures.
    """
    x, y = np.array(scores), np.array(first)
    n = len(x)
    wins = (x > y) + 0.5 * (x == y)
    rows = np.random.default_rng(0).integers(0, n, (resamples, n))
    low, high = np.percentile(wins[rows].mean(1), [2.5, 97.5])
    error = lambda v: float(v.std(ddof=1) / n ** 0.5) if n > 1 else float("nan")  # noqa: E731
    return dict(mean=float(x.mean()), standard_error=error(x), n=n, difference=float((x - y).mean()),
                difference_standard_error=error(x - y), win_rate=float(wins.mean()), win_rate_interval=[float(low), float(high)])


def table(results: dict[str, dict[str, dict]], metrics: list[Metric]) -> str:
    """Markdown: one row per model; win rates are against the first."""
    first = next(iter(results))
    lines = ["| model | " + " | ".join(f"{m.name} | win rate" for m in metrics) + " |", "|---" * (1 + 2 * len(metrics)) + "|"]
    for name, row in results.items():
        cells = []
        for m in metrics:
            r = row[m.name]
            low, high = r["win_rate_interval"]
            cells += [f"{r['mean']:.3f} ± {r['standard_error']:.3f}",
                      "" if name == first else f"{100 * r['win_rate']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_grid(folder: Path, models: dict[str, str], count: int, columns: int = 12) -> Image.Image:
    """A row per model, same prompt and seed below each other."""
    rows = [load_images([folder / name / f"{i:05d}.png" for i in range(min(columns, count))]) for name in models]
    return grid(torch.cat(rows), min(columns, count))


def main() -> None:
    """Draw, score and compare as the command line says."""
    config = parse_options(EvaluateConfig, PRESETS, description=__doc__)
    processes = start_processes(config.device or None)
    if not 1 <= config.steps <= 999:
        raise InputError(f"--steps {config.steps}: must lie in 1..999")
    models, folder = candidates(config), Path(config.out)
    pipe = load_pipeline(config.model, DTYPES[config.dtype], processes.device, vae=config.vae or None,
                         prediction_type=config.prediction_type, tokenizer=config.tokenizer, zero_negative=NEGATIVE[config.negative])
    if config.trace:
        return trace(pipe, models, config, folder)
    if config.prompt:
        for name, source in models.items():
            wear(pipe, source)
            image = generate(pipe, [config.prompt], [config.seed], steps=config.steps, guidance_scale=config.guidance_scale,
                             eta=config.eta, resolution=config.resolution or None)
            folder.mkdir(parents=True, exist_ok=True)
            to_pil(image)[0].save(folder / f"{name}.png")
            print(folder / f"{name}.png")
        return
    prompts = read_prompts(config.prompts)[:config.limit or None]
    protocol = dict(model=config.model, sampler=f"DDIM, eta {config.eta}", steps=config.steps, guidance_scale=config.guidance_scale,
                    resolution=config.resolution or pipe.latent_shape()[1] * pipe.vae.factor, dtype=config.dtype, seed=config.seed,
                    prompts=len(prompts), images_per_prompt=config.images_per_prompt,
                    prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(), vae=config.vae or "its own")
    prompts = [p for p in prompts for _ in range(config.images_per_prompt)]
    claim(folder, dict(protocol, lora={n: digest(s) for n, s in models.items()}), processes)
    draw_all(pipe, models, prompts, config, processes, folder / "images")
    processes.barrier()
    metrics = [load_metric(name, config.model, pipe.tokenizers[0], processes.device) for name in config.metrics]
    scores = score_all(metrics, models, prompts, config, processes, folder / "images")
    if not processes.main:
        return
    first = next(iter(models))
    results = {name: {m.name: compare(scores[name][m.name], scores[first][m.name]) for m in metrics} for name in models}
    write_json(folder / "results.json", dict(protocol=protocol, metrics={m.name: m.formula for m in metrics}, results=results,
                                             scores=scores))
    text = table(results, metrics) + "\n\n" + ", ".join(f"{k} {v}" for k, v in protocol.items()) + "\n"
    text += "".join(f"- {m.name}: {m.formula}\n" for m in metrics)
    write_atomic(folder / "results.md", lambda p: p.write_text(text))
    comparison_grid(folder / "images", models, len(prompts)).save(folder / "grid.png")
    print(text)
    print(f"pictures, results.json, results.md and grid.png in {folder}")


def digest(source: str) -> str:
    """What identifies a LoRA file: its SHA-256; "" for the base."""
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""


def claim(folder: Path, identity: dict, processes: Processes) -> None:
    """Make the folder this evaluation's; refuse one whose pictures another protocol or another LoRA has drawn."""
    path, problem = folder / "protocol.json", ""
    if processes.main:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            old = json.loads(path.read_text())
            for name, value in identity.pop("lora").items():        # more candidates may join later
                if old["lora"].setdefault(name, value) != value:
                    problem = f"{folder}: its pictures of {name!r} come from another LoRA file; choose another --out or name"
            identity["lora"] = old["lora"]
            changed = [k for k in identity if k != "lora" and identity[k] != old.get(k)]
            if changed:
                problem = f"{folder}: its pictures were drawn with another {', '.join(changed)}; choose another --out"
        if not problem:
            write_json(path, identity)
    if processes.any(bool(problem)):
        raise InputError(problem or f"{folder}: refused, see the first process's message")


def trace(pipe: Pipeline, models: dict[str, str], config: EvaluateConfig, folder: Path) -> None:
    """Draw one SPO trajectory per candidate with the settings that the model is trained with."""
    import spo_train
    settings = spo_train.SPOConfig(**(spo_train.PRESETS.get(config.model, {}) | dict(model=config.model)))
    judge = load_clip(spo_train.judge_source(settings), DTYPES[config.dtype], pipe.device)
    calls = spo_train.Models(pipe.unet, lambda z: decode(pipe, z), judge, judge.image_features)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in models.items():
        wear(pipe, source)
        spo_train.trace_prompt(pipe, calls, config.trace, settings, config.seed).save(folder / f"trace-{name}.png")
        print(folder / f"trace-{name}.png")


if __name__ == "__main__":
    run_script(main)
