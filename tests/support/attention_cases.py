"""Inputs, options and gradients for the tests of `sinkhorn_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS

# Outputs are averages of values of order 1. The 16-bit types round the inputs' products
# nowhere and the output once: 8 and 11 bits of mantissa.
ATOL = {"float64": 1e-12, "float32": 3e-6, "bfloat16": 2e-2, "float16": 2e-3}

B, T, S, N, K, H, D = 2, 5, 7, 4, 2, 3, 6

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
PLAIN = [name for name in IMPLEMENTATIONS if "mosaic" not in name]  # Take float64.


def inputs(
    dtype="float64", b=B, t=T, s=S, n=N, k=K, h=H, d=D, scale=1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, d)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return query * jnp.asarray(scale, dtype), key, value


def random(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape, "float64")


def sparse_mask():
    """Every row and column keeps an entry, whatever the lengths below leave."""
    allowed = np.random.default_rng(0).uniform(size=(1, N, T, S)) < 0.7
    allowed[..., 0] = allowed[..., 0, :] = True
    return jnp.asarray(allowed)


def positive(seed, shape):
    """Marginals, each with a total of 5."""
    marginal = 0.2 + jax.random.uniform(jax.random.key(seed), shape)
    return 5 * marginal / marginal.sum(axis=-1, keepdims=True)


# Each an options dict for the library, and what the oracle calls it.
CASES = {
    "plain": {},
    "columns": {"finish": "columns"},
    "bias over batch": {"bias": random(5, (1, N, T, S))},
    "bias over queries": {"bias": random(5, (B, 1, 1, S))},
    "bias": {"bias": random(5, (B, N, T, S)), "finish": "columns"},
    "mask": {"mask": sparse_mask()},
    "lengths": {"query_seq_lengths": [3, 5], "key_value_seq_lengths": [7, 4]},
    "an empty element": {"query_seq_lengths": [0, 5], "key_value_seq_lengths": [3, 4]},
    "key lengths": {"key_value_seq_lengths": [7, 4], "bias": random(5, (T, S))},
    "everything": {
        "finish": "columns",
        "mask": sparse_mask()[0, 0],
        "bias": random(5, (N, T, 1)),
        "query_seq_lengths": [3, 5],
        "key_value_seq_lengths": [7, 4],
        "scale": 0.7,
    },
    "marginals": {
        "query_marginal": positive(6, (B, N, T)),
        "key_marginal": positive(7, (N, S)),
    },
    "marginals with zeros": {
        "query_marginal": jnp.array([2.0, 0, 1, 1, 1]),
        "key_marginal": jnp.array([1.0, 1, 0, 1, 1, 0.5, 0.5]),
        "mask": sparse_mask(),
        "finish": "columns",
    },
    "one marginal": {
        "key_marginal": positive(7, (B, 1, S)),
        "query_seq_lengths": [3, 5],
        "key_value_seq_lengths": [7, 4],
    },
    "column_tau": {"column_tau": 0.3},
    "column_tau of each head": {
        "column_tau": jnp.linspace(0, 1, B * N).reshape(B, N),
        "query_seq_lengths": [3, 5],
        "key_value_seq_lengths": [7, 4],
        "finish": "columns",
    },
    "column_tau with unequal totals": {
        "column_tau": 0.7,
        "query_marginal": positive(6, (T,)),
        "key_marginal": 2 * positive(7, (N, S)),
        "bias": random(5, (B, N, T, S)),
    },
}


def options_of(case):
    options = dict(CASES[case])
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if name in options:
            options[name] = jnp.asarray(options[name])
    return options


def with_logits(logits):
    """One-hot queries of one head, and keys that are their logits at scale 1."""
    eye = jnp.eye(logits.shape[-1], dtype=logits.dtype)
    query = jnp.broadcast_to(eye, logits.shape)
    return query[:, :, None], jnp.swapaxes(logits, 1, 2)[:, :, None]


def gradients(implementation, operands, bias, options):
    options = {"num_iters": 3, "implementation": implementation} | options

    def loss(operands, bias):
        out = sinkhorn_attention(*operands, bias, **options)
        return (out.astype("float64") * random(9, out.shape)).sum()

    argnums = 0 if bias is None else (0, 1)
    return jax.jit(jax.value_and_grad(loss, argnums))(operands, bias)
