# ptlab: `make quickstart` trains, `make test` tests; both install what they need into .venv first.
# PYTHON=... chooses the interpreter, TORCH=cpu|cuda overrules the choice of builds, WITH_VLLM=0 leaves vLLM out, ARGS=... adds arguments.

SHELL := /bin/bash
VENV  ?= .venv
BIN   := $(VENV)/bin
# One thread: two OpenMP threads on busy cores spin at their barriers and are several times slower (docs/quickstart.md).
export OMP_NUM_THREADS ?= 1

# A quickstart without vLLM says so on its command line; every other config is the user's choice. $(wildcard) would read a stale directory.
SAMPLER = $(shell ls -d $(VENV)/lib/python3*/site-packages/vllm >/dev/null 2>&1 || echo --set engines.sampler.kind=torch)
SETUP  := $(VENV)/.setup$(if $(filter 0,$(WITH_VLLM)),-without-vllm)

.PHONY: help setup quickstart smoke test test-sdk test-cookbook bench bench-trainer lint types ci clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train the quickstart model (about two minutes on a CPU)"
	@echo "make smoke        train every recipe of configs/smoke and check what each claims to learn (about half an hour)"
	@echo "make test         run the tests"
	@echo "make test-sdk     run the official SDKs 0.38.0 and 0.25.0 against ptlab serve, and check docs/compatibility.md"
	@echo "make test-cookbook  run recipes of the Tinker cookbook against ptlab serve"
	@echo "make bench-trainer  the trainer against TRL on the same batches, ratios in the last lines (ARGS=--quick: does it run?)"
	@echo "make bench        all benchmarks: trainer and whole steps against TRL, cost model, scaling, losses (about two hours)"
	@echo "make setup        only install into $(VENV), and look whether all is well (ptlab doctor)"
	@echo "make lint types   ruff, mypy"
	@echo "make ci           all of the above, as continuous integration does"
	@echo "make clean        remove caches (not $(VENV), not runs/)"

# Stamps: each runs again only when what it installs from has changed.
$(SETUP): pyproject.toml setup.py ptlab/server/wire.proto scripts/setup_venv.sh $(wildcard requirements/*.txt)
	@scripts/setup_venv.sh $(VENV)
	@touch $@

$(VENV)/.dev: $(SETUP)
	@scripts/setup_venv.sh $(VENV) dev
	@touch $@

setup: $(SETUP)

quickstart: $(SETUP)
	$(BIN)/python scripts/train.py --config configs/quickstart.yaml $(SAMPLER) $(if $(findstring --resume,$(ARGS)),,--overwrite) $(ARGS)

smoke: $(SETUP)
	$(BIN)/python scripts/smoke.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-sdk: $(VENV)/.dev
	scripts/setup_sdk_venvs.sh .
	$(BIN)/python scripts/make_compatibility.py --check   # runs every program of tests/sdk with both SDKs
	$(BIN)/python -m pytest -m sdk tests/sdk/test_ugly.py $(ARGS)

test-cookbook: $(VENV)/.dev
	scripts/setup_cookbook_venv.sh .venv-cookbook
	$(BIN)/python -m pytest -m cookbook tests/cookbook $(ARGS)

# TRL in an environment of its own; ptlab's is the one of `make quickstart`.
bench-trainer: $(SETUP)
	scripts/setup_trl_venv.sh .venv-trl
	$(BIN)/python benchmarks/trainer.py --against trl $(ARGS)

bench: bench-trainer
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/cost_model.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python scripts/benchmark_losses.py --quick

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

ci:
	bash .ci/run

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist ptlab.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
