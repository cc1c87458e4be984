"""Runs every test under jaxtyping's checks and JAX's strictest promotion rules."""

import os

# Compilation is most of the suite's time. The flag changes LLVM's effort, not XLA's
# graph; set XLA_FLAGS, to nothing for instance, to test fully optimised code.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

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
    """Tests over the table run the TPU kernels in the interpreter, or skip them."""
    callspec = getattr(pyfuncitem, "callspec", None)
    if callspec is None or callspec.params.get("implementation") != "mosaic_tpu":
        return (yield)
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
            return (yield)
    except NotImplementedError as reason:
        if "implementation='mosaic_tpu' cannot run here" not in str(reason):
            raise
        pytest.skip(str(reason))
