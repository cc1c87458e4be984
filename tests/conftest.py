"""Runs every test under jaxtyping's checks and JAX's strictest promotion rules."""

import os
from contextlib import nullcontext

# Compilation is most of the suite's time. The flag changes LLVM's effort, not XLA's
# graph; set XLA_FLAGS, to nothing for instance, to test fully optimised code.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Warpgroups of an interpreted GPU kernel wait for each other, each in a thread of XLA's
# pool. It has one for each core otherwise, and two cores would wait for ever.
os.environ.setdefault("NPROC", "8")

import jax
import jaxtyping
import pytest
from jax.experimental.pallas import tpu as pltpu

# Shapes and dtypes of every annotated function of the package are checked at each call.
jaxtyping.install_import_hook("sinkhorn_jax", "beartype.beartype")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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

    Those for TPUs in the interpreter, those for GPUs on a GPU.
    """
    callspec = getattr(pyfuncitem, "callspec", None)
    name = None if callspec is None else callspec.params.get("implementation")
    if name not in ("mosaic_tpu", "mosaic_gpu"):
        return (yield)
    if name == "mosaic_gpu" and jax.default_backend() != "gpu":
        pytest.skip("a GPU's kernels are interpreted in tests of their own alone")
    interpret = name == "mosaic_tpu"
    params = pltpu.InterpretParams()
    try:
        with pltpu.force_tpu_interpret_mode(params) if interpret else nullcontext():
            return (yield)
    except NotImplementedError as reason:
        if f"implementation={name!r} cannot run here" not in str(reason):
            raise
        pytest.skip(str(reason))
