"""`sinkhorn_attention`: values, padding, dropout, logits that are hard."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.attention_cases import (
    ATOL,
    CASES,
    PLAIN,
    B,
    D,
    H,
    K,
    N,
    S,
    T,
    implementations,
    inputs,
    options_of,
    random,
    sparse_mask,
    with_logits,
)
from support.hostile import hostile_logits

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("short_query_blocks")


def oracle_options(options):
    lengths = "query_seq_lengths", "key_value_seq_lengths"
    sums = {"query_marginal": "a", "key_marginal": "b", "column_tau": "tau"}
    shapes = {"query_marginal": (B, N, T), "key_marginal": (B, N, S)}
    return {k: v for k, v in options.items() if k not in (*lengths, *sums)} | {
        "lengths": tuple(options.get(name) for name in lengths),
        "sums": {
            short: np.broadcast_to(options[name], shapes.get(name, (B, N)))
            for name, short in sums.items()
            if name in options
        },
    }


@pytest.mark.few(4)
@implementations
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_oracle(implementation, case):
    operands, options = inputs(), options_of(case)
    out, error = sinkhorn_attention(
        *operands,
        num_iters=3,
        implementation=implementation,
        return_marginal_error=True,
        **options,
    )
    oracle = oracle_options(options)
    expected = reference.sinkhorn_attention(*operands, num_iters=3, **oracle)
    np.testing.assert_allclose(out, expected, atol=ATOL["float64"])
    finish, sums = oracle.pop("finish", "rows"), oracle.pop("sums")
    logits = reference.attention_logits(*operands[:2], **oracle)
    expected = reference.potentials(logits, 3, finish=finish, **sums)[2]
    np.testing.assert_allclose(error, expected, atol=ATOL["float64"])


GROUPED = {"t": 64, "s": 40, "n": 6, "k": 3}


SHAPES = (
    {"t": 64, "s": 64, "h": 32},
    GROUPED,
    {"t": 1, "s": 9},
    {"t": 37, "s": 1, "n": 1, "k": 1},
)


# Each dtype and each shape; all pairs of them take long.
@pytest.mark.few(4)
@implementations
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        pytest.param(
            *(dtype, shape),
            marks=[pytest.mark.slow] * (dtype != "float32" and shape is not GROUPED),
        )
        for dtype in ATOL
        for shape in SHAPES
    ],
    ids=str,
)
def test_dtypes_and_shapes(implementation, dtype, shape):
    query, key, value = inputs(dtype, **shape)
    out = sinkhorn_attention(query, key, value, implementation=implementation)
    assert out.dtype == query.dtype
    chex.assert_shape(out, (*query.shape[:-1], value.shape[-1]))
    expected = reference.sinkhorn_attention(query, key, value)
    np.testing.assert_allclose(out.astype("float64"), expected, atol=ATOL[dtype])


@implementations
def test_no_iterations_is_softmax_attention(implementation):
    query, key, value = inputs("float32", d=H)
    mask = sparse_mask()
    out = sinkhorn_attention(
        query, key, value, mask=mask, num_iters=0, implementation=implementation
    )
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.nn.dot_product_attention(query, key, value, mask=mask)
    chex.assert_trees_all_close(out, expected, atol=ATOL["float32"])


@pytest.mark.few(1)
@implementations
def test_padding_equals_cropping(implementation):
    query, key, value = inputs(b=1)
    query, key = query.at[:, 3:].set(1e3), key.at[:, 4:].set(-1e3)
    weights = random(9, (1, 3, N, D))
    lengths = {
        "query_seq_lengths": jnp.array([3]),
        "key_value_seq_lengths": jnp.array([4]),
    }
    outer = (jnp.arange(T) < 3)[:, None] & (jnp.arange(S) < 4)[None]

    def loss(operands, crop, **options):
        query, key, value = operands
        if crop:
            query, key, value = query[:, :3], key[:, :4], value[:, :4]
        out, error = sinkhorn_attention(
            query,
            key,
            value,
            num_iters=3,
            implementation=implementation,
            return_marginal_error=True,
            **options,
        )
        return (out[:, :3] * weights).sum(), (abs(out[:, 3:]).sum(), error)

    grad = jax.value_and_grad(loss, has_aux=True)
    expected = grad((query, key, value), True)
    for options in (lengths, {"mask": outer}):
        chex.assert_trees_all_close(
            grad((query, key, value), False, **options), expected, atol=1e-12
        )


@implementations
def test_without_batch_axis(implementation):
    query, key, value = (x[0] for x in inputs())
    solve = functools.partial(
        sinkhorn_attention, implementation=implementation, return_marginal_error=True
    )
    lengths = {"key_value_seq_lengths": jnp.array([4])}
    out, error = solve(query, key, value, **lengths)
    chex.assert_shape((out, error), ((T, N, D), (N,)))
    batched = solve(query[None], key[None], value[None], **lengths)
    chex.assert_trees_all_equal((out[None], error[None]), batched)


@implementations
def test_lengths_of_a_narrow_type_and_an_empty_batch(implementation):
    solve = functools.partial(
        sinkhorn_attention, implementation=implementation, num_iters=1
    )
    query, key, value = inputs(t=300, h=2)
    lengths = jnp.array([200, 3], "uint8")
    out = solve(query, key, value, query_seq_lengths=lengths)
    assert (abs(out).sum((2, 3)) > 0).sum(1).tolist() == [200, 3]
    out, error = solve(query[:0], key[:0], value[:0], return_marginal_error=True)
    chex.assert_shape((out, error), ((0, 300, N, D), (0, N)))


def test_dropout_is_the_same_in_every_implementation_and_unbiased():
    operands = inputs()
    options = {"dropout_rate": 0.25, "dropout_rng": jax.random.key(3), "num_iters": 3}
    outs = [
        sinkhorn_attention(*operands, implementation=implementation, **options)
        for implementation in PLAIN
    ]
    for out in outs[1:]:
        chex.assert_trees_all_close(out, outs[0], atol=1e-12)
    # Each entry of the plan has its own draw, made from the key and the position.
    rng = options["dropout_rng"]
    for b, n, i in [(0, 0, 0), (1, 2, 3), (1, 3, 4)]:
        row = jax.random.fold_in(jax.random.fold_in(rng, b * N + n), i)
        keep = np.asarray(jax.random.bernoulli(row, 0.75, (S,))) / 0.75
        query, key, value = (np.asarray(x) for x in operands)
        plan = reference.sinkhorn(reference.attention_logits(query, key), 3)[b, n, i]
        expected = (plan * keep) @ value[b, :, n // (N // K)]
        np.testing.assert_allclose(outs[0][b, i, n], expected, atol=1e-12)


def test_marginal_error_is_before_dropout_and_not_differentiated():
    operands = inputs()

    def error(operands, **options):
        return sinkhorn_attention(
            *operands, num_iters=1, return_marginal_error=True, **options
        )[1].sum()

    dropped = error(operands, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    assert dropped == error(operands)
    for implementation in PLAIN:
        grads = jax.grad(error)(operands, implementation=implementation)
        assert not any(x.any() for x in grads)


# The kernels for TPUs meet them in a test of their own, interpreted too.
@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "mosaic_tpu"))
        for name in IMPLEMENTATIONS
    ],
)
def test_hostile_logits_in_float32(implementation):
    named = hostile_logits(16)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    query, key = with_logits(logits)
    value = query  # The identity: the output is the plan.

    def solve(query, key, value):
        return sinkhorn_attention(
            query, key, value, scale=1.0, num_iters=50, implementation=implementation
        )

    out, pull_back = jax.vjp(solve, query, key, value)
    expected = reference.sinkhorn(logits, 50)
    error = abs(np.asarray(out[:, :, 0]) - expected).max(axis=(1, 2))
    limit = 1e-4 if implementation == "reference" else 3e-5
    assert max(error) < limit, dict(zip(named, error, strict=True))
    chex.assert_tree_all_finite(pull_back(jnp.sin(9 * out)))
