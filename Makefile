# `make demo` compares the losses on real digits, `make test` runs every check, `make clean` forgets
# the environment that both make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean
demo: .venv/.ready
	$(BIN)/softsphere compare --tune

test: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The environment is made once and again only when what it is made from changes.
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lab]" --group dev
	touch $@

clean:
	rm -rf .venv
