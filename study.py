"""A human study on one page (paper, Figure 6): two models' pictures side by side, blind.

    python evaluate.py --model sdxl --lora base= spo=FILE --prompts parti --study study.html
    python evaluate.py --tally votes-*.json

Send the page to the raters; it needs no network. It explains itself, says how long it takes, and
asks three questions of each pair. Every rater sees the prompts in an order, and the models on
sides, of their own, and is asked for SITTING pairs (as many again if they like). A tap on a picture
answers, as do the keys 1 / 2 / 3 (A, B, no difference); Backspace goes back, and what was answered
survives a reload. The button saves votes-RATER.json.
"""
import hashlib
import json
import math
from pathlib import Path

from PIL import Image

from report import data_uri, write_page
from training import permutation
from weights import InputError, read_json

QUESTIONS = {"general": "Which picture do you prefer, given the prompt?",
             "visual appeal": "Which picture is more beautiful, whatever the prompt says?",
             "prompt alignment": "Which picture fits the prompt better?"}
SITTING = 30                # pairs that a rater is asked for before the page says thank you
SECONDS = 6                 # that an answer takes
STYLE = """
body { max-width: 1100px; margin: 0 auto; padding: .6rem 1rem 1rem; }
main p { margin: .4rem 0; }
#prompt { font-size: 1.15rem; }
#question { font-weight: 700; color: var(--accent); margin: .2rem 0 .6rem; }
#pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
#pictures button { padding: 0; border: 0; background: none; position: relative; }
#pictures img {
  display: block; width: 100%; max-height: 64vh; object-fit: contain; border-radius: .5rem;
}
#pictures span {
  position: absolute; top: .5rem; left: .5rem; width: 2rem; line-height: 2rem; border-radius: 9rem;
  background: #000a; color: #fff; font-weight: 700;
}
#answers {
  position: sticky; bottom: 0; display: grid; grid-template-columns: 1fr 1fr 1fr; gap: .5rem;
  padding: .6rem 0; background: var(--ground);
}
#answers button { padding: .7rem .3rem; }
.main { background: var(--accent); color: var(--card); border: 0; padding: .7rem 1.4rem; }
progress { width: 100%; accent-color: var(--accent); }
#introduction, #thanks { max-width: 40rem; margin: 6vh auto; }
#foot { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .5rem 0; }
@media (max-width: 760px) and (orientation: portrait) {
  body { padding: .3rem .8rem .6rem; }
  #pictures { grid-template-columns: 1fr; gap: .4rem; margin: 0 -.8rem; }
  #pictures img { max-height: none; border-radius: 0; }
  #answers { margin: 0 -.8rem; padding: .5rem .8rem; }
  #answers button { padding: .5rem .1rem; }
  #ask header { position: sticky; top: 0; z-index: 1; background: var(--ground); }
  #prompt { font-size: 1rem; }
  .keys { display: none; }
}
"""
SCRIPT = """
const at = name => document.getElementById(name);
const data = JSON.parse(at("data").textContent), kept = "study-" + data.study;
const questions = Object.keys(data.questions), total = data.items.length * questions.length;
// The later of two copies: a browser is slow to write localStorage, a closed tab forgets its own.
const places = ["sessionStorage", "localStorage"];
const read = place => {
  try { return JSON.parse(window[place].getItem(kept)); } catch (error) { return null; }
};
let state = places.map(read).filter(found => found).sort((a, b) => b.time - a.time)[0];
state = state || { rater: Math.floor(Math.random() * 2 ** 31), votes: [] };
// How many votes make a sitting; the next one is offered, never asked for.
const sitting = data.sitting * questions.length;
state.goal = Math.min(total, state.goal || sitting);
let started = state.votes.length > 0;

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
  state.time = Date.now();
  try { places.forEach(place => window[place].setItem(kept, JSON.stringify(state))); }
  catch (error) { at("note").textContent = "This browser keeps nothing: do not reload."; }
}

// What the next vote is about: its item's index, and the question's name.
function next() {
  const done = state.votes.length;
  return [order[Math.floor(done / questions.length)], questions[done % questions.length]];
}

function length(votes) {
  const minutes = Math.max(1, Math.round(votes * data.seconds / 60));
  return votes / questions.length + " pairs, " + votes + " answers, about " + minutes +
    (minutes == 1 ? " minute" : " minutes");
}

function show() {
  const done = state.votes.length, over = done >= state.goal;
  const more = Math.min(sitting, total - state.goal);
  at("bar").max = state.goal;
  at("bar").value = done;
  at("place").textContent = done + " of " + state.goal;
  at("length").textContent = length(state.goal);
  at("introduction").hidden = started;
  at("ask").hidden = !started || over;
  at("thanks").hidden = !started || !over;
  at("foot").hidden = !started;
  at("more").hidden = more == 0;
  at("more").textContent = "Go on: " + length(more);
  at("back").disabled = done == 0;
  if (!started || over) return;
  const [index, question] = next(), item = data.items[index];
  const sides = swapped[index] ? [1, 0] : [0, 1];
  at("prompt").textContent = item.prompt;
  at("question").textContent = data.questions[question];
  at("left").src = item.images[sides[0]];
  at("right").src = item.images[sides[1]];
  if (done % questions.length == 0) scrollTo(0, 0);
}

function vote(choice) {                         // 0 left, 1 right, 2 no difference
  if (!started || state.votes.length >= state.goal) return;
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
// The second tap of a double tap is not an answer to the next question.
["tap-left", "tap-right"].forEach((name, i) => at(name).onclick = event => {
  if (event.detail < 2) vote(i);
});
at("start").onclick = () => { started = true; show(); };
at("more").onclick = () => { state.goal = Math.min(total, state.goal + sitting); keep(); show(); };
at("back").onclick = back;
at("save").onclick = at("finish").onclick = save;
const keys = { "1": 0, ArrowLeft: 0, "2": 1, ArrowRight: 1, "3": 2, ArrowDown: 2 };
document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in keys) { event.preventDefault(); vote(keys[event.key]); }
  if (event.key == "Backspace" && state.votes.length) { event.preventDefault(); back(); }
});
// Nothing is written before a vote: what a page has not read yet must not be overwritten.
show();
"""
BODY = """<main id="introduction">
<h1>Which picture is better?</h1>
<p>You will see two pictures at a time. Two programs made them from the same words. Three questions
are asked about each pair: which you prefer, which is more beautiful, and which fits the words
better.</p>
<p>Tap the picture of your choice, or &#8220;no difference&#8221;. There is no right answer: the
first impression counts.</p>
<p><b id="length"></b>. You may stop and go on later in this browser. At the end, save your votes
and send the file to whoever sent you this page.</p>
<p><button id="start" class="main">Start</button></p>
</main>
<main id="ask" hidden>
<header><progress id="bar" aria-label="progress"></progress>
<p id="prompt"></p><p id="question" aria-live="polite"></p></header>
<div id="pictures" class="SMALL">
<button id="tap-left" aria-label="picture A is my answer"><img id="left" alt="picture A"><span
aria-hidden="true">A</span></button>
<button id="tap-right" aria-label="picture B is my answer"><img id="right" alt="picture B"><span
aria-hidden="true">B</span></button></div>
<div id="answers"><button id="vote-left">A <span class="keys quiet">1 or &#8592;</span></button>
<button id="vote-tie">no difference <span class="keys quiet">3 or &#8595;</span></button>
<button id="vote-right">B <span class="keys quiet">2 or &#8594;</span></button></div>
</main>
<main id="thanks" hidden>
<h1>That was all, thank you!</h1>
<p>Please save your votes and send the file to whoever sent you this page.</p>
<p><button id="finish" class="main">Save my votes</button></p>
<p><button id="more"></button></p>
</main>
<p id="foot" hidden><button id="back">back</button><button id="save">save votes</button>
<span id="place" class="quiet"></span> <span id="note" class="quiet"></span>
<span class="keys quiet">Backspace goes back. You may reload; your answers stay in this
browser.</span></p>"""


def write_study(path: Path, files: dict[str, list[Path]], prompts: list[str], pairs: int = 0,
                seed: int = 0, side: int = 512) -> None:
    """Write the page for the first two models of `files` (model -> pictures, one per prompt).

    `pairs` of them, drawn by `seed` (0: all), shrunk to at most `side` pixels, so that the page can
    be mailed. A rater is asked for SITTING of them, other ones than the next rater. InputError if
    there is only one model, or one called tie.
    """
    models = list(files)[:2]
    if len({*models} - {"tie"}) < 2:        # a vote for a model called "tie" would be none
        raise InputError("--study: compares two candidates, none of them called tie; "
                         "give a second one, --lora base= spo=FILE")
    items = [dict(prompt=prompts[i],
                  images=[data_uri(Image.open(files[m][i]), side, 90) for m in models])
             for i in sorted(permutation(len(prompts), seed, "study")[:pairs or None])]
    small = all(uri.startswith("data:image/png") for item in items for uri in item["images"])
    body = dict(models=models, items=items, questions=QUESTIONS)
    study = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]
    write_page(path, "Which picture is better?", STYLE,
               BODY.replace("SMALL", "small" if small else ""),
               dict(body, study=study, sitting=SITTING, seconds=SECONDS), SCRIPT)


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share observed in n trials."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def tally(paths: tuple[str, ...]) -> str:
    """Vote files -> Markdown: per question, how often the second model won, with its interval.

    Ties count half. One file per rater; InputError for files of different studies or models, of no
    study, or of the same rater twice.
    """
    ballots = []
    for path in paths:
        ballot = read_json(path)
        kinds = dict(votes=list, models=list, study=str, prompts=int, rater=int)
        sound = all(isinstance(ballot.get(k), kind) for k, kind in kinds.items()) \
            and len(ballot["models"]) == 2 and all(isinstance(m, str) for m in ballot["models"]) \
            and len({*ballot["models"], "tie"}) == 3 and all(
                isinstance(v, dict) and v.get("choice") in (*ballot["models"], "tie")
                and v.get("question") in [*QUESTIONS] for v in ballot["votes"])
        if not sound:
            raise InputError(f"{path}: not a file of votes from a study page")
        if ballots and any(ballot[k] != ballots[0][k] for k in ("study", "models", "prompts")):
            raise InputError(f"{path}: votes of another study, or on other models, than {paths[0]}")
        if any(ballot["rater"] == other["rater"] for other in ballots):
            raise InputError(f"{path}: this rater's votes are already among the files")
        ballots.append(ballot)
    models = ballots[0]["models"]
    first, second = ("".join(c if c.isprintable() else "?" for c in name).replace("|", r"\|")
                     for name in models)
    votes = [v for ballot in ballots for v in ballot["votes"]]
    lines = [f"{len(ballots)} raters, {len(votes)} votes on {ballots[0]['prompts']} prompts", "",
             f"| question | {second} wins | tie | {first} wins | {second}'s share, ties half "
             "| 95 % interval | votes |", "|---" * 7 + "|"]
    for question in QUESTIONS:
        choices = [v["choice"] for v in votes if v["question"] == question]
        if not choices:
            lines.append(f"| {question} |  |  |  |  |  | 0 |")
            continue
        counts = [choices.count(c) for c in (models[1], "tie", models[0])]
        share = (counts[0] + counts[1] / 2) / len(choices)
        cells = [*(f"{100 * c / len(choices):.1f} %" for c in counts), f"{100 * share:.1f} %",
                 "{:.1f} to {:.1f}".format(*(100 * v for v in wilson(share, len(choices))))]
        lines.append(f"| {question} | {' | '.join(cells)} | {len(choices)} |")
    return "\n".join([*lines, "", "The intervals take all votes as independent; "
                                  "many votes of one rater, or on one prompt, are not."])
