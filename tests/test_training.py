"""training.py: options, keyed random numbers, run folders, checkpoints, prompts files."""
import json
import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calls import Calls
from helpers import log_of
from loading import load_pipeline
from training import (
    Processes,
    Run,
    Stopped,
    fingerprint,
    generator,
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
    start: str = opt("random", "where from", ("random", "win"))
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
    assert parse("--start=win").start == "win" and parse("--lr", "-1e-3").lr == -0.001


@pytest.mark.parametrize("words, says", [
    (("--step", "3"), "did you mean --steps?"), (("--checkpoint",), "did you mean --checkpointing?"), (("--zzz", "3"), "see --help"),
    (("--steps=x",), "--steps x"), (("--steps", "1.5"), "--steps 1.5"), (("--checkpointing", "maybe"), "true or false"),
    (("--start", "lose"), "choose one of random, win"), (("--steps",), "--steps"), (("word",), "'word'"),
    (("--lr", "nan"), "--lr nan: must be a finite number"), (("--lr=-inf",), "finite"), (("--steps", "1" + 30 * "0"), "at most 18 digits"),
    (("--steps", "9" * 5000), "whole number"), (("--share", "0"), "--share 0.0: must be above 0 and at most 1"), (("--share", "1.1"), "--share 1.1"),
    (("--share", "nan"), "finite"), (("--batch", "0"), "must be at least 1 and below 9"), (("--batch", "9"), "--batch 9")])
def test_mistakes_are_one_line_with_a_suggestion(words, says):
    with pytest.raises(InputError) as caught:
        parse(*words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in Options.__dataclass_fields__) and "100 % of it [0.0001; sdxl: 1e-05; tiny: 0.5]" in text and "one of random, win [random]" in text
    assert "of it; above 0 and at most 1 [0.5]" in text


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


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:0", "cuda:", "meta"])
def test_a_device_that_is_not_there_is_one_line(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=f"^--device {device}: (must be cpu or cuda|torch finds 0 GPUs here, none for process 0)$"):
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
    with pytest.raises(InputError, match=r"holds a run with other options \(lr\)"):
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
    for name in (".lora.bin.123.tmp", "best/.lora.bin.77.tmp", "mine.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("")
    open_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "best", "config.json", "mine.tmp"]
    assert not list((tmp_path / "best").iterdir())


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
                 lambda: changed.tokenizers[0].add_tokens(["<new>"])):
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


def test_too_little_memory_names_the_options(capsys):
    def main():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2 and "--sample_batch" in capsys.readouterr().err


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
    run = open_run(tmp_path)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        assert run.processes.stop
    monkeypatch.setattr("training.time.monotonic", lambda: run.asked + 3)
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
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.json"]


def test_a_log_value_may_not_be_finite(tmp_path):
    """A diverged run can still be read."""
    open_run(tmp_path).log(dict(loss=math.nan))
    assert math.isnan(log_of(tmp_path)[0]["loss"])
