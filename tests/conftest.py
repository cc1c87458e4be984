"""Runs every test under jaxtyping's checks and JAX's strictest promotion rules."""

import importlib.metadata
import importlib.util
import os
from contextlib import nullcontext

# Compilation is most of the suite's time. The flags change LLVM's effort and how loops
# are written for it, not XLA's graph; set XLA_FLAGS, to nothing for instance, to test
# fully optimised code. The second is the older of two ways to write loops, and compiles
# in half the time. Later versions may lack it, and XLA ends at a flag it does not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)
# On a GPU the processes share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Warpgroups of an interpreted GPU kernel wait for each other, each in a thread of XLA's
# pool. It has one for each core otherwise, and two cores would wait for ever.
os.environ.setdefault("NPROC", "8")

import jax
import jaxtyping
import pytest
from jax.experimental.pallas import tpu as pltpu

# Shapes and dtypes of every annotated function of the package are checked at each call.
# Where nothing can be installed, as on borrowed machines with a GPU, they may not be.
CHECKS_SHAPES = importlib.util.find_spec("beartype") is not None
if CHECKS_SHAPES:
    jaxtyping.install_import_hook("sinkhorn_jax", "beartype.beartype")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    text = "What JAX must compute on, such as gpu; an error if it is another."
    parser.addoption("--platform", help=text)


def pytest_configure(config):
    wanted = config.getoption("--platform")
    if wanted is not None and wanted != (found := jax.default_backend()):
        raise pytest.UsageError(
            f"--platform {wanted}: JAX finds no {wanted.upper()} here and computes on "
            f"a {found.upper()}."
        )


def pytest_terminal_summary(terminalreporter):
    if not CHECKS_SHAPES:
        terminalreporter.write_line(
            "Shapes and dtypes were not checked: beartype is not installed."
        )


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def unchecked():
    """Without jaxtyping's checks, which would speak up before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Tests over the table run kernels where they can, or skip them.

    Those for TPUs in the interpreter on a CPU, those for GPUs on a GPU.
    """
    callspec = getattr(pyfuncitem, "callspec", None)
    name = None if callspec is None else callspec.params.get("implementation")
    if name not in ("mosaic_tpu", "mosaic_gpu"):
        return (yield)
    if name == "mosaic_gpu" and jax.default_backend() != "gpu":
        pytest.skip("a GPU's kernels are interpreted in tests of their own alone")
    if name == "mosaic_tpu" and jax.default_backend() == "gpu":
        pytest.skip("a TPU's kernels are interpreted on a CPU")
    interpret = name == "mosaic_tpu"
    params = pltpu.InterpretParams()
    try:
        with pltpu.force_tpu_interpret_mode(params) if interpret else nullcontext():
            return (yield)
    except NotImplementedError as reason:
        if f"implementation={name!r} cannot run here" not in str(reason):
            raise
        pytest.skip(str(reason))
