# `make demo` compares the losses on real digits, `make test` runs every check, `make docs` builds the
# documentation site, `make test-oldest` runs the tests with the oldest supported torch, and
# `make clean` removes the environments and the site. WORKERS=12 runs the tests in so many processes.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
OLDEST := .venv-oldest/bin

.PHONY: demo test docs test-oldest clean
# Two processes of one thread each: the network is so small that threads would wait for each other.
demo: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/softsphere compare --tune \
		--jobs $$(($$(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1))

# Each process has a share of the tests, and takes over what another has not begun. So what the tests
# of a file share is seldom made twice.
test: .venv/.ready .venv/.docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

# Every example on the pages and in the docstrings runs; then the site is built, where a warning is
# an error, and its links are followed. MkDocs Material needs Python 3.11.
docs: .venv/.docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m "slow or not slow" tests/test_docs.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) tests/test_how_it_works.py tests/test_site.py src/softsphere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site is in site/index.html. With its search: $(BIN)/python -m http.server -d site"

# The Triton of that torch uses arrays of one element as numbers, for which NumPy has a warning.
test-oldest: .venv-oldest/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/pytest -n $(WORKERS) --dist worksteal -W ignore::DeprecationWarning:triton.runtime.interpreter

# An environment is made once, and again only when the files that it is made from change.
.venv/.ready: pyproject.toml constraints.txt
.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
.venv/.ready .venv-oldest/.ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(@D)/bin/python -m pip install --quiet --constraint $(filter constraints%,$^) \
		--editable ".[lab]" --group dev $(if $(filter .venv/%,$@),--group frameworks)
	touch $@

.venv/.docs: .venv/.ready
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

clean:
	rm -rf .venv .venv-oldest site
