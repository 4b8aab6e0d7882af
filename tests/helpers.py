"""Minuscule random checkpoints in the official layouts, written by diffusers and transformers themselves; ways to run the scripts."""
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import clip_spm
import lora
import spm_train
from conftest import randomize, sd15_shaped, sdxl_shaped, seeded
from diffusion import encode_empty
from finetune import Trainer, Turn, loss_scaler
from loading import TINY, load_clip
from training import Processes, lock, run_script

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red circle", "two blue squares", "a green cross above a yellow triangle", "three cyan crosses", "a purple square",
           "a blue circle left of a red square", "two yellow triangles"]
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                 set_alpha_to_one=False, steps_offset=1, clip_sample=False, timestep_spacing="leading", prediction_type="epsilon")
TEXT = dict(vocab_size=579, max_position_embeddings=16, bos_token_id=577, eos_token_id=578, num_attention_heads=2)


def _tokenizer(pad: str = "<|endoftext|>"):
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(TINY / "tokenizer", pad_token=pad)


def _vae(seed: int):
    from diffusers import AutoencoderKL
    return randomize(AutoencoderKL(block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
                                   up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, sample_size=16), seed)


def write_sd(folder: Path, **unet) -> Path:
    """SD-1.5's structure with 8 to 24 channels, latents 4 x 8 x 8, pictures 16 x 16, 16 tokens; `unet`: what its UNet has otherwise."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    text = CLIPTextConfig(hidden_size=12, intermediate_size=24, num_hidden_layers=2, hidden_act="quick_gelu", **TEXT)
    StableDiffusionPipeline(
        vae=_vae(1), text_encoder=randomize(CLIPTextModel(text), 2), tokenizer=_tokenizer(),
        unet=randomize(UNet2DConditionModel(**sd15_shaped(sample_size=8, **unet)), 3), scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def write_sdxl(folder: Path, **unet) -> Path:
    """SDXL's structure: two text encoders, the second padded with "!", text_time embedding, zero negative conditioning."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    one = CLIPTextConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, hidden_act="quick_gelu", **TEXT)
    two = CLIPTextConfig(hidden_size=12, intermediate_size=24, num_hidden_layers=3, hidden_act="gelu", projection_dim=10, **TEXT)
    StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=randomize(CLIPTextModel(one), 5), text_encoder_2=randomize(CLIPTextModelWithProjection(two), 6),
        tokenizer=_tokenizer(), tokenizer_2=_tokenizer("!"), scheduler=DDIMScheduler(**SCHEDULER),
        unet=randomize(UNet2DConditionModel(**sdxl_shaped(sample_size=8, **unet)), 7), force_zeros_for_empty_prompt=True,
        add_watermarker=False).save_pretrained(folder)
    return folder


def write_pickscore(folder: Path) -> Path:
    """A CLIP of both towers as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    text = CLIPTextConfig(hidden_size=12, intermediate_size=24, num_hidden_layers=2, hidden_act="gelu", projection_dim=10, **TEXT)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
                              image_size=16, patch_size=4, projection_dim=10)
    clip = randomize(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=10)), 8)
    clip.logit_scale.data.fill_(4.6)
    clip.save_pretrained(folder)
    return folder


def write_spm(folder: Path, pickscore: Path) -> Path:
    """An SPM made from that CLIP, with adaLN weights that really act."""
    torch.manual_seed(0)
    spm = clip_spm.make_step_aware(load_clip(str(pickscore)))
    with torch.no_grad():
        for i, (name, p) in enumerate(spm.named_parameters()):
            if "adaLN" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=seeded(i)))
    spm_train.save_spm(spm, folder)
    return folder


class NoWaiting(TorchFunctionMode):
    """The meta device in a GPU's place: AssertionError for whatever a GPU would be waited for.

    By itself that device refuses .item(), bool(), nonzero and masks, which need its numbers. This adds what sends it numbers that do not
    lie in pinned memory: a CPU tensor (but a 0-d one, which travels as an argument) and a list, be it an index or a tensor to be.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name, tensors = function.__name__, [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor)]
        if any(v.is_meta for v in tensors):
            index = tree_leaves(args[1], is_leaf=lambda v: isinstance(v, list)) if name in ("__getitem__", "__setitem__") else []
            sent = [v for v in tensors if not v.is_meta and (v.ndim or name in ("as_tensor", "to", "copy_"))]
            assert not sent and name != "tensor" and not any(isinstance(i, list) for i in index), f"{name} waits for the device"
        return out


def unpinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """In place of training.upload where the device is `meta`: what travels without waiting."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def environment() -> dict[str, str]:
    """Of a child process: offline, one thread, this repository importable."""
    return os.environ | dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")


def torchrun(processes: int) -> list[str]:
    """Its words behind `python`. Without an address its processes look for each other by the machine's name, which need not lead anywhere."""
    return ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", f"--nproc_per_node={processes}"]


def shell(*words: object, check: bool = True, processes: int = 1) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user does; with `processes` > 1 under torchrun. The imports alone take seconds."""
    launch = torchrun(processes) if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, *map(str, words)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


# Forked from a process that has imported what takes seconds; it has computed nothing, so its children may.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "transformers.models.clip.tokenization_clip", "pytest", "baselines", "spm_train"])


def run_script_here(script: str, words: list[str], adam: object, variables: dict[str, str], folder: str) -> None:
    """One process of `Job`: the script's main, its number and its output in files."""
    os.environ.update(variables, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    torch.optim.AdamW = adam
    sys.argv = [script, *words]
    run_script(importlib.import_module(script).main)


class Job:
    """A script in `count` processes that find each other as those of torchrun do, on this process's store."""

    def __init__(self, script: str, words: tuple, count: int, adam: object = torch.optim.AdamW):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.folder = tempfile.TemporaryDirectory()
        self.processes = []
        shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.store.port), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                      TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        for rank in map(str, range(count)):
            arguments = (script, [*map(str, words), "--device", "cpu"], adam, shared | dict(RANK=rank, LOCAL_RANK=rank), self.folder.name)
            self.processes.append(FORKS.Process(target=run_script_here, args=arguments, daemon=True))
            self.processes[-1].start()

    def said(self, name: str) -> str:
        """What all have written so far, by rank, on `out` or `err`."""
        return "".join(file.read_text() for file in sorted(Path(self.folder.name).glob(name + "*")))

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit statuses; AssertionError if one is still there after `seconds`. Nobody ends another."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        status = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in status, f"still running after {seconds} s: {status}\n{self.said('err')[-3000:]}"
        return status


def together(script: str, *words: object, processes: int = 2, adam: object = torch.optim.AdamW) -> str:
    """Run a script's main in several processes, or in one of its own, with one thread each; returns what they printed."""
    job = Job(script, words, processes, adam)
    status = job.wait()
    assert not any(status), (status, job.said("err")[-3000:])
    return job.said("out")


def call(script: str, *words: object) -> str:
    """Run a script's main in this process, which spares the imports; returns what it printed. Mistakes are raised."""
    out, device = io.StringIO(), () if "cuda" in words else ("--device", "cpu")       # the last one counts
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), main_of(script, *words, *device) as main:
        main()
    return out.getvalue()


def command(script: str, *words: object) -> subprocess.CompletedProcess:
    """Run a script in this process as its command line would: exit status and what it says."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), main_of(script, *words) as main:
        try:
            run_script(main)
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())


@contextlib.contextmanager
def taken(folder: Path):
    """Another process, whose id this is, has the run folder; it is killed at the end."""
    ready, stay = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(stay[1])
            lock(folder)
            os.write(ready[1], b"!")
            os.read(stay[0], 1)             # ends with the parent, however that ends
        finally:
            os._exit(0)
    os.close(ready[1])
    try:
        assert os.read(ready[0], 1) == b"!"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in (ready[0], *stay):
            os.close(end)


@contextlib.contextmanager
def main_of(script: str, *words: object):
    """A script's main function, the command line being `words`; the signals are afterwards what they were."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    argv, sys.argv = sys.argv, [script, *map(str, words)]
    module = importlib.import_module(script)
    try:
        yield getattr(module, "main", None) or module.command_line
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def log_of(folder: Path, timing: bool = False) -> list[dict]:
    """The records of log.jsonl; fields that measure time only if asked for."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = () if timing else ("seconds", "eta_minutes", "prompts_per_second", "pairs_per_second")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


ALONE = Processes(0, 1, torch.device("cpu"))


def bare_trainer(pipe, config, optimizer=None, processes=ALONE, prompts=PROMPTS) -> Trainer:
    """A trainer without a run folder, for what needs its pipe, its minibatches or its prompts."""
    trainer = object.__new__(Trainer)
    trainer.pipe, trainer.config, trainer.optimizer, trainer.processes = pipe, config, optimizer, processes
    trainer.prompts, trainer.empty, trainer.weights = prompts, encode_empty(pipe), lora.parameters(pipe.unet)
    trainer.rounds, trainer.scaler = SimpleNamespace(bad=0), loss_scaler(config, pipe.device)
    return trainer


def turn_of(indices, epoch: int = 0, place: int = 0, prompts=PROMPTS) -> Turn:
    """A round of some of the prompts."""
    return Turn(0, epoch, place, list(indices), [prompts[i] for i in indices])
