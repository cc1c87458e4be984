import jax
import pytest
from support.gpu_interpreter import gpu_or_interpreter

from sinkhorn_jax.attention import IMPLEMENTATIONS


@pytest.fixture
def on_device(capfd):
    """`call(fn, *args)`: on a GPU, or in the interpreter, which must see no race."""
    with gpu_or_interpreter(capfd) as call:
        yield call


@pytest.fixture
def in_float32(on_device, monkeypatch):
    """`on_device` for float32 inputs, which the implementation refuses on a GPU.

    The interpreter does not round them.
    """
    if jax.default_backend() == "gpu":
        pytest.skip("the tensor cores round float32")
    module = IMPLEMENTATIONS["mosaic_gpu"].load()
    monkeypatch.setattr(module, "why_not", lambda problem: None)
    with jax.default_matmul_precision("highest"):
        yield on_device
