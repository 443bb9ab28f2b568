# Two commands set everything up: `make demo` (train, evaluate, save, reload, segment) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OFFLINE = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.PHONY: demo test test-all check format lint types docs notebooks release-check install clean

demo: install
	$(BIN)/denseseg kernels build --optional
	$(OFFLINE) $(BIN)/denseseg demo --output_dir runs/demo

# Two processes with one thread each are faster than one process with two threads on models this small. Each takes
# half of the files, so that what the tests of a file share is made once, and steals from the other at the end.
test: install
	$(BIN)/python -m compileall -qq src
	$(BIN)/denseseg kernels build --optional
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# The slow tests too, which take much longer.
test-all: install
	$(BIN)/python -m compileall -qq src
	$(BIN)/denseseg kernels build --optional
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: format lint types test

format: install
	$(BIN)/ruff format --check .

# mlinter: the conventions of transformers, but for TRF057. `@auto_docstring` looks models up in the tree of
# transformers: outside it, it prints errors on import and puts a general text in place of ours.
lint: install
	$(BIN)/ruff check .
	sed '/^\[rules.TRF057\]/,/^default_enabled/s/= true/= false/' \
	  "$$($(BIN)/python -c 'import mlinter; print(mlinter.__path__[0])')/rules.toml" >$(VENV)/mlinter.toml
	$(BIN)/mlinter --no-progress --no-cache --rules-toml $(VENV)/mlinter.toml src/hf_denseseg/models

types: install
	$(BIN)/mypy

# The site of docs/, in build/site.
docs: install
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --quiet

# Runs the notebooks of docs/notebooks again, and keeps their outputs.
notebooks: install
	$(BIN)/denseseg kernels build --optional
	$(BIN)/python scripts/notebooks.py

# Builds and checks what a release publishes, and publishes nothing.
release-check: install
	$(BIN)/python -m pip install --quiet --editable '.[release]'
	$(BIN)/python scripts/release_check.py

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
# Where Python may not write bytecode, every new process would compile torch again: compile it once, on all cores.
# Some packages ship files for newer versions of Python, which do not compile.
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
