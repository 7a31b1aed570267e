# `make demo` compares the losses on real digits, `make test` runs every check, `make test-oldest`
# runs the tests with the oldest supported torch, and `make clean` removes the environments.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin

.PHONY: demo test test-oldest clean
# Two processes of one thread each: the network is so small that threads would wait for each other.
demo: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/softsphere compare --tune \
		--jobs $$(($$(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1))

test: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The Triton of that torch uses arrays of one element as numbers, for which NumPy has a warning.
test-oldest: .venv-oldest/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/pytest -n 2 -W ignore::DeprecationWarning:triton.runtime.interpreter

# An environment is made once, and again only when the files that it is made from change.
.venv/.ready: pyproject.toml constraints.txt
.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
.venv/.ready .venv-oldest/.ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(@D)/bin/python -m pip install --quiet --constraint $(filter constraints%,$^) \
		--editable ".[lab]" --group dev
	touch $@

clean:
	rm -rf .venv .venv-oldest
