"""Two runs in the same processes, under torchrun: python tests/killed.py OUT spm_train.py ... then spm_train.py ...

The second finds the folder OUT as if the first had been killed after its last checkpoint but one. What the first left stays
in OUT-first. Both use gentle.py's Adam.
"""
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch

import gentle

if __name__ == "__main__":
    sys.path.insert(0, str(gentle.ROOT))
    torch.optim.AdamW = gentle.adamw
    out, words = Path(sys.argv[1]), sys.argv[2:]
    cut = words.index("then")
    sys.argv = words[:cut]
    runpy.run_path(str(gentle.ROOT / sys.argv[0]), run_name="__main__")
    if os.environ["RANK"] == "0":
        shutil.copytree(out, f"{out}-first")
        last = max(out.glob("checkpoint-*.pt"))
        for file in (last, last.with_suffix(".json"), out / "results.json"):
            file.unlink()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"          # another place in torchrun's store
    sys.argv = words[cut + 1:]
    runpy.run_path(str(gentle.ROOT / sys.argv[0]), run_name="__main__")
