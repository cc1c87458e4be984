"""Limits of the kernels for small matrices."""

import re

import jax
import jax.numpy as jnp
import pytest

# Not public: the switch of the GPU's interpreter, and what it saw.
from support.small_matrices import S, T, random

from sinkhorn_jax import Truncated, sinkhorn
from sinkhorn_jax._core.options import Options
from sinkhorn_jax._runtime.dispatch import preferred
from sinkhorn_jax.matrix import IMPLEMENTATIONS
from sinkhorn_jax.matrix._problem import Problem
from sinkhorn_jax.matrix._small import mosaic_tpu


def problem(**changed):
    fields = {
        "batch": (10,),
        "t": 4,
        "s": 16,
        "dtype": jnp.dtype("bfloat16"),
        "options": Options(20, "columns"),
    }
    return Problem(**fields | changed)


kernels = pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])


@kernels
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dtype": jnp.dtype("float64")}, "float32 and bfloat16, got float64"),
        ({"dtype": jnp.dtype("float16")}, "float32 and bfloat16, got float16"),
        ({"t": 17}, "at most 16 rows and columns, got 17 x 16"),
        ({"s": 17}, "at most 16 rows and columns, got 4 x 17"),
        ({"options": Options(2, tolerance=0.1)}, "no tolerance, got 0.1"),
        ({"options": Options(2, gradient=Truncated(1))}, "Exact.*Truncated"),
    ],
    ids=str,
)
def test_why_not(name, changed, says):
    why_not = IMPLEMENTATIONS[name].load().why_not
    assert why_not(problem()) is None
    assert re.search(says, why_not(problem(**changed)))


@kernels
def test_refuses_second_derivatives(name):
    def loss(logits):
        return (sinkhorn(logits, 1, implementation=name) ** 2).sum()

    with pytest.raises(NotImplementedError, match=r"second derivatives .*'reference'"):
        jax.eval_shape(jax.hessian(loss), random(0, (T, S)))


@kernels
def test_is_not_taken_unasked(name):
    for platform in ("cpu", "gpu", "tpu"):
        assert preferred(IMPLEMENTATIONS, problem(), platform) != name


@pytest.mark.parametrize("num_iters", [0, 1, 2, 7, 20, 63, 64, 65, 1000])
@pytest.mark.parametrize("most", [0, 1, 64])
def test_segments_cover_all_iterations(num_iters, most):
    length, *more = mosaic_tpu.segment_lengths(num_iters, most)
    (num_segments,) = more or [1]
    assert length * (num_segments - 1) < max(1, num_iters) <= length * num_segments
    assert bool(more) == (num_iters > max(1, most))
    assert not more or length + num_segments < 2 * num_iters**0.5 + 2
