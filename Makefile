# Everything a contributor types. Each target sets up what it needs, and finds it in place the second time.
.DEFAULT_GOAL := help
.PHONY: help setup serve test check bench clean
SHELL := /bin/bash

HOST  ?= 127.0.0.1
PORT  ?= 8000
MODEL ?= checkpoints/demo

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The first interpreter that both exists and starts: a version manager's stand-in may exist and not start.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	"$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& { echo "$$name"; break; }; done)

help: ## Show this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "  Variables: HOST=$(HOST) PORT=$(PORT) MODEL=$(MODEL)"

setup: $(READY) ## Create .venv with the pinned versions

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "marginrm needs Python 3.11, 3.12 or 3.13, and none is on PATH." >&2; \
		echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@test -x $(BIN)/python || { echo "Creating $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "Installing the pinned versions (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[service,training,dev]'
	@touch $@

serve: $(READY) ## Serve MODEL on HOST:PORT, training the demo model first when it is missing
ifeq ($(MODEL),checkpoints/demo)
	$(BIN)/marginrm demo --if-missing --output $(MODEL)
endif
	exec $(BIN)/marginrm serve --model "$(MODEL)" --host "$(HOST)" --port "$(PORT)"

test: $(READY) ## Run every test
	$(BIN)/python -m pytest

check: $(READY) ## Lint, types, import rules and the deployment files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python deploy/check.py

bench: $(READY) ## Compare with its peers, given by BENCH (docs/benchmarks.md); results in runs/bench
	$(BIN)/python -m benchmarks.run $(BENCH)

clean: ## Remove what was built and cached; checkpoints and runs stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src service training tests benchmarks deploy -name __pycache__ -type d -prune -exec rm -rf {} +
