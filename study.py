"""A human study on one page (paper, Figure 6): two models' pictures side by side, blind.

    python evaluate.py --lora base= spo=spo.safetensors --prompts parti --study study.html
    python evaluate.py --tally votes-*.json

Send the page to the raters; it needs no network. It asks three questions of each pair. Every rater
sees the prompts in an order, and the models on sides, of their own. Keys 1 / 2 / 3 answer (left,
right, no difference), Backspace goes back, and what was answered survives a reload. The button
saves votes-RATER.json.
"""
import hashlib
import json
import math
from pathlib import Path

from PIL import Image

from report import data_uri, embed_json
from training import permutation, write_atomic
from weights import InputError, read_json

QUESTIONS = {"general": "Which picture do you prefer, given the prompt?",
             "visual appeal": "Which picture is more beautiful, whatever the prompt says?",
             "prompt alignment": "Which picture fits the prompt better?"}
STYLE = """
:root { color-scheme: light dark; }
body {
  font: 16px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1rem;
}
#pictures { display: flex; gap: 1rem; }
#pictures img { width: 50%; min-width: 0; object-fit: contain; max-height: 60vh; }
.small img { image-rendering: pixelated; }
button { font: inherit; padding: .5rem 1rem; margin: 0 .5rem .5rem 0; }
progress { width: 100%; }
#question { font-weight: bold; }
.quiet { opacity: .75; font-size: .9em; }
"""
SCRIPT = """
const at = name => document.getElementById(name);
const data = JSON.parse(at("data").textContent), kept = "study-" + data.study;
const questions = Object.keys(data.questions), total = data.items.length * questions.length;
let state = null;
try { state = JSON.parse(localStorage.getItem(kept)); } catch (error) { state = null; }
state = state || { rater: Math.floor(Math.random() * 2 ** 31), votes: [] };

// A small generator of its own, so that a reload finds the same order.
function numbers(seed) {
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const random = numbers(state.rater), order = data.items.map((_, i) => i);
const swapped = data.items.map(() => random() < 0.5);
for (let i = order.length - 1; i > 0; i--) {
  const j = Math.floor(random() * (i + 1));
  [order[i], order[j]] = [order[j], order[i]];
}

function keep() {
  try { localStorage.setItem(kept, JSON.stringify(state)); }
  catch (error) { at("note").textContent = "This browser keeps nothing: do not reload."; }
}

// What the next vote is about: its item's index, and the question's name.
function next() {
  const done = state.votes.length;
  return [order[Math.floor(done / questions.length)], questions[done % questions.length]];
}

function show() {
  const done = state.votes.length, over = done >= total;
  at("bar").max = total;
  at("bar").value = done;
  at("place").textContent = done + " of " + total;
  at("ask").hidden = over;
  at("thanks").hidden = !over;
  at("back").disabled = done == 0;
  if (over) return;
  const [index, question] = next(), item = data.items[index];
  const sides = swapped[index] ? [1, 0] : [0, 1];
  at("prompt").textContent = item.prompt;
  at("question").textContent = data.questions[question];
  at("left").src = item.images[sides[0]];
  at("right").src = item.images[sides[1]];
}

function vote(choice) {                         // 0 left, 1 right, 2 no difference
  if (state.votes.length >= total) return;
  const [item, question] = next(), model = swapped[item] ? 1 - choice : choice;
  state.votes.push({ item, question, choice: choice == 2 ? "tie" : data.models[model] });
  keep();
  show();
}

function back() {
  state.votes.pop();
  keep();
  show();
}

function result() {
  return { study: data.study, models: data.models, prompts: data.items.length,
           rater: state.rater, votes: state.votes };
}

function save() {
  const link = document.createElement("a");
  const file = new Blob([JSON.stringify(result())], { type: "application/json" });
  link.href = URL.createObjectURL(file);
  link.download = "votes-" + state.rater + ".json";
  link.click();
}

["vote-left", "vote-right", "vote-tie"].forEach((name, i) => at(name).onclick = () => vote(i));
at("back").onclick = back;
at("save").onclick = save;
const keys = { "1": 0, ArrowLeft: 0, "2": 1, ArrowRight: 1, "3": 2, ArrowDown: 2 };
document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in keys) { event.preventDefault(); vote(keys[event.key]); }
  if (event.key == "Backspace" && state.votes.length) { event.preventDefault(); back(); }
});
keep();
show();
"""


def write_study(path: Path, files: dict[str, list[Path]], prompts: list[str], pairs: int = 0,
                seed: int = 0, side: int = 512) -> None:
    """Write the page for the first two models of `files` (model -> pictures, one per prompt).

    `pairs` of them, drawn by `seed` (0: all), shrunk to at most `side` pixels, so that the page can
    be mailed. InputError if there is only one model.
    """
    models = list(files)[:2]
    if len(models) < 2:
        raise InputError("--study: compares two candidates; "
                         "give a second one, --lora base= spo=FILE")
    items = [dict(prompt=prompts[i],
                  images=[data_uri(Image.open(files[m][i]), side, 90) for m in models])
             for i in sorted(permutation(len(prompts), seed, "study")[:pairs or None])]
    small = all(uri.startswith("data:image/png") for item in items for uri in item["images"])
    body = dict(models=models, items=items, questions=QUESTIONS)
    study = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Which picture?</title>
<style>{STYLE}</style></head><body>
<progress id="bar" aria-label="progress"></progress>
<span id="place" class="quiet"></span> <span id="note" class="quiet"></span>
<main id="ask">
<p>Prompt: <b id="prompt"></b></p>
<div id="pictures" class="{'small' if small else ''}"><img id="left" alt="left picture">
<img id="right" alt="right picture"></div>
<p id="question" aria-live="polite"></p>
<button id="vote-left">1 &#8592; left</button><button id="vote-right">2 &#8594; right</button>
<button id="vote-tie">3 &#8595; no difference</button>
</main>
<main id="thanks" hidden>
<p>That was all, thank you. Please save your votes and send the file back.</p></main>
<p><button id="back">back</button><button id="save">save votes</button>
<span class="quiet">Keys 1, 2, 3 or the arrows answer, Backspace goes back. You may reload; your
answers stay in this browser.</span></p>
<script type="application/json" id="data">{embed_json(dict(body, study=study))}</script>
<script>{SCRIPT}</script>
</body></html>
"""
    write_atomic(path, lambda p: p.write_text(page, encoding="utf-8"))


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share observed in n trials."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def tally(paths: tuple[str, ...]) -> str:
    """Vote files -> Markdown: per question, how often the second model won, with its interval.

    Ties count half. One file per rater; InputError for files of different studies, of no study, or
    of the same rater twice.
    """
    ballots = []
    for path in paths:
        ballot = read_json(path)
        kinds = dict(votes=list, models=list, study=str, prompts=int, rater=int)
        sound = all(isinstance(ballot.get(k), kind) for k, kind in kinds.items()) \
            and len(ballot["models"]) == 2 and all(
                isinstance(v, dict) and v.get("choice") in (*ballot["models"], "tie")
                and v.get("question") in [*QUESTIONS] for v in ballot["votes"])
        if not sound:
            raise InputError(f"{path}: not a file of votes from a study page")
        if ballots and ballot["study"] != ballots[0]["study"]:
            raise InputError(f"{path}: votes of another study than {paths[0]}")
        if any(ballot["rater"] == other["rater"] for other in ballots):
            raise InputError(f"{path}: this rater's votes are already among the files")
        ballots.append(ballot)
    first, second = ballots[0]["models"]
    votes = [v for ballot in ballots for v in ballot["votes"]]
    lines = [f"{len(ballots)} raters, {len(votes)} votes on {ballots[0]['prompts']} prompts", "",
             f"| question | {second} wins | tie | {first} wins | {second}'s share, ties half "
             "| 95 % interval | votes |", "|---" * 7 + "|"]
    for question in QUESTIONS:
        choices = [v["choice"] for v in votes if v["question"] == question]
        if not choices:
            lines.append(f"| {question} |  |  |  |  |  | 0 |")
            continue
        counts = [choices.count(c) for c in (second, "tie", first)]
        share = (counts[0] + counts[1] / 2) / len(choices)
        cells = [*(f"{100 * c / len(choices):.1f} %" for c in counts), f"{100 * share:.1f} %",
                 "{:.1f} to {:.1f}".format(*(100 * v for v in wilson(share, len(choices))))]
        lines.append(f"| {question} | {' | '.join(cells)} | {len(choices)} |")
    return "\n".join([*lines, "", "The intervals take all votes as independent; "
                                  "many votes of one rater, or on one prompt, are not."])
