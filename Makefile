# `make demo` runs the main experiment, `make report` writes all findings on one page,
# `make test` runs everything that must pass. They create .venv on first use and reuse it
# afterwards. `make benchmark` and `make test-all` add the libraries that the benchmarks
# compare with, PyTorch among them.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv/installed-peers

.PHONY: demo report test test-all benchmark clean

demo: $(INSTALLED)
	$(BIN)/python -m experiments rank_decay

report: $(INSTALLED)
	$(BIN)/python -m experiments report

test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow"

test-all: $(PEERS)
	$(BIN)/python -m pytest

benchmark: $(PEERS)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,experiments,benchmarks]'
	touch $@

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	touch $@
