# Each target makes its own environment in .venv, installs what it needs, and does nothing twice: a stamp file in .venv
# says what is installed, and is renewed when pyproject.toml changes.
#
#   PYTHON  the interpreter that makes .venv (3.11 or newer; the first one found)
#   TORCH   what `make test-reference` asks pip for

# A pyenv shim exists for versions that are not active, so each candidate is run, not only looked up.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# Installed before the rest, by a version without a local part: where pip is given an index with CPU builds (2.13.0+cpu) it
# takes that build, which is ten times smaller than the CUDA one; elsewhere it takes the usual one.
TORCH ?= torch==2.13.0
WORKERS ?= 2
# A file's tests stay on one worker, so that they share its models and scores.
PARALLEL := -n $(WORKERS) --dist loadscope
# A Python that compiles quickly rather than well: halves the time of the tests (tests/quick.py says how).
quickly = XLA_FLAGS="$$XLA_FLAGS $$($(1) tests/quick.py)" $(1)
# Tests of what depends on jax and flax most: the laws, parity and lowering.
LAWS := $(addprefix tests/test_,attribution.py checkpoint.py compaction.py gates.py golden.py lowering.py)

BIN := .venv/bin
# Python compiles what is imported by itself; pip would compile all files of all packages, which takes 25 s.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(INSTALL)
# pyright asks its registry for a newer version of itself at every start unless told not to.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo notebooks test test-slow test-reference test-runtimes test-oldest test-faults lint bench bench-reference clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' Makefile

demo: .venv/.stamp-runtime  ## prune the bundled model for one task and show before and after (offline)
	$(BIN)/jaxprune demo

test: .venv/.stamp-test  ## the tests that need neither PyTorch nor much time (under five minutes)
	$(call quickly,$(BIN)/python) -m pytest -m "not slow and not reference and not faults" $(PARALLEL)

test-slow: .venv/.stamp-test  ## the others: killed and resumed runs, memory, bundled models, devices, the README's example
	$(call quickly,$(BIN)/python) -m pytest -m slow $(PARALLEL)

test-reference: .venv/.stamp-reference  ## compare with PyTorch, captum and scikit-learn
	$(BIN)/python -m pytest -m reference $(PARALLEL)

test-runtimes: .venv/.stamp-runtimes  ## have llama.cpp and onnxruntime load what is exported (builds the first: minutes)
	$(BIN)/python -m pytest tests/test_runtimes.py tests/test_export_onnx.py

test-oldest: .venv-oldest/.stamp  ## the laws with the oldest supported jax and flax, in .venv-oldest
	$(call quickly,.venv-oldest/bin/python) -m pytest -m "not slow and not reference and not faults" $(PARALLEL) $(LAWS)

test-faults: .venv/.stamp-test  ## kill and damage things at random, write benchmarks/results/faults.json
	JAXPRUNE_FAULTS_RECORD=benchmarks/results/faults.json $(call quickly,$(BIN)/python) -m pytest -m faults $(PARALLEL)

notebooks: .venv/.stamp-test  ## run the notebooks and store what they show (04: the decoder JAXPRUNE_DECODER, or one of the hub)
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

lint: .venv/.stamp-dev  ## ruff (rules and format) and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: .venv/.stamp-runtime  ## time scoring and the pruned model, write benchmarks/results/speed.json
	$(BIN)/python benchmarks/speed.py --model jaxprune/bundled/model -o benchmarks/results/speed.json

bench-reference: .venv/.stamp-reference  ## the same beside PyTorch and captum
	$(BIN)/python benchmarks/speed.py --model jaxprune/bundled/model -o benchmarks/results/speed.json

clean:  ## remove caches (compiled programs too) and build products; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache
	find jaxprune tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "jaxprune needs Python 3.11 or newer; none found. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxprune needs Python 3.11 or newer; $(PYTHON) is not. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.stamp-runtime: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

.venv/.stamp-test: pyproject.toml | $(BIN)/python
	$(PIP) --editable ".[test]"
	@touch $@ .venv/.stamp-runtime

.venv-oldest/.stamp: pyproject.toml tests/oldest.txt
	@test -n "$(PYTHON)" || { echo "jaxprune needs Python 3.11 or newer; none found. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(INSTALL) --constraint tests/oldest.txt --editable ".[test]"
	@touch $@

.venv/.stamp-dev: pyproject.toml | $(BIN)/python
	$(PIP) --editable ".[dev]"
	@touch $@ .venv/.stamp-runtime .venv/.stamp-test

.venv/.stamp-reference: pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[test,reference]"
	@$(BIN)/python -c "import captum, sklearn, torch"  # a missing one would skip its tests
	@touch $@ .venv/.stamp-runtime .venv/.stamp-test

.venv/.stamp-runtimes: pyproject.toml | $(BIN)/python
	$(PIP) --editable ".[test,runtimes]"
	@touch $@ .venv/.stamp-runtime .venv/.stamp-test
