"""One self-contained page per evaluation: what got better, the pictures, the numbers, the curves.

    python evaluate.py --lora base= spo=runs/spo --curves spo=runs/spo  # writes report.html, too

The page needs no network and no server: pictures are embedded as thumbnails, charts are SVG, a
short script sorts, compares two models on one picture, and enlarges. A training has a shorter page,
which follows it (write_live).
"""
import base64
import contextlib
import functools
import html
import io
import json
import os
import time
from pathlib import Path
from zlib import Z_RLE

from PIL import Image, ImageDraw

from clip_spm import upright
from diffusion import to_pil
from training import warn, write_atomic
from weights import InputError, read_json

# Paul Tol's colours, safe for the colour-blind.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
CURVES = {"validation_score": "same prompts every time",
          "validation_pickscore": "of the same pictures",
          "score": "judge's mean score of the candidates",
          "score_gap": "best minus worst of a pool", "margin": "log-ratio, winner - loser",
          "accuracy": "share of pairs in the right order",
          "ratio_win": "policy / reference, winners", "ratio_lose": "policy / reference, losers",
          "lora_norm": "size of the LoRA", "loss": "what is minimized",
          "grad_norm": "gradient norm"}
# In the judge's units: those of two judges share no axis.
JUDGED = ("validation_score", "score", "score_gap")
SHOWN = {"geneval": (100, 2)}           # metric -> (factor, decimals); (1, 3) for others
THEME = """
:root {
  color-scheme: light dark;
  --ground: #f6f5f2; --card: #fff; --ink: #1d1f23; --soft: #62666e; --line: #dddad3;
  --accent: #2b5fc4; --better: #1c7c3c; --worse: #b8322a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #131518; --card: #1d2024; --ink: #e9e7e3; --soft: #a3a7af; --line: #34383f;
    --accent: #8db4ff; --better: #62cf86; --worse: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: clamp(1.7rem, 5vw, 2.6rem); line-height: 1.15; margin: .2rem 0 .6rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; }
a { color: var(--accent); }
button, select {
  font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .3rem .8rem; max-width: 100%;
}
button { cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
img { max-width: 100%; }
[hidden] { display: none !important; }
.quiet { color: var(--soft); font-size: .88rem; }
.small img { image-rendering: pixelated; }
"""
STYLE = """
body { max-width: 1280px; margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 4rem; }
.kicker { color: var(--soft); margin: 0; }
.lead { font-size: clamp(1.05rem, 2.5vw, 1.3rem); max-width: 52rem; margin: .4rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1.2rem 0 0; }
figure { margin: 0; }
figcaption { font-size: .85rem; line-height: 1.35; }
.picture { display: block; width: 100%; padding: 0; border: 0; background: none; }
.picture img { display: block; width: 100%; border-radius: .4rem; }
.picture:hover img { filter: brightness(1.06); }
.up { color: var(--better); }
.down { color: var(--worse); }
.same { color: var(--soft); }
.ends { display: flex; justify-content: space-between; font-size: .85rem; }
.bars {
  display: flex; align-items: end; gap: 1px; height: 5.5rem; margin: .2rem 0;
  border-bottom: 1px solid var(--line);
}
.bars i { flex: 1; background: currentColor; }
#hero {
  display: grid; gap: .5rem; margin-top: 1.4rem;
  grid-template-columns: max-content repeat(var(--prompts), minmax(0, 1fr));
  grid-template-rows: repeat(var(--models), auto) auto;
}
#hero > * { display: grid; grid-row: 1 / -1; grid-template-rows: subgrid; min-width: 0; }
#hero > .names { align-items: center; font-weight: 600; max-width: 9rem; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  max(11rem, var(--across) * 8rem)), 1fr)); }
.row, .chart, .sheet {
  background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .8rem;
}
.head { display: flex; justify-content: space-between; gap: .5rem; margin-bottom: .5rem; }
.head p { margin: 0; line-height: 1.35; }
.head p, #hero figcaption {         /* a long prompt is read in the enlarged picture */
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden;
}
.pictures {
  display: grid; gap: .5rem; grid-template-columns: repeat(var(--across), minmax(0, 1fr));
}
.pictures figcaption { color: var(--soft); margin-top: .2rem; font-size: .8rem; }
.pictures b { color: var(--ink); }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; }
.controls label { max-width: 100%; }
.charts {
  display: grid; gap: .8rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
}
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: currentColor; }
.sheet { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td {
  padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word;
}
tr + tr > * { border-top: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; }
tbody th { padding-top: 1rem; }
td:first-child { overflow-wrap: anywhere; min-width: 4rem; }
tbody tr:last-child > * { border-bottom: 0; }
th .quiet { font-weight: 400; }
.up, .down { white-space: nowrap; }
.grids { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0; }
.grids .sheet { margin: 0; max-width: max(min(100%, 30rem), 50% - .4rem); }
.trace { border-radius: .4rem; display: block; margin-top: .3rem; }
details { margin-top: 3rem; }
summary { cursor: pointer; font-size: 1.3rem; font-weight: 700; }
dialog {
  border: 0; border-radius: .9rem; background: var(--card); color: var(--ink); padding: 1rem;
  max-width: 96vw; max-height: 96vh;
}
dialog::backdrop { background: #000b; }
dialog p { margin: 0 0 .6rem; max-width: min(88vw, 44rem); }
#stage {
  position: relative; margin: auto; width: min(88vw, calc(66vh * var(--ratio, 1)));
}
#stage img { display: block; width: 100%; border-radius: .4rem; }
#over, #slider { position: absolute; inset: 0; width: 100%; height: 100%; }
#over { clip-path: inset(0 calc(100% - var(--at)) 0 0); }
#slider { margin: 0; opacity: 0; cursor: ew-resize; touch-action: pan-y; }
#edge {
  position: absolute; top: 0; bottom: 0; left: var(--at); width: 3px; margin-left: -1.5px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none;
}
#edge::after {
  content: "\\2194"; position: absolute; top: 50%; left: 50%; translate: -50% -50%; width: 2.2rem;
  background: #fff; color: #111; border-radius: 9rem; text-align: center; line-height: 2.2rem;
  box-shadow: 0 0 4px #0008;
}
#slider:focus-visible + #edge::after { background: var(--accent); color: var(--card); }
.sides { display: flex; justify-content: space-between; gap: 1rem; margin: .4rem 0; }
.sides :last-child { text-align: right; }
.alone .sides :first-child, .alone #over, .alone #slider, .alone #edge { display: none; }
dialog form { display: flex; justify-content: space-between; gap: .5rem; }
@media (max-width: 760px) {
  #hero { grid-template-columns: repeat(var(--models), minmax(0, 1fr)); grid-template-rows: none; }
  #hero > * { grid-row: auto; grid-column: 1 / -1; grid-template: auto / subgrid; }
  #hero > .names { max-width: none; }
  #hero figcaption { grid-column: 1 / -1; margin-bottom: .5rem; }
  th, td { padding-right: .5rem; font-size: .85rem; }
}
"""
SCRIPT = """
const pick = name => document.getElementById(name);
const data = JSON.parse(pick("data").textContent), { models, found } = data;
const base = models[0], metrics = Object.keys(found.metrics);
const set = (style, values) => { for (const k in values) style.setProperty(k, values[k]); };
function make(tag, className, ...children) {
  const out = document.createElement(tag);
  out.className = className;
  out.append(...children);
  return out;
}

const direction = gain => gain > 0 ? "up" : gain < 0 ? "down" : "same";
function told(metric, score, signed = false) {
  const [factor, digits] = data.shown[metric] || [1, 3];
  return (signed && score >= 0 ? "+" : "") + (factor * score).toFixed(digits);
}

// The numbers

function sheet(head, rows) {                // a table; cells are texts, or elements
  const line = (tag, cells) => make("tr", "", ...cells.map(
    cell => cell instanceof Node ? cell : make(tag, "", cell)));
  return make("div", "sheet", make("table", "", make("thead", "", line("th", head)),
    make("tbody", "", ...rows.map(cells => line("td", cells)))));
}

function means() {
  const rows = [];
  for (const m of metrics) {
    const title = make("th", "", m + " ", make("span", "quiet", found.metrics[m]));
    title.colSpan = 4;
    rows.push([title]);
    for (const name of models) {
      const row = found.results[name][m], interval = row.win_rate_interval;
      const error = interval ? " ± " + told(m, row.standard_error) : "";
      const range = interval ? ` (${interval.map(v => (100 * v).toFixed(1)).join(" to ")})` : "";
      rows.push([name, told(m, row.mean) + error, ...(name == base ? ["", ""] : [
        make("td", direction(row.difference), told(m, row.difference, true)),
        (100 * row.win_rate).toFixed(1) + " %" + range])]);
    }
  }
  return sheet(["model", "mean ± standard error ↑", "gain ↑", `win rate against ${base} ↑`], rows);
}

function groups(m) {                        // GenEval's tags, HPSv2's styles
  const columns = Object.keys(found.groups[base][m]);
  return sheet([m, ...columns.map(c => c + " ↑")], models.map(
    name => [name, ...columns.map(c => told(m, found.groups[name][m][c]))]));
}

function histogram(m, name, bins = 21) {    // zero is in the middle
  const gains = found.scores[name][m].map((score, i) => score - found.scores[base][m][i]);
  const reach = gains.reduce((most, g) => Math.max(most, Math.abs(g)), 0) || 1;
  const counts = new Array(bins).fill(0), many = kind =>
    gains.filter(g => direction(g) == kind).length;
  for (const g of gains) counts[Math.min(bins - 1, Math.floor(bins * (g / reach + 1) / 2))]++;
  const bars = counts.map((count, b) => {
    const bar = make("i", direction(b - (bins - 1) / 2));
    bar.style.height = `max(${count && 2}px, ${100 * count / Math.max(...counts)}%)`;
    bar.title = count;
    return bar;
  });
  return make("figure", "chart", `${m}: gain of ${name}, by picture`,
    make("div", "ends", make("span", "down", "worse " + many("down")),
      make("span", "same", "as good " + many("same")), make("span", "up", "better " + many("up"))),
    make("div", "bars", ...bars), make("div", "ends quiet", make("span", "", told(m, -reach)),
      make("span", "", "0"), make("span", "", told(m, reach, true))));
}

pick("tables").append(means(), ...(Object.hasOwn(found.groups, base) ? metrics.map(groups) : []));
pick("gains").append(...metrics.flatMap(m => models.slice(1).map(name => histogram(m, name))));

// The pictures

for (const m of models.slice(1)) pick("model").append(new Option(m, m));
for (const m of metrics) pick("metric").append(new Option(m, m));
pick("model").parentElement.hidden = models.length < 2;

function gain(row) {
  const model = pick("model").value, metric = pick("metric").value;
  return row.scores[model || base][metric] - (model ? row.scores[base][metric] : 0);
}

function scores(row, model) {               // a line per metric; better or worse than the base
  return metrics.flatMap(m => {
    const score = row.scores[model][m], step = score - row.scores[base][m];
    const arrow = step > 0 ? " ▲" : step < 0 ? " ▼" : "";
    return [make("br", ""), m + " " + told(m, score), make("span", direction(step), arrow)];
  });
}

function picture(row, model) {
  const image = new Image(), out = make("button", "picture", image);
  image.src = row.images[model];
  image.alt = model + ": " + row.prompt;
  image.loading = "lazy";
  out.onclick = () => zoom(row, model);
  return out;
}

let listed = [], enlarged = null;           // the rows in the order of the page; the one in #zoom

function show() {
  const order = pick("order").value, rows = data.rows.map((row, i) => [row, gain(row), i]);
  const sign = order == "most" ? -1 : 1, metric = pick("metric").value;
  if (order != "prompts") rows.sort((a, b) => sign * (a[1] - b[1]) || a[2] - b[2]);
  listed = rows.map(([row]) => row);
  pick("rows").replaceChildren(...rows.map(([row, g]) => {
    const change = models.length > 1 ? make("span", direction(g), told(metric, g, true)) : "";
    const out = make("div", "row", make("div", "head", make("p", "", row.prompt), change),
      make("div", "pictures", ...models.map(model => make("figure", "", picture(row, model),
        make("figcaption", "", make("b", "", model), ...scores(row, model))))));
    out.dataset.gain = g;
    return out;
  }));
}

// Two models on one picture: the first on the left of the edge, the other on its right.
function zoom(row, model) {
  const other = model == base ? pick("model").value || base : model;
  enlarged = row;
  pick("zoom").classList.toggle("alone", other == base);
  pick("zoom").dataset.model = other;
  pick("zoom-prompt").textContent = row.prompt;
  pick("under").onload = () => set(pick("stage").style,
    { "--ratio": pick("under").naturalWidth / pick("under").naturalHeight });
  for (const [image, name] of [["under", other], ["over", base]]) {
    pick(image).src = row.images[name];
    pick(image).alt = name;
  }
  pick("one").replaceChildren(make("b", "", base), ...scores(row, base));
  pick("other").replaceChildren(make("b", "", other), ...scores(row, other));
  if (!pick("zoom").open) pick("zoom").showModal();
}

function slide() { set(pick("stage").style, { "--at": pick("slider").value + "%" }); }

function turn(step) {                       // to the next picture in the order that is shown
  const place = listed.indexOf(enlarged) + step + listed.length;
  zoom(listed[place % listed.length], pick("zoom").dataset.model);
}

pick("slider").oninput = slide;
pick("stage").onpointermove = event => {    // a mouse need not press
  if (event.pointerType != "mouse" || event.buttons) return;
  const box = pick("stage").getBoundingClientRect();
  pick("slider").value = 100 * (event.clientX - box.left) / box.width;
  slide();
};
pick("zoom").onclick = event => { if (event.target == pick("zoom")) pick("zoom").close(); };
pick("earlier").onclick = () => turn(-1);
pick("later").onclick = () => turn(1);
for (const name of ["model", "metric", "order"]) pick(name).onchange = show;

const few = Math.min(data.rows.length, 8);  // evenly spaced, on top of the page
set(document.documentElement.style, {
  "--across": models.length == 4 ? 2 : Math.min(models.length, 3), "--models": models.length,
  "--prompts": few });
pick("hero").append(make("div", "names", ...models.map(m => make("span", "", m))));
for (let i = 0; i < few; i++) {
  const row = data.rows[Math.floor(i * data.rows.length / few)];
  pick("hero").append(make("figure", "", ...models.map(model => picture(row, model)),
    make("figcaption", "", row.prompt)));
}
for (const heading of document.querySelectorAll("h2, summary")) {
  const link = make("a", "", heading.textContent.toLowerCase());
  link.href = "#" + heading.id;
  if (heading.offsetParent) document.querySelector("nav").append(link);
}
slide();
show();
"""
BODY = """<p class="kicker">{kicker}</p>
<h1>{title}</h1>
{summary}
<div id="hero" class="{small}" {hidden}></div>
<nav></nav>
<h2 id="numbers">Numbers</h2>
<div id="tables"></div>
<p class="quiet">&#8593; higher is better. Ties count half in a win rate; its interval is of 95 %,
over prompts.</p>
<div id="gains" class="charts"></div>
{curves}
{traces}
<section {hidden}><h2 id="pictures">Pictures</h2>
<p class="quiet">{count} of {all} pictures of each model, evenly spaced in the list of prompts,
never chosen by score. Same prompt and seed beside each other; &#9650; better, &#9660; worse than
{base}. Tap a picture to enlarge it.</p>
<p class="controls"><label>order <select id="order"><option value="prompts">as in the list</option>
<option value="most">largest gain first</option>
<option value="least">smallest gain first</option></select></label>
<label>gain in <select id="metric"></select></label>
<label>of <select id="model"></select></label></p>
<div id="rows" class="cards {small}"></div></section>
<details><summary id="protocol">Protocol</summary>
<div class="sheet"><table>{told}</table></div></details>
<dialog id="zoom" class="{small}"><p id="zoom-prompt"></p>
<div id="stage"><img id="under"><img id="over"><input type="range" id="slider" min="0" max="100"
step="0.1" aria-label="how much of the left model is seen"><span id="edge"></span></div>
<div class="sides quiet"><span id="one"></span><span id="other"></span></div>
<form method="dialog"><button id="earlier" type="button">&#8592; previous</button>
<button id="close">close</button><button id="later" type="button">next &#8594;</button></form>
</dialog>"""
LIVE = """<p class="kicker">{kicker}</p>
<h1>{title}</h1>
<p class="lead">{state}</p>
<progress value="{done}" max="{total}" style="width: 100%"></progress>
<div class="grids">{grids}</div>
{advice}
{curves}"""
FINISHED = "finished; README.md in the same folder says how to use what was trained"
WATCH = (           # the advice of docs/watch.md, with the newest values
    "validation_score {validation_score:.4g}, {validation_score_at_start:.4g} at the start: it "
    "should rise. The prompts and seeds are the same every time.",
    "valid_share {valid_share:.3g}: if it is near zero, lower --threshold. margin {margin:.3g}: "
    "far below 1 / beta (beta is {beta:g}), the loss does not yet hold the LoRA near the base.",
    "ratio_win {ratio_win:.4g}, ratio_lose {ratio_lose:.4g}: they climb while the run leaves the "
    "base; above 1.02 it has mostly gone on too long. best/ is earlier. Look at the pictures.",
    "accuracy {accuracy:.3g} (chance: 0.5), loss {loss:.3g} (chance: 0.693) in the newest step. "
    "Single steps are noisy: look at the curves. Unreadable pairs so far: {unreadable}.")
TRACES = """<h2 id="trajectories">Trajectories</h2>
<p class="quiet">A row per scored step, its candidates as decoded x0 with the judge's scores. Green:
winner; red: loser; blue dot: where the trajectory goes on, chosen at random; grey: too close to
count.</p>"""


def data_uri(image: Image.Image, side: int = 0, quality: int = 85) -> str:
    """A picture as text for `src=`: PNG up to 128 pixels, else JPEG of at most `side` pixels.

    So the tiny model's pictures stay exact.
    """
    image, handle = upright(image).convert("RGB"), io.BytesIO()
    if side and max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.save(handle, kind, quality=quality, compress_type=Z_RLE)      # JPEG's, PNG's
    return f"data:image/{kind};base64,{base64.b64encode(handle.getvalue()).decode()}"


def draw_trace(trace: list[dict], width: int = 96) -> Image.Image:
    """The paper's Figures 3 and 5 of one trajectory: a row per pool, candidates as decoded x0.

    Beside each row stands when its pool opened and was judged. Green frame: winner. Red frame:
    loser. Blue dot: the candidate that the next step starts from. Grey: no pair.
    """
    head, margin = 16, 6
    across, down = width + 2 * margin, width + head + 2 * margin        # a candidate's cell
    canvas = Image.new(
        "RGB", (64 + len(trace[0]["scores"]) * across, len(trace) * down + head), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((8, len(trace) * down),
             "green: best, red: worst (grey: no pair), dot: goes on from here", fill="black")
    for r, row in enumerate(trace):
        when = f"t = {row['opened']:.0f}\n -> {row['timestep']:.0f}"
        pen.text((8, r * down + down // 2 - 8), when, fill="black")
        for c, image in enumerate(to_pil((row["images"] / 2 + 0.5).clamp(0, 1))):
            left, top = 64 + c * across + margin, r * down + margin
            green, red = ("#1a9850", "#d73027") if row["valid"] else ("#999", "#999")
            colour = {row["win"]: green, row["lose"]: red}.get(c)
            if colour:
                pen.rectangle((left - 4, top - 4, left + width + 3, top + width + 3), fill=colour)
            canvas.paste(image.resize((width, width), Image.Resampling.LANCZOS), (left, top))
            pen.text((left, top + width + 4), f"{row['scores'][c]:.2f}", fill=colour or "black")
            if c == row["chosen"]:
                pen.ellipse((left + width - 13, top + width + 5,
                             left + width - 3, top + width + 15), fill="#2b6cff")
    return canvas


def write_page(path: Path, title: str, style: str, body: str, data, script: str,
               head: str = "") -> None:
    """Write one HTML file that needs no other. `title` is text, `body` and `head` HTML.

    `script` finds `data` in #data, as JSON that no prompt can close; ValueError for NaN in it.
    """
    held = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>{head}
<style>{THEME}{style}</style></head><body>
{body}
<script type="application/json" id="data">{held}</script>
<script>{script}</script>
</body></html>
"""
    write_atomic(path, lambda p: p.write_bytes(page.encode("utf-8", "replace")))


# The curves

def read_logs(words: tuple[str, ...]) -> dict[str, list[dict]]:
    """name=FOLDER (of a run, or its log.jsonl) -> {name: records}; InputError names the file.

    A record says who judged, `judge`, where the run's config.json lies beside the log.
    """
    out = {}
    for word in words:
        name, equals, source = word.partition("=")
        path = Path(source) / "log.jsonl" if os.path.isdir(source) else Path(source)
        if not equals or not name or not source or name in out:
            raise InputError(f"--curves {word}: write name=RUNFOLDER, each name once")
        if not os.path.isfile(path):
            raise InputError(f"{path}: cannot be read (no such file)")
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path}: not a run's log ({error})") from None
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: holds no records")
        settings = path.with_name("config.json")
        config = read_json(settings) if settings.exists() else {}
        judge = f"{config.get('judge')} of {config.get('spm') or config.get('model')}"
        out[name] = [dict(row, judge=judge) for row in rows] if config else rows
    return out


def number(value) -> bool:
    """Can it be drawn? A damaged log holds anything."""
    return isinstance(value, int | float) and abs(value) < 1e30


def curve(series: dict[str, list[tuple[float, float]]], title: str, colours: dict[str, str],
          unit: str = "", width: int = 340, height: int = 190) -> str:
    """{name: [(x, y)]} -> an SVG line chart with its extreme values at the axes.

    `colours`: of every name.
    """
    xs, ys = zip(*(point for line in series.values() for point in line))
    left, right = min(xs), max(xs)
    spread = (max(ys) - min(ys)) or abs(max(ys)) or 1.0
    low, high = min(ys) - 0.05 * spread, max(ys) + 0.05 * spread
    x0, y0, w, h = 62, 24, width - 74, height - 52          # the plot

    def place(x: float, y: float) -> tuple[float, float]:
        return x0 + w * (x - left) / ((right - left) or 1), y0 + h * (high - y) / (high - low)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">',
           f'<text x="{x0}" y="14">{html.escape(title)}</text>',
           f'<path d="M{x0} {y0}V{y0 + h}H{x0 + w}" fill="none" stroke="currentColor" '
           'opacity=".4"/>',
           *(f'<text x="{x0 - 5}" y="{place(left, y)[1] + 4:.1f}" text-anchor="end">{y:.4g}</text>'
             for y in (low, (low + high) / 2, high)),
           *(f'<text x="{place(x, low)[0]:.1f}" y="{y0 + h + 16}" text-anchor="middle">{x:g}</text>'
             for x in dict.fromkeys((left, right))),
           f'<text x="{x0 + w / 2}" y="{y0 + h + 16}" text-anchor="middle">{unit}</text>']
    for name, line in series.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" '
                   f'stroke-width="2"><title>{html.escape(name)}</title></polyline>')
    return "".join(out) + "</svg>"


def thinned(line: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """A long line as means of neighbours, each at its last x: single steps are noise."""
    size = -(-len(line) // most)
    parts = [line[i:i + size] for i in range(0, len(line), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def learning_curves(logs: dict[str, list[dict]]) -> str:
    """Charts of CURVES in the logs, over rounds (SPO) or steps (SPM); "" without any.

    Runs share a chart where they share its unit; JUDGED fields also need the same judge.
    """
    colours = dict(zip(logs, COLOURS * len(logs)))
    charts = []
    for field, meaning in CURVES.items():
        axes: dict[tuple[str, str], dict] = {}
        for name, rows in logs.items():
            unit = "round" if "round" in rows[0] else "step"
            start = rows[0].get(f"{field}_at_start")
            line = [(0, start)] if number(start) else []
            line += [(row[unit] if number(row.get(unit)) else i + 1, row[field])
                     for i, row in enumerate(rows) if number(row.get(field))]
            judge = str(rows[0].get("judge", name)) if field in JUDGED else ""
            if line:
                axes.setdefault((unit, judge), {})[name] = thinned(line)
        for (unit, judge), series in axes.items():
            told = f"{', '.join(series)} by {judge}" if judge and len(axes) > 1 else ""
            chart = curve(series, f"{field}: {meaning}", colours, unit)
            charts.append(f'<figure class="chart">{chart}<figcaption class="quiet">'
                          f'{html.escape(told)}</figcaption></figure>')
    legend = " ".join(f'<span style="color:{colours[name]}">&#9632;</span> {html.escape(name)}'
                      for name in logs)
    return (f'<h2 id="curves">Learning curves</h2><p>{legend}</p>'
            f'<div class="charts">{"".join(charts)}</div>') if charts else ""


# The page

def shown(metric: str, value: float) -> str:
    """A score as the tables print it."""
    factor, digits = SHOWN.get(metric, (1, 3))
    return f"{factor * value:.{digits}f}"


def summary(found: dict) -> list[str]:
    """A sentence per model but the first: how often it is better by the first metric, the means.

    `found`: what results.json holds.
    """
    metrics, scores = list(found["metrics"]), found["scores"]
    (base, first), *others = found["results"].items()
    if not others:
        means = ", ".join(f"{m} {shown(m, first[m]['mean'])}" for m in metrics)
        return [f"{base}: {means} over {first[metrics[0]]['n']} pictures."]
    out = []
    for name, row in others:
        gains = [b - a for a, b in zip(scores[base][metrics[0]], scores[name][metrics[0]])]
        equal = f", as good in {gains.count(0)}," if 0 in gains else ""
        means = "; ".join(f"{m} ({shown(m, first[m]['mean'])} to {shown(m, row[m]['mean'])})"
                          for m in metrics)
        low, high = row[metrics[0]]["win_rate_interval"] or (0, 1)
        chance = " That may be chance." if low <= 0.5 <= high else ""
        out.append(f"{name} is better than {base} in {sum(g > 0 for g in gains)} of {len(gains)} "
                   f"pictures{equal} by {means}.{chance}")
    return out


def traces(folder: Path) -> str:
    """The trajectories drawn into the folder, trace-*.png, as HTML; "" without any."""
    out = []
    for path in sorted(folder.glob("trace-*.png")):
        try:
            uri = data_uri(Image.open(path))
        except Exception as error:          # PIL's decoders raise what they like
            warn(f"{path}: not a readable picture ({error}); the report goes without it")
            continue
        out.append(f'<figure><figcaption>{html.escape(path.stem.removeprefix("trace-"))}'
                   f'</figcaption><img class="trace" alt="" loading="lazy" src="{uri}"></figure>')
    return TRACES + "".join(out) if out else ""


def write_report(path: Path, found: dict, files: dict[str, list[Path]], prompts: list[str],
                 logs: dict[str, list[dict]], rows: int = 200, date: str = "") -> None:
    """Write report.html from what an evaluation holds.

    `found`: what results.json holds; `files`: model -> its pictures, one per entry of `prompts`.
    The page shows `rows` of the pictures (0: none), evenly spaced, never chosen by score, 384
    pixels wide at most; the trace-*.png beside it come with it.
    """
    models, protocol = list(files), found["protocol"]
    count = min(rows, len(prompts))
    entries = [dict(prompt=prompts[i],
                    images={m: data_uri(Image.open(files[m][i]), 384) for m in models},
                    scores={m: {k: v[i] for k, v in found["scores"][m].items()} for m in models})
               for i in (row * len(prompts) // count for row in range(count))]
    small = all(uri.startswith("data:image/png") for e in entries for uri in e["images"].values())
    title = f"{', '.join(models[1:])} against {models[0]}" if models[1:] else models[0]
    told = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>"
                   for k, v in (protocol | found["metrics"]).items())
    body = BODY.format(
        kicker=" · ".join(html.escape(str(word)) for word in (
            protocol.get("model", "pictures made elsewhere"), date,
            f"{protocol['prompts']} prompts") if word), title=html.escape(title),
        summary="".join(f'<p class="lead">{html.escape(words)}</p>' for words in summary(found)),
        curves=learning_curves(logs), traces=traces(path.parent), told=told, count=count,
        all=len(prompts), base=html.escape(models[0]), small="small" if small else "",
        hidden="" if entries else "hidden")
    data = dict(models=models, found=found, rows=entries, shown=SHOWN)
    write_page(path, title, STYLE, body, data, SCRIPT)


# The page of a training

def round_of(grid: Path) -> str:
    """After which round samples-*.png was drawn, in words."""
    after = grid.stem.removeprefix("samples-")
    return f"after round {after.lstrip('0')}" if after.strip("0") else "the base"


def time_left(minutes: float) -> str:
    """In hours where minutes are many."""
    return f"about {minutes:.0f} minutes" if minutes < 100 else f"about {minutes / 60:.1f} hours"


def advice(rows: list[dict], config: dict) -> list[str]:
    """WATCH with each field's newest value; a method without such fields goes without the line."""
    newest = config | {k: v for row in rows for k, v in row.items() if number(v)}
    out = []
    for words in WATCH:
        with contextlib.suppress(KeyError):
            out.append(words.format_map(newest))
    return out


@functools.lru_cache(4)
def sheet(grid: Path, changed: int) -> str:
    """A sample grid for a page that is written often; `changed`: the file's time, in ns."""
    return (f'<figure class="sheet"><figcaption>{round_of(grid)}</figcaption>'
            f'<img alt="sample pictures" src="{data_uri(Image.open(grid), 1600)}"></figure>')


def write_live(folder: Path, rows: list[dict], total: int, unit: str, running: bool,
               config: dict) -> None:
    """report.html of a training: how far it is, the newest samples beside the base's, the curves.

    `rows`: its log; `total`: `unit`s, rounds or steps. While it runs, the page loads itself again
    every 30 s.
    """
    last = rows[-1] if rows else {}
    done, minutes = last.get(unit, 0), last.get("eta_minutes")
    state = FINISHED if done == total else "stopped; the same command goes on from here"
    if running:
        state = f"running, {time_left(minutes)} left" if number(minutes) else "running"
    grids = sorted(folder.glob("samples-*.png"))
    name = folder.resolve().name
    told = "".join(f"<li>{html.escape(words)}</li>" for words in advice(rows, config))
    body = LIVE.format(
        kicker=html.escape(f"{config.get('model')} · {time.strftime('%Y-%m-%d %H:%M:%S')}"),
        title=html.escape(f"{name}: {unit} {done} of {total}"), state=state, done=done, total=total,
        grids="".join(sheet(grid, grid.stat().st_mtime_ns)
                      for grid in dict.fromkeys(grids[:1] + grids[-1:])),
        curves=learning_curves({name: rows}) if rows else "",
        advice=f'<h2 id="watch">What to watch</h2><ul>{told}</ul>' if told else "")
    head = '\n<meta http-equiv="refresh" content="30">' if running else ""
    write_page(folder / "report.html", f"{name}: {done} of {total}", STYLE, body, {}, "", head)
