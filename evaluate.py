"""Generate, score and compare: a row per model, same prompts and seeds (paper, section 5).

    python evaluate.py --lora base= spo=runs/spo                    # tiny, on its held-out prompts
    python evaluate.py --model sdxl --lora base= half=spo.safetensors@0.5 spo=spo.safetensors \\
        --prompts prompts.txt --metrics pickscore
    python evaluate.py --model sdxl --lora base= dpo=mhdang/dpo-sdxl-text2image-v1 spo=FILE \\
        --prompts pickapic --metrics pickscore hpsv2
    python evaluate.py --images FOLDER --prompts parti      # FOLDER/NAME/*.png made elsewhere
    python evaluate.py --model sdxl --prompts geneval=evaluation_metadata.jsonl \\
        --images_per_prompt 4 --steps 50 --metrics geneval
    python evaluate.py --prompt "a red circle" --lora spo=runs/spo  # pictures only
    python evaluate.py --lora base= spo=runs/spo --curves spo=runs/spo  # and curves
    python evaluate.py --lora base= spo=runs/spo --study study.html # and a page for raters
    python evaluate.py --model sdxl --lora base= spo=FILE --study study.html \\
        --prompts parti:100 hpsv2:200                               # the paper's Figure 6
    python evaluate.py --tally votes-*.json                         # what they said
    python evaluate.py --trace "two squares" --lora spo=runs/spo    # one SPO trajectory, drawn

The defaults are the paper's protocol (DDIM, 20 steps, guidance 5); it is written into every result.
Another model, protocol or list of prompts needs another --out.
"""
import needs  # noqa: F401
import datetime
import hashlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import Z_RLE

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import geneval
import lora
import spo_train
from clip_spm import upright
from diffusion import (
    decode,
    encode_empty,
    encode_prompts,
    generate,
    generate_latents,
    grid,
    judge_features,
    negative,
    to_pil,
)
from finetune import ModelConfig, load_model
from loading import (
    DTYPES,
    SDXL_VAE,
    TINY,
    Pipeline,
    build,
    check_schedule,
    clip_file,
    first_tokenizer,
    judge_source,
    option,
)
from metrics import WITH_TOKENIZER, Metric, find_metric, load_metric, metric_sources, rgb
from observers import Trace
from prompt_sets import PromptSet, checked_prompt, drawn, join_sets
from report import draw_trace, read_logs, shown, summary, write_report
from study import tally, write_study
from training import (
    Processes,
    fingerprint,
    generator,
    lock,
    opt,
    parse_options,
    run_script,
    sha256,
    start_processes,
    write_atomic,
    write_json,
    write_text,
    writing,
)
from unet import UNet
from weights import (
    InputError,
    clean,
    fetch,
    load_strict,
    preset_of,
    read_json,
    read_weights,
    weight_file,
)


@dataclass
class EvaluateConfig(ModelConfig):
    """Every option, beside the model's."""
    model: str = opt("", "tiny, tiny-flow, sd15, sdxl, a folder or hub id in the diffusers layout, "
                         "or a single-file checkpoint; empty: tiny, or with --images no model, the "
                         "official PickScore and CLIP tokenizer")
    lora: tuple[str, ...] = opt(("base=",), "candidates as name=SOURCE: a LoRA (file, or folder "
                                            "of a run or peft adapter; SOURCE@0.7 for its "
                                            "strength), a whole UNet (file, folder or hub id), or "
                                            "nothing for the base model")
    images: str = opt("", "score pictures made elsewhere, FOLDER/NAME/*.png in the order of the "
                          "prompts, instead of drawing")
    prompts: tuple[str, ...] = opt((), "one or several of pickapic, hpsv2, parti, geneval=FILE, or "
                                       "a file: .txt, .json, .jsonl, .csv, .tsv, .parquet; with :N "
                                       "behind it N of that, drawn by the seed")
    metrics: tuple[str, ...] = opt(("pickscore",),
                                   "what to score by: name or name=SOURCE, see metrics.py")
    out: str = opt("runs/evaluate",
                   "folder for images/, results.json, results.md, grid.png, report.html")
    images_per_prompt: int = opt(1, "pictures of each prompt", least=1)
    export_geneval: str = opt("", "also lay the pictures out in this folder as GenEval's own "
                                  "scorer wants them, NAME/00000/samples/")
    curves: tuple[str, ...] = opt((), "name=RUNFOLDER of training runs whose learning curves "
                                      "the report shows", old="logs")
    report_rows: int = opt(200, "pictures of each model in the report, evenly spaced in the list",
                           least=0)
    study: str = opt("", "also write a page for a human study here: the first two candidates "
                         "side by side, blind")
    study_pairs: int = opt(300, "pairs of pictures in it, drawn by the seed (P: 300); 0: all",
                           least=0)
    tally: tuple[str, ...] = opt((), "only add up the votes that study pages exported, votes*.json")
    limit: int = opt(0, "only the first so many prompts of each set; 0: all", least=0)
    seed: int = opt(0, "picture i of every model starts from seed + i", least=0)
    steps: int = opt(20, "DDIM steps (P: 20; 50 for GenEval)", least=1, most=999)
    guidance_scale: float = opt(5.0, "classifier-free guidance (P: 5)")
    eta: float = opt(0.0, "DDIM stochasticity; the paper does not say, 0 is diffusers' default",
                     least=0, most=1)
    batch: int = opt(4, "pictures drawn and scored at a time", least=1)
    dtype: str = opt("bf16", "of the weights", tuple(DTYPES))
    prompt: str = opt("", "only draw this prompt with every candidate, no scores")
    trace: str = opt("", "only draw one SPO trajectory of this prompt with its candidates and "
                         "scores")
    spm: str = opt("", "who judges it: folder, file or hub id; empty: the model's own for tiny, "
                       "sd15 and sdxl")


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")           # of pictures made elsewhere
PRESETS = {
    "tiny": dict(metrics=("aesthetics", "alignment", "pickscore"), guidance_scale=3.0, dtype="fp32",
                 batch=64, prompts=(str(TINY / "held_out_prompts.txt"),)),
    "sdxl": dict(vae=SDXL_VAE),
}
PRESETS["tiny-flow"] = PRESETS["tiny"] | dict(guidance_scale=2.0)
TILE = 512              # most pixels a side of a picture in grid.png


# The candidates

def candidates(config: EvaluateConfig) -> dict[str, str]:
    """Name -> weight file, or "" for the base; a LoRA's strength stays behind it, FILE@0.7."""
    out = {}
    for word in config.lora:
        name, equals, source = word.partition("=")
        if (not equals or not name or "/" in name or name.startswith(".") or name in out
                or len(os.fsencode(name)) > 100):
            raise InputError(f"--lora {word}: write name=FILE, each name once and of at most 100 "
                             "letters (base= for the model as it is)")
        file, _ = strength(source)
        with option("lora"):
            out[name] = str(candidate_file(file)) + source.removeprefix(file) if source else ""
    return out


def strength(source: str) -> tuple[str, float]:
    """FILE@0.7 -> FILE, 0.7; a source without strength, or whose own name has the @, -> it, 1."""
    match = re.fullmatch(r"(.+)@(-?\d*\.?\d+)", source)
    return (match[1], float(match[2])) if match and not os.path.exists(source) else (source, 1.0)


def candidate_file(source: str) -> Path:
    """A weight file as it is; a folder or hub id stands for the UNet or the LoRA in it."""
    path = fetch(source, ["unet/*.safetensors*", "diffusion_pytorch_model*.safetensors*",
                          "pytorch_lora_weights.safetensors", "unet/adapter_config.json",
                          "scheduler/*"])
    if (path / "unet").is_dir() and not (path / "unet/adapter_config.json").is_file():
        return weight_file(path / "unet")
    if any(path.glob("diffusion_pytorch_model*")):
        return weight_file(path)
    return path if path.is_file() else lora.file_in(source, path)


def wear(pipe: Pipeline, source: str) -> None:
    """Give the pipeline a candidate: its own UNet (""), that with a LoRA file, or another UNet."""
    pipe.unet = vars(pipe).setdefault("own_unet", pipe.unet)
    lora.remove(pipe.unet)
    file, scale = strength(source)
    weights = read_weights(Path(file)) if file else {}
    if "conv_in.weight" in weights:
        if scale != 1:
            raise InputError(f"{source}: a whole UNet, which has no strength; leave out the @")
        for folder in Path(file).absolute().parents[:2]:     # the hub's cache is of links
            check_schedule(folder, pipe)
        own = next(pipe.unet.parameters())
        unet = build(UNet, pipe.unet.config, Path(file))
        pipe.unet = load_strict(unet, clean(weights), source, own.dtype, own.device)
    elif source:
        try:
            lora.load(pipe.unet, weights, file, scale)
        except ValueError as error:
            raise InputError(str(error)) from None


# The pictures

def load_images(paths: list[Path], most: int = TILE) -> torch.Tensor:
    """Picture files -> [N, 3, H, W] in [0, 1], all of the first one's H, W, at most `most`.

    EXIF turns them, for whoever looks, but not what is scored, as in the metrics' own code.
    """
    first = upright(open_image(paths[0]))
    first.thumbnail((most, most))
    return torch.cat([rgb(upright(open_image(p)).convert("RGB").resize(first.size))
                      for p in paths]) / 255


def find_images(folder: str, count: int) -> dict[str, list[Path]]:
    """FOLDER/NAME/* -> {NAME: its pictures by file name, numbers as numbers}.

    The base comes first. Raises InputError unless there are `count` pictures of every name.
    """
    def place(path: Path) -> list[str | int]:
        return [int(part) if i % 2 else part
                for i, part in enumerate(re.split(r"(\d+)", path.name))]

    homes = sorted(Path(folder).glob("*/"), key=lambda p: (p.name != "base", p.name))
    files = {home.name: sorted((p for p in home.iterdir()
                                if p.suffix.lower() in SUFFIXES and p.is_file()), key=place)
             for home in homes}
    wrong = [f"{name} holds {len(paths)}" for name, paths in files.items() if len(paths) != count]
    if wrong or not files:
        raise InputError(f"--images {folder}: {[*wrong, 'holds no folder of'][0]} pictures, "
                         f"the prompts ask for {count} (--images_per_prompt, --limit)")
    return files


def undrawn(models: dict[str, str], count: int, processes: Processes,
            folder: Path) -> dict[str, list[int]]:
    """{model: indices of its `count` pictures that are not in folder/NAME yet}.

    The main process looks before anybody draws, so that all deal out one list.
    """
    return processes.union({
        name: [i for i in range(count) if not (folder / name / f"{i:05d}.png").exists()]
        for name in models} if processes.main else {})


def try_on(pipe: Pipeline, models: dict[str, str]) -> None:
    """Wear every candidate once: a fault of a file is told before hours of drawing, not after."""
    for source in [*models.values(), ""]:
        wear(pipe, source)


def rehearse(words: tuple[str, ...], load, prompt: str, side: int) -> None:
    """Let every metric, `load(word)`, score a blank picture, for the same reason."""
    for word in words:
        load(word).score([Image.new("RGB", (side, side))], [prompt])


def refuse_damaged(images: torch.Tensor, name: str, prompts: list[str]) -> None:
    """InputError for the first of the pictures [N, 3, H, W] that holds NaN or infinity."""
    sound = images.isfinite().flatten(1).all(1).tolist()
    if not all(sound):
        raise InputError(f"{name}: draws NaN for the prompt {prompts[sound.index(False)]!r}; "
                         "--dtype bf16 or fp32 instead of fp16, another --vae, or the weights of "
                         "the candidate are damaged")


def draw_all(pipe: Pipeline, models: dict[str, str], prompts: list[str], config: EvaluateConfig,
             processes: Processes, folder: Path, todo: dict[str, list[int]]) -> None:
    """Draw this process's share of `todo` {model: prompts' indices} into folder/NAME/00000.png."""
    for name, source in models.items():
        mine = [todo[name][i] for i in processes.share(len(todo[name]))]
        if mine:
            wear(pipe, source)
        for begin in tqdm(range(0, len(mine), config.batch), f"draw {name}",
                          disable=not processes.main):
            part = mine[begin:begin + config.batch]
            words = [prompts[i] for i in part]
            latents = generate_latents(pipe, words, [config.seed + i for i in part], config.steps,
                                       config.guidance_scale, config.eta, config.resolution or None)
            images = decode(pipe, latents) / 2 + 0.5
            refuse_damaged(images, name, words)
            with ThreadPoolExecutor(16) as writers:         # each waits for the disk
                files = [folder / name / f"{i:05d}.png" for i in part]
                list(writers.map(save_png, files, to_pil(images.clamp(0, 1))))
    wear(pipe, "")


def save_png(path: Path, image: Image.Image) -> None:
    """Write a picture whole or not at all, as small as usual in half the time."""
    write_atomic(path, lambda p: image.save(p, format="PNG", compress_type=Z_RLE))


# The scores

def score_model(metric: Metric, name: str, paths: list[Path], pictures: str, prompts: list[str],
                batch: int, processes: Processes, folder: Path) -> list[float]:
    """One score per picture of a model, on every process; `pictures`: their digest.

    Kept in folder/MODEL.METRIC.json while pictures, prompts and weights last. Until all are there,
    each process keeps its own after every batch in a .part file beside it (None where it has none);
    the next start, with however many processes, goes on from all of them.
    """
    stem, count = f"{name}.{metric.name}", len(prompts)
    identity = dict(formula=metric.formula, weights=metric.weights, pictures=pictures,
                    prompts=hashlib.sha256("\n".join(prompts).encode()).hexdigest())
    # What is kept: all is in the main process's part before another overwrites its own.
    earlier = [read_json(path) for path in score_files(folder, stem)] if processes.main else []
    own = {i: score for old in earlier if old.get("identity") == identity
           for i, score in enumerate(old["scores"]) if score is not None}
    if own:
        write_scores(folder / f"{stem}.part0.json", identity, own, count)
    kept = processes.union(own)
    # What is left to do.
    todo = [i for i in range(count) if i not in kept]
    mine = [todo[i] for i in processes.share(len(todo))]
    # Score it.
    for begin in tqdm(range(0, len(mine), batch), f"{metric.name} {name}",
                      disable=not processes.main):
        part = mine[begin:begin + batch]
        scores = metric.score([open_image(paths[i]) for i in part], [prompts[i] for i in part])
        for i, score in zip(part, scores.double().tolist()):
            if not np.isfinite(score):
                raise InputError(f"{metric.name}: {score} for {paths[i]} of {name}, "
                                 f"prompt {prompts[i]!r}; the metric's weights or the picture "
                                 "are damaged")
            own[i] = score
        write_scores(folder / f"{stem}.part{processes.rank}.json", identity, own, count)
    # Put it together.
    whole = processes.union(own)
    if processes.main:
        write_scores(folder / f"{stem}.json", identity, whole, count)
        for path in set(score_files(folder, stem)) - {folder / f"{stem}.json"}:
            path.unlink()
    return [whole[i] for i in range(count)]


def score_files(folder: Path, stem: str) -> list[Path]:
    """The files that a model's scores are in, whole or in parts."""
    return [p for p in folder.glob("*")
            if re.fullmatch(re.escape(stem) + r"(\.part\d+)?\.json", p.name)]


def write_scores(path: Path, identity: dict, scores: dict[int, float], count: int) -> None:
    """{picture: score} as a list of all `count`, None where there is none yet."""
    write_json(path, dict(identity=identity, scores=[scores.get(i) for i in range(count)]))


def open_image(path: Path) -> Image.Image:
    """A picture file, read; InputError if it is none."""
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:          # PIL's many decoders raise what they like
        raise InputError(f"{path}: not a readable picture "
                         f"({(str(error) or type(error).__name__).splitlines()[0]})") from None
    return image


def compare(scores: list[float], first: list[float], resamples: int = 2000, each: int = 1,
            groups: list[str] | None = None) -> dict:
    """Mean, standard error, and against the first row: paired difference and win rate.

    Ties count half; intervals are of 95 %. Pictures of one prompt (`each` of them in a row) are not
    independent: errors are over prompts' means, and the interval of the win rate is a percentile
    bootstrap over prompts. With `groups`, one for each prompt, everything is the unweighted mean
    over groups (GenEval's tags). What a single prompt cannot tell is None.
    """
    x, y = (np.array(v, dtype=np.float64).reshape(-1, each) for v in (scores, first))
    labels = np.array(groups or [""] * len(x))
    parts = [np.flatnonzero(labels == g) for g in dict.fromkeys(labels.tolist())]
    alone = min(map(len, parts)) < 2

    def mean(v: np.ndarray) -> float:
        return float(np.mean([v[p].mean() for p in parts]))

    def error(v: np.ndarray) -> float | None:
        return None if alone else float(
            sum(v[p].mean(1).var(ddof=1) / len(p) for p in parts) ** 0.5 / len(parts))

    wins = (x > y) + 0.5 * (x == y)
    random = np.random.default_rng(0)
    drawn = sum(wins[p].mean(1)[random.integers(0, len(p), (resamples, len(p)))].mean(1)
                for p in parts) / len(parts)
    return dict(mean=mean(x), standard_error=error(x), n=x.size, prompts=len(x),
                difference=mean(x - y), difference_standard_error=error(x - y), win_rate=mean(wins),
                win_rate_interval=None if alone else np.percentile(drawn, [2.5, 97.5]).tolist())


# The tables

def table(results: dict[str, dict[str, dict]], metrics: list[str]) -> str:
    """Markdown: one row per model; win rates are against the first.

    One prompt leaves errors and intervals blank.
    """
    lines = ["| model | " + " | ".join(f"{m} | win rate" for m in metrics) + " |",
             "|---" * (1 + 2 * len(metrics)) + "|"]
    for name, row in results.items():
        cells = [name]
        for m in metrics:
            mean = shown(m, row[m]["mean"])
            win = f"{100 * row[m]['win_rate']:.1f} %"
            if row[m]["standard_error"] is not None:
                mean += f" ± {shown(m, row[m]['standard_error'])}"
                win += " ({:.1f} to {:.1f})".format(*(100 * v for v in row[m]["win_rate_interval"]))
            cells += [mean, "" if name == next(iter(results)) else win]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def group_means(scores: list[float], groups: list[str]) -> dict[str, float]:
    """Mean score of each group, and `mean`, their unweighted mean, as GenEval and HPSv2 have it."""
    means = {g: float(np.mean([s for s, h in zip(scores, groups) if h == g]))
             for g in dict.fromkeys(groups)}
    return means | dict(mean=float(np.mean(list(means.values()))))


def group_tables(by_group: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown of {model: {metric: group_means}}: a table per metric, a row per model."""
    lines = []
    for name, columns in next(iter(by_group.values())).items():
        lines += [f"\n| {name} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
        cells = {model: " | ".join(shown(name, row[name][c]) for c in columns)
                 for model, row in by_group.items()}
        lines += [f"| {model} | {row} |" for model, row in cells.items()]
    return "\n".join(lines) + "\n"


def digest(paths: list[Path]) -> str:
    """SHA-256 over those of the files that there are."""
    found = [bytes.fromhex(sha256(path)) for path in paths if path.is_file()]
    return hashlib.sha256(b"".join(found)).hexdigest()


def worn_by(source: str) -> str:
    """By what a candidate's pictures are known: its files' contents, and its strength.

    Its files: the weights, shards if they are an index, peft's configuration.
    """
    file, scale = strength(source)
    shards = read_json(file)["weight_map"].values() if file.endswith(".json") else []
    names = (Path(file).name, *sorted(set(shards)), "adapter_config.json") if file else ()
    return digest([Path(file).parent / n for n in names]) + (f"@{scale}" if scale != 1 else "")


def claim(folder: Path, identity: dict, processes: Processes) -> None:
    """Make the folder this evaluation's; refuse one whose pictures something else has drawn."""
    path = folder / "protocol.json"
    with processes.agreed():
        if processes.main:
            # As long as nothing was drawn, a command may be corrected.
            old = read_json(path) if os.path.exists(path) and any(folder.glob("*/")) else identity
            if not isinstance(worn := old.get("lora"), dict):
                raise InputError(f"{path}: not the protocol of an evaluation; choose another --out")
            changed = [k for k in identity if k != "lora" and identity[k] != old.get(k)]
            other = [n for n, value in identity["lora"].items() if worn.get(n, value) != value]
            if changed:
                raise InputError(f"{folder}: its pictures were drawn with another "
                                 f"{', '.join(changed)}; choose another --out")
            if other:
                raise InputError(f"{folder}: its pictures of {other[-1]!r} come from another LoRA "
                                 "file or UNet; choose another --out or name")
            write_json(path, identity | dict(lora=worn | identity["lora"]))     # all so far


# What is only drawn

def draw_prompt(pipe: Pipeline, models: dict[str, str], config: EvaluateConfig,
                folder: Path) -> None:
    """Draw --prompt with every candidate into folder/NAME.png.

    Where there are earlier pictures, all are called NAME-2.png, or -3 and so on.
    """
    number, tail = 1, ""
    while any((folder / f"{name}{tail}.png").exists() for name in models):
        number += 1
        tail = f"-{number}"
    for name, source in models.items():
        wear(pipe, source)
        image = generate(pipe, [config.prompt], [config.seed], steps=config.steps,
                         guidance_scale=config.guidance_scale, eta=config.eta,
                         resolution=config.resolution or None)
        refuse_damaged(image, name, [config.prompt])
        save_png(folder / f"{name}{tail}.png", to_pil(image)[0])
        print(folder / f"{name}{tail}.png")


def trace_prompt(pipe: Pipeline, judge, prompt: str, config, seed: int = 0) -> list[dict]:
    """Sample a trajectory of `prompt` as SPO (an SPOConfig) does -> its pools, for draw_trace."""
    cond = encode_prompts(pipe, [prompt], config.resolution or None)
    batch = spo_train.Batch(
        cond, negative(pipe, cond, encode_empty(pipe)), judge_features(pipe, judge.clip, [prompt]),
        [generator(seed, "trace", prompt)])
    judge = replace(judge)                      # whose pictures the trace looks at
    trace = Trace(judge)
    spo_train.sample_pools(pipe, judge, batch, config, [trace])
    return trace.rows


def draw_trajectories(pipe: Pipeline, models: dict[str, str], config: EvaluateConfig,
                      folder: Path) -> None:
    """Draw one SPO trajectory per candidate with the settings that the model is trained with."""
    preset = preset_of(config.model)
    settings = spo_train.SPOConfig(**(spo_train.PRESETS[preset] | dict(
        model=config.model, preset=preset, spm=config.spm, dtype=config.dtype)))
    judge = spo_train.load_judge(settings, pipe)
    for name, source in models.items():
        wear(pipe, source)
        pools = trace_prompt(pipe, judge, config.trace, settings, config.seed)
        width = max(96, min(256, pipe.side(config.resolution)))
        save_png(folder / f"trace-{name}.png", draw_trace(pools, width))
        print(folder / f"trace-{name}.png")


# All together

def check(config: EvaluateConfig, sources: dict) -> None:
    """Refuse what contradicts itself before anything is loaded; `sources` are the metrics'."""
    checked_prompt(config.prompt, "--prompt")
    checked_prompt(config.trace, "--trace")
    if len(sources) not in (0, len(config.metrics)):
        raise InputError(f"--metrics {' '.join(config.metrics)}: each metric once")
    if config.images and (config.trace or config.prompt):
        raise InputError(f"--images {config.images}: pictures made elsewhere are only scored; "
                         "leave out --trace and --prompt, or --images")
    if config.study and len(config.lora) < 2 and not config.images:
        raise InputError(f"--study {config.study}: compares two candidates; "
                         "give a second one, --lora base= spo=FILE")


def find_all(config: EvaluateConfig, sources: dict) -> tuple[PromptSet | None, dict, dict]:
    """(prompts, candidates, pictures made elsewhere): all that is named, before anything is loaded.

    Loading takes a minute, and a mistake can be told at once. Without metrics (`sources` as check
    has them) only --prompt or --trace is drawn.
    """
    if config.trace:
        with option("spm"):
            clip_file(config.spm or judge_source(config.model, "", "spm"))
    if not sources:
        return None, candidates(config), {}
    if not config.prompts:
        raise InputError("--prompts: name pickapic, hpsv2, parti, geneval=FILE, or a file "
                         "(only tiny brings its own)")
    with option("prompts"):
        chosen = join_sets(config.prompts, config.limit, config.seed)
    alone = chosen.rows and len(config.prompts) == 1
    if not alone and ("geneval" in sources or config.export_geneval):
        raise InputError("geneval: wants its own prompts alone, "
                         "--prompts geneval=evaluation_metadata.jsonl")
    if config.images:
        return chosen, {}, find_images(config.images,
                                       len(chosen.prompts) * config.images_per_prompt)
    return chosen, candidates(config), {}


def lone_tokenizer(config: EvaluateConfig, sources: dict):
    """What reads the prompts of pictures made elsewhere; None if no metric needs it."""
    needy = [name for name in sources if name in WITH_TOKENIZER
             and not (name.startswith("hpsv2") and sources[name][1])]
    if not needy:
        return None
    with option(f"metrics {needy[0]}: reads prompts by the tokenizer of --model or "
                "--tokenizer FOLDER, else the official one;"):
        return first_tokenizer(config.model, config.tokenizer)


def describe(config: EvaluateConfig, chosen: PromptSet, pipe: Pipeline | None) -> dict:
    """The protocol, as every result states it; without a pipeline, of pictures made elsewhere."""
    made = dict(images=config.images)
    if pipe:
        made = dict(model=config.model, sampler=f"DDIM, eta {config.eta}", steps=config.steps,
                    guidance_scale=config.guidance_scale, resolution=pipe.side(config.resolution),
                    dtype=config.dtype, seed=config.seed,
                    negative="zeros" if pipe.zero_negative else "encoded",
                    prediction_type=pipe.schedule.prediction_type,
                    tokenizer=config.tokenizer or "its own", vae=config.vae or "its own")
    if [*config.prompts] != [drawn(word)[0] for word in config.prompts[:1]]:
        made["prompt_sets"] = f"{', '.join(config.prompts)} (:N drawn by seed {config.seed})"
    return made | dict(prompts=len(chosen.prompts), images_per_prompt=config.images_per_prompt,
                        prompts_sha256=hashlib.sha256(
                            "\n".join(chosen.prompts).encode()).hexdigest())


def write_results(config: EvaluateConfig, protocol: dict, chosen: PromptSet,
                  formulas: dict[str, str], files: dict[str, list[Path]],
                  scores: dict[str, dict[str, list[float]]], logs: dict[str, list[dict]]) -> None:
    """Compare with the first model and print the table.

    Leaves results.json, results.md, grid.png, report.html, and the study page if one is asked for.
    """
    folder, each = Path(config.out), config.images_per_prompt
    prompts, groups = ([x for x in part for _ in range(each)]
                       for part in (chosen.prompts, chosen.groups))
    first = scores[next(iter(files))]
    results = {name: {m: compare(row[m], first[m], each=each,
                                 groups=chosen.groups if m == "geneval" else None)
                      for m in formulas} for name, row in scores.items()}
    by_group = {name: {m: group_means(row[m], groups) for m in formulas}
                for name, row in scores.items()} if groups else {}
    found = dict(protocol=protocol, metrics=formulas, results=results, groups=by_group,
                 scores=scores)
    write_json(folder / "results.json", found)
    text = "\n".join([
        table(results, list(formulas)), group_tables(by_group) if groups else "",
        ", ".join(f"{k} {v}" for k, v in protocol.items()),
        *(f"- {m}: {formula}" for m, formula in formulas.items()), ""])
    write_text(folder / "results.md", text)
    columns = min(12, len(prompts))             # same prompt and seed below each other
    save_png(folder / "grid.png", grid(
        load_images([path for paths in files.values() for path in paths[:columns]]), columns,
        names=list(files), captions=prompts[:columns]))
    write_report(folder / "report.html", found, files, prompts, logs, config.report_rows,
                 datetime.date.today().isoformat())
    if config.study:
        write_study(Path(config.study), files, prompts, config.study_pairs, config.seed)
        print(f"study page: {config.study}; raters send back votes-*.json, for --tally")
    print(text)
    print(*summary(found), sep="\n")
    print(f"open {folder / 'report.html'}; {'' if config.images else 'pictures, '}results.json, "
          "results.md and grid.png lie beside it")


def score_pictures(config: EvaluateConfig, load, files: dict[str, list[Path]], prompts: list[str],
                   processes: Processes) -> tuple[dict, dict]:
    """({metric: formula}, {model: {metric: one score per picture}}) by the metrics `load(word)`."""
    # Metrics are promised in fp32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    digests = processes.union(
        {name: digest(paths) for name, paths in files.items()} if processes.main else {})
    formulas, scores = {}, {name: {} for name in files}
    for word in config.metrics:
        metric = load(word)
        formulas[metric.name] = metric.formula
        for name, paths in files.items():
            scores[name][metric.name] = score_model(
                metric, name, paths, digests[name], prompts, config.batch, processes,
                Path(config.out) / "scores")
        del metric                      # one scorer in memory at a time
    return formulas, scores


def main() -> None:
    """Draw, score and compare as the command line says."""
    config = parse_options(EvaluateConfig, PRESETS, description=__doc__)
    if not config.model and not config.images:
        config = parse_options(EvaluateConfig, PRESETS, ["--model", "tiny", *sys.argv[1:]], __doc__)
    if config.tally:
        return print(tally(config.tally))
    logs = read_logs(config.curves)
    processes = start_processes(config.device or None)
    sources = dict(metric_sources(word, config.model) for word in config.metrics
                   if not config.trace and not config.prompt)
    check(config, sources)
    chosen, models, files = find_all(config, sources)
    tokenizer = lone_tokenizer(config, sources) if config.images else None
    for name, places in sources.items():
        find_metric(name, places)
    folder = Path(config.out)
    with processes.agreed():
        if processes.main:
            lock(folder)
    pipe = None if config.images else load_model(config, processes)
    tokenizer = pipe.tokenizers[0] if pipe else tokenizer
    if config.trace or config.prompt:
        try_on(pipe, models)
        return (draw_trajectories if config.trace else draw_prompt)(pipe, models, config, folder)

    def load(word: str) -> Metric:
        if word.partition("=")[0] == "geneval":
            return geneval.geneval(*sources["geneval"], chosen.rows, tokenizer, processes.device)
        return load_metric(word, config.model, tokenizer, processes.device)

    prompts = [p for p in chosen.prompts for _ in range(config.images_per_prompt)]
    protocol = describe(config, chosen, pipe)
    if config.images:
        claim(folder, dict(protocol, lora={}), processes)
    else:
        claim(folder, dict(protocol, base=fingerprint(*pipe.identity), lora={
            name: worn_by(source) for name, source in models.items()}), processes)
        todo = undrawn(models, len(prompts), processes, folder / "images")
        if any(todo.values()):
            try_on(pipe, models)
            rehearse(config.metrics, load, prompts[0], pipe.side(config.resolution))
            draw_all(pipe, models, prompts, config, processes, folder / "images", todo)
        files = {name: [folder / "images" / name / f"{i:05d}.png" for i in range(len(prompts))]
                 for name in models}
        del pipe                        # the scorers want its memory
    processes.barrier()
    if config.export_geneval and processes.main:
        for name, paths in files.items():
            with writing(Path(config.export_geneval)):
                geneval.export(chosen.rows, paths, Path(config.export_geneval) / name)
    formulas, scores = score_pictures(config, load, files, prompts, processes)
    if processes.main:
        write_results(config, protocol, chosen, formulas, files, scores, logs)


if __name__ == "__main__":
    run_script(main)
