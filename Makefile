# Every command of a contributor. Each target installs what it needs the first time.
.DEFAULT_GOAL := help
.PHONY: help setup serve test check docs bench clean
SHELL := /bin/bash

HOST  ?= 127.0.0.1
PORT  ?= 8000
MODEL ?= checkpoints/demo
# Tests wait for processes and sockets much of the time, so there is one more file than cores.
JOBS  ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$(( n < 8 ? n + 1 : 8 )))

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The first interpreter that starts. A file alone proves nothing: the stand-in of a version manager may not start.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$name"; break; }; done)

help: ## Show this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "  Variables: HOST=$(HOST) PORT=$(PORT) MODEL=$(MODEL) JOBS=$(JOBS)"

setup: $(READY) ## Create .venv with the pinned versions

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "marginrm needs Python 3.11 or newer, and none is on PATH." >&2; \
		echo "Install one, or give its path: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@test -x $(BIN)/python || { echo "Creating $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "Installing the pinned versions (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[service,training,dev]'
	@touch $@

serve: $(READY) ## Serve MODEL on HOST:PORT; train the demo model first if it is missing
ifeq ($(MODEL),checkpoints/demo)
	$(BIN)/marginrm demo --if-missing --output $(MODEL)
endif
	exec $(BIN)/marginrm serve --model "$(MODEL)" --host "$(HOST)" --port "$(PORT)"

# Ray gives its processes seconds to start, so its tests run alone; 5 is the status without the extra `ray`.
# A file's tests stay in one process, which shares its models and servers. One thread for each process, or they contend.
test: $(READY) ## Run every test, JOBS files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster || [ $$? = 5 ]
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not cluster"

check: $(READY) ## Check style, types, import rules, deployment files and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python deploy/check.py
	$(MAKE) --no-print-directory docs

docs: $(READY) ## Build the documentation site into build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY) ## Run benchmarks.run with the options in BENCH (docs/benchmarks.md); results go to runs/bench
	$(BIN)/python -m benchmarks.run $(BENCH)

clean: ## Remove builds and caches; checkpoints and runs stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src service training tests benchmarks deploy -name __pycache__ -type d -prune -exec rm -rf {} +
