# Each target does its own set-up: a machine needs Python 3.11 or newer (with venv), make and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo faces test test-studio test-wheel slow check bench docs clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "introvae needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Trains on scikit-learn's digits, prints the numbers and where the pictures are.
demo: $(VENV)/.ready
	$(BIN)/introvae fit --data digits --out runs/demo-$$(date +%Y%m%d-%H%M%S) --evaluate

# The README's faces: a Parquet file of them becomes a folder of JPEG files with thirty odd ones, 24 minutes of training.
FACES ?= ../shared/data/faces-lfw-gray/train.parquet
faces: $(VENV)/.ready
	$(BIN)/python tests/unprepared.py $(FACES) runs/faces
	$(BIN)/introvae fit --data runs/faces --size 64 --group '^(\d+)_' --out runs/faces-$$(date +%Y%m%d-%H%M%S) --evaluate

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Two processes with one thread each: faster than one with two, and the same on any number of cores. A file's tests share
# one of them, so that what they share (runs, processes) is made once.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

# The studio in a real browser: Debian's chromium, installed where it is missing and may be. Without one it fails, unless
# INTROVAE_NO_BROWSER=1 is given: then the tests that need one say so and are skipped.
BROWSER := for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done >/dev/null; false
test-studio: $(VENV)/.ready
	@[ "$$INTROVAE_NO_BROWSER" = 1 ] || ($(BROWSER)) || (apt-get update && apt-get install -y chromium) >/dev/null 2>&1 \
		|| { echo "test-studio: no chromium, and none could be installed: install it, or give INTROVAE_NO_BROWSER=1" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m studio -rs tests/test_studio.py

# What is released: the wheel in a new environment, all libraries installed anew; minutes.
test-wheel: $(VENV)/.ready
	$(BIN)/python -m pytest -m release -p no:cacheprovider tests/test_wheel.py

# What takes minutes: networks at full size.
slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow tests

# The short forms of the benchmarks, in five minutes; let nothing else run. What is committed comes from the long ones.
bench: $(VENV)/.ready
	mkdir -p runs/bench
	for name in startup input loop scaling step; do \
		$(BIN)/python benchmarks/$$name.py --short --json runs/bench/$$name.json || exit 1; done

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

# The documentation as HTML, without warnings; pages with code run it. One thread: the cells' networks are tiny.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "open build/docs/index.html"

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .coverage
