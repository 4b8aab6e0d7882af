"""What the trainers share: options, processes, keyed random numbers, checkpoints, the log.

Three rules keep runs exact. Every random draw is keyed by what it is for, never taken from a global
state; so resuming needs no random state, and any number of processes draws the same numbers. Every
collective is called by every process. Everything on disk is replaced atomically.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import operator
import os
import pickle
import platform
import re
import signal
import sys
import threading
import time
import types
import typing
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from weights import InputError, first_line, preset_of, read_json


LIMITS = dict(least=("at least", operator.ge), above=("above", operator.gt),
              most=("at most", operator.le), below=("below", operator.lt))
WORDS = {bool: dict(true=True, false=False), types.NoneType: dict(none=None)}
EXPECTED = {bool: "true or false", int: "must be a whole number", float: "must be a number"}
SHOWN = {bool: "true|false", int: "N", float: "NUMBER"}         # in --help; texts by their name:
PLACES = dict(
    SOURCE="model vae tokenizer spm reward pickscore prompts pairs decoder",
    FOLDER="out images export_geneval", FILE="study tally")
LEGEND = """P: from the paper, O: the released official code, D: a rival's own, T: measured on tiny.
In brackets: the default, and where a preset has another. SOURCE: a file, folder or hub id."""
GROUPS = {          # of --help; what stands in none is about the method
    "model": "model preset vae prediction_type negative tokenizer resolution dtype vae_dtype "
             "judge_dtype spm reward pickscore lora targets rank",
    "data": "prompts prompt sample_prompts limit pairs labels count validation ties images "
            "max_unreadable",
    "method": "",
    "optimization": "lr adaln_lr rate warmup weight_decay clip_norm epochs rounds batch "
                    "prompts_per_round pairs_per_step",
    "memory and speed": "device memory compile sample_batch train_batch decode_batch micro_batch "
                        "checkpointing cache_latents decoder decoder_check profile",
    "output": "out seed save_every grid_every snapshot_every track export_geneval curves "
              "report_rows study study_pairs tally trace",
}
WRONG = (AttributeError, EOFError, IndexError, KeyError, RuntimeError, TypeError, ValueError,
         pickle.UnpicklingError)        # what another content than the expected one may raise
LESS_MEMORY = ("try --memory low, or lower --sample_batch, --train_batch or --decode_batch "
               "(spm_train.py: lower --micro_batch; evaluate.py: lower --batch)")
FULL = "out of memory|alloc_failed|can't allocate memory|(calculation|multiplication) overflow"
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}     # by bytes
BATCHES = "batch_size train_batch_size per_device_train_batch_size eval_batch_size"
ELSEWHERE = dict(       # our options -> what diffusers, TRL, peft and kohya call them
    model="pretrained_model_name_or_path pretrained_model model_name model_name_or_path base_model",
    vae="pretrained_vae_model_name_or_path", out="output_dir output_name logging_dir save_dir",
    lora="lora_weights", lr="learning_rate unet_lr", dtype="mixed_precision precision fp16 bf16",
    rank="lora_rank lora_r network_dim network_alpha lora_alpha", beta="beta_dpo dpo_beta",
    targets="target_modules lora_target_modules", weight_decay="adam_weight_decay",
    clip_norm="max_grad_norm", warmup="lr_warmup_steps warmup_steps num_warmup_steps",
    prompts="dataset_name train_data_dir prompt_file prompt_fn",
    pairs="dataset_name train_data_dir", epochs="num_epochs num_train_epochs max_train_epochs",
    rounds="max_steps max_train_steps", prompts_per_round=BATCHES,
    pairs_per_step=BATCHES + " gradient_accumulation_steps", train_batch=BATCHES,
    batch=BATCHES + " gradient_accumulation_steps", micro_batch=BATCHES,
    steps="num_inference_steps num_steps sample_num_steps",
    guidance_scale="cfg cfg_scale", resolution="height width image_size",
    save_every="checkpointing_steps save_steps save_freq save_every_n_epochs save_every_n_steps",
    checkpointing="gradient_checkpointing")
TOO_MANY = 10       # steps or rounds in a row that were not finite, after which a run stops


def opt(default, help: str, choices: tuple = (), old: str = "", **limits: float):
    """A documented option of a dataclass; `limits` of a number: least=, above=, most=, below=.

    `old`: a name that it once had, which command lines and run folders may still use.
    """
    words = " and ".join(f"{LIMITS[name][0]} {limit}" for name, limit in limits.items())
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, old=old, limits=limits, words=words))


def parse_options(cls, presets: dict[str, dict], arguments: list[str] | None = None,
                  description: str = ""):
    """Command line -> an instance of the dataclass `cls`: command line over preset over default.

    The preset is the model's own or, where `cls` has a field `preset`, what that says; empty, it is
    filled in with what fits the model. Raises InputError for unknown options, with a suggestion,
    and for numbers that are not finite, of more than 64 bits or outside the field's limits.
    `--help` lists every field with its help text, limits and default. Dashes in names count as
    underscores.
    """
    kinds = typing.get_type_hints(cls)
    parser = _parser(cls, kinds, presets, description)
    words = [re.sub(r"^--\w[\w-]*", lambda name: "--" + name[0][2:].replace("-", "_"), word)
             for word in (sys.argv[1:] if arguments is None else arguments)]
    if empty := [word for word in words if re.fullmatch(r"--[\w-]+=--", word)]:
        raise InputError(f"{empty[0]}: -- is no value")         # which argparse may drop
    known, unknown = parser.parse_known_args(words)
    if unknown:
        word = unknown[0].split("=")[0]
        ours = [f"--{name}" for name, others in ELSEWHERE.items()
                if name in kinds and word.strip("-").replace("-", "_") in others.split()]
        near = ours or difflib.get_close_matches(word, parser._option_string_actions, n=1)
        advice = f"did you mean {' or '.join(near)}?" if near else "see --help"
        raise InputError(f"unknown option {unknown[0]!r}; {advice}")
    given = {name: _convert(name, text, kinds[name]) for name, text in vars(known).items()}
    model = given.get("model", getattr(cls, "model", ""))
    own = preset_of(model)
    preset = own if own.startswith("tiny") else model
    if "preset" in kinds:
        preset = given["preset"] = given.get("preset") or own
    config = cls(**(presets.get(preset, {}) | given))
    _check(config)
    return config


def _parser(cls, kinds: dict, presets: dict, description: str) -> argparse.ArgumentParser:
    """argparse's parser of the fields of `cls`; what is not given stays absent."""
    parser = plain_parser(f"{description.strip()}\n\n{LEGEND}")
    parser.usage = "%(prog)s [--option value ...]"
    # Before Python 3.14, -1e-3 is taken for an option.
    parser._negative_number_matcher = re.compile(r"^-[\d.]+(e[+-]?\d+)?$", re.I)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for f in dataclasses.fields(cls):
        kind = kinds[f.name]
        settings = dict(dest=f.name, default=argparse.SUPPRESS, metavar=_metavar(f, kind))
        if bool in (kind, *typing.get_args(kind)):
            settings |= dict(nargs="?", const="true")
        elif typing.get_origin(kind) is tuple:
            settings |= dict(nargs="+")
        if f.metadata["old"]:
            parser.add_argument(f"--{f.metadata['old']}", **settings, help=argparse.SUPPRESS)
        groups[_named(GROUPS, f.name, "method")].add_argument(
            f"--{f.name}", **settings, help=_help(f, presets).replace("%", "%%"))
    return parser


def _named(table: dict[str, str], name: str, otherwise: str) -> str:
    """Under which key of the table a name stands."""
    return next((key for key, names in table.items() if name in names.split()), otherwise)


def _metavar(f: dataclasses.Field, kind: type) -> str:
    """What kind of value an option takes, as --help shows it."""
    choices = "|".join(_shown(choice) for choice in f.metadata["choices"] if choice != "")
    first, *_ = typing.get_args(kind) or (kind,)
    return choices or SHOWN.get(first) or _named(PLACES, f.name, "TEXT")


def _help(f: dataclasses.Field, presets: dict) -> str:
    """What --help says of an option: its meaning, limits and defaults."""
    others = [f"{preset}: {_shown(given[f.name])}" for preset, given in presets.items()
              if given.get(f.name, f.default) != f.default]
    defaults = "; ".join(filter(None, (_shown(f.default), *others)))
    text = "; ".join(filter(None, (f.metadata["help"], f.metadata["words"])))
    return f"{text} [{defaults}]" if defaults else text


def _shown(value) -> str:
    """A value as the command line takes it; tiny's own files wherever the project lies."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return re.sub(r"^.*[/\\]tiny[/\\](model|flow)([/\\]|$)", r"tiny/\1\2", text)


def _convert(name: str, text: str | list[str], kind: type):
    """What the command line says after --name, as the first of its field's types that takes it."""
    if isinstance(text, list):
        return tuple(text)
    kinds = typing.get_args(kind) or (kind,)
    for one in kinds:
        with contextlib.suppress(KeyError, ValueError):
            return WORDS[one][text.lower()] if one in WORDS else one(text)
    raise InputError(f"--{name} {text:.60}: {EXPECTED[kinds[0]]}")


def _check(config) -> None:
    """Raise InputError for a value that its field does not allow."""
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        for word in value if isinstance(value, tuple) else (value,):
            if choices and word not in choices:
                listed = ", ".join(_shown(choice) for choice in choices if choice != "")
                raise InputError(f"--{f.name} {word}: choose one of {listed}")
        if isinstance(value, int | float) and not abs(value) < 10 ** 18:    # as 64 bits want it
            raise InputError(f"--{f.name} {value}: must be a finite number of at most 18 digits")
        limits = f.metadata["limits"].items()
        if isinstance(value, int | float) and not all(
                LIMITS[name][1](value, limit) for name, limit in limits):
            raise InputError(f"--{f.name} {value}: must be {f.metadata['words']}")


def plain_parser(description: str) -> argparse.ArgumentParser:
    """argparse's, whose mistakes are an InputError; for scripts without a dataclass of options."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    return parser


def refuse(message: str) -> None:
    """In place of argparse's own exit, which prints the whole usage."""
    raise InputError(f"{message}; see --help")


def check_preset(config, is_sdxl: bool) -> None:
    """Warn if the loaded model is not of the preset's kind: a hub id does not tell before."""
    if config.preset in ("sd15", "sdxl") and is_sdxl != (config.preset == "sdxl"):
        warn(f"{config.model} is {'an SDXL' if is_sdxl else 'no SDXL'} model, but the settings are "
             f"those of --preset {config.preset}; start anew with --preset "
             f"{'sdxl' if is_sdxl else 'sd15'}, unless this is meant")


def run_script(main) -> None:
    """Run a script's main; what the user can mend becomes one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):     # what the terminal's code page lacks is spelt out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            stream.write, stream.flush = _unheard(stream, "write"), _unheard(stream, "flush")
    try:
        main()
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:            # a full disk, a file that may not be written
        if error.errno is None:
            raise
        sys.exit(_fail(f"{error.filename or 'a file'}: {error.strerror}; "
                       "what was saved before is untouched"))
    except (MemoryError, RuntimeError) as error:
        # Neither a full memory nor a peer that died has a type of its own.
        if isinstance(error, MemoryError) or re.search(FULL, str(error), re.I):
            sys.exit(_fail("out of memory; " + LESS_MEMORY))
        lost = re.search(r"gloo|nccl|connection (closed|reset)|broken pipe", str(error), re.I)
        if not lost or not dist.is_initialized():
            raise
        _fail("another process is gone, see its message; start the same command again to go on "
              f"from the last checkpoint ({str(error).splitlines()[0]})")
        os._exit(1)                     # leaving the group politely would wait for the dead
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _unheard(stream: io.TextIOWrapper, method: str):
    """Its write or flush, which lets all go nowhere once nobody reads it: the work goes on."""
    call = getattr(stream, method)

    def careful(*text: str) -> int | None:
        try:
            return call(*text)
        except BrokenPipeError:         # `| head`, or a tee that Ctrl-C has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    return careful


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def warn(message: str) -> None:
    """A line on stderr that does not tear the progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


class Stopped(BaseException):
    """A signal came during work that may be dropped. No Exception: nobody else is to catch it."""


@dataclasses.dataclass
class Processes:
    """This process among all: its rank, how many there are, and its device."""
    rank: int
    world: int
    device: torch.device
    stop: int = 0               # the signal that has asked to save and leave
    dropping: bool = False      # what is being done may be dropped for it

    @property
    def main(self) -> bool:
        """True on the one process that writes files."""
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """The indices of this process among `count` things dealt out in turn; may be empty."""
        return list(range(self.rank, count, self.world))

    def sum(self, tensors: list[torch.Tensor]) -> None:
        """Add tensors up over all processes, in place, in one message."""
        if self.world > 1:
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def union(self, mine: dict) -> dict:
        """One dict of everybody's."""
        parts = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, mine)
        return {k: v for part in parts for k, v in part.items()}

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        return any(self.union({self.rank: flag}).values())

    def gather_rows(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """Everybody's [n, ...] -> [total, ...] in the order that `share` dealt them out."""
        if self.world == 1:
            return rows
        missing = -(-total // self.world) - len(rows)       # messages have one shape
        mine = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def barrier(self) -> None:
        """Wait for everybody."""
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def agreed(self):
        """What raises InputError on one process raises it on all."""
        problem = ""
        try:
            yield
        except InputError as error:
            problem = str(error)
        if self.any(bool(problem)):
            raise InputError(problem or "stopped, see another process's message")

    @contextlib.contextmanager
    def droppable(self):
        """Work without collectives, which a signal ends and throws away. Then all raise Stopped."""
        with contextlib.suppress(Stopped):
            self.dropping = True
            if not self.stop:
                yield
            self.dropping = False
        if self.any(bool(self.stop)):
            raise Stopped


def _from_torchrun() -> tuple[int, int, int]:
    """How many processes there are, this one's rank, and that on this machine."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    world, rank, local = (given.get(name, alone) for name, alone in zip(names, "100"))
    if (not all(map(str.isdecimal, (world, rank, local))) or int(rank) >= int(world)
            or ("RANK" in given) != ("WORLD_SIZE" in given)):
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(f"{said}: not what torchrun sets; start with torchrun, or unset all of "
                         f"{', '.join(names)}")
    return int(world), int(rank), int(local)


def start_processes(device: str | None = None) -> Processes:
    """Join the process group that torchrun describes, or be alone. GPU if there is one.

    `device`: cpu, cuda or cuda:N. Raises InputError for others, and where there is no such GPU.
    """
    world, rank, local = _from_torchrun()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{local}" if device == "cuda" else device
    count = torch.cuda.device_count()
    if name not in ("cpu", *(f"cuda:{i}" for i in range(count))):
        kind = device.split(":")[0]
        why = dict(cuda=f"torch finds {count} GPUs here, none for process {local}",
                   mps="not tried on Apple's GPUs; cpu works")
        raise InputError(f"--device {device}: {why.get(kind, 'must be cpu or cuda')}")
    place = torch.device(name)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if place.type == "cpu":
        hold_memory()
    if world > 1:
        try:
            store, _, _ = next(dist.rendezvous("env://", rank, world))
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError("MASTER_ADDR and MASTER_PORT lead to no other process "
                             f"({first_line(error, 120)}); start with torchrun") from None
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # After a restart torchrun's store still holds the dead processes' addresses.
            # (On several nodes each counts its own restarts.)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore("attempt-" + attempt, store)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(minutes=30))
    return Processes(rank, world, place)


def hold_memory() -> None:
    """Let glibc keep freed memory for the next tensor, where each new page would cost a fault."""
    with contextlib.suppress(AttributeError, OSError, TypeError):       # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2 ** 25)            # M_MMAP_THRESHOLD: smaller ones come from the heap,
        mallopt(-1, 2 ** 30)            # M_TRIM_THRESHOLD: which gives back what is beyond 1 GB


def generator(*key) -> torch.Generator:
    """CPU generator for one purpose, as (seed, "noise", epoch, prompt): same key, same numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def permutation(count: int, *key) -> list[int]:
    """A keyed shuffle of 0..count-1."""
    return torch.randperm(count, generator=generator(*key)).tolist()


@contextlib.contextmanager
def writing(path: Path):
    """A failure inside, for want of space or permission, becomes an InputError naming `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:   # torch.save's, save_file's
        # Where a file is full, torch.save then fails once more while it closes its archive.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({reason}); "
                         "what was saved before is untouched") from None


def write_atomic(path: Path, write) -> None:
    """Call `write(temporary path)`, make it durable, and only then let it take the place of `path`.

    The folder is made if need be. Whatever `write` does, the umask says who may read the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)                   # safetensors leaves all others no rights
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            with contextlib.suppress(OSError):      # the name, too, is to survive a power cut,
                folder = os.open(path.parent, os.O_RDONLY)      # where the file system can
                os.fsync(folder)
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, replaced atomically: UTF-8, whatever the locale."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON: what is not finite becomes null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda word: None),
                      indent=indent)


def write_json(path: Path, value) -> None:
    """A file of strict JSON, replaced atomically."""
    write_text(path, to_json(value, indent=2) + "\n")


def lock(folder: Path) -> None:
    """Make a folder, and keep it for this process until that ends, however it ends.

    It relies on a POSIX record lock (fcntl) of the file `.lock` in it: the kernel gives that back
    with the process; NFS 4, NFS 3 with lockd, Lustre and GPFS hold it between machines. Where the
    file system or the platform has none, a warning says so. InputError if another process has the
    folder, or if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)   # stays open
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as a run folder ({error})") from None
    try:
        import fcntl                                # not on Windows
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):      # EAGAIN or EACCES: it is taken
        holder = os.read(handle, 999).decode(errors="replace").split("\n")[0]
        raise InputError(f"{folder}: another process is at work in it ({holder}); wait until that "
                         "ends, or choose another --out") from None
    except (ImportError, OSError) as error:
        warn(f"{folder}: no locks here ({error}); never start two runs in it at once")
    os.write(handle, f"{platform.node()}, process {os.getpid()}\n".encode())


def fingerprint(*things) -> str:
    """Sixteen hexadecimal digits that change when what a run is made of does.

    Of networks (their configuration and weights, but no LoRA), tokenizers, schedules, tensors and
    plain values. Same things, same digits, on every device.
    """
    parts = itertools.chain.from_iterable(map(_identity, things))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _identity(thing) -> typing.Iterator[bytes]:
    """What tells a thing from others. Of tensors the sum of all bits, and some of them in place."""
    if isinstance(thing, torch.Tensor):
        flat = thing.detach().contiguous().flatten()
        even = flat.numel() * flat.element_size() % 8 == 0
        bits = flat.view(torch.int64 if even else WHOLE[flat.element_size()])
        yield repr([*thing.shape, int(bits.sum(dtype=torch.int64)),     # exact, in any order
                    *bits[::len(bits) // 256 + 1].tolist()]).encode()
    elif isinstance(thing, torch.nn.Module):
        yield repr(getattr(thing, "config", "")).encode()
        for name, value in thing.state_dict().items():
            if "lora_" not in name:
                yield name.encode()
                yield from _identity(value)
    elif hasattr(thing, "get_vocab"):
        backend = getattr(thing, "backend_tokenizer", None)         # whose paddings change with use
        read = thing(["A Word", "a word " * 9], padding="max_length", truncation=True, max_length=9)
        yield json.dumps([sorted(thing.get_vocab().items()), read.input_ids,
                          json.loads(backend.to_str())["model"] if backend else ""]).encode()
    elif dataclasses.is_dataclass(thing):
        for value in vars(thing).values():
            yield from _identity(value)
    else:
        yield json.dumps(thing).encode()


def _as_kept(cls, options: dict) -> dict:
    """The options of a `cls` as a run's folder keeps them, on any machine: plain JSON.

    By their names of today, and tiny's own files wherever the project lies.
    """
    names = {f.metadata.get("old"): f.name for f in dataclasses.fields(cls)}
    return {names.get(name, name): _shown(value) if isinstance(value, str) else value
            for name, value in json.loads(to_json(options)).items()}


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run folder, oldest first."""
    found = {path.stem.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*.pt")}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


def last_step(folder: Path) -> int:
    """The step or round of a run folder's newest checkpoint; 0 if it has none."""
    return max((int(path.stem[11:]) for path in checkpoints(folder)), default=0)


def told(config, presets: dict[str, dict]) -> str:
    """The options that are not as the preset has them, as the command line takes them."""
    preset = getattr(config, "preset", "")
    usual = type(config)(**presets.get(preset, {}))
    words = [f"--{name} {_shown(value) or repr('')}" for name, value in vars(config).items()
             if name != "preset" and value != getattr(usual, name)]
    return " ".join([f"settings of {preset or 'the program'}", *words])


class Run:
    """A run's folder: config.json, log.jsonl, checkpoints. Only the main process writes.

    The same command again continues the run. A folder that holds another configuration's work is
    refused, not overwritten; `free` names the fields that may differ (how long, how often), since
    they do not change what a step computes. `config` is a dataclass; options that are younger than
    the folder count as left at their defaults. What differs from its preset is printed.
    """

    def __init__(self, folder: str, config, processes: Processes, free: tuple[str, ...] = (),
                 presets: dict[str, dict] | None = None):
        self.folder = Path(folder)
        self.log_file = self.folder / "log.jsonl"
        self.processes, self.free = processes, free
        self.config = _as_kept(type(config), dataclasses.asdict(config))
        self.identity: dict[str, str] = {}
        with processes.agreed():
            if processes.main:
                self._claim(config)
        self.handlers = {}                      # the caller's; only the main thread may have any
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._on_signal)
                             for number in (signal.SIGTERM, signal.SIGINT)}
        if processes.main:
            print(f"{told(config, presets or {})} (all: {self.folder / 'config.json'})", flush=True)

    def close(self) -> None:
        """Signals are the caller's again."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _claim(self, config) -> None:
        """Write the configuration; InputError if the folder cannot be used or holds another run."""
        path = self.folder / "config.json"
        lock(self.folder)
        begun = self.log_file.exists() or checkpoints(self.folder)
        try:
            earlier = [_as_kept(type(config), old) for old in self._configurations(path)]
            changed = list(dict.fromkeys(
                words for old in earlier for words in self._differences(config, old)))
            if not begun and all(old.keys() == self.config.keys() for old in earlier):
                changed = []            # nothing was done yet: a command may be corrected
            if not changed:
                self._sweep()
                write_json(path, self.config)
        except (OSError, InputError) as error:
            raise InputError(f"{self.folder}: cannot be used as a run folder ({error})") from None
        if changed:
            some = "; ".join(changed[:6] + ["..."] * (len(changed) > 6))
            raise InputError(f"{self.folder}: holds a run with other options ({some}); choose "
                             "another --out or repeat its options")

    def _differences(self, config, old: dict) -> list[str]:
        """In which options `old` is another run's, in words; what it lacks was at its default."""
        old = _as_kept(type(config), dataclasses.asdict(type(config)())) | old
        return [f"{k} {old.get(k)!r:.80}, now {self.config.get(k)!r:.80}"
                for k in sorted(old.keys() | self.config.keys())
                if k not in self.free and old.get(k) != self.config.get(k)]

    def _configurations(self, file: Path) -> list[dict]:
        """The options in config.json, if it is there, and in each checkpoint that says them."""
        found = [read_json(file)] if file.exists() else []
        for path in checkpoints(self.folder):
            with contextlib.suppress(Exception):        # damaged: resume will say so
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                found.append(dict(state["config"]))
        return found

    def _sweep(self) -> None:
        """Remove what a process left that was killed while it wrote; other runs may lie below."""
        parts = [path for name in ("best", "spm*", "loras/*") for path in self.folder.glob(name)
                 if not (path / ".lock").exists()]
        for left in [file for part in (self.folder, *parts) for file in part.glob(".*")]:
            if re.fullmatch(r"\..+\.\d+\.tmp|\.tmp\w{6}", left.name):     # or safetensors' own
                left.unlink()

    def _on_signal(self, number, frame) -> None:
        """The first signal stops the run, a later Ctrl-C at once.

        SIGTERM may come twice, from torchrun and the cluster, and torchrun echoes Ctrl-C.
        """
        now = time.monotonic()
        if not self.processes.stop:
            self.processes.stop, self.asked = number, now
            if self.processes.main:
                warn("stopping: what is done is saved; a round whose pictures are being drawn will "
                     "be drawn again (Ctrl-C again: at once)")
        elif number == signal.SIGINT and now - self.asked > 2:
            raise KeyboardInterrupt
        if self.processes.dropping:
            self.processes.dropping = False
            raise Stopped

    def log(self, record: dict) -> None:
        """Append one JSON line to log.jsonl."""
        if self.processes.main:
            line = to_json({k: float(f"{v:.6g}") if isinstance(v, float) else v
                            for k, v in record.items()})
            with writing(self.log_file), open(self.log_file, "a", encoding="utf-8") as handle:
                handle.write(line + "\n")

    def read_log(self) -> list[dict]:
        """The records of log.jsonl so far."""
        text = self.log_file.read_text(encoding="utf-8") if self.log_file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def _scores(self) -> dict[Path, float]:
        """The checkpoints on disk that were given a score."""
        scores = {}
        for path in checkpoints(self.folder):
            with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
                scores[path] = float(read_json(path.with_suffix(".json"))["score"])
        return scores

    def is_best(self, score: float | None) -> bool:
        """Is this above the score of every kept checkpoint?"""
        return score is not None and all(score > old for old in self._scores().values())

    def save(self, step: int, state: dict, score: float | None = None) -> None:
        """Write checkpoint-<step>.pt and its checksum; for every process.

        The last two stay, and the one with the highest score.
        """
        if self.processes.main:
            size = 0
            if self.log_file.exists():          # on disk before the checkpoint that speaks of it
                with open(self.log_file, "rb+") as handle:
                    os.fsync(handle.fileno())
                    size = handle.seek(0, os.SEEK_END)
            state = dict(
                state, step=step, log_bytes=size, identity=self.identity,
                config={k: v for k, v in self.config.items() if k not in self.free})
            path = self.folder / f"checkpoint-{step:06d}.pt"

            def write(temporary: Path) -> None:         # a checkpoint is never without checksum
                with open(temporary, "wb") as handle:   # so that a full disk is said to be one
                    torch.save(state, handle)
                write_json(path.with_suffix(".json"),
                           dict(step=step, score=score, sha256=sha256(temporary)))

            write_atomic(path, write)
            scores = self._scores()
            best = max(scores, key=lambda p: (scores[p], p), default=None)
            for old in set(checkpoints(self.folder)[:-2]) - {best}:
                old.unlink()
                old.with_suffix(".json").unlink(missing_ok=True)
        self.processes.barrier()

    def resume(self, **identity: str) -> dict | None:
        """The newest sound checkpoint, the same on every process, or None if there is none.

        Later log lines are cut off. Damaged checkpoints are passed over with a message and kept as
        `*.damaged`. `identity`: fingerprints of what the run is made of besides its options. Raises
        InputError if one differs from the checkpoint's, if all checkpoints are damaged, or if one
        cannot be read for any other reason.
        """
        self.identity = identity
        with self.processes.agreed():
            name = self._newest_sound() if self.processes.main else ""
        name = self.processes.union({"newest": name} if self.processes.main else {})["newest"]
        with self.processes.agreed():
            state = self._load(self.folder / name) if name else None
        if self.processes.main and self.log_file.exists():
            if state:
                self._cut_log(state["log_bytes"])
            else:
                self.log_file.unlink()
        return state

    def _newest_sound(self) -> str:
        """The name of the newest checkpoint that is sound, or "" if there is none at all."""
        damaged: list[Path] = []
        for path in reversed(checkpoints(self.folder)):
            try:
                reason = _damage(path)
                if not reason:
                    for file in damaged:
                        file.rename(file.with_name(file.name + ".damaged"))
                    return path.name
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}); "
                                 "mend that and start again") from None
            warn(f"{path}: damaged ({reason}); going back to the one before")
            damaged += [file for file in (path, path.with_suffix(".json")) if file.exists()]
        if damaged:
            raise InputError(f"{self.folder}: none of its checkpoints is sound; choose another "
                             "--out, or remove them to begin anew")
        return ""

    def _load(self, path: Path) -> dict:
        """A checkpoint's content; InputError if it is not of this run's models and prompts."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); "
                             "every process must see the run folder") from None
        with self.restoring():
            earlier = dict(state.get("identity", {}))
            changed = [k for k, v in earlier.items() if self.identity.get(k, v) != v]
            if state["step"] != int(path.stem[11:]) or state["log_bytes"] < 0:
                raise ValueError("another step, or no place in the log")
        if changed:
            raise InputError(
                f"{self.folder}: the {' and '.join(changed).replace('_', ' ')} that this run was "
                "trained with had the same name but another content; put it back, or choose "
                "another --out")
        return state

    @contextlib.contextmanager
    def restoring(self):
        """What a checkpoint lacks, or holds in another shape or of another type, is an InputError.

        Inside, its content is put to use; no collectives.
        """
        try:
            yield
        except WRONG as error:
            raise InputError(
                f"{self.folder}: its newest checkpoint is whole, but not of such a run "
                f"({type(error).__name__}: {first_line(error, 120)}); take it away with its .json "
                "to go on from the one before, or choose another --out") from None

    def _cut_log(self, size: int) -> None:
        """Leave the first `size` bytes of the log, or its whole lines if there are fewer."""
        with open(self.log_file, "rb+") as handle:
            if handle.seek(0, os.SEEK_END) < size:
                warn(f"{self.log_file}: lines are missing that were there when the checkpoint was "
                     "written")
                handle.seek(0)
                size = handle.read().rfind(b"\n") + 1
            handle.truncate(size)


def sha256(path: Path) -> str:
    """Of a file's contents, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint's content, or ""; OSError where it cannot be read at all."""
    try:
        expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return "its .json is missing or damaged"
    if sha256(path) != expected:
        return "checksum differs"
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except WRONG:
        return "not a plain checkpoint; pickles with code are never run"
    return ""


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """AdamW's state from a checkpoint; ValueError where its moments are not the weights'."""
    optimizer.load_state_dict(saved)
    for weight, state in optimizer.state.items():
        if {weight.shape} != {state["exp_avg"].shape, state["exp_avg_sq"].shape}:
            raise ValueError(f"moments of the shape {list(state['exp_avg'].shape)}")


@contextlib.contextmanager
def profiled(folder: Path, device: torch.device):
    """What happens inside is written to `profile.txt` and `profile.json` (for Perfetto)."""
    with torch.profiler.profile() as profiler:
        yield
    write_atomic(folder / "profile.json", lambda p: profiler.export_chrome_trace(str(p)))
    rows = profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=30,
                                         max_name_column_width=60)
    write_text(folder / "profile.txt", rows)
