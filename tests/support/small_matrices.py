"""Operands for the tests of the kernels for small matrices."""

import jax
import jax.numpy as jnp
import numpy as np

M, T, S = 2, 3, 4


def random(seed, shape, dtype="float32", scale=1.0):
    x = jax.random.normal(jax.random.key(seed), shape, dtype)
    return x * jnp.asarray(scale, dtype)


def marginals():
    """Positive marginals, of equal total without the padding of `where`."""
    a = 0.5 + jax.random.uniform(jax.random.key(1), (M, T), "float32")
    b = 0.5 + jax.random.uniform(jax.random.key(2), (M, S), "float32")
    total = jnp.where(where().any(-1), a, 0).sum(-1, keepdims=True)
    return a, b * total / jnp.where(where().any(-2), b, 0).sum(-1, keepdims=True)


def where():
    """Allowed entries; the second matrix is sparse, with a padded row and column."""
    allowed = np.ones((M, T, S), bool)
    allowed[1, 1], allowed[1, :, 2], allowed[1, 0, 1] = False, False, False
    return jnp.asarray(allowed)
