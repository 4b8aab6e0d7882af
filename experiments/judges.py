"""How often do the tiny model's judges order a pair as labelled, when they see it through the noise of timestep t?

    python experiments/judges.py                    # the shipped ones, on 2,048 fresh pairs; 8 minutes on one core
    python experiments/judges.py mine=runs/spm/spm  # others beside them

Pairs that no training and no choice has seen, the same noise for every judge; differences are paired. Writes results/judges.json.
"""
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from diffusion import TINY, encode_empty, load_clip, load_pipeline  # noqa: E402
from pairs import Pairs  # noqa: E402
from spm_train import PRESETS, SPMConfig, accuracy_table, print_table  # noqa: E402
from tiny.world import preference_pairs  # noqa: E402
from training import run_script, start_processes, write_json  # noqa: E402

COUNT, SEED = 2048, 20_000


def main() -> None:
    """Judge the pairs, print the table, keep it."""
    processes, config = start_processes("cpu"), SPMConfig(**PRESETS["tiny"], seed=SEED)
    sources = {"PickScore": TINY / "pickscore", "SPM": TINY / "spm", "step-blind SPM": TINY / "spm_step_blind"}
    sources |= dict(word.split("=", 1) for word in sys.argv[1:])
    pipe, models = load_pipeline("tiny"), {name: load_clip(str(source)) for name, source in sources.items()}
    images, captions, labels = preference_pairs(COUNT, SEED)
    pairs = Pairs(captions, labels, torch.ones(COUNT), [range(COUNT)], lambda i: images[i])
    ids = pipe.tokenizers[0](captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    table = accuracy_table(pipe, models, pairs, lambda index, _: labels[index], list(range(COUNT)), config, encode_empty(pipe), ids,
                           processes)
    print_table(table)
    write_json(ROOT / "experiments/results/judges.json", dict(date=time.strftime("%Y-%m-%d"), torch=torch.__version__, pairs=COUNT, judges={
        name: {t: dict(zip(("accuracy", "standard_error", "pairs", "difference", "difference_standard_error"), row))
               for t, row in rows.items()} for name, rows in table.items()}))


if __name__ == "__main__":
    run_script(main)
