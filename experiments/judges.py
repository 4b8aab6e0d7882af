"""How often do the tiny model's judges order a pair as labelled, through the noise of timestep t?

    python experiments/judges.py                    # the shipped ones; 8 minutes on one core
    python experiments/judges.py mine=runs/spm/spm  # others beside them

2,048 pairs that no training and no choice has seen, the same noise for every judge: differences are
paired. Writes results/judges.json.
"""
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import needs  # noqa: F401
import torch

from loading import TINY, load_clip
from spm_train import print_table
from tiny.build import judge_table
from training import plain_parser, refuse, run_script, write_json

COUNT, SEED = 2048, 20_000
COLUMNS = ("accuracy", "standard_error", "pairs", "difference", "difference_standard_error")


def records(table: dict[str, dict]) -> dict[str, dict]:
    """A table of accuracies as results keep it: {judge: {timestep: {column: figure}}}."""
    return {name: {t: dict(zip(COLUMNS, row)) for t, row in rows.items()}
            for name, rows in table.items()}


def main() -> None:
    """Judge the pairs, print the table, keep it."""
    parser = plain_parser(__doc__)
    parser.add_argument("judges", nargs="*", metavar="NAME=SOURCE", help="others beside them")
    words = parser.parse_args().judges
    if not all("=" in word for word in words):
        refuse(f"{' '.join(words)}: write NAME=SOURCE")
    sources = {
        "PickScore": TINY / "pickscore", "SPM": TINY / "spm",
        "step-blind SPM": TINY / "spm_step_blind",
        **dict(word.split("=", 1) for word in words),
    }
    models = {name: load_clip(str(source)) for name, source in sources.items()}
    table = judge_table("tiny", models, COUNT, SEED)
    print_table(table)
    write_json(ROOT / "experiments/results/judges.json", dict(
        date=time.strftime("%Y-%m-%d"), torch=torch.__version__, pairs=COUNT, judges=records(table)
    ))


if __name__ == "__main__":
    run_script(main)
