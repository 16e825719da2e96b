# Complete on a fresh machine with Python >= 3.11 and nothing else: `make run`, `make test`.
# PYTHON=... chooses the interpreter, VENV=... the folder of the environment, ARGS=... what follows the command.

VENV ?= .venv
ARGS ?=
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup
DEV := $(VENV)/.setup-dev
DEMO := $(VENV)/.setup-demo
DOCS := $(VENV)/.setup-docs
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# Images of containers set it, and every command would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup run demo test test-slow test-nightly check format docs

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV) ## make the virtual environment and install everything, once

run: $(STAMP) ## distil the embedded teacher and write a report; ARGS="method=ladd trainer.max_steps=100"
	$(PY) -m distill.run $(ARGS)

demo: $(DEMO) ## a page where pictures change as one types; ARGS="run=runs/..."
	$(PY) -m distill.demo $(ARGS)

test: $(DEV) ## the fast tests
	$(PY) -m pytest $(PARALLEL) --timeout 300 --durations 15 $(ARGS)

test-slow: $(DEV) ## the slow tests
	$(PY) -m pytest $(PARALLEL) --timeout 3600 --durations 40 -m "slow and not nightly and not gpu" $(ARGS)

test-nightly: $(DEV) ## what takes too long for each change: every family by every option
	$(PY) -m pytest $(PARALLEL) --timeout 3600 --durations 40 -m "nightly and not gpu" $(ARGS)

check: $(DEV) ## format, lint and types; how the code reads, in numbers
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) tests/measures.py

docs: $(DOCS) ## the documentation, docs/_build/html/index.html
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

format: $(DEV) ## put every file into the house format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# An environment that works is kept, so a change of pyproject.toml installs only what is new. Python compiles what it
# imports; to compile all of torch beforehand takes longer.
$(STAMP): pyproject.toml
	@set -e; \
	if ! "$(PY)" -c '$(NEW_ENOUGH)' 2>/dev/null || ! "$(PY)" -m pip --version >/dev/null 2>&1; then \
	  found=; \
	  for each in $(CANDIDATES); do \
	    if "$$each" -c '$(NEW_ENOUGH)' 2>/dev/null; then found="$$each"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: no Python >= 3.11 among: $(CANDIDATES). Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	  fi; \
	  if ! "$$found" -m venv --clear "$(VENV)"; then \
	    echo "make: $$found cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	fi
	$(PY) -m pip install --no-compile -e .
	@touch $@

$(DEV): $(STAMP)
	$(PY) -m pip install -e '.[dev]'
	@touch $@

$(DEMO): $(STAMP)
	$(PY) -m pip install -e '.[demo]'
	@touch $@

$(DOCS): $(STAMP)
	$(PY) -m pip install -e '.[docs]'
	@touch $@
