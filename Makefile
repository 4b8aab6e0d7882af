# Two commands do everything on a fresh machine, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
OUT    ?= runs/demo
MINUTES ?= 9

HEART  := $(patsubst %,tests/test_%.py,spo baselines ddim lora clip_spm unet)

.PHONY: demo test quick test-slow soak gpu clean

$(VENV)/.runtime: requirements.txt
	@echo 'setting up $(VENV): about 1.2 GB with the CPU build of torch, more with CUDA; a few minutes'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps open_clip_torch==3.3.0
	@touch $@

demo: $(VENV)/.runtime
	$(PY) spo_train.py --out $(OUT)
	$(PY) evaluate.py --trace "three blue squares" --lora spo=$(OUT) --out $(OUT)/evaluation
	$(PY) evaluate.py --lora base= spo-0.5=$(OUT)@0.5 spo=$(OUT) spo-1.5=$(OUT)@1.5 \
	    --curves spo=$(OUT) --out $(OUT)/evaluation
	$(PY) card.py $(OUT)

test: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m pytest -n 2 --dist worksteal

# For everyday work: the method's own tests, without compiling, low memory, processes of their own.
quick: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m pytest -n 2 --dist worksteal -k 'not compil and not low_memory and not a_user and not processes' $(HEART)

test-slow: $(VENV)/.dev
	$(PY) -m pytest -m slow

soak: $(VENV)/.runtime
	$(PY) benchmarks/soak.py

# With MINUTES=4, say. Where no .venv is to be made: python benchmarks/gpu.py
gpu: $(VENV)/.runtime
	$(PY) benchmarks/gpu.py --minutes $(MINUTES)

clean:
	rm -rf $(VENV) runs
