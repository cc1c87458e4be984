"""Operands for the tests of the matrix functions."""

import jax
import jax.numpy as jnp
import numpy as np

T, S = 5, 7


def random(seed, shape, dtype="float64", scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def marginals(batch=()):
    """Two positive marginals of equal total for each matrix."""
    a = 0.2 + jax.random.uniform(jax.random.key(1), (*batch, T))
    b = 0.2 + jax.random.uniform(jax.random.key(2), (*batch, S))
    return a, b * (a.sum(-1) / b.sum(-1))[..., None]


def sparse_with_padding():
    """Allowed entries: sparse, with a padded row and a padded column."""
    allowed = np.random.default_rng(0).uniform(size=(T, S)) < 0.8
    allowed[:, 0] = allowed[0] = True
    allowed[2], allowed[:, 4] = False, False
    return jnp.asarray(allowed)
