"""One self-contained page per evaluation: table, protocol, learning curves, every picture.

    python evaluate.py --lora base= spo=runs/spo --logs spo=runs/spo    # writes report.html, too

The page needs no network and no server: pictures are embedded as thumbnails, curves are SVG, a
short script sorts.
"""
import base64
import html
import io
import json
import math
import os
import re
from pathlib import Path

from PIL import Image, ImageDraw

from diffusion import to_pil
from training import write_atomic
from weights import InputError

# Paul Tol's colours, safe for the colour-blind.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
CURVES = {"score": "judge's mean score of the candidates",
          "score_gap": "best minus worst of a pool", "margin": "log-ratio, winner - loser",
          "ratio_win": "policy / reference, winners", "ratio_lose": "policy / reference, losers",
          "lora_norm": "size of the LoRA", "loss": "loss", "grad_norm": "gradient norm"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body {
  font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1.2rem;
}
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
th, td {
  padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line);
}
.wide { overflow-x: auto; }
.quiet { opacity: .75; font-size: .9em; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; }
.curves figure { margin: 0; }
svg text { font-size: 11px; fill: currentColor; }
.row { border-top: 1px solid var(--line); padding: .6rem 0; }
.row p { margin: 0 0 .3rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; }
.pictures figure { margin: 0; width: 192px; }
.pictures img { width: 192px; }
figcaption { font-size: .85em; }
.small img { image-rendering: pixelated; }
.controls { display: flex; flex-wrap: wrap; gap: 1rem; }
.trace { max-width: 100%; }
"""
SCRIPT = """
const pick = name => document.getElementById(name);
const data = JSON.parse(pick("data").textContent), base = data.models[0];
const make = tag => document.createElement(tag);
const text = (tag, words) => {
  const element = make(tag);
  element.textContent = words;
  return element;
};
for (const m of data.models.slice(1)) pick("model").append(new Option(m, m));
for (const m of data.metrics) pick("metric").append(new Option(m, m));

function gain(row) {
  const model = pick("model").value, metric = pick("metric").value;
  return row.scores[model || base][metric] - (model ? row.scores[base][metric] : 0);
}

function figure(row, model) {
  const out = make("figure"), image = new Image(), caption = make("figcaption");
  image.src = row.images[model];
  image.alt = model + ": " + row.prompt;
  image.loading = "lazy";
  caption.append(text("b", model));
  for (const m of data.metrics) {
    caption.append(make("br"), m + " " + row.scores[model][m].toFixed(3));
  }
  out.append(image, caption);
  return out;
}

function show() {
  const order = pick("order").value, rows = data.rows.map((row, i) => [row, gain(row), i]);
  const sign = order == "most" ? -1 : 1;
  if (order != "prompts") rows.sort((a, b) => sign * (a[1] - b[1]) || a[2] - b[2]);
  pick("rows").replaceChildren(...rows.map(([row, g]) => {
    const out = make("div"), pictures = make("div");
    out.className = "row";
    out.dataset.gain = g;
    pictures.className = "pictures";
    pictures.append(...data.models.map(model => figure(row, model)));
    const told = "  (gain " + (g >= 0 ? "+" : "") + g.toFixed(3) + ")";
    out.append(text("p", row.prompt + told), pictures);
    return out;
  }));
}

for (const name of ["model", "metric", "order"]) pick(name).onchange = show;
show();
"""
TRACES = """<h2>Trajectories</h2>
<p class="quiet">A row per scored step, its candidates as decoded x0 with the judge's scores. Green:
winner; red: loser; blue dot: where the trajectory goes on, chosen at random; grey: too close to
count.</p>"""


def data_uri(image: Image.Image, side: int = 0, quality: int = 85) -> str:
    """A picture as text for `src=`: PNG up to 128 pixels, else JPEG of at most `side` pixels.

    So the tiny model's pictures stay exact.
    """
    image, handle = image.convert("RGB"), io.BytesIO()
    if side and max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.save(handle, kind, **({} if kind == "png" else dict(quality=quality)))
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
        pen.text((8, r * down + down // 2 - 8), f"t = {row['opened']}\n -> {row['timestep']}",
                 fill="black")
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


def embed_json(value) -> str:
    """JSON that may stand inside a <script> element, which no prompt can close; no NaN in it."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def read_logs(words: tuple[str, ...]) -> dict[str, list[dict]]:
    """name=FOLDER (of a run, or its log.jsonl) -> {name: records}; InputError names the file."""
    out = {}
    for word in words:
        name, equals, source = word.partition("=")
        path = Path(source) / "log.jsonl" if os.path.isdir(source) else Path(source)
        if not equals or not name or not source:
            raise InputError(f"--logs {word}: write name=RUNFOLDER")
        try:
            out[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path}: not a run's log ({error})") from None
        if not out[name] or not all(isinstance(row, dict) for row in out[name]):
            raise InputError(f"{path}: holds no records")
    return out


def curve(series: dict[str, list[tuple[float, float]]], title: str, width: int = 340,
          height: int = 190) -> str:
    """{name: [(x, y)]} -> an SVG line chart with its extreme values at the axes.

    The colours follow the order of names.
    """
    xs, ys = zip(*(point for line in series.values() for point in line))
    left, right = min(xs), max(xs)
    spread = (max(ys) - min(ys)) or abs(max(ys)) or 1.0
    low, high = min(ys) - 0.05 * spread, max(ys) + 0.05 * spread
    x0, y0, w, h = 62, 24, width - 74, height - 52          # the plot

    def place(x: float, y: float) -> tuple[float, float]:
        return x0 + w * (x - left) / ((right - left) or 1), y0 + h * (high - y) / (high - low)

    out = [f'<svg width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">',
           f'<text x="{x0}" y="14">{html.escape(title)}</text>',
           f'<path d="M{x0} {y0}V{y0 + h}H{x0 + w}" fill="none" stroke="currentColor" '
           'opacity=".4"/>',
           *(f'<text x="{x0 - 5}" y="{place(left, y)[1] + 4:.1f}" text-anchor="end">{y:.4g}</text>'
             for y in (low, (low + high) / 2, high)),
           *(f'<text x="{place(x, low)[0]:.1f}" y="{y0 + h + 16}" text-anchor="middle">{x:g}</text>'
             for x in dict.fromkeys((left, right)))]
    for (name, line), colour in zip(series.items(), COLOURS * len(series)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2">'
                   f"<title>{html.escape(name)}</title></polyline>")
    return "".join(out) + "</svg>"


def learning_curves(logs: dict[str, list[dict]]) -> str:
    """A chart for each of CURVES in the logs, over rounds (SPO) or steps (SPM); "" without any."""
    charts = []
    for field, meaning in CURVES.items():
        series = {name: [(row.get("round", row.get("step", i + 1)), row[field])
                         for i, row in enumerate(rows) if isinstance(row.get(field), int | float)
                         and math.isfinite(row[field])] for name, rows in logs.items()}
        if any(series.values()):
            seen = {name: line for name, line in series.items() if line}
            charts.append(f"<figure>{curve(seen, f'{field}: {meaning}')}</figure>")
    legend = " ".join(f'<span style="color:{colour}">&#9632;</span> {html.escape(name)}'
                      for name, colour in zip(logs, COLOURS * len(logs)))
    return (f'<h2>Learning curves</h2><p>{legend} <span class="quiet">over rounds</span></p>'
            f'<div class="curves">{"".join(charts)}</div>') if charts else ""


def markdown_table(text: str) -> str:
    """The Markdown tables of results.md as HTML."""
    def row(line: str, tag: str) -> str:
        cells = (f"<{tag}>{html.escape(c.strip())}</{tag}>" for c in line.strip("|").split("|"))
        return f"<tr>{''.join(cells)}</tr>"

    blocks = map(str.splitlines, re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE))
    return "".join(f"<table>{row(head, 'th')}{''.join(row(line, 'td') for line in body)}</table>"
                   for head, _, *body in blocks)


def write_report(path: Path, tables: str, told: dict[str, object], files: dict[str, list[Path]],
                 prompts: list[str], scores: dict[str, dict[str, list[float]]],
                 logs: dict[str, list[dict]], rows: int = 200) -> None:
    """Write report.html from what an evaluation holds.

    `tables`: Markdown; `told`: the protocol and the metrics' formulas; `files`: model -> its
    pictures, one per entry of `prompts`; `scores`: model -> metric -> one per picture. The page
    shows `rows` of the pictures, evenly spaced, never chosen by score, 256 pixels wide at most;
    traces (trace-*.png beside it) come last.
    """
    models = list(files)
    count = min(rows, len(prompts))
    entries = [dict(prompt=prompts[i],
                    images={m: data_uri(Image.open(files[m][i]), 256) for m in models},
                    scores={m: {k: v[i] for k, v in scores[m].items()} for m in models})
               for i in (row * len(prompts) // count for row in range(count))]
    small = all(uri.startswith("data:image/png") for e in entries for uri in e["images"].values())
    traces = "".join(
        f'<figure><figcaption>{html.escape(p.stem.removeprefix("trace-"))}</figcaption><img '
        f'class="trace" alt="{html.escape(p.stem)}" src="{data_uri(Image.open(p))}"></figure>'
        for p in sorted(path.parent.glob("trace-*.png")))
    protocol = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>"
                       for k, v in told.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation</title>
<style>{STYLE}</style></head><body>
<h1>Evaluation</h1>
<div class="wide">{markdown_table(tables)}</div>
<p class="quiet">Mean ± standard error; win rate against {html.escape(models[0])} with its 95 %
interval.</p>
<h2>Protocol</h2>
<table>{protocol}</table>
{learning_curves(logs)}
<h2>Pictures</h2>
<p class="quiet">{len(entries)} of {len(prompts)} pictures of each model, evenly spaced in the list
of prompts; same prompt and seed beside each other.</p>
<p class="controls"><label>order <select id="order"><option value="prompts">as in the list</option>
<option value="most">largest gain first</option>
<option value="least">smallest gain first</option></select></label>
<label>gain in <select id="metric"></select></label>
<label>of <select id="model"></select></label></p>
<div id="rows" class="{'small' if small else ''}"></div>
{TRACES + traces if traces else ""}
<script type="application/json" id="data">{embed_json(
        dict(models=models, metrics=list(scores[models[0]]), rows=entries))}</script>
<script>{SCRIPT}</script>
</body></html>
"""
    write_atomic(path, lambda p: p.write_text(page, encoding="utf-8"))
