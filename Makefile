# ptlab: `make quickstart` trains, `make test` tests; both install what they need into .venv first.
# PYTHON=... chooses the interpreter, TORCH=cpu|cuda overrules the choice of torch, ARGS=... adds arguments.

SHELL := /bin/bash
VENV  ?= .venv
BIN   := $(VENV)/bin
# One thread: two OpenMP threads on busy cores spin at their barriers and are several times slower (docs/quickstart.md).
export OMP_NUM_THREADS ?= 1

.PHONY: help setup quickstart test lint types ci clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train the quickstart model (about two minutes on a CPU)"
	@echo "make test         run the tests"
	@echo "make setup        only install into $(VENV)"
	@echo "make lint types   ruff, mypy"
	@echo "make ci           all of the above, as continuous integration does"
	@echo "make clean        remove caches (not $(VENV), not runs/)"

# Stamps: each runs again only when what it installs from has changed.
$(VENV)/.setup: pyproject.toml scripts/setup_venv.sh
	@scripts/setup_venv.sh $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.setup
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	@touch $@

setup: $(VENV)/.setup

quickstart: $(VENV)/.setup
	$(BIN)/python scripts/train.py --config configs/quickstart.yaml $(if $(findstring --resume,$(ARGS)),,--overwrite) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

ci:
	bash .ci/run

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist ptlab.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
