"""training.py: options, keyed random numbers, run folders, checkpoints, prompts files."""
import ast
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tqdm import tqdm

import training

from calls import Calls
from helpers import ROOT, log_of, taken
from loading import load_pipeline
from training import (
    Processes,
    Run,
    Stopped,
    fingerprint,
    generator,
    lock,
    opt,
    parse_options,
    permutation,
    run_script,
    start_processes,
    write_atomic,
    write_json,
)
from weights import InputError

ALONE = Processes(0, 1, torch.device("cpu"))


OURS = [ROOT / name for name in (
    "training.py", "finetune.py", "calls.py", "observers.py", "needs.py", "tiny/build.py", *(f"experiments/{n}.py" for n in (
        "alignment", "effect", "judges", "tables")))]


# Options

@dataclass
class Options:
    """One of each kind."""
    model: str = opt("tiny", "the model")
    steps: int = opt(20, "how many")
    lr: float = opt(1e-4, "100 % of it")
    checkpointing: bool = opt(False, "yes or no")
    names: tuple[str, ...] = opt(("a",), "several words")
    seed_or_none: int | None = opt(None, "a number or none")
    start: str = opt("random", "where from", ("random", "win"), old="from_where")
    kind: str = opt("", "of which", ("", "epsilon"))
    share: float = opt(0.5, "of it", above=0, most=1)
    batch: int = opt(4, "at a time", least=1, below=9)


PRESETS = {"sdxl": dict(steps=50, lr=1e-5), "tiny": dict(lr=0.5)}


def parse(*words) -> Options:
    """Parse as the scripts do."""
    return parse_options(Options, PRESETS, list(words))


def test_precedence_is_command_line_then_preset_then_default():
    assert (parse().lr, parse().steps) == (0.5, 20)
    assert (parse("--model", "sdxl").lr, parse("--model", "sdxl").steps) == (1e-5, 50)
    assert (parse("--model", "sdxl", "--lr", "3").lr, parse("--lr", "3", "--model=sdxl").steps) == (3.0, 50)
    assert parse("--model", "some/folder") == Options(model="some/folder")


def test_kinds_of_options():
    assert parse("--checkpointing").checkpointing is True and parse("--checkpointing", "false").checkpointing is False
    assert parse("--checkpointing", "--steps", "3").steps == 3 and parse().checkpointing is False
    assert parse("--names", "base=", "spo=x").names == ("base=", "spo=x") and parse("--names", "b").names == ("b",)
    assert parse("--seed_or_none", "7").seed_or_none == 7 and parse("--seed-or-none", "None").seed_or_none is None
    assert parse("--start=win").start == parse("--from_where", "win").start == "win" and parse("--lr", "-1e-3").lr == -0.001


@pytest.mark.parametrize("words, says", [
    (("--step", "3"), "did you mean --steps?"), (("--checkpoint",), "did you mean --checkpointing?"), (("--zzz", "3"), "see --help"),
    (("--steps=x",), "--steps x"), (("--steps", "1.5"), "--steps 1.5"), (("--checkpointing", "maybe"), "true or false"),
    (("--start", "lose"), "choose one of random, win"), (("--steps",), "--steps"), (("word",), "'word'"),
    (("--lr", "nan"), "--lr nan: must be a finite number"), (("--lr=-inf",), "finite"), (("--steps", "1" + 30 * "0"), "at most 18 digits"),
    (("--steps", "9" * 5000), "whole number"), (("--share", "0"), "--share 0.0: must be above 0 and at most 1"), (("--share", "1.1"), "--share 1.1"),
    (("--steps", "1" * 19), "at most 18 digits"), (("--steps=--",), "--steps=--: -- is no value"), (("--names=--",), "-- is no value"),
    (("--kind", "x"), "--kind x: choose one of epsilon"), (("--learning_rate", "1"), "did you mean --lr?"), (("--batch-size=3",), "did you mean --batch?"),
    (("--pretrained_model_name_or_path", "x"), "did you mean --model?"), (("--gradient_checkpointing",), "did you mean --checkpointing?"),
    (("--share", "nan"), "finite"), (("--batch", "0"), "must be at least 1 and below 9"), (("--batch", "9"), "--batch 9")])
def test_mistakes_are_one_line_with_a_suggestion(words, says):
    with pytest.raises(InputError) as caught:
        parse(*words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in Options.__dataclass_fields__) and "100 % of it [0.0001; sdxl: 1e-05; tiny: 0.5]" in text
    words = re.sub(r"\s+", " ", text)
    assert "of it; above 0 and at most 1 [0.5]" in words and "--start random|win where from [random]" in words and "--kind epsilon of which --" in words
    assert "--checkpointing [true|false] yes or no [false]" in words and "--steps N how many [20; sdxl: 50]" in words and "--model SOURCE" in words and "--lr NUMBER" in words
    assert "--names TEXT [TEXT ...] several words [a]" in words and "--seed_or_none N a number or none [none]" in words and "from_where" not in text


def test_help_is_in_groups_after_a_legend_and_without_the_machines_paths(capsys):
    import baselines, evaluate, spm_train, spo_train  # noqa: E401
    from tiny import build
    for kind, presets in [(spo_train.SPOConfig, spo_train.PRESETS), (baselines.BaselineConfig, baselines.PRESETS), (spm_train.SPMConfig, spm_train.PRESETS),
                          (evaluate.EvaluateConfig, evaluate.PRESETS), (build.BuildConfig, {})]:
        with pytest.raises(SystemExit):
            parse_options(kind, presets, ["--help"], "What it does.")
        text = capsys.readouterr().out
        places = [text.index(f"\n{words}:") for words in ("model", "data", "method", "optimization", "memory and speed", "output") if f"\n{words}:" in text]
        assert len(places) > 2 or kind is build.BuildConfig
        assert text.index("What it does.") < text.index("P: from the paper, O: ") < places[0] and places == sorted(places)
        assert str(ROOT) not in text and " X " not in text and all(f"--{name} " in text for name in kind.__dataclass_fields__), kind
    listed = " ".join(training.GROUPS.values()).split()
    assert len(listed) == len(set(listed)), "in one group each"


@pytest.mark.parametrize("words", [("--train-batch", "3"), ("--train_batch=3",), ("--train-batch=3",)])
def test_dashes_in_names_are_underscores(words):
    import spo_train
    assert parse_options(spo_train.SPOConfig, spo_train.PRESETS, [*words, "--out=a-b"]).train_batch == 3


SCRIPTS = dict(spo_train="SPOConfig", spm_train="SPMConfig", baselines="BaselineConfig", evaluate="EvaluateConfig")


@pytest.mark.parametrize("script", SCRIPTS)
def test_torchrun_passes_every_option_on(script):
    """Its parser also looks for abbreviations of its own options behind the script's name."""
    fields = dataclasses.fields(getattr(importlib.import_module(script), SCRIPTS[script]))
    words = [word for f in fields for name in dict.fromkeys((f.name, f.name.replace("_", "-"))) for word in (f"--{name}", "x")]
    assert len(words) > 60 and {f.metadata["old"] for f in fields} <= {"", "start", "logs"}
    assert torch.distributed.run.parse_args(["--nproc_per_node=2", script + ".py", *words]).training_script_args == words


@pytest.mark.parametrize("script", ["experiments/alignment.py", "experiments/effect.py", "experiments/judges.py", "experiments/tables.py", "tiny/build.py"])
@pytest.mark.parametrize("word, status", [("--help", 0), ("bogus", 2), ("--bogus", 2)])
def test_other_scripts_start_no_work_unasked(script, word, status, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, word])
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr("subprocess.run", pytest.fail)
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script", module)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as caught:
        run_script(module.main)
    said = capsys.readouterr()
    assert (caught.value.code or 0) == status and (said.out.startswith("usage") if not status else re.fullmatch("error: .*\n", said.err))


@pytest.mark.parametrize("words, says", [(("--seed", "9" * 19), "at most 18 digits"), (("--device", "foo"), "--device foo"), (("--stages", "x"), "choose one of vae")])
def test_mistakes_of_the_build_are_one_line(words, says, monkeypatch):
    from tiny import build
    monkeypatch.setattr(sys, "argv", ["build.py", *words])
    with pytest.raises(InputError, match=says):
        build.main()


@pytest.mark.parametrize("script", ["spo_train.py", "spm_train.py", "baselines.py", "evaluate.py", "lora.py", "experiments/alignment.py", "experiments/effect.py", "experiments/judges.py", "experiments/tables.py", "tiny/build.py"])
def test_missing_packages_are_one_line(script):
    """As of a Python outside the environment: -S leaves its packages out."""
    done = subprocess.run([sys.executable, "-S", script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and re.fullmatch("error: .* lacks torch, .*make demo.*\n", done.stderr)


HELP = """
import contextlib, io, runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}")
names, *scripts = sys.argv[1:]
names = names.split()
sys.meta_path.insert(0, Missing())
path = sys.path[:]
for script in scripts:
    sys.argv, sys.path[:] = [script, "--help"], [script.rpartition("/")[0] or ".", *path]
    said, status = io.StringIO(), "went on"
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as left:
            status = left.code or 0
        except Exception as error:
            status = repr(error)
    print(script, status, said.getvalue().startswith("usage: "), sep=": ")
"""


def test_help_of_every_script_without_the_development_packages():
    names = ["diffusers", "peft", "pytest", "hypothesis", "scipy", "clip", "xdist", "ruff", "accelerate", "cv2", "torchvision", "matplotlib", "pandas", "pyarrow",
             "fitz", "playwright", "nbclient", "tensorboard", "wandb", "ftfy", "conftest"]
    files = [path for folder in (".", "benchmarks", "experiments", "tiny") for path in sorted((ROOT / folder).glob("*.py"))]
    scripts = [str(path.relative_to(ROOT)) for path in files if "__main__" in path.read_text(encoding="utf-8")]
    done = subprocess.run([sys.executable, "-c", HELP, " ".join(names), *scripts], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert len(scripts) > 15 and done.stdout.splitlines() == [f"{script}: 0: True" for script in scripts], done.stdout + done.stderr


def test_an_old_python_is_one_line():
    words = "import sys; sys.version_info = (3, 9); sys.version = '3.9.2 (x)'; import needs"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "lacks Python 3.11 or later (this is 3.9.2)" in done.stderr and done.stderr.count("\n") == 1


# Processes

@pytest.mark.parametrize("given", [
    dict(WORLD_SIZE="abc", RANK="0"), dict(RANK="1"), dict(RANK="0"), dict(WORLD_SIZE="2"), dict(WORLD_SIZE="2", RANK="2"),
    dict(WORLD_SIZE="2", RANK="-1"), dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="x")], ids=str)
def test_surroundings_that_are_not_torchruns_are_one_line(given, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{list(given)[0]}={list(given.values())[0]}.*: not what torchrun sets; start with torchrun, or unset"):
        start_processes("cpu")


@pytest.mark.parametrize("given", [{}, dict(MASTER_ADDR="127.0.0.1"), dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="abc")], ids=str)
def test_processes_without_an_address_are_one_line(given, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (dict(WORLD_SIZE="2", RANK="0") | given).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="MASTER_ADDR and MASTER_PORT lead to no other process .*; start with torchrun"):
        start_processes("cpu")


# Random numbers

def test_keyed_random_numbers():
    draw = lambda *key: torch.randn(8, generator=generator(*key)).tolist()  # noqa: E731
    assert draw(0, "pool", 1, 2) == draw(0, "pool", 1, 2)
    keys = [(0, "pool", 1, 2), (1, "pool", 1, 2), (0, "other", 1, 2), (0, "pool", 2, 1), (0, "pool", 12), (0, "pool", "1", 2)]
    assert len({tuple(draw(*k)) for k in keys}) == len(keys)
    assert draw(0, "pool", 1, 2)[0] == pytest.approx(1.55463, abs=1e-4)        # the numbers of a key are for ever
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())                            # and the global state is left alone


def test_permutation():
    assert sorted(permutation(50, 0, "order", 1)) == list(range(50)) and permutation(0, 1) == []
    assert permutation(50, 0, "order", 1) == permutation(50, 0, "order", 1) != permutation(50, 0, "order", 2)


def test_share_deals_everything_out_once():
    for count in (0, 1, 3, 8):
        for world in (1, 2, 5):
            shares = [Processes(rank, world, torch.device("cpu")).share(count) for rank in range(world)]
            assert sorted(i for s in shares for i in s) == list(range(count)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_clock_adds_phases_up():
    calls = Calls()
    for phase in ("a", "b", "a"):
        with calls.phase(phase):
            sum(range(20_000))
    assert len(calls.marks) == 3
    seconds = calls.seconds()
    assert seconds.keys() == {"a", "b"} and seconds["a"] > 0 and calls.seconds() == {}
    with calls.phase("outer"), calls.phase("inner"):
        pass
    assert [phase for phase, _, _ in calls.marks] == ["outer", "inner", "outer"]


# Files

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing\nmore")])
def test_write_atomic_leaves_the_old_file_on_failure(tmp_path, error):
    path = tmp_path / "lora.bin"
    write_atomic(path, lambda p: p.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half a f")
        raise error

    with pytest.raises(InputError, match="lora.bin: cannot be written") as caught:
        write_atomic(path, fail)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["lora.bin"]
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, lambda p: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="cannot be written"):
        write_json(path / "such.json", 1)
    write_json(tmp_path / "new" / "folder" / "such.json", 1)
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["such.json"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path, mask, mode):
    """safetensors makes files that only their owner reads."""
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "a.safetensors", functools.partial(save_file, dict(a=torch.zeros(2))))
        write_json(tmp_path / "a.json", 1)
        run = open_run(tmp_path / "run")
        run.log(dict(a=1))
        run.save(1, dict(value=1))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 7 and {path.stat().st_mode & 0o777 for path in files} == {mode}


class Full(io.BytesIO):
    """A file on a disk that is full after the first piece."""

    def write(self, data) -> int:
        if self.tell():
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    """torch.save fails once more while it closes its archive, with "unexpected pos 704 vs 598"."""
    run = open_run(tmp_path)
    run.save(1, dict(value=1))
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: Full() if a == ("wb",) else real(path, *a, **k))
    with pytest.raises(InputError, match=r"checkpoint-000002.pt: cannot be written \(No space left on device\); what was saved before is untouched$"):
        run.save(2, dict(value=torch.zeros(9999)))
    monkeypatch.undo()
    assert run.resume()["value"] == 1


def test_what_is_written_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    """And half a character, of a file name in another code page, is spelt out."""
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii", raising=False)
    training.write_text(tmp_path / "a.md", "± 提示 \udcff\n")
    assert (tmp_path / "a.md").read_bytes() == "± 提示 \\udcff\n".encode()


def test_every_text_file_names_its_encoding():
    """Elsewhere than on a machine of UTF-8 these would be written, or read, in another one."""
    nameless = [f"{path.relative_to(ROOT)}:{call.lineno}" for path in OURS for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", "")) in ("write_text", "read_text", "open")
                and not (isinstance(call.func, ast.Name) and call.func.id == "write_text")          # training's own
                and not any(k.arg == "encoding" for k in call.keywords) and "Image.open" not in ast.unparse(call.func)
                and "os.open" != ast.unparse(call.func) and "'rb" not in ast.unparse(call) and "'wb'" not in ast.unparse(call)]
    assert not nameless


@pytest.mark.parametrize("code_page", ["ascii", "cp1252"])
def test_what_is_printed_survives_every_code_page(code_page, monkeypatch):
    """A picture's path, a caption, half a character of a file name."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding=code_page) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)

    def main():
        print("提示/p.png ± \udcff")
        training.warn("Привет")
        raise InputError("一只猫: not found")
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    out.flush()
    assert caught.value.code == 2 and out.buffer.getvalue().startswith(b"\\u63d0\\u793a/p.png ")
    assert errors.buffer.getvalue().endswith(b"error: \\u4e00\\u53ea\\u732b: not found\n")


@pytest.mark.parametrize("buffering", [-1, 1], ids=["block", "line"])
def test_what_nobody_reads_any_more_ends_no_work(buffering, monkeypatch):
    """`| head`, a `tee` that has ended: no message, no traceback, the exit status is the work's own, and a flush at the end says nothing."""
    streams = []
    for name in ("stdout", "stderr"):
        read, write = os.pipe()
        os.close(read)
        streams.append(open(write, "w", buffering, encoding="utf-8"))
        monkeypatch.setattr(sys, name, streams[-1])

    def main():
        for _ in tqdm(range(3), mininterval=0):
            print("x" * 5000)
        print("said at once", flush=True)
        training.warn("heard by nobody")
        raise InputError("reached")

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2 and "reached" in str(caught.value.__context__)
    for stream in streams:
        print("what remains in the buffer", file=stream)
        stream.close()


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:0", "cuda:", "meta"])
def test_a_device_that_is_not_there_is_one_line(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=f"^--device {device}: (must be cpu or cuda|torch finds 0 GPUs here, none for process 0)$"):
        start_processes(device)


def test_memory_is_held_on_a_cpu():
    """Three tensors of 24 MB, freed and made again: without hold_memory pages of them are faults again, thousands a time."""
    start_processes("cpu")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            tensors = [torch.ones(6 * 2 ** 20) for _ in range(3)]
            del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # The first rounds may still find room in the heap that was never touched.
    assert min(faults() for _ in range(5)) < 2_000


@pytest.mark.parametrize("device", ["mps", "mps:0"])
def test_apples_gpus_are_refused_with_the_reason(device):
    with pytest.raises(InputError, match=f"^--device {device}: not tried on Apple's GPUs; cpu works$"):
        start_processes(device)


@dataclass
class Settings:
    """A run's configuration."""
    out: str = ""
    lr: float = 1.0
    rounds: int = 3


def open_run(folder, **config) -> Run:
    """A run of one process."""
    return Run(str(folder), Settings(out=str(folder), **config), Processes(0, 1, torch.device("cpu")), ("out", "rounds"))


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """Run installs its own."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for n, handler in before.items():
        signal.signal(n, handler)


def test_run_refuses_another_configuration(tmp_path):
    folder, config = tmp_path / "run", tmp_path / "run/config.json"
    open_run(folder, lr=5.0)
    open_run(folder).log(dict(step=1))                                          # corrected before anything was done
    open_run(folder, rounds=9)                                                  # free
    assert json.loads(config.read_text())["rounds"] == 9
    with pytest.raises(InputError, match=r"holds a run with other options \(lr 1.0, now 2.0\); choose another --out or repeat its options"):
        open_run(folder, lr=2.0)
    assert json.loads(config.read_text())["lr"] == 1.0                          # refused, not overwritten
    config.write_text(json.dumps(dict(out="x", rounds=3)))                      # from before --lr existed: it had what is the default now
    open_run(folder)
    for content in (b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"act_fn": "silu"}', json.dumps(dict(lr=1.0, gone=2)).encode()):
        config.write_bytes(content)                                             # the sixth is a model's, the last of an option we lost
        with pytest.raises(InputError, match="run folder|no run's|other options") as caught:
            open_run(folder)
        assert "\n" not in str(caught.value) and config.read_bytes() == content
    (folder / "log.jsonl").unlink()
    config.write_text('{"act_fn": "silu"}')
    with pytest.raises(InputError, match="act_fn"):                             # not even where no run has been
        open_run(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        open_run(tmp_path / "file" / "run")


def test_what_killed_writes_left_is_swept_up(tmp_path):
    (tmp_path / "best").mkdir()
    for name in (".lora.bin.123.tmp", "best/.lora.bin.77.tmp", "best/.tmpDyRXjF", "mine.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("")
    open_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".mine.tmp", "best", "config.json", "mine.tmp"]
    assert not list((tmp_path / "best").iterdir())


def test_the_sweep_leaves_other_runs_alone(tmp_path):
    """Whatever lies in a folder below that is no part of this run, and a run there even if it is called as a part is."""
    kept = [tmp_path / name for name in ("child/.checkpoint-000001.pt.99.tmp", "best/.checkpoint-000001.pt.99.tmp", "best/.lock")]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    open_run(tmp_path)
    assert all(path.exists() for path in kept)


def test_two_processes_never_share_a_folder(tmp_path):
    """Another process is refused while this one is there; a killed one has given the folder back."""
    with pytest.raises(InputError, match="file/run: cannot be used as a run folder"):
        (tmp_path / "file").write_text("")
        lock(tmp_path / "file/run")
    dead = tmp_path / "run"
    with taken(dead) as other:
        with pytest.raises(InputError, match=rf"{dead}: another process is at work in it \(.*process {other}\); wait until that ends"):
            open_run(dead)
        assert [p.name for p in dead.iterdir()] == [".lock"]
    open_run(dead)
    open_run(dead)                                  # the same process may


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", none)
    lock(tmp_path)
    assert "no locks here ([Errno 37] No locks available); never start two runs" in capsys.readouterr().err


def test_a_checkpoint_belongs_to_the_configuration_inside_it(tmp_path):
    """Also where config.json was removed, or made to say what the new command does."""
    open_run(tmp_path, lr=5.0).save(1, dict(value=1))
    config = tmp_path / "config.json"
    for content in (None, json.dumps(dict(out="", lr=2.0, rounds=3))):
        config.unlink()
        if content:
            config.write_text(content)
        with pytest.raises(InputError, match=r"holds a run with other options \(lr 5.0, now 2.0\)"):
            open_run(tmp_path, lr=2.0)
        assert (config.read_text() if content else config.exists()) == (content or False)
        config.unlink(missing_ok=True)
        assert open_run(tmp_path, lr=5.0, rounds=9).resume()["value"] == 1 and json.loads(config.read_text())["lr"] == 5.0


def rewrite(path: Path, **changes) -> None:
    """Another content of a checkpoint, with a checksum that is right; None takes a key out."""
    state = torch.load(path, weights_only=True) | changes
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    write_json(path.with_suffix(".json"), dict(step=1, score=None, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


def test_a_checkpoint_of_before_it_held_its_configuration_resumes(tmp_path):
    run = open_run(tmp_path)
    run.save(1, dict(value=1))
    rewrite(tmp_path / "checkpoint-000001.pt", config=None)
    assert open_run(tmp_path).resume()["value"] == 1


@pytest.mark.parametrize("change", [
    dict(step=None), dict(step="1"), dict(step=2), dict(log_bytes=None), dict(log_bytes="x"), dict(log_bytes=-5), dict(identity=3), dict(identity=["x"])], ids=str)
def test_another_content_under_a_right_checksum_is_one_line(tmp_path, change):
    run = open_run(tmp_path)
    run.log(dict(a=1))
    run.save(1, dict(value=1))
    rewrite(tmp_path / "checkpoint-000001.pt", **change)
    with pytest.raises(InputError, match="its newest checkpoint is whole, but not of such a run") as caught:
        run.resume()
    assert "\n" not in str(caught.value) and log_of(tmp_path) == [dict(a=1)]


@pytest.mark.parametrize("content", [[1], 3, torch.zeros(3)], ids=str)
def test_a_checkpoint_that_is_none_is_one_line(tmp_path, content):
    open_run(tmp_path).save(1, dict(value=1))
    path = tmp_path / "checkpoint-000001.pt"
    torch.save(content, path)
    write_json(path.with_suffix(".json"), dict(step=1, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    with pytest.raises(InputError, match="but not of such a run"):
        open_run(tmp_path).resume()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 no archive"], ids=str)
def test_a_file_with_a_right_checksum_that_is_no_archive_is_damaged(tmp_path, content):
    run = open_run(tmp_path)
    run.save(1, dict(value=1))
    run.save(2, dict(value=2))
    path = tmp_path / "checkpoint-000002.pt"
    path.write_bytes(content)
    write_json(path.with_suffix(".json"), dict(step=2, sha256=hashlib.sha256(content).hexdigest()))
    assert open_run(tmp_path).resume()["value"] == 1


def test_moments_of_another_shape_are_refused():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    saved = optimizer.state_dict()
    training.restore_optimizer(optimizer, saved)
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="moments of the shape"):
        training.restore_optimizer(optimizer, saved)


@dataclass
class Renamed:
    """The same configuration after `lr` was called otherwise, with a word of tiny's files."""
    out: str = ""
    rate: float = opt(1.0, "x", old="lr")
    rounds: int = 3
    prompts: str = "/here/tiny/model/train_prompts.txt"


def test_old_names_and_other_places_resume(tmp_path):
    """An option's old name in config.json and checkpoint, and the project at another place."""
    def renamed(**options) -> Run:
        return Run(str(tmp_path), Renamed(**options), Processes(0, 1, torch.device("cpu")), ("out", "rounds"))

    open_run(tmp_path, lr=5.0).save(1, dict(value=1))
    assert renamed(rate=5.0).resume()["value"] == 1
    (tmp_path / "config.json").write_text(json.dumps(dict(out="", lr=5.0, rounds=3, prompts="/there/and/tiny/model/train_prompts.txt")))
    assert renamed(rate=5.0).resume()["value"] == 1
    assert json.loads((tmp_path / "config.json").read_text()) == dict(out="", rate=5.0, rounds=3, prompts="tiny/model/train_prompts.txt")
    with pytest.raises(InputError, match=r"\(prompts 'tiny/model/train_prompts.txt', now 'other.txt'; rate 5.0, now 2.0\)"):
        renamed(rate=2.0, prompts="other.txt")


def test_the_configuration_is_printed_at_once(tmp_path, capsys):
    open_run(tmp_path, lr=0.25)
    assert capsys.readouterr().out == f"settings of the program --out {tmp_path} --lr 0.25 (all: {tmp_path}/config.json)\n"


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_resume_takes_the_newest_sound_checkpoint(tmp_path, capsys):
    run = open_run(tmp_path)
    assert run.resume() is None
    for step in (1, 2, 3):
        run.log(dict(step=step))
        run.save(step, dict(value=torch.tensor([float(step)])))
    run.log(dict(step=4))
    names = lambda: sorted(p.name for p in tmp_path.glob("checkpoint-*"))  # noqa: E731
    assert names() == [f"checkpoint-00000{i}.{kind}" for i in (2, 3) for kind in ("json", "pt")]        # keep = 2
    state = run.resume()
    assert (state["step"], state["value"].item()) == (3, 3.0) and log_of(tmp_path) == [dict(step=s) for s in (1, 2, 3)]
    flip(tmp_path / "checkpoint-000003.pt")
    state = run.resume()
    assert (state["step"], state["value"].item()) == (2, 2.0) and log_of(tmp_path) == [dict(step=s) for s in (1, 2)]
    assert "checkpoint-000003.pt: damaged (checksum differs)" in capsys.readouterr().err
    assert "checkpoint-000003.pt.damaged" in names() and "checkpoint-000003.pt" not in names()
    run.save(3, dict(value=torch.tensor([5.0])))
    (tmp_path / "checkpoint-000003.json").unlink()
    assert run.resume()["step"] == 2


def test_new_checkpoints_outlive_damaged_ones(tmp_path):
    """Whoever went back past damaged checkpoints with higher numbers must not lose what is saved next."""
    run = open_run(tmp_path)
    for step in (5, 10, 15):
        run.save(step, dict(value=step))
    flip(tmp_path / "checkpoint-000015.pt")
    assert run.resume()["value"] == 10
    run.save(12, dict(value=12))
    assert run.resume()["value"] == 12
    for step in (999_999, 1_000_000, 1_000_001):                                # names grow longer: numbers are what counts
        run.save(step, dict(value=step))
    assert run.resume()["value"] == 1_000_001


def test_nothing_is_begun_anew_unasked(tmp_path, monkeypatch):
    """Neither damage of all checkpoints nor a fault of the machine deletes a log."""
    run = open_run(tmp_path)
    run.log(dict(step=1))
    run.save(1, dict(value=1))
    for error, raised in ((OSError(5, "Input/output error"), InputError), (MemoryError(), MemoryError)):
        with monkeypatch.context() as patch:
            patch.setattr("training.torch.load", lambda *_, e=error, **__: (_ for _ in ()).throw(e))
            with pytest.raises(raised):
                run.resume()
    assert run.resume()["value"] == 1
    flip(tmp_path / "checkpoint-000001.pt")
    for _ in range(2):
        with pytest.raises(InputError, match="none of its checkpoints is sound"):
            run.resume()
    assert log_of(tmp_path) == [dict(step=1)]
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    assert run.resume() is None and not (tmp_path / "log.jsonl").exists()       # killed before the first checkpoint


def test_a_log_that_lost_its_end_is_cut_at_a_line(tmp_path, capsys):
    run = open_run(tmp_path)
    for step in (1, 2, 3):
        run.log(dict(step=step))
    run.save(3, dict(value=3))
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-4])
    assert run.resume()["step"] == 3 and log_of(tmp_path) == [dict(step=1), dict(step=2)]
    assert log.read_bytes().endswith(b"\n") and "lines are missing" in capsys.readouterr().err


def test_other_prompts_under_the_same_name_are_noticed(tmp_path):
    run = open_run(tmp_path)
    run.resume(prompts=fingerprint(["a", "b"]), model="x")
    run.save(1, dict(value=1))
    assert run.resume(prompts=fingerprint(["a", "b"]), model="x", judge="younger than the checkpoint")["value"] == 1
    with pytest.raises(InputError, match="the prompts that this run was trained with"):
        run.resume(prompts=fingerprint(["a", "c"]), model="x")


def test_fingerprint():
    """Any training of any tensor changes it, a LoRA does not; texts are not run together."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 40))
    before = fingerprint(module)
    assert before == fingerprint(module) != fingerprint(module, module)
    module[1].lora_B = torch.nn.Parameter(torch.ones(3))
    assert fingerprint(module) == before and fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    module[1].bias.data[0] += 1e-6
    assert fingerprint(module) != before


def test_fingerprint_of_everything_a_picture_depends_on():
    """Weights behind a tensor's beginning, turned round, a configuration, a schedule, a tokenizer."""
    pipe, changed = load_pipeline("tiny"), load_pipeline("tiny")
    known = {fingerprint(*pipe.identity)}
    assert fingerprint(*changed.identity) in known

    def new() -> bool:
        known.add(found := fingerprint(*changed.identity))
        return len(known) == 1 + len(edits) and found in known

    weight, edits = changed.unet.conv_in.weight, []
    for edit in (lambda: weight.data.flatten()[-1:].mul_(1.5), lambda: weight.data.copy_(weight.flip(0)),
                 lambda: setattr(changed, "schedule", replace(changed.schedule, steps_offset=0)),
                 lambda: setattr(changed, "schedule", replace(changed.schedule, alphas_cumprod=changed.schedule.alphas_cumprod * 0.999)),
                 lambda: setattr(changed.vae, "config", replace(changed.vae.config, scaling_factor=2.0)),
                 lambda: setattr(changed.unet, "config", replace(changed.unet.config, attention_head_dim=8)),
                 lambda: setattr(changed, "zero_negative", True),
                 lambda: setattr(changed.tokenizers[0], "pad_token", "!"), lambda: setattr(changed.tokenizers[0], "padding_side", "left"),
                 lambda: setattr(changed.tokenizers[0], "truncation_side", "left"), lambda: changed.tokenizers[0].add_tokens(["<new>"])):
        edit()
        edits.append(edit)
        assert new()
    pipe.tokenizers[0](["a red circle"], padding="max_length", max_length=30)
    assert fingerprint(*pipe.identity) in known, "use changes nothing"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans(), sidecar=st.booleans())
def test_any_damage_is_noticed(tmp_path_factory, place, flip, cut, sidecar):
    """One byte changed or the end cut off, of a checkpoint or of its checksum: never a wrong state, never a crash."""
    run = open_run(tmp_path_factory.mktemp("damage"))
    for step in (1, 2):
        run.save(step, dict(value=torch.full((8,), float(step))))
    path = run.folder / ("checkpoint-000002.json" if sidecar else "checkpoint-000002.pt")
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data[at] ^= flip
    path.write_bytes(data[:at] if cut else data)
    state = run.resume()
    assert state["value"].tolist() == [state["step"]] * 8 and (state["step"] == 1 or sidecar)


@pytest.mark.parametrize("shape", [(1 << 60,), (1, 10 ** 17, 4, 8, 8), (10 ** 17, 10 ** 17)], ids=str)
def test_too_little_memory_names_the_options(capsys, shape):
    def main():
        torch.empty(shape, dtype=torch.uint8)
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2 and "--sample_batch" in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), MemoryError()], ids=str)
def test_so_does_too_little_on_a_gpu(capsys, error):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2 and "error: out of memory; try --memory low" in capsys.readouterr().err


def test_the_best_checkpoint_stays(tmp_path):
    run = open_run(tmp_path)
    assert run.is_best(-9) and not run.is_best(None)
    for step, score in enumerate((1, 5, 2, None, 3), 1):
        assert run.is_best(score) == (step < 3)
        run.save(step, dict(value=step), score)
    assert [int(p.stem[-6:]) for p in sorted(tmp_path.glob("checkpoint-*.pt"))] == [2, 4, 5]        # the best and the last two
    assert run.is_best(6) and not run.is_best(5) and run.resume()["step"] == 5
    (tmp_path / "checkpoint-000002.json").write_text("{")                                           # damaged: no longer the best
    assert run.is_best(4)


def test_checkpoints_never_run_code(tmp_path, capsys):
    run = open_run(tmp_path)
    run.save(1, dict(value=1))
    run.save(2, dict(value=Path("a pickled object")))
    assert run.resume()["value"] == 1 and "pickles with code are never run" in capsys.readouterr().err


def test_signals(tmp_path, monkeypatch):
    """One saves and leaves, SIGTERM also if it comes twice, or Ctrl-C with torchrun's echo; a second Ctrl-C leaves at once."""
    run, now = open_run(tmp_path), [100.0]
    monkeypatch.setattr("training.time.monotonic", lambda: now[0])
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        assert run.processes.stop
        now[0] += 0.9
    now[0] += 3
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_ends_what_may_be_dropped(tmp_path):
    processes, done = open_run(tmp_path).processes, []
    with processes.droppable():
        done.append(3)
    assert done.pop() == 3 and not processes.dropping
    with pytest.raises(Stopped), processes.droppable():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("all")
    assert not done and processes.stop and not processes.dropping
    with pytest.raises(Stopped), processes.droppable():                         # asked before: not even begun
        done.append("all")
    assert not done and not processes.dropping


def test_log_is_valid_json(tmp_path):
    run = open_run(tmp_path)
    run.log(dict(a=1.23456789, b=2, c=dict(d=0.5)))
    assert log_of(tmp_path) == [dict(a=1.23457, b=2, c=dict(d=0.5))]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a run folder"):
        open_run(tmp_path / "file/run")
    run = open_run(tmp_path / "run")

    def denied(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(InputError, match="Permission denied.*what was saved before is untouched"):
        run.save(1, dict(value=1))
    assert sorted(p.name for p in run.folder.iterdir()) == [".lock", "config.json"]


def test_a_log_value_may_not_be_finite(tmp_path):
    """A diverged run can still be read, by every reader of JSON."""
    open_run(tmp_path).log(dict(loss=math.nan, norms=[math.inf, 1.0], parts=dict(a=-math.inf), step=3))
    write_json(tmp_path / "new.json", dict(a=(1.5, math.nan)))
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail) == dict(
        loss=None, norms=[None, 1.0], parts=dict(a=None), step=3)
    assert json.loads((tmp_path / "new.json").read_text(), parse_constant=pytest.fail) == dict(a=[1.5, None])
