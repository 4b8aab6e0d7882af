"""report.py and study.py: the pages as a reader finds them, driven in a headless Chromium (skipped where there is none)."""
import base64
import io
import json
import os
import re
import shutil
import time

import pytest
import scipy.stats
import torch
from PIL import Image

import report
import study
from diffusion import grid
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
    from selenium.common.exceptions import WebDriverException
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
                 "--disable-dev-shm-usage", "--window-size=1200,1000", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for last in (False, False, True):           # selenium finds a free port, which another program may take before chromedriver does
        try:
            driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
            break
        except WebDriverException:
            if last:
                raise
    driver.set_script_timeout(300)              # 30 s to decode all pictures are few on a busy machine
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
    browser.wide = width


def overflow(browser) -> int:
    """Pixels by which the page is wider than the window."""
    return browser.execute_script("return document.documentElement.scrollWidth") - browser.wide


def colours(browser) -> tuple[str, str]:
    """Ground and ink."""
    return tuple(browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"))


def tap(browser, element, times: int = 1) -> None:
    """A finger; of several taps, each a tenth of a second after the one before, whatever time the machine takes to bring them."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    finger = ActionBuilder(browser, mouse=PointerInput("touch", "finger"), duration=20)
    finger.pointer_action.move_to(element)
    if times == 1:
        finger.pointer_action.pointer_down().pointer_up()
    finger.perform()
    if times > 1:
        now, place = time.time(), browser.execute_script("""
            const r = arguments[0].getBoundingClientRect();             // the middle of what is seen of it, where the driver taps, too
            return { x: (Math.max(0, r.left) + Math.min(innerWidth, r.right)) / 2, y: (Math.max(0, r.top) + Math.min(innerHeight, r.bottom)) / 2 };
            """, element)
        for at in [now + n / 10 for n in range(times)]:
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", dict(type="touchStart", touchPoints=[place], timestamp=at))
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", dict(type="touchEnd", touchPoints=[], timestamp=at + 0.02))


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
    call("spo_train", "--prompts", prompts, "--rounds", 1, "--threshold", 0, "--steps", 5, "--prompts_per_round", 2, "--grid_every", 1,
         "--out", folder / "run", "--lr", 0.05)
    lora = f"spo={folder / 'run'}"
    call("evaluate", "--trace", PROMPTS[0], "--lora", lora, "--out", folder / "out")
    told = call("evaluate", "--lora", "base=", lora, "--prompts", prompts, "--metrics", "pickscore", "--steps", 2, "--images_per_prompt", 2,
                "--out", folder / "out", "--curves", lora, "--study", folder / "study.html", "--seed", 3)
    (folder / "told.txt").write_text(told)
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
    sentence, where = (evaluated / "told.txt").read_text().splitlines()[-2:]        # what the command ends with
    assert [sentence] == report.summary(results) and where.startswith(f"open {evaluated / 'out/report.html'};")
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


@pytest.fixture
def three(tmp_path):
    """A report of three models, twelve flat pictures each; `spo` gains 1 on all but the last, `dpo` loses."""
    files = pictures(tmp_path, ["base", "spo", "dpo"], 12)
    scores = dict(base=dict(aesthetics=[float(i) for i in range(12)], alignment=[1.0] * 12))
    scores["spo"] = dict(aesthetics=[i + 1.0 for i in range(11)] + [10.0], alignment=[1.0] * 12)
    scores["dpo"] = dict(aesthetics=[i - 0.5 for i in range(12)], alignment=[1.0] * 11 + [0.0])
    prompts = [f"a rather long prompt that has to be broken somewhere, number {i}" for i in range(12)]
    groups = {name: {m: {"single_object": 0.25, "two_object": 0.5, "mean": 0.375} for m in row} for name, row in scores.items()}
    found = evaluation(scores, groups=groups, model="runs/" + "x" * 200)
    report.write_report(tmp_path / "report.html", found, files, prompts, {"spo": [dict(round=i, score=i) for i in (1, 2)]}, date="2026-11-28")
    return tmp_path / "report.html"


def lefts(browser, selector: str) -> list[int]:
    """How many elements stand in each row of the screen."""
    tops = browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => Math.round(e.getBoundingClientRect().top))", selector)
    return [tops.count(top) for top in dict.fromkeys(tops)]


def test_report_on_a_desktop_and_on_a_phone_in_light_and_dark(three, browser):
    from selenium.webdriver.common.by import By
    seen = set()
    for width, dark in ((1280, False), (1280, True), (360, True), (360, False)):
        look(browser, three, width, dark)
        assert overflow(browser) <= 0
        seen.add((dark, *colours(browser)))
        cards, tops, grids = lefts(browser, ".row"), lefts(browser, "#hero figure"), lefts(browser, "#hero .picture")
        assert (cards[0] >= 3, tops, grids) == ((True, [8], [8] * 3) if width == 1280 else (False, [1] * 8, [3] * 8))
        assert [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#hero .names span")] == ["base", "spo", "dpo"]
        assert browser.find_element(By.CSS_SELECTOR, "#hero figcaption").text.startswith("a rather long prompt")
        assert browser.execute_script("return document.querySelector('#hero').getBoundingClientRect().top") < 500    # pictures first
    assert len(seen) == 2 and len({ground for _, ground, _ in seen}) == len({ink for _, _, ink in seen}) == 2


def test_report_in_numbers_and_words(three, browser):
    """A sentence each; a table with named columns; every metric's gains as a histogram of its own."""
    from selenium.webdriver.common.by import By
    look(browser, three)
    assert [e.text for e in browser.find_elements(By.CLASS_NAME, "lead")] == [
        "spo is better than base in 11 of 12 pictures by aesthetics (5.500 to 6.333); alignment (1.000 to 1.000).",
        "dpo is better than base in 0 of 12 pictures by aesthetics (5.500 to 5.000); alignment (1.000 to 0.917)."]
    assert "2026-11-28" in browser.find_element(By.CLASS_NAME, "kicker").text
    rows = [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in browser.find_elements(By.CSS_SELECTOR, "#tables tr")]
    assert rows[0] == ["model", "mean ± standard error ↑", "gain ↑", "win rate against base ↑"]
    assert rows[1] == ["aesthetics formula of aesthetics"] and rows[2] == ["base", "5.500 ± 1.041", "", ""]
    assert rows[3][:3] == ["spo", "6.333 ± 0.972", "+0.833"] and re.fullmatch(r"91\.7 % \(\d+\.\d to 100\.0\)", rows[3][3])
    assert ["aesthetics", "single_object ↑", "two_object ↑", "mean ↑"] in rows and ["dpo", "0.250", "0.500", "0.375"] in rows
    told = [figure.text.split("\n") for figure in browser.find_elements(By.CSS_SELECTOR, "#gains figure")]
    assert told[0] == ["aesthetics: gain of spo, by picture", "worse 1", "as good 0", "better 11", "-1.000", "0", "+1.000"] and len(told) == 4
    bars = browser.execute_script("return [...document.querySelectorAll('#gains .bars')].map(b => [...b.children].map(i => Number(i.title)))")
    assert bars[0] == [1] + [0] * 19 + [11] and bars[2] == [0] * 10 + [12] + [0] * 10 and bars[3] == [1] + [0] * 9 + [11] + [0] * 10
    assert not browser.find_element(By.CSS_SELECTOR, "details table").is_displayed()
    browser.find_element(By.TAG_NAME, "summary").click()
    assert browser.find_element(By.CSS_SELECTOR, "details table").is_displayed()


@pytest.mark.parametrize("width", [1280, 360])
def test_slider_compares_two_models_on_one_picture(three, browser, width):
    """Opened by a tap: the base on the left of the edge, the model on its right; by keys, mouse and buttons."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    look(browser, three, width)
    data, zoom, slider = embedded(three), browser.find_element(By.ID, "zoom"), browser.find_element(By.ID, "slider")

    def pixel(share: float) -> tuple[int, ...]:
        """What is seen at that share of the picture's width."""
        browser.execute_script("return Promise.all([...document.querySelectorAll('#zoom img')].map(i => i.decode()))")
        box = browser.find_element(By.ID, "stage").rect
        with Image.open(io.BytesIO(browser.get_screenshot_as_png())) as shot:
            rect = browser.execute_script("const r = document.getElementById('stage').getBoundingClientRect(); return [r.left, r.top]")
            return shot.convert("RGB").getpixel((int(rect[0] + share * box["width"]), int(rect[1] + 0.2 * box["height"])))

    assert not zoom.is_displayed()
    tap(browser, browser.find_elements(By.CSS_SELECTOR, "#rows .row:nth-child(3) .picture")[1])
    assert zoom.is_displayed() and overflow(browser) <= 0 and browser.find_element(By.ID, "zoom-prompt").text == data["rows"][2]["prompt"]
    picture = browser.find_element(By.CSS_SELECTOR, "#rows .row:nth-child(3) .picture")
    assert browser.find_element(By.ID, "stage").rect["width"] > 1.9 * picture.rect["width"]         # enlarged
    base, spo = (40, 0, 40), (40, 90, 40)
    assert (pixel(0.2), pixel(0.8)) == (base, spo)
    slider.send_keys(Keys.HOME)
    assert (pixel(0.2), pixel(0.8)) == (spo, spo)
    slider.send_keys(Keys.END)
    assert (pixel(0.2), pixel(0.8)) == (base, base)
    if width == 1280:                               # a mouse that hovers
        ActionChains(browser).move_to_element_with_offset(slider, 0.2 * slider.rect["width"], 0).perform()
        assert (pixel(0.5), pixel(0.9)) == (base, spo) and 69 < float(slider.get_property("value")) < 71
    browser.find_element(By.ID, "later").click()
    assert browser.find_element(By.ID, "zoom-prompt").text == data["rows"][3]["prompt"]
    browser.find_element(By.ID, "close").click()
    assert not zoom.is_displayed()


def test_the_page_of_a_training_on_a_desktop_and_on_a_phone(tmp_path, browser):
    """Base and newest samples beside each other, or below; no sideways scrolling, nothing cut, not even a long number at an axis; running and finished."""
    from selenium.webdriver.common.by import By
    for done in (0, 3):
        grid(torch.rand(16, 3, 64, 64), 4, captions=["a rather long prompt that has to be broken"] * 16).save(tmp_path / f"samples-{done:05d}.png")
    rows = [dict(round=i, eta_minutes=300.0, margin=-1.2345e-4 * i, validation_score=float(i), validation_score_at_start=0.5) for i in (1, 2, 3)]
    seen = set()
    for running, state in ((True, "running, about 5.0 hours left"), (False, "finished; README.md")):
        report.write_live(tmp_path, rows, 3, "round", running, dict(model="m" * 90, beta=10.0))
        for width, dark in ((1280, False), (1280, True), (360, True), (360, False)):
            look(browser, tmp_path / "report.html", width, dark)
            assert overflow(browser) <= 0 and browser.find_element(By.CLASS_NAME, "lead").text.startswith(state)
            assert lefts(browser, ".sheet") == ([2] if width == 1280 else [1, 1])
            assert all(browser.execute_script("return [...document.images].map(i => i.width >= 0.7 * i.parentElement.clientWidth && i.width > 200)"))
            cut = "const box = t.closest('.chart').getBoundingClientRect(), own = t.getBoundingClientRect(); return own.left < box.left || own.right > box.right"
            assert browser.execute_script(f"return [...document.querySelectorAll('svg text')].filter(t => {{ {cut} }}).length") == 0
            assert browser.execute_script("return getComputedStyle(document.querySelector('svg')).overflow") == "visible"
            seen.add((dark, *colours(browser)))
    assert len(seen) == 2


def test_report_of_one_model_and_of_no_pictures(tmp_path, browser):
    """Nothing to compare, nothing to sort by; --report_rows 0 leaves the numbers, no heading without pictures, no error."""
    from selenium.webdriver.common.by import By
    files, scores = pictures(tmp_path, ["base"], 3), dict(base=dict(s=[1.0, 2.0, 3.0]))
    report.write_report(tmp_path / "one.html", evaluation(scores), files, ["p"] * 3, {})
    look(browser, tmp_path / "one.html", 360)
    assert browser.find_element(By.CLASS_NAME, "lead").text == "base: s 2.000 over 3 pictures." and overflow(browser) <= 0
    assert not browser.find_element(By.ID, "model").is_displayed() and len(browser.find_elements(By.CLASS_NAME, "row")) == 3
    browser.find_element(By.CSS_SELECTOR, "#rows .picture").click()
    assert browser.find_element(By.ID, "under").is_displayed() and not browser.find_element(By.ID, "slider").is_displayed()
    report.write_report(tmp_path / "none.html", evaluation(scores), files, ["p"] * 3, {}, rows=0)
    look(browser, tmp_path / "none.html")
    assert [h.text for h in browser.find_elements(By.TAG_NAME, "h2") if h.is_displayed()] == ["Numbers"]
    assert [a.text for a in browser.find_elements(By.CSS_SELECTOR, "nav a")] == ["numbers", "protocol"]
    assert not browser.find_element(By.ID, "hero").is_displayed() and "data:image" not in (tmp_path / "none.html").read_text()


def test_hostile_names_and_prompts_are_shown_and_not_obeyed(tmp_path, browser):
    from selenium.webdriver.common.by import By
    names = ["__proto__", "</script><img src=x onerror=alert(1)>", "7", "constructor", "lone \udcff surrogate {title}"]
    files = {name: paths for name, paths in zip(names, pictures(tmp_path, list("abcde"), 2).values())}
    scores = {name: dict(s=[float(m), 1.0]) for m, name in enumerate(names)}
    found = evaluation(scores, dict(s="<img src=x>"), model="<script>alert(2)</script>")
    logs = {name: [dict(round=1, score=1.0)] for name in names[1:2]}
    report.write_report(tmp_path / "report.html", found, files, [NASTY, "{0} ${x} %s"], logs)
    study.write_study(tmp_path / "study.html", {name: files[name] for name in names[:2]}, [NASTY, "{0} ${x} %s"])
    look(browser, tmp_path / "report.html")
    shown = browser.find_elements(By.CSS_SELECTOR, "#rows .row:first-child b")
    assert [e.text for e in shown[:4]] == names[:4] and len(shown) == 5     # the driver cannot say the surrogate
    assert not browser.find_elements(By.CSS_SELECTOR, "img[src=x], #rows p b")
    assert [row.get_attribute("data-gain") for row in browser.find_elements(By.CLASS_NAME, "row")] == ["1", "0"]
    assert browser.find_element(By.CSS_SELECTOR, ".head p").text == NASTY and "<script>alert(2)" in browser.find_element(By.CLASS_NAME, "kicker").text
    look(browser, tmp_path / "study.html")
    browser.find_element(By.ID, "start").click()
    assert browser.find_element(By.ID, "prompt").text in (NASTY, "{0} ${x} %s")


def test_a_damaged_trajectory_is_left_out_and_said(tmp_path, capsys):
    files = pictures(tmp_path, ["base"], 1)
    Image.new("RGB", (20, 10)).save(tmp_path / "trace-good.png")
    (tmp_path / "trace-torn.png").write_bytes((tmp_path / "trace-good.png").read_bytes()[:40])
    (tmp_path / "trace-text.png").write_text("no picture")
    (tmp_path / "trace-folder.png").mkdir()
    report.write_report(tmp_path / "report.html", evaluation(dict(base=dict(s=[1.0]))), files, ["p"], {})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("not a readable picture" in line for line in said)
    assert (tmp_path / "report.html").read_text().count('class="trace"') == 1


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


def test_scores_of_two_judges_share_no_axis(tmp_path):
    """Runs of one judge share a chart; another judge's, an unknown one's and steps get one of their own; what no judge scored is shared."""
    for name, config in (("a", dict(judge="spm", spm="", model="tiny")), ("b", dict(judge="spm", spm="", model="tiny")),
                         ("c", dict(judge="pickscore", spm="", model="tiny")), ("d", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(json.dumps(dict(round=1, score=1.0, margin=2.0)) + "\n")
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    page = report.learning_curves(report.read_logs(tuple(f"{n}={tmp_path / n}" for n in "abcd")))
    charts = [(re.search('aria-label="(.*?):', chart)[1], re.findall("<title>(.*?)<", chart), re.findall('stroke="(#.*?)"', chart))
              for chart in page.split("<svg")[1:]]
    blue, red, green, yellow = report.COLOURS[:4]
    assert charts == [("score", ["a", "b"], [blue, red]), ("score", ["c"], [green]), ("score", ["d"], [yellow]),
                      ("margin", ["a", "b", "c", "d"], [blue, red, green, yellow])]
    assert "a, b by spm of tiny" in page and "c by pickscore of tiny" in page
    mixed = report.learning_curves(dict(spo=[dict(round=1, loss=1.0)], spm=[dict(step=9, loss=1.0)]))
    assert mixed.count("<svg") == 2 and ">round<" in mixed and ">step<" in mixed


def test_what_a_damaged_log_holds_in_a_numbers_place_is_not_drawn():
    rows = [dict(round=1, score=1.0), dict(round=None, score=10 ** 400), dict(round="x", score="2"), dict(round=[3], score=float("inf")),
            dict(round=float("nan"), score=2.0), dict(round=1e308, score=-1e308), {}, dict(round=7, score=3.0)]
    page = report.learning_curves({"run": rows})
    assert page.count("<svg") == 1 and len(re.search('points="(.*?)"', page)[1].split()) == 3 and "nan" not in page and "inf" not in page


def test_logs_that_are_no_files_or_named_twice(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"round": 1}\n')
    os.mkfifo(tmp_path / "pipe")
    for words, message in (((f"a={tmp_path / 'pipe'}",), "cannot be read"), (("a=/dev/zero",), "cannot be read"), (("a=" + "x" * 9999,), "cannot be read"),
                           ((f"a={tmp_path}",) * 2, "each name once")):
        with pytest.raises(InputError, match=message) as caught:
            report.read_logs(words)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="config.json: not valid JSON"):
        report.read_logs((f"a={tmp_path}",))


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
    WebDriverWait(browser, 120).until(lambda _: any(path.stat().st_size for path in (tmp_path / "downloads").glob("votes-*.json")))
    saved = next((tmp_path / "downloads").glob("votes-*.json"))
    assert json.loads(saved.read_text()) == result
    assert "1 raters, 18 votes on 6 prompts" in study.tally((str(saved),))


def test_study_on_a_phone_by_taps_in_sittings(tmp_path, browser, monkeypatch):
    """An introduction that says how long; pictures as wide as the phone; a tap is a vote, a double tap one; an end, and more if wanted."""
    from selenium.webdriver.common.by import By
    monkeypatch.setattr(study, "SITTING", 2)
    files, prompts = pictures(tmp_path, ["base", "spo"], 5), ["a long prompt " * 8, *(f"prompt {i}" for i in range(4))]
    study.write_study(tmp_path / "study.html", files, prompts)
    grounds = []
    for dark in (False, True):
        look(browser, tmp_path / "study.html", 360, dark, 740)
        grounds.append(colours(browser))
    assert grounds[0] != grounds[1]
    introduction = browser.find_element(By.ID, "introduction")
    assert introduction.is_displayed() and "2 pairs, 6 answers, about 1 minute" in introduction.text and not browser.find_element(By.ID, "foot").is_displayed()
    tap(browser, browser.find_element(By.ID, "start"))
    assert not introduction.is_displayed() and overflow(browser) <= 0

    def votes() -> list[dict]:
        return browser.execute_script("return state.votes")

    for side in ("left", "right"):
        assert browser.find_element(By.ID, side).rect["width"] == 360
    swapped = browser.execute_script("return swapped[next()[0]]")
    tap(browser, browser.find_element(By.ID, "tap-left"))
    assert [v["choice"] for v in votes()] == ["spo" if swapped else "base"]
    tap(browser, browser.find_element(By.ID, "tap-right"), times=2)
    assert [v["choice"] for v in votes()] == (["spo", "base"] if swapped else ["base", "spo"])
    for _ in range(4):
        assert not browser.find_element(By.ID, "thanks").is_displayed()
        tap(browser, browser.find_element(By.ID, "vote-tie"))
    assert browser.find_element(By.ID, "thanks").is_displayed() and browser.find_element(By.ID, "finish").is_displayed() and overflow(browser) <= 0
    browser.refresh()
    tap(browser, browser.find_element(By.ID, "more"))
    assert browser.find_element(By.ID, "place").text == "6 of 12" and browser.find_element(By.ID, "ask").is_displayed()
    browser.execute_script("for (let i = 0; i < 6; i++) vote(2)")
    assert "1 pairs, 3 answers" in browser.find_element(By.ID, "more").text
    tap(browser, browser.find_element(By.ID, "more"))
    browser.execute_script("for (let i = 0; i < 9; i++) vote(2)")
    assert len(votes()) == 15 and not browser.find_element(By.ID, "more").is_displayed()
    assert len({(v["item"], v["question"]) for v in votes()}) == 15
    look(browser, tmp_path / "study.html", 1280)
    assert overflow(browser) <= 0


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


def test_names_in_a_tally(tmp_path):
    """Votes on other models are refused under one study's name; hostile names stay within their cells."""
    good = ballot(tmp_path, 1, [("general", "spo")])
    for changes in (dict(models=["base", "dpo"]), dict(models=["spo", "base"]), dict(prompts=5)):
        with pytest.raises(InputError, match="another study, or on other models"):
            study.tally((good, ballot(tmp_path, 2, [("general", "spo")] if "dpo" not in str(changes) else [], **changes)))
    for models in (["a", "a"], ["tie", "b"], ["a", 1], [["a"], ["b"]], [None, "b"]):
        with pytest.raises(InputError, match="not a file of votes"):
            study.tally((ballot(tmp_path, 3, [], models=models),))
    name = "s|p\no\x1b[31m\ud800"
    line = study.tally((ballot(tmp_path, 4, [("general", name)], models=["base", name]),)).splitlines()[2]
    assert line.startswith(r"| question | s\|p?o?[31m? wins | tie |") and line.count(" | ") == 6 and line.encode()
    with pytest.raises(InputError, match="none of them called tie"):
        study.write_study(tmp_path / "s.html", pictures(tmp_path / "p", ["tie", "b"], 1), ["p"])


def test_study_wants_two(tmp_path):
    with pytest.raises(InputError, match="compares two"):
        study.write_study(tmp_path / "s.html", pictures(tmp_path, ["a"], 1), ["p"])
    with pytest.raises(InputError, match="compares two"):
        call("evaluate", "--study", tmp_path / "s.html")
