"""What every script imports first: a plain word where Python is too old, or packages are missing.

Nothing here may be newer than Python 3.6.
"""
import importlib.util
import sys

lacking = [name for name in ("torch", "safetensors", "transformers", "huggingface_hub", "numpy",
                             "PIL", "tqdm") if importlib.util.find_spec(name) is None]
if sys.version_info < (3, 11):         # noqa: UP036
    lacking = [f"Python 3.11 or later (this is {sys.version.split()[0]})"]
if lacking:
    print(f"error: {sys.executable} lacks {', '.join(lacking)}; make demo sets up .venv, then: "
          "source .venv/bin/activate (or pip install -r requirements.txt)", file=sys.stderr)
    sys.exit(2)
