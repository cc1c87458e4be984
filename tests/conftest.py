"""Runs every test under jaxtyping's checks and JAX's strictest promotion rules."""

import gc
import importlib.util
import os
from contextlib import nullcontext

import jax
import jaxtyping
import pytest
from jax.experimental.pallas import tpu as pltpu
from support.xla_flags import compile_quickly

# Set XLA_FLAGS, for instance to nothing, to test fully optimised code.
compile_quickly()
# Tracing makes many small objects, and few of them are in cycles.
gc.set_threshold(200_000, 20, 100)
# Several test processes share the memory of a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The warpgroups of an interpreted GPU kernel wait for each other, each in a thread of
# XLA's pool. With one thread per core, the default, two cores would wait forever.
os.environ.setdefault("NPROC", "8")
# Checks shapes and dtypes at each call of every annotated function of the package.
# beartype may be missing where nothing can be installed.
CHECKS_SHAPES = importlib.util.find_spec("beartype") is not None
if CHECKS_SHAPES:
    jaxtyping.install_import_hook("sinkhorn_jax", "beartype.beartype")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    text = "The platform that JAX must compute on, such as gpu."
    parser.addoption("--platform", help=text)


def pytest_configure(config):
    wanted = config.getoption("--platform")
    if wanted is not None and wanted != (found := jax.default_backend()):
        raise pytest.UsageError(
            f"--platform {wanted}: JAX finds no {wanted.upper()} here and computes on "
            f"a {found.upper()}."
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as slow all but a few cases of a test, evenly spaced: `few(4)` keeps 4.

    The longest tests come first, where they leave no process waiting at the end.
    """
    items.sort(key=lambda item: "test_many_devices" not in item.nodeid)
    cases = {}
    for item in items:
        mark = item.get_closest_marker("few")
        if mark and not item.get_closest_marker("slow"):
            key = item.nodeid.partition("[")[0]
            cases.setdefault(key, (mark.args[0], []))[1].append(item)
    for keep, found in cases.values():
        # Steps that are not whole do not favour one value of an inner parameter.
        kept = {int((i + 0.5) * len(found) / keep) for i in range(keep)}
        for number, item in enumerate(found):
            if number not in kept:
                item.add_marker(pytest.mark.slow)


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
    """Switches off jaxtyping's checks, which would raise before the package does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs the kernels in tests over a table, or skips them with the reason.

    Kernels for TPUs are interpreted on a CPU; those for GPUs run on a GPU.
    """
    callspec = getattr(pyfuncitem, "callspec", None)
    name = None if callspec is None else callspec.params.get("implementation")
    if name not in ("mosaic_tpu", "mosaic_gpu"):
        return (yield)
    if name == "mosaic_gpu" and jax.default_backend() != "gpu":
        pytest.skip("kernels for GPUs are interpreted in tests of their own")
    if name == "mosaic_tpu" and jax.default_backend() == "gpu":
        pytest.skip("kernels for TPUs are interpreted on a CPU")
    interpret = name == "mosaic_tpu"
    params = pltpu.InterpretParams()
    try:
        with pltpu.force_tpu_interpret_mode(params) if interpret else nullcontext():
            return (yield)
    except NotImplementedError as reason:
        if f"implementation={name!r} cannot run here" not in str(reason):
            raise
        pytest.skip(str(reason))
