# `make demo` runs the main experiment and `make report` writes all findings on one page.
# `make docs` writes the documentation site to runs/site, in an environment of its own;
# `make docs-serve` shows it in a browser and follows changes.
# `make test` runs everything that must pass; `make check-results` compares the committed
# results, figures and pages with each other. They create .venv on first use.
#
# `make benchmark` and `make test-all` add the libraries that the benchmarks compare with,
# PyTorch among them. `make compile-table` compiles the TPU kernels without a TPU, for
# which it downloads libtpu (484 MB); `make compile-table-gpu` compiles the GPU kernels
# without a GPU, with JAX's CUDA plugin and ptxas.
#
# `make gpu` runs what needs an NVIDIA GPU (for attention, a Hopper): the tests of the
# kernels, the sweep of attention, the search for the kernels' blocks, and the small
# matrices. Its parts are `gpu-test`, `gpu-benchmark`, `gpu-blocks` and `gpu-matrices`;
# `make -k gpu` goes on where one fails. Without a GPU each is an error. .venv gets
# jax[cuda13], or another with CUDA=cuda12. BIN=/folder/of/its/python uses an existing
# environment instead, which needs jax, jaxtyping, flax, numpy, matplotlib, tqdm, chex,
# pytest and pytest-xdist; tests that need more are skipped with a reason. When time is
# short: TESTS=tests/package/attention/mosaic_gpu in `gpu-test`,
# OPTIONS="--cases 128x128 128x1024 --dtypes bfloat16" in `gpu-benchmark` and
# `gpu-blocks`, OPTIONS="--sizes 4" in `gpu-matrices`.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv/installed-peers
LIBTPU := .venv/libtpu
COMPILER := .venv/cuda
DOCS := .venv-docs
NEWEST := .venv-newest
NEWEST_PYTHON = $(firstword $(foreach v,14 13 12 11,$(shell \
    python3.$(v) -c 'import sys; print(sys.executable)' 2>/dev/null)))
CUDA ?= cuda13
TESTS ?= tests/package/attention tests/package/matrix tests/package/flax/test_multi_head.py
# Nothing is installed into an environment that BIN names.
GPU := $(if $(filter .venv/bin,$(BIN)),needs-gpu .venv/installed-$(CUDA))
ON_GPU = $(or $(firstword $(wildcard $(BIN)/python $(BIN)/python3)),$(BIN)/python)

.PHONY: demo report test check-results test-all fuzz mutation benchmark clean
.PHONY: test-wheel test-newest dist docs docs-serve
.PHONY: compile-table compile-table-gpu
.PHONY: gpu gpu-test gpu-benchmark gpu-blocks gpu-matrices needs-gpu
# Programs that share a device must not run at the same time.
.NOTPARALLEL:

demo: $(INSTALLED)
	$(BIN)/python -m experiments demo

report: $(INSTALLED)
	$(BIN)/python -m experiments report

test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow" --ignore=tests/results

# The committed results against each other: figures and texts against their rows.
check-results: $(INSTALLED)
	$(BIN)/python -m pytest tests/results

# With XLA's default loops; tests/support/xla_flags.py says which ones `make test` uses.
test-all: $(PEERS)
	XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python -m pytest

# The wheel in an environment with nothing but what it asks for.
test-wheel: $(INSTALLED)
	rm -rf runs/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir runs/wheel .
	$(PYTHON) -m venv runs/wheel/venv
	runs/wheel/venv/bin/python -m pip install --quiet runs/wheel/*.whl
	cd runs/wheel && venv/bin/python -I -W error ../../tests/bare.py

# The source distribution and the wheel, which has the package alone.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[release]'
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/distribution.py dist

# The suite on the newest Python and the newest packages there are. Their warnings are no
# failures.
test-newest:
	rm -rf $(NEWEST)
	$(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --editable '.[dev,experiments,benchmarks]'
	$(NEWEST)/bin/python -m pip list | grep -i -E '^(jax|jaxlib|flax|numpy) '
	$(NEWEST)/bin/python -m pytest -m "not slow" --ignore=tests/results -W default

# Warnings are errors.
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

docs-serve: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

# 20,000 random problems; goes on where it was stopped.
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz.py

# Random changes of the code, to see which ones the tests notice: some hours.
mutation: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mutation]'
	$(BIN)/python tests/mutation.py

benchmark: $(PEERS)
	$(BIN)/python -m benchmarks

compile-table: $(INSTALLED) $(LIBTPU)
	$(BIN)/python -m benchmarks.ahead_of_time.tpu --libtpu $(LIBTPU)

compile-table-gpu: $(INSTALLED) $(COMPILER)
	$(BIN)/python -m benchmarks.ahead_of_time.gpu --cuda $(COMPILER)

gpu: gpu-test gpu-benchmark gpu-blocks gpu-matrices

# Warnings of other versions of JAX and NumPy are no failures there, and the code under
# test is fully optimised.
gpu-test: $(GPU)
	XLA_FLAGS= $(ON_GPU) -m pytest --platform gpu -W default \
	    -m "not slow or on_device" $(TESTS)

gpu-benchmark: $(GPU)
	$(ON_GPU) -m benchmarks --sweeps gpu $(OPTIONS)

gpu-blocks: $(GPU)
	$(ON_GPU) -m benchmarks gpu_block_search $(OPTIONS)

gpu-matrices: $(GPU)
	$(ON_GPU) -m benchmarks matrices --platform gpu $(OPTIONS)

# Checked before anything is installed.
needs-gpu:
	@ls /dev/nvidia[0-9]* /dev/dxg 2>/dev/null | grep -q . || { \
	    echo 'make gpu needs an NVIDIA GPU, and this machine has none.' >&2; exit 1; }

clean:
	rm -rf .venv $(NEWEST) $(DOCS)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,experiments,benchmarks]'
	touch $@

$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

# Outside the environment, because JAX looks for a TPU wherever it finds libtpu.
$(LIBTPU): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ 'libtpu>=0.0.52'
	touch $@

# Outside the environment too, and in one call, because the packages share a folder.
$(COMPILER): $(INSTALLED)
	rm -rf $@
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --target $@ jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version \
	    nvidia-cuda-nvcc-cu12
	touch $@

.venv/installed-$(CUDA): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'jax[$(CUDA)]'
	touch $@

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	touch $@
