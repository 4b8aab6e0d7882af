"""Several processes train what one trains; a run that was stopped, however, ends as one that was not."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import gentle
from conftest import assert_close
from helpers import PROMPTS, ROOT, Job, call, environment, log_of, run_script_here, together, torchrun

LORA = "pytorch_lora_weights.safetensors"
# Seven prompts, three a round: shares of 2 and 1, and in each epoch's last round of 1 and none.
BASE = ("--dtype", "fp32", "--steps", "4", "--k", "2", "--prompts_per_round", "3", "--pairs_per_step", "4", "--lr", "1e-3",
        "--grid_every", "0", "--save_every", "2", "--device", "cpu")


@pytest.fixture
def kind(small, spm, prompts):
    """The options of a run but its folder and its length."""
    return ("--model", small, "--spm", spm, "--prompts", prompts, *BASE)


def assert_same_run(a, b, step: int) -> None:
    """LoRA, optimizer state and log agree bit for bit."""
    ours, theirs = load_file(a / LORA), load_file(b / LORA)
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    first, second = (torch.load(f / f"checkpoint-{step:06d}.pt", weights_only=True) for f in (a, b))
    assert first["step"] == second["step"] == step and all(torch.equal(x, y) for x, y in zip(first["lora"], second["lora"], strict=True))
    one, two = first["optimizer"], second["optimizer"]
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys() and one["state"]
    for i, values in one["state"].items():
        assert all(torch.equal(v, two["state"][i][k]) for k, v in values.items())
    assert log_of(a) == log_of(b) and len(log_of(a)) == step


def assert_close_loras(a, b) -> None:
    """The LoRAs of two run folders agree up to rounding."""
    ours, theirs = load_file(a / LORA), load_file(b / LORA)
    for key, value in ours.items():
        assert_close(theirs[key], value, what=key)


# Three prompts a round: four processes leave one without prompts. With threshold 0.95 a round has one pair, and one process none;
# more than 1 is impossible, so nobody ever has one. With train_batch 1, gradients accumulate; with j = 2 (MSPO) x_t are not shared.
@pytest.mark.parametrize("threshold, train_batch, j, processes", [(0.0, 10, 1, 2), (0.0, 1, 2, 3), (0.0, 10, 1, 4), (0.95, 10, 1, 2),
                                                                  (1.0, 10, 1, 3)])
def test_several_processes_train_what_one_trains(kind, tmp_path, monkeypatch, threshold, train_batch, j, processes):
    words = ("spo_train", *kind, "--lr", 0.005, "--rounds", 4, "--threshold", threshold, "--j", j)
    monkeypatch.setattr(torch.optim, "AdamW", gentle.adamw)
    call(*words, "--out", tmp_path / "one")
    together(*words, "--out", tmp_path / "two", "--train_batch", train_batch, processes=processes, adam=gentle.adamw)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5) for k in a), (a, b)
    few = [row["pairs"] for row in one]
    assert sum(few) == 0 if threshold == 1 else min(few) > 1 if not threshold else 1 in few
    ours, theirs = load_file(tmp_path / "one" / LORA), load_file(tmp_path / "two" / LORA)
    largest = max(float(v.abs().max()) for k, v in ours.items() if "lora_B" in k)
    assert ours.keys() == theirs.keys() and (largest == 0 if threshold == 1 else largest > 1e-4)
    assert_close_loras(tmp_path / "one", tmp_path / "two")


def test_mistakes_end_every_process(kind, tmp_path):
    """No process waits for one that has given up."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"lr": 5}')
    job = Job("spo_train", (*kind, "--rounds", 1, "--out", tmp_path / "run"), 2)
    assert job.wait() == [2, 2] and "holds a run with other options" in job.said("err")


def rounds_of(folder: Path) -> int:
    """How many rounds are logged so far."""
    return (folder / "log.jsonl").read_text().count("\n") if (folder / "log.jsonl").exists() else 0


def test_killed_ranks_are_restarted_and_the_run_ends_the_same(kind, tmp_path):
    """Rank 0 and, once that is mended, rank 1, under torchrun's own agent, which starts each process anew."""
    run, words = tmp_path / "run", (*kind, "--device", "cpu", "--rounds", 14, "--save_every", 1)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          run_id="killed", start_method="forkserver", monitor_interval=0.1, local_addr="127.0.0.1")
    arguments = ("spo_train", [*map(str, words), "--out", str(run)], gentle.Waiting, {}, str(tmp_path))

    def begun() -> list[int]:
        """The round that each start has begun with, so far."""
        return [int(n) for n in re.findall(r"starting at round (\d+);", (tmp_path / "out0").read_text())] if (tmp_path / "out0").exists() else []

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(elastic_launch(config, run_script_here), *arguments)
        for rank in (0, 1):
            while not job.done() and (len(begun()) <= rank or rounds_of(run) < begun()[rank] + 2):        # a checkpoint after the start's is there
                time.sleep(0.02)
            assert not job.done(), job.result()
            os.kill(int((tmp_path / f"pid{rank}").read_text()), signal.SIGKILL)
        job.result(300)
    together("spo_train", *words, "--out", tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole", 14)
    assert len(begun()) == 3 and 0 == begun()[0] < begun()[1] < begun()[2]


def test_without_restarts_a_killed_rank_ends_the_job_with_a_message(kind, tmp_path):
    """The one that is left says what happened; torchrun asks it to end, too."""
    job = Job("spo_train", (*kind, "--rounds", 500, "--epochs", 999, "--save_every", 1, "--out", tmp_path / "run"), 2)
    while rounds_of(tmp_path / "run") < 2 and job.processes[0].is_alive():
        time.sleep(0.02)
    job.processes[1].kill()
    os.kill(job.processes[0].pid, signal.SIGTERM)
    assert job.wait(60) == [1, -signal.SIGKILL]
    assert "another process is gone" in job.said("err") and "start the same command again" in job.said("err")


def test_stopped_and_continued_is_the_same_run(kind, tmp_path):
    """Four rounds; against two rounds, the same command again for four. Over an epoch's end, without random states saved."""
    call("spo_train", *kind, "--rounds", 4, "--out", tmp_path / "whole")
    call("spo_train", *kind, "--rounds", 2, "--out", tmp_path / "parts")
    assert len(log_of(tmp_path / "parts")) == 2
    half = load_file(tmp_path / "parts" / LORA)
    said = call("spo_train", *kind, "--rounds", 4, "--out", tmp_path / "parts")
    assert "starting at round 2" in said
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 4)
    assert any(not torch.equal(v, half[k]) for k, v in load_file(tmp_path / "parts" / LORA).items())
    assert "starting at round 4" in call("spo_train", *kind, "--rounds", 4, "--out", tmp_path / "parts")     # nothing left to do
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stopped_and_continued_on_a_gpu_is_the_same_run_up_to_rounding(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", gentle.adamw)
    words = ("spo_train", *kind, "--device", "cuda", "--lr", 0.005)
    call(*words, "--rounds", 4, "--out", tmp_path / "whole")
    call(*words, "--rounds", 2, "--out", tmp_path / "parts")
    assert "starting at round 2" in call(*words, "--rounds", 4, "--out", tmp_path / "parts")
    assert_close_loras(tmp_path / "whole", tmp_path / "parts")


def test_lost_work_is_done_again(kind, tmp_path):
    """Killed after round 3 was logged but not saved, and the last checkpoint damaged on top: back to the one before."""
    call("spo_train", *kind, "--rounds", 4, "--out", tmp_path / "whole", "--save_every", 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    newest = tmp_path / "parts/checkpoint-000004.pt"
    newest.write_bytes(newest.read_bytes()[:-7])
    (tmp_path / "parts" / LORA).unlink()
    assert "starting at round 3" in call("spo_train", *kind, "--rounds", 4, "--out", tmp_path / "parts", "--save_every", 1)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 4)


# A cluster's SIGTERM may reach torchrun and its children, so that these get two; Ctrl-C reaches the whole group, and torchrun repeats it.
@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_the_run_goes_on(kind, tmp_path, number, processes):
    """As a cluster or Ctrl-C stops a job: save, exit, soon; then the same command finishes the run."""
    out = tmp_path / "run"
    launch = torchrun(processes) if processes > 1 else []
    words = [sys.executable, *launch, "spo_train.py", *map(str, kind), "--rounds", "1000", "--epochs", "999", "--save_every", "500",
             "--out", str(out)]
    job = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    try:
        while job.poll() is None and not (out / "log.jsonl").exists():
            time.sleep(0.05)
        os.killpg(job.pid, number)
        _, errors = job.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert 'spo_train.py", line' not in errors and (job.returncode == 128 + number or processes > 1), errors[-3000:]      # torchrun shows its own
    saved = len(log_of(out))
    assert 1 <= saved < 1000 and (out / f"checkpoint-{saved:06d}.pt").exists() and (out / LORA).exists()
    # With as many threads as before: their number changes the order of sums.
    more = ("spo_train", *kind, "--rounds", saved + 1, "--epochs", 999)
    assert f"starting at round {saved}" in together(*more, "--out", out, processes=processes)
    together(*more, "--out", tmp_path / "whole", processes=processes)
    assert_same_run(out, tmp_path / "whole", saved + 1)


def test_result_does_not_depend_on_what_fits(kind, tmp_path, monkeypatch):
    """sample_batch, train_batch and decode_batch change the order of arithmetic, not the run."""
    monkeypatch.setattr(torch.optim, "AdamW", gentle.adamw)
    words = ("spo_train", *kind, "--lr", 0.005, "--rounds", 2)
    call(*words, "--out", tmp_path / "a")
    call(*words, "--out", tmp_path / "b", "--sample_batch", 1, "--train_batch", 1, "--decode_batch", 1)
    theirs = load_file(tmp_path / "b" / LORA)
    assert max(float(v.abs().max()) for k, v in theirs.items() if "lora_B" in k) > 1e-4
    assert_close_loras(tmp_path / "a", tmp_path / "b")


def test_seed_and_order_matter(kind, tmp_path):
    """Another seed is another run, and every epoch visits every prompt once."""
    call("spo_train", *kind, "--epochs", 1, "--out", tmp_path / "a")
    call("spo_train", *kind, "--epochs", 1, "--out", tmp_path / "b", "--seed", 1)
    assert len(log_of(tmp_path / "a")) == len(log_of(tmp_path / "b")) == -(-len(PROMPTS) // 3)
    assert log_of(tmp_path / "a")[0]["score"] != log_of(tmp_path / "b")[0]["score"]
