"""Operands, forward and backward pass, and a comparison, for tests of kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax._core.options import Options
from sinkhorn_jax.attention._problem import Problem


def problem(**changed):
    """A call of 256 x 256 entries in bfloat16, except for these fields."""
    fields = {
        "batch": 1,
        "t": 256,
        "s": 256,
        "num_heads": 1,
        "num_key_heads": 1,
        "head_dim": 64,
        "value_dim": 64,
        "dtype": jnp.dtype("bfloat16"),
        "options": Options(10),
        "scale": 1.0,
    }
    return Problem(**fields | changed)


def operands(t, s, dtype="float32", b=1, n=2, k=1, h=8, d=4, scale=1.0):
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, d), (b, t, n, d)
    keys = jax.random.split(jax.random.key(0), 4)
    query, *rest = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return query * jnp.asarray(scale, dtype), *rest


def exact(arrays):
    return jax.tree.map(lambda x: jnp.asarray(x).astype("float64"), arrays)


def step(implementation, **options):
    """A function that returns output, marginal error and the operands' gradients."""

    def attend(query, key, value):
        return sinkhorn_attention(
            query,
            key,
            value,
            implementation=implementation,
            return_marginal_error=True,
            **options,
        )

    def call(query, key, value, cotangent):
        (out, error), pull_back = jax.vjp(attend, query, key, value)
        return out, error, pull_back((cotangent, jnp.zeros_like(error)))

    return call


def assert_close(got, expected, rtol):
    """Compares arrays relative to their largest magnitude, and marginal errors."""

    def error(x, y):
        return abs(x.astype("float64") - np.asarray(y)).max() / abs(y).max()

    errors = jax.tree.map(error, got[::2], expected[::2])
    assert max(jax.tree.leaves(errors)) < rtol, errors
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-2, atol=rtol)
