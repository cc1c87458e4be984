"""What rounding leaves: offsets that cancel, and gradients of many iterations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.attention_cases import PLAIN, with_logits
from support.hostile import large_offsets

from sinkhorn_jax import sinkhorn_attention

plain = pytest.mark.parametrize("implementation", PLAIN)


def normal(seed, shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def gradients(dtype, implementation, operands, weights, options):
    """Output, and the gradients of a weighted sum of it."""

    @jax.jit
    def call(*operands):
        out, pull_back = jax.vjp(
            lambda *x: sinkhorn_attention(*x, implementation=implementation, **options),
            *operands,
        )
        return out, pull_back(weights.astype(dtype))

    return call(*(x.astype(dtype) for x in operands))


@pytest.mark.few(2)
@plain
@pytest.mark.parametrize("finish", ["rows", "columns"])
@pytest.mark.parametrize("num_iters", [1, 10])
def test_large_offsets_leave_the_error_of_the_differences(
    implementation, finish, num_iters
):
    named = large_offsets(8)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    query, key = with_logits(logits)
    value, weights = normal(1, (len(named), 8, 1, 3)), normal(2, (len(named), 8, 1, 3))
    options = {"scale": 1.0, "num_iters": num_iters, "finish": finish}
    operands = query, key, value
    out, got = gradients("float32", implementation, operands, weights, options)
    plan = reference.sinkhorn(logits, num_iters, finish=finish)
    expected = np.einsum("bts,bsd->btd", plan, np.asarray(value)[:, :, 0])
    error = abs(np.asarray(out)[:, :, 0] - expected).max((1, 2))
    error = dict(zip(named, error, strict=True))
    assert max(error.values()) < 5e-6, error
    # One-hot queries: the gradient of the keys is that of the logits. The gradient of
    # the queries multiplies it by keys as large as the offsets.
    _, exact = gradients("float64", "reference", operands, weights, options)
    for x, y in zip(got[1:], exact[1:], strict=True):
        error = abs(x.astype("float64") - y).max((1, 2, 3))
        error = dict(zip(named, error, strict=True))
        assert max(error.values()) < 2e-5, error


@pytest.mark.few(2)
@plain
@pytest.mark.parametrize("finish", ["rows", "columns"])
@pytest.mark.parametrize(
    ("t", "s", "num_iters"), [(1, 16, 1000), (16, 1, 200), (64, 2, 100)]
)
def test_rounding_errors_do_not_add_up_over_the_iterations(
    implementation, finish, t, s, num_iters
):
    shapes = (1, t, 1, 8), (1, s, 1, 8), (1, s, 1, 8)
    operands = [normal(i, shape) for i, shape in enumerate(shapes)]
    options = {"num_iters": num_iters, "finish": finish}
    weights = normal(3, (1, t, 1, 8))
    _, got = gradients("float32", implementation, operands, weights, options)
    _, exact = gradients("float64", "reference", operands, weights, options)
    for x, y in zip(got, exact, strict=True):
        atol = 2e-6 * max(1.0, float(abs(y).max()))
        chex.assert_trees_all_close(x.astype("float64"), y, atol=atol)
