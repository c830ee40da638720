# Two commands do all the set-up: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIBRARY := steepest steepest.linalg steepest.geometry steepest.model.matrix_view \
  steepest.model.parameter_roles steepest.optim steepest.optim.settings steepest.optim.scales \
  steepest.optim.steepest_descent steepest.curvature steepest.diagnosis
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench docs clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1	\2/' | expand -t 16

demo: $(VENV)/report ## Install into .venv and run the main job on embedded text: about five minutes
	$(BIN)/steepest study --out runs/demo

test: $(VENV)/dev ## Install the development extras and run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: $(VENV)/dev ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev ## Format the code and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/bench ## Time, memory, error and failures beside every peer: about forty minutes
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/second_order.py
	$(BIN)/python benchmarks/failures.py
	$(BIN)/python benchmarks/curvature.py

docs: $(VENV)/dev ## Build the reference into site/
	$(BIN)/pdoc --math --docformat google --output-directory site $(LIBRARY)

clean: ## Remove everything that can be made again, but no runs
	rm -rf $(VENV) site build .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "steepest needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/report: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[report]'
	@touch $@

$(VENV)/bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/report
