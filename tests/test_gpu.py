"""benchmarks/gpu.py, the one command for a GPU: it is rehearsed on a CPU, skips what is held, ends in time and loses nothing."""
import contextlib
import json
import sys
import time

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cost  # noqa: E402
import gpu  # noqa: E402
import gpu_tables  # noqa: E402


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command with these words; returns what it printed and the records by name."""
    def command(*words: str, fail: str = "") -> tuple[str, dict]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--work", str(tmp_path), *words])
        with pytest.raises(gpu.InputError, match=fail) if fail else contextlib.nullcontext():
            gpu.main()
        file = tmp_path / "dry/gpu_dry_cpu.json"
        found = json.loads(file.read_text())["records"] if file.exists() else []
        return capsys.readouterr().out, {r["name"]: r for r in found}
    return command


def script(tmp_path, text: str):
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_the_plan_runs_nothing(run, tmp_path):
    said, records = run("--plan", "--dry")
    assert all(entry.name in said for entry in gpu.entries()) and "expected on an H100" in said
    assert not records and not list(tmp_path.iterdir())
    order = [entry.name.split()[0] for entry in gpu.entries()]
    assert order[:6] == ["spo", "spo", "round", "round", "setting", "setting"] and order[-1] == "tests"


def test_a_rehearsal_then_nothing_is_left_to_do(run, tmp_path):
    """SDXL at random weights in the official layout: trained, stopped, resumed, once under a cap; rounds beside the official recipe's."""
    names = ("spo sdxl", "setting sdxl low", "round sd15")
    said, records = run("--dry", "--only", *names)
    one, other = records["spo sdxl"]["found"], records["setting sdxl low in 24 GB"]["found"]
    assert one["status_when_stopped"] == 143 and [row["round"] for row in one["log"]] == list(range(1, len(one["log"]) + 1)) and one["log"][1:]
    assert all(row["pairs"] > 0 and row["valid_share"] == 1 for row in one["log"]) and one["checkpoint_bytes"] > one["lora_bytes"]
    assert other["fits"] and other["seconds_per_prompt"] > 0 and "| sdxl | `--memory low` | 24 | yes |" in said
    assert set(records["round sd15"]["found"]["bench"]["sides"]) >= {"official", "eager"}
    assert not (tmp_path / "entry").exists() and (tmp_path / "said/spo_sdxl.txt").exists()
    said, again = run("--dry", "--only", *names)
    assert said.count(": held") == 3 and again == records
    assert ": held" not in run("--plan", "--dry", "--only", "round sdxl")[0] and "; held" in run("--plan", "--dry", "--only", "spo")[0]


def test_a_crash_and_limits_lose_nothing(run, tmp_path, monkeypatch):
    """A crash, an endless process, one that eats memory, one that fails, between sound ones. All are written at once; none is tried twice but those."""
    tried = []

    def entry(name, measure):
        def noted(place):
            tried.append(name)
            place.found["begun"] = True
            measure(place)
        return gpu.Entry(name, "a test", 1, noted)

    def fine(place):
        place.must(script(tmp_path, "print('fine')"))
        place.found["value"] = len(json.loads((tmp_path / "dry/gpu_dry_cpu.json").read_text())["records"]) if tried[1:] else 0

    def endless(place):
        place.end = time.monotonic() + 0.5
        place.must(script(tmp_path, "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"))

    def greedy(place):
        place.ram = 300e6
        place.must(script(tmp_path, "import time\nx = b'1' * 600_000_000\ntime.sleep(600)"))

    def crash(place):
        raise ZeroDivisionError("as it happens")

    def failing(place):
        place.must(script(tmp_path, "import sys\nprint('what went wrong')\nsys.exit(3)"))

    queue = [entry("a", fine), entry("crash", crash), entry("endless", endless), entry("greedy", greedy), entry("failing", failing),
             entry("b", fine)]
    monkeypatch.setattr(gpu, "entries", lambda: queue)
    bad = "rehearsed, but not to the end: crash, endless, greedy, failing"
    said, records = run("--dry", fail=bad)
    assert tried == ["a", "crash", "endless", "greedy", "failing", "b"]
    assert {name: r["state"] for name, r in records.items()} == dict(
        a="done", crash="failed", endless="stopped", greedy="stopped", failing="stopped", b="done")
    assert all(r["found"]["begun"] for r in records.values()) and records["b"]["found"]["value"] == 5
    assert "time was over" in records["endless"]["error"] and "memory" in records["greedy"]["error"]
    assert "what went wrong" in records["failing"]["said"] and "status 3" in said and "ZeroDivisionError: as it happens" in said

    tried.clear()
    queue.insert(3, entry("c", fine))
    _, again = run("--dry", fail="crash, endless, greedy, failing")
    assert tried == ["c", "crash", "endless", "greedy", "failing"]              # what failed before comes last
    assert again["a"] == records["a"] and again["c"]["state"] == "done"
    tried.clear()
    run("--dry", "--minutes", "0.1", fail=bad)      # less than what the tables need
    assert not tried
    run("--dry", "--only", "a")                         # other entries' faults are not this one's


def test_a_poorer_record_takes_no_better_ones_place():
    def record(state, left_out=(), **found):
        return dict(name="n", versions={"torch": "1"}, state=state, left_out=list(left_out), found=found)

    done, part, nothing = record("done", x=1, y=2), record("stopped", x=1), record("failed")
    assert gpu.keep([done], part) == [done] and gpu.keep([part], nothing) == [part] and gpu.keep([part], done) == [done]
    assert gpu.keep([done], newer := record("done", x=3, y=4)) == [newer]
    lacking = record("done", ["official"], x=1)
    assert gpu.keep([lacking], done) == [done] and gpu.keep([done], lacking) == [done]
    other = done | dict(versions={"torch": "2"})
    assert gpu.keep([done], other) == [done, other]


def test_what_is_left_out_is_named_and_caught_up_on(run, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    said, _ = run("--plan", "--dry")
    assert "without official (requirements-dev.txt)" in said and "left out: needs pytest, diffusers" in said
    card, entry = gpu.this_card(True), next(e for e in gpu.entries() if e.name == "round sd15")
    held = dict(name=entry.name, versions=card["versions"], state="done", left_out=["official"], found={})
    assert gpu.is_held([held], entry, card)
    monkeypatch.undo()
    assert not gpu.is_held([held], entry, card)


def test_without_a_gpu_it_says_so(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(gpu.InputError, match="--dry"):
        run()


def between(page) -> str:
    return page.read_text(encoding="utf-8").partition(gpu_tables.MARKS[0] + "\n")[2].partition(gpu_tables.MARKS[1])[0]


def test_the_pages_show_what_the_results_say(tmp_path, capsys):
    assert between(cost.PAGE) == "\n".join(cost.page()), "run benchmarks/cost.py"
    copy = tmp_path / "page.md"
    copy.write_text(gpu.README.read_text(encoding="utf-8"), encoding="utf-8")
    gpu.write_tables(gpu.RESULTS, copy)
    assert copy.read_text(encoding="utf-8") == gpu.README.read_text(encoding="utf-8"), "run benchmarks/gpu.py --tables"


def test_hours_by_hand_and_measured_ones_win(tmp_path):
    parts = dict(device="a card", sides=dict(compiled=dict(seconds_per_prompt=0.9, peak_bytes=5e9, tflops=400.0)))
    (tmp_path / "parts_sd15_h100.json").write_text(json.dumps(parts))
    table = cost.hours(tmp_path)
    assert "| 5.0 | 0.90 | 10 | measured in parts, a card |" in table[3]                # 40,000 x 0.9 / 3600
    assert f"| {1696 / 400:.2f} | {40_000 * 1696 / 400 / 3600:.0f} | calculated |" in table[6]
    sides = dict(compiled=dict(seconds_per_prompt=1.8, peak_bytes=6e9))
    records = [dict(name="round sdxl", found=dict(bench=dict(sides=sides))),
               dict(name="setting sdxl low in 24 GB", found=dict(peak_memory_gb=21.5))]
    (tmp_path / "gpu_a.json").write_text(json.dumps(dict(card="another", memory_gb=85.0, records=records)))
    table = cost.hours(tmp_path)
    assert "| 6.0 | 1.80 | 20 | measured, another |" in table[6] and "| 21.5 |" in table[5] and "calculated" in table[5]
    assert "| 0.45 | 5 | measured, another; over 4: calculated |" in table[7]
