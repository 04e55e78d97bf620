# `make help` lists the targets. Every target sets up what it needs in .venv; stamps in .venv/.stamps keep re-runs fast.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
PYTEST_ARGS ?=
CLAIMS ?= $(patsubst %/claim.toml,%,$(wildcard claims/*/claim.toml))

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
STAMPS := $(VENV)/.stamps
MERGEKIT := $(VENV)/mergekit
# Many small matrices: workers that share the cores beat threads that fight over them.
ONE_THREAD := OMP_NUM_THREADS=1

# Libraries that could reach a model hub must not: tests and demo run on local files.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo quickstart uptrain tour-model claims test lint types conformance bench bench-edit bench-uptrain clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1	/' | expand -t 16

setup: $(STAMPS)/package ## make .venv and install the locked versions and loopwise itself

demo: $(STAMPS)/package $(STAMPS)/demo ## loop a real model, then watch a trained one answer; writes demo_out/
	$(PY) examples/demo.py --out demo_out
	$(BIN)/loopwise tour --png demo_out/tour.png --json demo_out/tour.json

quickstart: $(STAMPS)/package ## train 1 layer, 1 layer looped and 4 layers, and compare them; writes quickstart_out/
	$(ONE_THREAD) $(PY) examples/quickstart.py --out quickstart_out

uptrain: $(STAMPS)/package $(STAMPS)/demo ## make a real model recursive and heal it a little; writes uptrain_out/
	$(ONE_THREAD) $(PY) examples/uptrain.py --out uptrain_out

tour-model: $(STAMPS)/package ## train the model of `loopwise tour` again and put it into the package
	$(ONE_THREAD) $(BIN)/loopwise train tour --out runs/tour
	$(PY) -m loopwise.study.tour runs/tour

claims: $(STAMPS)/package ## carry out every claim, hours of two cores; CLAIMS=claims/NAME for one
	for folder in $(CLAIMS); do $(ONE_THREAD) $(PY) -m loopwise.study $$folder || exit 1; done

test: $(STAMPS)/package ## run the tests (WORKERS=2, PYTEST_ARGS=...)
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(STAMPS)/package ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/package ## pyright
	$(BIN)/pyright

conformance: $(STAMPS)/package ## re-run the laws over every causal model type and rewrite the committed tables
	$(ONE_THREAD) $(PY) tests/conformance/run.py --write
	$(ONE_THREAD) $(PY) tests/conformance/zeroing.py --write
	$(ONE_THREAD) $(PY) tests/conformance/batching.py --write

bench: $(STAMPS)/package $(STAMPS)/demo ## run the benchmarks; a missed target fails
	for script in $(filter-out benchmarks/edit.py benchmarks/uptrain.py,$(wildcard benchmarks/[!_]*.py)); do $(PY) $$script || exit 1; done

bench-edit: $(STAMPS)/package ## edit a checkpoint of 1.1 B parameters beside mergekit, in an environment of its own; needs 9 GB of disk
	test -x $(MERGEKIT)/bin/mergekit-yaml || ($(PYTHON) -m venv $(MERGEKIT) && $(MERGEKIT)/bin/python -m pip install -q "$(TORCH)" \
		&& $(MERGEKIT)/bin/python -m pip install -q mergekit==0.1.5)
	$(PY) benchmarks/edit.py --mergekit $(MERGEKIT)/bin/python

bench-uptrain: $(STAMPS)/package $(STAMPS)/demo ## heal a recursive SmolLM2 beside its controls: over an hour of one core
	$(ONE_THREAD) $(PY) benchmarks/uptrain.py

clean: ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) build dist demo_out quickstart_out uptrain_out .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"loopwise needs Python >= 3.11, $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.11")'
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch goes first and exactly, so that nothing after it can choose another build.
$(STAMPS)/torch: $(STAMPS)/venv
	$(PIP) --constraint requirements/lock.txt "$(TORCH)"
	@touch $@

$(STAMPS)/lock: $(STAMPS)/torch requirements/lock.txt
	$(PIP) --requirement requirements/lock.txt
	@touch $@

# setuptools is in the lock, so the build needs no second, isolated download of it.
$(STAMPS)/package: $(STAMPS)/lock pyproject.toml
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMPS)/demo: $(STAMPS)/lock requirements/demo.txt
	$(PIP) --no-deps --requirement requirements/demo.txt
	@touch $@
