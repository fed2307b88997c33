# Every target sets up what it needs; the first one on a fresh clone takes a minute or more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Half the cores for each of two ranks.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(shell echo $$(( $(CORES) > 1 ? $(CORES) / 2 : 1 )))

.PHONY: demo test test-all lint venv
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/torchrun --standalone --nproc-per-node 2 infer.py --config configs/demo.toml

# Two processes of one thread each: most tests keep a single core busy. Files stay whole, for their fixtures.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 2 --dist loadfile

test-all: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

venv: $(VENV)/.installed-dev

# torch comes first and by itself, so that nothing else can bring another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "error: $(PYTHON) is not Python 3.10 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "error: no virtual environment in $(VENV); is this folder writable, and the venv module installed?" >&2; exit 1; }
	@echo "Installing torch into $(VENV) ..."
	@$(PIP) torch
	@echo "Installing ssm-dist and what else it needs ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools of the tests ..."
	@$(PIP) --editable '.[dev]'
	@touch $@
