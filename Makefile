# Two commands set everything up: `make demo` (train, evaluate, save, reload, segment) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OFFLINE = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.PHONY: demo test check format lint types install clean

demo: install
	$(BIN)/denseseg kernels build --optional
	$(OFFLINE) $(BIN)/denseseg demo --output runs/demo

# Two processes with one thread each are faster than one process with two threads on models this small. Each takes
# half of the files, so that what the tests of a file share is made once, and steals from the other at the end.
test: install
	$(BIN)/denseseg kernels build --optional
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

check: format lint types test

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'  # most of torch is never imported
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
