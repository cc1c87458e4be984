"""What `implementation="mosaic_gpu"` takes, and what it does around its kernels."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_attention import RTOL, lengths
from support.kernel_steps import exact, operands, problem, step

from sinkhorn_jax import Truncated, sinkhorn_attention
from sinkhorn_jax._core.options import Options
from sinkhorn_jax._runtime.dispatch import preferred
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._mosaic_gpu.blocks import MAX_ITERS
from sinkhorn_jax.attention._pallas_common import reciprocal, to_unit_by_head


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dtype": jnp.dtype("float64")}, "got float64.*'scaling' and 'streaming'"),
        ({"dtype": jnp.dtype("float32")}, "got float32.*'scaling' and 'streaming'"),
        ({"head_dim": 129}, "up to 128, got 129"),
        ({"value_dim": 256}, "up to 128, got 64 and 256"),
        ({"options": Options(MAX_ITERS + 1)}, "64 iterations, got 65"),
        ({"has_bias": True}, "no bias"),
        ({"has_mask": True}, "no mask"),
        ({"dropout_rate": 0.5}, r"dropout_rate=0\.5"),
        ({"options": Options(2, "columns")}, "finish='rows', got 'columns'"),
        ({"options": Options(2, gradient=Truncated(1))}, "Exact.*Truncated"),
    ],
    ids=str,
)
def test_why_not(changed, says):
    why_not = IMPLEMENTATIONS["mosaic_gpu"].load().why_not
    assert why_not(problem()) is None
    assert re.search(says, why_not(problem(**changed)))


def test_is_not_taken_unasked():
    for platform in ("cpu", "gpu", "tpu"):
        assert preferred(IMPLEMENTATIONS, problem(), platform) != "mosaic_gpu"


@pytest.mark.parametrize("tokens", [64, 1024])
def test_no_batch_needs_no_kernel(tokens):
    arrays = operands(tokens, tokens, "bfloat16", b=0)
    out, error, grads = step("mosaic_gpu", num_iters=2)(*arrays)
    assert (out.shape, error.shape) == (arrays[3].shape, (0, 2))
    assert [x.shape for x in grads] == [x.shape for x in arrays[:3]]


def test_refuses_second_derivatives():
    def loss(query, key, value):
        return sinkhorn_attention(query, key, value, implementation="mosaic_gpu").sum()

    arrays = operands(3, 3, "bfloat16")[:3]
    with pytest.raises(NotImplementedError, match=r"second derivatives .*'reference'"):
        jax.eval_shape(jax.hessian(loss), *arrays)


@pytest.mark.few(1)
def test_what_lies_in_padding_does_not_matter(on_device):
    query, key, value, cotangent = operands(9, 7, "bfloat16", n=1)
    solve = jax.jit(step("mosaic_gpu", **lengths([5], [4]), num_iters=1))
    expected = on_device(solve, query, key, value, cotangent)
    for bad in (jnp.nan, jnp.inf, jnp.finfo("bfloat16").max):
        dirty = (
            query.at[:, 5:].set(bad),
            key.at[:, 4:].set(bad),
            value.at[:, 4:].set(bad),
            cotangent.at[:, 5:].set(bad),
        )
        chex.assert_trees_all_equal(on_device(solve, *dirty), expected)


@pytest.mark.slow
@pytest.mark.on_device
def test_vmap_agrees_with_float64(on_device):
    """Over values too, while the queries are shared."""
    query, key, _, _ = operands(40, 20, "bfloat16", n=1)
    values = jax.random.normal(jax.random.key(5), (2, *key.shape), "bfloat16")

    def grads(implementation, query, key, values):
        def loss(query, value):
            solve = functools.partial(sinkhorn_attention, num_iters=1)
            out = solve(query, key, value, implementation=implementation)
            return (out.astype("float32") ** 2).sum()

        return jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(query, values)

    got = on_device(functools.partial(grads, "mosaic_gpu"), query, key, values)
    expected = grads("reference", *exact((query, key, values)))
    for x, y in zip(got, expected, strict=True):
        error = abs(x.astype("float64") - np.asarray(y)).max() / abs(y).max()
        assert error < RTOL["bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cotangents_are_scaled_to_order_one_without_rounding(dtype):
    limits = jnp.finfo(dtype)
    sizes = limits.max, limits.tiny, 3.0, 0.0
    dout = jnp.asarray([[1.0, -0.5]] * len(sizes), dtype)
    dout = (dout * jnp.asarray(sizes, dtype)[:, None])[:, None, None]
    unit, size = to_unit_by_head(dout)
    assert unit.dtype == dout.dtype
    top = abs(unit).max(axis=(1, 2, 3)).tolist()
    assert [0.5 <= x < 2 for x in top] == [True, True, True, False]
    again = unit.astype("float64") * size.astype("float64")
    np.testing.assert_array_equal(again, dout.astype("float64"))


def test_the_reciprocal_of_an_empty_sum_is_0():
    x = jnp.array([0.0, 4.0], "float32")
    np.testing.assert_array_equal(reciprocal(x), [0, 0.25])
