# `make demo` runs the main experiment, `make report` writes all findings on one page,
# `make test` runs everything that must pass. They create .venv on first use and reuse it
# afterwards. `make benchmark` and `make test-all` add the libraries that the benchmarks
# compare with, PyTorch among them. `make compile-table` compiles the TPU kernels without
# a TPU, for which it downloads libtpu, 484 MB.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv/installed-peers
LIBTPU := .venv/libtpu

.PHONY: demo report test test-all benchmark compile-table clean

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

compile-table: $(INSTALLED) $(LIBTPU)
	$(BIN)/python -m benchmarks.compile_tpu --libtpu $(LIBTPU)

clean:
	rm -rf .venv

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,experiments,benchmarks]'
	touch $@

# Beside the environment and not in it: JAX looks for a TPU wherever it finds libtpu.
$(LIBTPU): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ 'libtpu>=0.0.52'
	touch $@

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	touch $@
