"""experiments/tables.py: budgets, the choice of learning rates, intervals, and what is fixed before it is run."""
import json
import math
import sys
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from helpers import ROOT
from weights import InputError, read_weights

sys.path.insert(0, str(ROOT / "experiments"))
import figures  # noqa: E402
import further  # noqa: E402
import overoptimization  # noqa: E402
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
    tuned = [tables.METHODS[m] | start | change for m, (start, rows) in tables.TUNING.items() for row in rows for change in row]
    for options in [*tables.METHODS.values(), *tables.ARMS.values(), *tuned]:
        module = baselines if options.get("script") == "baselines.py" else spo_train
        words = [w for k, v in options.items() if k != "script" for w in (f"--{k}", str(v))]
        kind = baselines.BaselineConfig if module is baselines else spo_train.SPOConfig
        config = parse_options(kind, module.PRESETS, words)
        if module is spo_train:
            spo_train.check(config)
            assert spo_train.pool_groups([951 - 50 * i for i in range(20)], config.t_min, config.t_max, config.j)
    for number, (_, names, _) in tables.TABLES.items():
        assert {name.removesuffix(" tuned") for name in names} <= set(tables.METHODS if number in ("1", "tuned") else tables.ARMS)


def test_what_is_there_is_not_run_again(results, monkeypatch):
    monkeypatch.setattr(tables, "train", lambda *_: pytest.fail("trained again"))
    tables.keep(["arms", "a", "0"], dict(updates=1))
    tables.keep(["rates", "spo"], dict(chosen=4e-4))
    tables.measure("a", "a", {}, 0, None)
    assert tables.choose_rate("spo", None) == 4e-4 and tables.kept("arms", "a", "1") is None


@pytest.mark.parametrize("method", tables.METHODS)
def test_every_method_has_ten_tuning_runs_and_keeps_the_best_of_each_setting(results, monkeypatch, method):
    """The score rises along every row of TUNING, so the last of each is chosen; nothing is run twice."""
    start, rows = tables.TUNING[method]
    worth = {json.dumps(change, sort_keys=True): i + 1 for row in rows for i, change in enumerate(row)}
    runs = []

    def score(run, options, judge):
        runs.append(run)
        return float(sum(worth[json.dumps(c, sort_keys=True)] for row in rows for c in row if c.items() <= options.items()))

    monkeypatch.setattr(tables, "choice_score", score)
    wanted = dict(start)
    for row in rows:
        wanted |= row[-1]
    assert tables.tune(method, None) == wanted and len(runs) == len(set(runs)) == 10
    assert tables.tune(method, None) == wanted and len(runs) == 10          # what is kept is not run again
    assert tables.options_of(f"{method} tuned") == tables.METHODS[method] | wanted
    assert method in "".join(tables.render_tuning(tables.kept()))


def test_an_arm_that_is_run_again_is_compared_with_its_first_run(results, monkeypatch):
    point = dict(round=3, seconds=9.0, aesthetics=dict(difference=2.0))
    tables.keep(["arms", "k = 2", "0"], dict(updates=point))
    monkeypatch.setattr(tables, "Judge", lambda: None)
    monkeypatch.setattr(tables, "train", lambda run, options, seed: (run, options, seed))
    for found, same in ((dict(point, seconds=8.0), True), (dict(point, aesthetics=dict(difference=1.9)), False)):
        monkeypatch.setattr(tables, "reading", lambda folder, judge, shares, found=found: {"k = 2 again": dict(updates=found)}[folder[0]])
        tables.again("k = 2", "0")
        assert tables.kept("again", "k = 2", "0")["figures"] == dict(updates=found) and tables.kept("again", "k = 2", "0")["same"] == same
    with pytest.raises(InputError, match="k = 2, seed 1: not measured yet"):
        tables.again("k = 2", "1")


SMALL = {name: {s: {p: dict(evaluations=e, updates=60, **{m: dict(difference=d + 0.1 * int(s), difference_standard_error=0.05) for m in tables.METRICS})
                    for p, e in (("evaluations x 0.25", 6000), ("evaluations x 0.5", 12_500), ("evaluations", 25_000))} for s in "012"}
         for name, d in (("spo", 2.0), ("ddpo", 0.0), ("as the demo", 2.0), ("k = 2", 1.0))}


def coordinates(svg: str, tag: str) -> list[tuple[float, float]]:
    found = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith(tag)]
    return [(float(e.get("cx")), float(e.get("cy"))) for e in found]


def test_a_picture_by_hand():
    """Table 1's last point of SPO, and an arm's mean in the picture of all arms."""
    pictures = tables.pictures(dict(arms=SMALL))
    half = 4.303 * 0.1 / 3 ** 0.5                          # of gains 2.0, 2.1, 2.2
    ends = (0.1 - half, 2.1 + half)                         # ddpo's interval is as wide, about 0.1
    low, high = ends[0] - 0.06 * (ends[1] - ends[0]), ends[1] + 0.06 * (ends[1] - ends[0])
    x, y = 60 + 520 * 25_000 / 25_500, 370 - (370 - 66) * (2.1 - low) / (high - low)
    assert any(abs(a - x) < 0.06 and abs(b - y) < 0.06 for a, b in coordinates(pictures["curves.svg"], "circle"))
    ends = (0.0, 2.1 + half)
    x = 190 + (700 - 24 - 190) * (1.1 + 0.03 * ends[1]) / (1.06 * ends[1])      # k = 2: 1.0, 1.1, 1.2
    assert any(abs(a - x) < 0.06 for a, _ in coordinates(pictures["arms.svg"], "circle"))
    assert all(">k = 2</text>" in pictures[name] for name in ("arms.svg", "alignment.svg"))
    assert figures.ticks(0.0, 2.4) == pytest.approx([0, 0.5, 1, 1.5, 2]) and figures.apart([5, 3, 40], 10) == [13, 3, 40]


def test_tables_and_pictures_are_those_of_the_json():
    """`render` writes the committed files again, byte for byte."""
    folder, results = tables.RESULTS.parent, tables.kept()
    assert tables.render() == (folder / "tables.md").read_text(encoding="utf-8")
    for name, picture in tables.pictures(results).items():
        assert picture == (folder / name).read_text(encoding="utf-8"), name
        assert name in tables.PAGE.read_text(encoding="utf-8"), "the page shows it"


def test_the_page_is_short_and_its_effect_is_that_of_effect_md():
    page, effect = tables.PAGE.read_text(encoding="utf-8"), (tables.RESULTS.parent / "effect.md").read_text(encoding="utf-8")
    assert len(page.split()) <= 1800
    rows = [line for line in page.splitlines() if line.startswith("| SPO, seed")]
    assert len(rows) == 3
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert any(all(f"| {cell} |" in line for cell in cells) for line in effect.splitlines()), row


def test_nothing_makes_no_picture_and_every_picture_is_xml():
    assert tables.pictures({}) == {}
    for svg in tables.pictures(tables.kept()).values():
        assert ElementTree.fromstring(svg).get("viewBox").startswith("0 0 700 ")


def test_harm_and_alarm_by_hand():
    over = overoptimization
    assert over.alarm([3, 2, 2, 2, 2, 2], None) == 6 and over.alarm([1, 2, 3, 2.9, 2.8, 2.7, 2.6, 2.5], None) == 8 and over.alarm([1, 2, 3, 2, 2, 2, 2, 3.1, 2, 2], None) is None
    assert over.alarm([1.0, 1.03, 1.01, 1.01, 1.05], 1.02) == 5 and over.alarm([1.02] * 9, 1.02) is None
    base = dict(alignment=0.98, aesthetics=7.0)

    def truth(*rows):
        return {str(2 * i + 2): dict(alignment=a, aesthetics=b) for i, (a, b) in enumerate(rows)}

    assert over.harm(truth((0.98, 8), (0.95, 8.5), (0.98, 9), (0.96, 9.2), (0.955, 9.2)), base) == 8        # one alone is no harm
    assert over.harm(truth((0.98, 8), (0.98, 9), (0.98, 8.9), (0.98, 8.85)), base) == 6 and over.harm(truth((0.98, 9)), base) is None
    assert [over.told(*pair) for pair in ((None, 8), (3, None), (9, 8), (8, 8), (4, 14), (3, 14))] == [
        "silent", "3: false alarm", "9: too late", "8: in time", "4: in time", "3: too early"]


def test_the_first_signal_is_in_time_with_every_seed():
    over = overoptimization
    rounds = range(1, 41)
    log = {name: [0.0] * 40 for name in over.SIGNALS} | dict(
        ratio_win=[1.0 + 0.001 * n for n in rounds], validation_score=[-abs(n - 18) for n in rounds], score=list(rounds), validation_pickscore=list(rounds))
    truth = {str(n): dict(alignment=0.98 if n < 26 else 0.9, aesthetics=9.0) for n in rounds if n % 2 == 0}
    record = dict(base=dict(alignment=0.98, aesthetics=7.0), seeds={s: dict(log=log, truth=truth) for s in "012"})
    text = over.render(record)
    assert "| **harm begins** |  | 26 | 26 | 26 |" in text and "| `validation_score` | no new best for 5 rounds | 23: in time" in text
    svg = over.picture(record)
    assert svg.count("stroke-dasharray") == 3 * 6 and svg.count(">round</text>") == 6           # six panels, three seeds
    assert "First, and in time with every seed: `ratio_win`, on average 4 rounds" in text      # mean of 21, 22, 23 is 1.022: 22
    record["seeds"]["1"] = dict(record["seeds"]["1"], truth={k: dict(v, alignment=0.98) for k, v in truth.items()})
    assert "No signal is in time with every seed." in over.render(record)


def test_a_mean_of_loras_is_the_mean_of_their_products(tmp_path, monkeypatch):
    monkeypatch.setattr(overoptimization, "RUNS", tmp_path)
    monkeypatch.setattr(further, "RUNS", tmp_path / "means")
    products = []
    for rounds in (8, 10, 12):
        a, b = torch.randn(2, 5), torch.randn(3, 2)
        (tmp_path / f"seed0/loras/{rounds:05d}").mkdir(parents=True)
        save_file({"unet.x.lora_A.weight": a, "unet.x.lora_B.weight": b}, tmp_path / f"seed0/loras/{rounds:05d}" / further.NAME)
        products.append(b @ a)
    mean = read_weights(further.candidate(0, 12, 3))
    torch.testing.assert_close(mean["unet.x.lora_B.weight"] @ mean["unet.x.lora_A.weight"], sum(products) / 3)
    with pytest.raises(InputError, match="run experiments/overoptimization.py first"):
        further.candidate(0, 14, 3)


def test_a_study_that_was_stopped_is_not_rendered(tmp_path, monkeypatch):
    record = json.loads(further.RECORD.read_text(encoding="utf-8"))
    monkeypatch.setattr(further, "RECORD", tmp_path / "further.json")
    monkeypatch.setattr(sys, "argv", ["further.py", "--render"])
    further.RECORD.write_text(json.dumps(dict(found=record["found"])), encoding="utf-8")
    with pytest.raises(InputError, match="further.json: not all is judged yet; run .* without --render"):
        further.main()


def test_the_candidate_of_the_raised_goal_by_hand():
    def arm(*rows):
        return {str(seed): dict(closed=closed, alignment=dict(difference=change)) for seed, (closed, change) in enumerate(rows)}

    found = dict(a=arm((0.90, -0.02), (0.82, 0.0)), b=arm((0.83, -0.005), (0.84, -0.01)), c=arm((0.95, 0.0), (0.81, 0.0)))
    assert further.choose(found) == "b"                     # c is not safe in every seed, a falls more
    assert further.choose({name: found[name] for name in "c"} | dict(d=arm((0.7, 0.0), (0.99, 0.0)))) == "c"


def test_the_advice_on_too_many_rounds_is_what_the_json_says():
    record = json.loads(overoptimization.RECORD.read_text(encoding="utf-8"))
    folder, page = overoptimization.RESULTS, (ROOT / "docs/watch.md").read_text(encoding="utf-8")
    assert overoptimization.render(record) == (folder / "overoptimization.md").read_text(encoding="utf-8")
    assert overoptimization.picture(record) == (folder / "overoptimization.svg").read_text(encoding="utf-8")
    assert all(line in page for line in overoptimization.render(record).splitlines() if line.startswith("|"))


def test_the_raised_goal_is_read_off_the_json():
    record = json.loads(further.RECORD.read_text(encoding="utf-8"))
    assert further.choose(record["found"]) == record["chosen"]
    lines = [line for line in further.markdown(record).splitlines() if line.startswith("|")]
    details, page = ((ROOT / "experiments" / name).read_text(encoding="utf-8") for name in ("details.md", "README.md"))
    assert all(line in details for line in lines[:-3])
    for seed in map(str, further.SEEDS):                        # this page says the same in fewer words
        row = record["held"][f"seed{seed}"]
        assert row["closed"] >= further.CLOSED and f"{100 * row['closed']:.0f} %, down {-100 * row['alignment']['difference']:.1f}" in page
