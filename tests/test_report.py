"""report.py and study.py: the pages as a reader finds them, driven in a headless Chromium (skipped where there is none)."""
import base64
import io
import json
import re
import shutil

import pytest
import scipy.stats
from PIL import Image

import report
import study
from evaluate import compare
from helpers import PROMPTS, call
from weights import InputError

NASTY = 'a "red" </script><b>circle</b> & <!-- cross'


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium; its downloads go to the test's folder."""
    if not shutil.which("chromedriver") or not (found := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium and chromedriver on this machine")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
                 "--disable-dev-shm-usage", "--window-size=1200,1000", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    driver.quit()
    assert not errors


def pictures(folder, models: list[str], count: int, size: int = 32) -> dict[str, list]:
    """Flat pictures, each of its own colour."""
    files = {}
    for m, model in enumerate(models):
        (folder / model).mkdir(parents=True)
        files[model] = [folder / model / f"{i}.png" for i in range(count)]
        for i, path in enumerate(files[model]):
            Image.new("RGB", (size, size), (20 * i, 90 * m, 40)).save(path)
    return files


def look(browser, page, width: int = 1280, dark: bool = False, height: int = 800) -> None:
    """Open a page as a window of that width, or a phone, shows it."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")]))
    browser.get(page.as_uri())


def overflow(browser) -> int:
    """Pixels by which the page is wider than the window."""
    return browser.execute_script("return document.documentElement.scrollWidth - arguments[0]", browser.execute_script("return screen.width"))


def colours(browser) -> tuple[str, str]:
    """Ground and ink."""
    return tuple(browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"))


def tap(browser, element, times: int = 1) -> None:
    """A finger."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    finger = ActionBuilder(browser, mouse=PointerInput("touch", "finger"), duration=20)
    finger.pointer_action.move_to(element)
    for _ in range(times):
        finger.pointer_action.pointer_down().pointer_up()
    finger.perform()


def evaluation(scores: dict, formulas: dict | None = None, groups: dict | None = None, **protocol) -> dict:
    """What results.json holds of these scores, {model: {metric: one per picture}}."""
    first = next(iter(scores))
    metrics = formulas or {m: f"formula of {m}" for m in scores[first]}
    return dict(protocol=dict(prompts=len(next(iter(scores[first].values())))) | protocol, metrics=metrics, groups=groups or {}, scores=scores,
                results={name: {m: compare(row[m], scores[first][m]) for m in metrics} for name, row in scores.items()})


def embedded(page) -> dict:
    """The data that a page carries."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


# The report

@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The tiny model and a LoRA of one short round: a trajectory traced first, then an evaluation with the training run's log."""
    folder = tmp_path_factory.mktemp("report")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS[:3], NASTY]))
    call("spo_train", "--prompts", prompts, "--rounds", 1, "--threshold", 0, "--steps", 5, "--prompts_per_round", 2, "--grid_every", 0,
         "--out", folder / "run", "--lr", 0.05)
    lora = f"spo={folder / 'run'}"
    call("evaluate", "--trace", PROMPTS[0], "--lora", lora, "--out", folder / "out")
    call("evaluate", "--lora", "base=", lora, "--prompts", prompts, "--metrics", "pickscore", "--steps", 2, "--images_per_prompt", 2,
         "--out", folder / "out", "--logs", lora, "--study", folder / "study.html", "--seed", 3)
    return folder


def test_report_holds_everything_and_needs_nothing(evaluated):
    page = (evaluated / "out/report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in re.sub(r"data:image/(png|jpeg);base64,[\w+/=]+", "", page)
    data, results = embedded(evaluated / "out/report.html"), json.loads((evaluated / "out/results.json").read_text())
    assert data["models"] == ["base", "spo"] and len(data["rows"]) == 8 and data["rows"][-1]["prompt"] == NASTY
    for i, row in enumerate(data["rows"]):
        assert all(row["scores"][m]["pickscore"] == results["scores"][m]["pickscore"][i] for m in ("base", "spo"))
    assert results["protocol"]["prompts_sha256"] in page and "the tiny model&#x27;s PickScore" in page
    assert data["found"] == results and page.count("<svg") == len(report.CURVES)
    order = [page.index(part) for part in ("<h1>spo against base</h1>", 'class="lead"', 'id="hero"', 'id="numbers"', 'id="curves"', 'id="trajectories"',
                                           'id="pictures"', "<details><summary")]
    assert order == sorted(order) and re.search(r"tiny · \d{4}-\d\d-\d\d · 4 prompts", page)


def test_report_in_a_browser(evaluated, browser):
    """It sorts; every picture, the numbers, the learning curves and the trajectory are there."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select
    browser.get((evaluated / "out/report.html").as_uri())
    scores = json.loads((evaluated / "out/results.json").read_text())["scores"]
    expected = [b - a for a, b in zip(scores["base"]["pickscore"], scores["spo"]["pickscore"])]

    def gains():
        return [float(row.get_attribute("data-gain")) for row in browser.find_elements(By.CLASS_NAME, "row")]

    assert gains() == pytest.approx(expected) and len(set(expected)) > 2
    for order, reverse in (("most", True), ("least", False)):
        Select(browser.find_element(By.ID, "order")).select_by_value(order)
        assert gains() == pytest.approx(sorted(expected, reverse=reverse))
    shown = browser.execute_script("return [...document.images].map(i => { i.loading = 'eager'; return i.src.length; })")
    assert len(shown) == 16 + 16 + 2 + 1                # all pictures, on top of the page too, the enlarged ones, and the trajectory
    browser.execute_async_script("const done = arguments[0]; Promise.all([...document.images].filter(i => i.src).map(i => i.decode())).then(() => done())")
    assert all(browser.execute_script("return [...document.images].filter(i => !i.closest('dialog')).map(i => i.naturalWidth)"))
    assert browser.find_elements(By.CSS_SELECTOR, "#rows b") and not browser.find_elements(By.CSS_SELECTOR, "#rows p b")   # shown, not obeyed
    trace = browser.find_element(By.CSS_SELECTOR, "img.trace")
    assert trace.is_displayed() and trace.get_property("naturalWidth") == Image.open(evaluated / "out/trace-spo.png").width
    curves = browser.find_elements(By.CSS_SELECTOR, ".charts svg")
    assert len(curves) == len(browser.find_elements(By.TAG_NAME, "polyline")) == len(report.CURVES) and all(c.is_displayed() for c in curves)


def test_report_takes_evenly_spaced_rows_and_shrinks_large_pictures(tmp_path):
    files = pictures(tmp_path, ["a", "b"], 10, 400)
    scores = {m: {"s": [float(i) for i in range(10)]} for m in files}
    Image.new("RGB", (200, 100)).save(tmp_path / "trace-b.png")
    report.write_report(tmp_path / "report.html", evaluation(scores, dict(s="<i>")), files, [f"p{i}" for i in range(10)], {}, rows=4)
    rows = embedded(tmp_path / "report.html")["rows"]
    assert [row["prompt"] for row in rows] == ["p0", "p2", "p5", "p7"] and rows[0]["images"]["a"].startswith("data:image/jpeg")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;i&gt;" in page and "<i>" not in page and "Trajectories" in page and "<svg" not in page


def test_curve_by_hand():
    """(0, 1) to (2, 3) in a plot 266 wide and 138 high; five per cent of room above and below."""
    points = re.search(r'points="([^"]+)"', report.curve({"a": [(0, 1.0), (1, 2.0), (2, 3.0)]}, "t", {"a": "red"}))[1]
    assert points == "62.0,155.7 195.0,93.0 328.0,30.3"
    assert "polyline" in report.curve({"flat": [(1, 0.0)]}, "one point, no spread", {"flat": "red"})


def test_learning_curves_leave_out_what_is_not_finite():
    rows = [dict(round=1, score=1.0, loss=float("nan")), dict(round=2, score=2.0)]
    page = report.learning_curves({"run": rows})
    assert page.count("<svg") == 1 and "nan" not in page and report.learning_curves({}) == ""


@pytest.mark.parametrize("text, message", [(None, "cannot be read"), ("", "holds no records"), ("{", "not a run's log"), ("1\n", "holds no records")])
def test_bad_logs(tmp_path, text, message):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        report.read_logs((f"a={tmp_path}" if text is not None else f"a={tmp_path / 'none'}",))
    with pytest.raises(InputError, match="name=RUNFOLDER"):
        report.read_logs((str(tmp_path),))


# The study

def test_study_in_a_browser(tmp_path, browser):
    """Blind, by keyboard and mouse, over a reload, back, and out as JSON that names the models chosen."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    files, prompts = pictures(tmp_path, ["base", "spo"], 6), [*[f"prompt {i}" for i in range(5)], NASTY]
    study.write_study(tmp_path / "study.html", files, prompts)
    uris = {m: [report.data_uri(Image.open(p)) for p in files[m]] for m in files}
    browser.get((tmp_path / "study.html").as_uri())
    assert "spo" not in browser.find_element(By.TAG_NAME, "body").text.lower()
    assert "6 pairs, 18 answers, about 2 minutes" in browser.find_element(By.ID, "introduction").text
    browser.find_element(By.TAG_NAME, "body").send_keys("1")
    assert browser.execute_script("return state.votes.length") == 0 and not browser.find_element(By.ID, "ask").is_displayed()
    browser.find_element(By.ID, "start").click()

    def seen():
        item = prompts.index(browser.find_element(By.ID, "prompt").text)
        sides = [next(m for m in files if uris[m][item] == browser.find_element(By.ID, side).get_attribute("src")) for side in ("left", "right")]
        return item, sides, browser.find_element(By.ID, "question").text

    def press(key):
        browser.find_element(By.TAG_NAME, "body").send_keys(key)

    questions, expected, turned = list(study.QUESTIONS.items()), [], set()
    keys = ["1", "2", "3", Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN]
    for step in range(18):
        item, sides, question = seen()
        assert question == questions[step % 3][1] and sorted(sides) == ["base", "spo"]
        turned.add((item, sides[0]))
        if step == 4:                           # a vote taken back counts once, and may be changed
            press("1")
            assert browser.find_element(By.ID, "bar").get_property("value") == 5
            press(Keys.BACKSPACE)
            assert seen() == (item, sides, question)
        if step == 7:
            browser.refresh()
            assert seen() == (item, sides, question)
        choice = step % 3 if step != 11 else 0
        if step % 5 == 4:
            browser.find_element(By.ID, ("vote-left", "vote-right", "vote-tie")[choice]).click()
        else:
            press(keys[choice if step % 2 else choice + 3])
        expected.append(dict(item=item, question=questions[step % 3][0], choice=(*sides, "tie")[choice]))
    assert len({item for item, _ in turned}) == 6 == len(turned)                    # every prompt, its sides fixed over the questions
    assert browser.find_element(By.ID, "thanks").is_displayed() and not browser.find_element(By.ID, "ask").is_displayed()
    press("1")                                  # after the end nothing counts
    result = browser.execute_script("return result()")
    assert result["votes"] == expected and result["models"] == ["base", "spo"]
    browser.find_element(By.ID, "save").click()
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(browser, 20).until(lambda _: list((tmp_path / "downloads").glob("votes-*.json")))
    saved = next((tmp_path / "downloads").glob("votes-*.json"))
    assert json.loads(saved.read_text()) == result
    assert "1 raters, 18 votes on 6 prompts" in study.tally((str(saved),))


def test_study_can_be_mailed(tmp_path):
    """Four pairs of ten, the seed's, as JPEG of at most 512 pixels; both pictures of a pair belong to its prompt."""
    files, prompts = pictures(tmp_path, ["base", "spo"], 10, 700), [str(i) for i in range(10)]
    for seed in (0, 0, 1):
        study.write_study(tmp_path / f"{seed}.html", files, prompts, 4, seed)
    one, other = (embedded(tmp_path / f"{seed}.html")["items"] for seed in (0, 1))
    assert len({item["prompt"] for item in one}) == 4 and [i["prompt"] for i in one] != [i["prompt"] for i in other]
    for item in one:
        for m, uri in enumerate(item["images"]):
            head, _, body = uri.partition(",")
            with Image.open(io.BytesIO(base64.b64decode(body))) as image:
                assert image.size == (512, 512) and "jpeg" in head
                assert image.getpixel((9, 9)) == pytest.approx((20 * int(item["prompt"]), 90 * m, 40), abs=3)


def ballot(folder, rater: int, votes: list[tuple[str, str]], **changes) -> str:
    """A vote file."""
    value = dict(study="s", models=["base", "spo"], prompts=4, rater=rater, votes=[dict(item=0, question=q, choice=c) for q, c in votes]) | changes
    path = folder / f"votes-{rater}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_tally_by_hand(tmp_path):
    """Six votes for spo, two ties, two for base: 7 of 10."""
    files = (ballot(tmp_path, 1, [("general", "spo")] * 6), ballot(tmp_path, 2, [("general", "tie")] * 2 + [("general", "base")] * 2))
    line = study.tally(files).splitlines()[4]
    low, high = scipy.stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert line == f"| general | 60.0 % | 20.0 % | 20.0 % | 70.0 % | {100 * low:.1f} to {100 * high:.1f} | 10 |"
    assert "| visual appeal |  |  |  |  |  | 0 |" in study.tally(files)
    assert "take all votes as independent" in study.tally(files)
    assert call("evaluate", "--tally", *files).strip() == study.tally(files)


@pytest.mark.parametrize("share, n", [(0.0, 5), (1.0, 5), (0.5, 1), (0.31, 400)])
def test_wilson_against_scipy(share, n):
    expected = scipy.stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    assert study.wilson(round(share * n) / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_bad_votes(tmp_path):
    good = ballot(tmp_path, 1, [("general", "spo")])
    for other, message in ((ballot(tmp_path, 2, [("general", "spo")], study="t"), "another study"), (good, "already among"),
                           (ballot(tmp_path, 3, [("general", "dpo")]), "not a file of votes"), (ballot(tmp_path, 4, [("taste", "spo")]), "not a file"),
                           (ballot(tmp_path, 5, [], models=None), "not a file"), (ballot(tmp_path, 6, [], models=["a"]), "not a file"),
                           (ballot(tmp_path, 7, [], prompts=None), "not a file"), (ballot(tmp_path, 8, [], study=None), "not a file"),
                           (ballot(tmp_path, "nine", []), "not a file"), (ballot(tmp_path, 10, [(["general"], "spo")]), "not a file"),
                           (str(tmp_path), "cannot be read"), (str(tmp_path / "none.json"), "not found")):
        with pytest.raises(InputError, match=message):
            study.tally((good, other))


def test_study_wants_two(tmp_path):
    with pytest.raises(InputError, match="compares two"):
        study.write_study(tmp_path / "s.html", pictures(tmp_path, ["a"], 1), ["p"])
    with pytest.raises(InputError, match="compares two"):
        call("evaluate", "--study", tmp_path / "s.html")
