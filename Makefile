# make demo | test | test-floors | test-newest | test-backbones | test-ray | check | docs | bench | clean
# Everything runs in .venv, made on first use with Python >= 3.11.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Small tensors lose more to spinning threads than they gain: one thread a process, several processes.
export OMP_NUM_THREADS ?= 1
# Extras for the tests; `make test EXTRAS=test,crf` also tests the pydensecrf backend (needs a C++ compiler).
EXTRAS ?= test
JOBS   ?= 2
TESTS  ?=
CONSTRAINTS ?= constraints.txt

install = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: demo test test-floors test-newest test-backbones test-ray check docs bench clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("pseudolabel needs Python >= 3.11, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"

demo: $(BIN)/python
	$(install) .
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/pseudolabel demo --out demo

test: $(BIN)/python
	$(install) --editable ".[$(EXTRAS)]"
	$(BIN)/python -m pytest -n $(JOBS) -q $(TESTS)

# The oldest releases that pyproject.toml allows, and the newest ones; each in a virtual environment of its own for each
# Python: `make test-newest PYTHON=python3.13`. The floors of numpy and scipy have wheels for Python 3.11 and 3.12 only.
test-floors:
	$(MAKE) test VENV=.venv-floors-$(notdir $(PYTHON)) CONSTRAINTS=constraints-floors.txt

test-newest:
	$(MAKE) test VENV=.venv-newest-$(notdir $(PYTHON)) CONSTRAINTS=constraints-newest.txt

# Real architectures of transformers, timm and torchvision, random weights; in a virtual environment of their own.
test-backbones:
	$(MAKE) test VENV=.venv-backbones EXTRAS=test,backbones TESTS=tests/backbones

# A Ray cluster of this machine, several processes; in a virtual environment of its own, one test at a time.
test-ray:
	$(MAKE) test VENV=.venv-ray EXTRAS=test,ray TESTS=tests/ray JOBS=0

check: $(BIN)/python
	$(install) --editable ".[dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir site

docs: $(BIN)/python
	$(install) --editable ".[docs]"
	$(BIN)/python -m mkdocs serve

bench: $(BIN)/python
	$(install) --editable ".[bench]"
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) .venv-* site dist build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
