# `make train` and `make test` work on a fresh clone: they create .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/tiny
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help train quiz test lint format slow parity beam tpu gpu eval slurm soak clean
.DEFAULT_GOAL := help

help:  ## print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16

.venv/.python:
	@$(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing, older than 3.11, or without the venv module; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.python setup.py constraints.txt
	@echo "installing llama_jax into .venv (a few minutes the first time)"
	@$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@$(PIP) -e '.[dev]'
	@touch $@

.venv/.installed-parity: .venv/.installed-dev
	@$(PIP) -e '.[dev,parity]'
	@touch $@

train: .venv/.installed  ## train configs/tiny.py on Python's own library, then print a sample
	$(BIN)/python -m llama_jax.train --config=configs/tiny.py --workdir=$(WORKDIR)

quiz: .venv/.installed  ## fine-tune the model of `make train` on questions, and compare its answers
	$(BIN)/python examples/quiz.py --base=$(WORKDIR)

test: lint  ## run lint, types, and the whole default test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -q $(PYTEST_ARGS)

lint: .venv/.installed-dev  ## run ruff, mypy and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch tests/*.sh

format: .venv/.installed-dev  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For root on Debian, the slow tests include those on a real Slurm.
SLOW := $(shell [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo slow or slurm || echo slow)

slow: .venv/.installed-dev  ## run the tests that take minutes; PYTEST_ARGS=--quarter=1 runs a quarter
	@[ "$(SLOW)" = slow ] || tests/slurm_cluster.sh install
	TEST_XLA_FLAGS= $(BIN)/python -m pytest -m "$(SLOW)" -n 2 --dist worksteal -q $(PYTEST_ARGS)

parity: .venv/.installed-parity  ## compare with transformers on torch
	TEST_XLA_FLAGS= $(BIN)/python -m pytest -m parity -n 2 --dist worksteal -q $(PYTEST_ARGS)

# Beam needs its own environment, with older versions of some libraries than in constraints.txt.
.venv-beam/.installed: setup.py
	$(PYTHON) -m venv .venv-beam
	@.venv-beam/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,beam]'
	@touch $@

beam: .venv-beam/.installed  ## compare prepare on Apache Beam with prepare on one machine
	.venv-beam/bin/python -m pytest -m beam -q $(PYTEST_ARGS)

.venv-tpu/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-tpu
	@.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tpu]'
	@touch $@

tpu: .venv-tpu/.installed  ## compile 7B and 65B for TPU slices, with the real compiler
	.venv-tpu/bin/python -m pytest -m tpu -q $(PYTEST_ARGS)

.venv-gpu/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-gpu
	@.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,cuda13]'
	@touch $@

gpu: .venv-gpu/.installed  ## compile 7B, 65B and attention for GPU nodes, with the real compiler
	.venv-gpu/bin/python -m pytest -m gpu -q $(PYTEST_ARGS)

# The harness needs another python-dateutil than constraints.txt has; only the test needs its [hf].
.venv-eval/.installed: setup.py
	$(PYTHON) -m venv .venv-eval
	@.venv-eval/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,parity,eval]' 'lm_eval[hf]'
	@touch $@

eval: .venv-eval/.installed  ## compare the adapter for lm-evaluation-harness with the harness's own model
	.venv-eval/bin/python -m pytest -m eval -q $(PYTEST_ARGS)

slurm: .venv/.installed-dev  ## test launch/slurm.sbatch on a real Slurm, from Debian's packages (as root)
	tests/slurm_cluster.sh install
	$(BIN)/python -m pytest -m slurm -q $(PYTEST_ARGS)

soak: .venv/.installed-dev  ## kill a run at random times for MINUTES (60) and compare it with a twin
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.faults.soak --minutes=$(or $(MINUTES),60)

clean:  ## remove .venv and caches, but not your runs
	rm -rf .venv .venv-beam .venv-tpu .venv-gpu .venv-eval .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
