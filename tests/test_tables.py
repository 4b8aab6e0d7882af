"""experiments/tables.py: budgets, the choice of learning rates, intervals, and what is fixed before it is run."""
import json
import math
import sys

import pytest
from scipy import stats

from helpers import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import tables  # noqa: E402


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Nothing of the repository's own is touched."""
    monkeypatch.setattr(tables, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results/tables.json")
    return tmp_path


def test_budgets_are_reached_at_the_first_round_that_has_them(tmp_path):
    rows = [dict(round=i + 1, updates=u, evaluations=e, seconds=dict(a=1.0, b=0.5), score=None) for i, (u, e) in
            enumerate([(30, 9000), (29, 9000), (1, 9000), (5, 9000)])]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    log = tables.read_log(tmp_path)
    assert [r["updates"] for r in log] == [30, 59, 60, 65] and log[-1]["evaluations"] == 36_000 and log[1]["seconds"] == 3.0
    assert tables.reach(log, "updates", 60)["round"] == 3 and tables.reach(log, "evaluations", 9000)["round"] == 1
    assert tables.reach(log, "updates", 1000)["round"] == 4 and tables.read_log(tmp_path / "none") == []


@pytest.mark.parametrize("best, tried", [(4e-4, 3), (1.6e-3, 4), (6.4e-3, 5), (1e9, 5), (2.5e-5, 5), (0.0, 5)])
def test_a_rate_at_the_end_of_the_grid_is_not_taken_for_the_best(results, monkeypatch, best, tried):
    """The score is highest nearest to `best`; the grid follows it, by at most two."""
    monkeypatch.setattr(tables, "train", lambda name, options, seed: results / f"{options['lr']:g}")
    monkeypatch.setattr(tables, "read_log", lambda folder: [dict(evaluations=10 ** 9, round=1)])
    judge = lambda folder, which: dict(pickscore=[-abs(math.log(float(folder.parent.parent.name)) - math.log(best or 1e-9))])  # noqa: E731
    chosen = tables.choose_rate("mapo", judge)
    kept = json.loads(tables.RESULTS.read_text())["rates"]["mapo"]
    assert kept["chosen"] == chosen and len(kept["pickscore"]) == tried
    if 1e-5 < best < 1:
        assert chosen == pytest.approx(best)


def test_interval_is_students():
    values = [0.1, 0.4, 0.3]
    half = stats.t.ppf(0.975, 2) * stats.sem(values)
    assert tables.interval(values) == f"{sum(values) / 3:+.3f} ± {half:.3f}"
    assert tables.interval([0.25]) == "+0.250 (1 seed)" and tables.interval([1.0, 2.0]).endswith("(2 seeds)")


def arm(*gains: float) -> dict:
    return {str(s): dict(evaluations=dict(aesthetics=dict(difference=g))) for s, g in enumerate(gains)}


@pytest.mark.parametrize("better, worse, word", [
    ((2.0, 2.2, 2.1), (1.0, 1.1, 1.2), "reproduced"), ((1.0, 1.1, 1.2), (2.0, 2.2, 2.1), "the reverse"),
    ((2.0, 2.2, 2.1), (2.01, 2.19, 2.1), "tie"), ((2.0, 2.9, 2.1), (1.9, 1.8, 2.1), "undecidable"),
    ((2.0, 2.2), (1.0, 1.1, 1.2), "too few seeds")])
def test_a_verdict_by_hand(better, worse, word):
    """Paired over seeds; interval and p-value are scipy's."""
    found = tables.verdict(arm(*better), arm(*worse))
    assert found["verdict"] == word
    if word != "too few seeds":
        theirs = stats.ttest_rel(better, worse)
        low, high = theirs.confidence_interval(0.95)
        assert [found["low"], found["high"], found["p"]] == pytest.approx([low, high, theirs.pvalue], rel=1e-3)


def test_holm_by_hand():
    assert tables.holm([0.03, 0.001, 0.02, 0.9]) == [False, True, False, False]        # .02 > .05 / 3
    assert tables.holm([0.02, 0.001, 0.016]) == [True, True, True] and tables.holm([]) == []


def test_the_page_shows_the_verdicts_of_the_json():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert "\n".join(tables.render_verdicts(tables.kept())[1:]).strip() in page
    assert all(a in tables.TABLES[n][1] and b in tables.TABLES[n][1] for n, a, b in tables.CLAIMS)


def test_results_of_several_processes_are_merged(results):
    tables.keep(["arms", "a", "0"], 1)
    tables.keep(["arms", "a", "1"], 2)
    tables.keep(["arms", "b", "0"], 3)
    assert json.loads(tables.RESULTS.read_text())["arms"] == {"a": {"0": 1, "1": 2}, "b": {"0": 3}}


def test_what_was_not_run_says_so(results):
    text = tables.render()
    assert text.count("not measured") >= sum(len(names) for _, names, _ in tables.TABLES.values())
    point = dict(round=3, updates=61, evaluations=25_100, seconds=9.0, score=1.0,
                 **{m: dict(mean=9.0, difference=d, difference_standard_error=0.1, win_rate=0.9) for m, d in zip(tables.METRICS, (2.0, -0.01, 0.5))})
    for seed in "012":
        tables.keep(["arms", "as the demo", seed], dict(updates=point, evaluations=point))
    line = next(row for row in tables.render().splitlines() if row.startswith("| as the demo") and "21.43" in row)
    assert "+2.000 ± 0.000" in line and "-0.010 ± 0.000" in line and "61 / 25,100" in line


def test_every_arm_is_a_command_that_the_trainers_understand():
    """Options exist, and tables name known arms only."""
    import baselines
    import spo_train
    from training import parse_options
    for options in [*tables.METHODS.values(), *tables.ARMS.values()]:
        module = baselines if options.get("script") == "baselines.py" else spo_train
        words = [w for k, v in options.items() if k != "script" for w in (f"--{k}", str(v))]
        kind = baselines.BaselineConfig if module is baselines else spo_train.SPOConfig
        config = parse_options(kind, module.PRESETS, words)
        if module is spo_train:
            spo_train.check(config)
            assert spo_train.pool_groups([951 - 50 * i for i in range(20)], config.t_min, config.t_max, config.j)
    for number, (_, names, _) in tables.TABLES.items():
        assert set(names) <= set(tables.METHODS if number == "1" else tables.ARMS)


def test_what_is_there_is_not_run_again(results, monkeypatch):
    monkeypatch.setattr(tables, "train", lambda *_: pytest.fail("trained again"))
    tables.keep(["arms", "a", "0"], dict(updates=1))
    tables.keep(["rates", "spo"], dict(chosen=4e-4))
    tables.measure("a", "a", {}, 0, None)
    assert tables.choose_rate("spo", None) == 4e-4 and tables.kept("arms", "a", "1") is None
