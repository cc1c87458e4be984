"""What lies in padding reaches nothing, and what is meant as padding is padding."""

import math
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.attention_cases import (
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
    random,
)

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax._core.options import Options
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._problem import Operands, Problem

ROWS, COLS = 3, 4  # Valid queries and keys.
JUNK = (np.nan, np.inf, -np.inf, 3e38)

valid_rows, valid_cols = jnp.arange(T) < ROWS, jnp.arange(S) < COLS
OUTER = valid_rows[:, None] & valid_cols[None, :]
LENGTHS = {
    "query_seq_lengths": jnp.array([ROWS] * B),
    "key_value_seq_lengths": jnp.array([COLS] * B),
}
PADDING = {
    "lengths": LENGTHS,
    "mask": {"mask": OUTER},
    "mask of pairs of axes": {
        "mask": valid_rows[:, None],
        "key_value_seq_lengths": LENGTHS["key_value_seq_lengths"],
    },
    "bias": {"bias": jnp.where(OUTER, 0.0, -jnp.inf)},
    "least bias": {"bias": jnp.where(OUTER, 0.0, float(jnp.finfo("float64").min))},
}


def with_junk(junk):
    query, key, value = inputs("float32")
    return (
        query.at[:, ROWS:].set(junk),
        key.at[:, COLS:].set(junk),
        value.at[:, COLS:].set(junk),
    )


@pytest.mark.few(2)
@implementations
@pytest.mark.parametrize("how", PADDING)
def test_junk_in_padding_reaches_nothing(implementation, how):
    options = {"num_iters": 3, "implementation": implementation} | PADDING[how]
    weights = random(9, (B, T, N, D)).astype("float32")

    @jax.jit
    def output_and_gradients(junk):
        """With the junk in padded inputs, and in the cotangents of padded outputs."""
        attend = lambda *operands: sinkhorn_attention(*operands, **options)
        out, pull_back = jax.vjp(attend, *with_junk(junk))
        return out, pull_back(weights.at[:, ROWS:].set(junk))

    expected = output_and_gradients(jnp.float32(0))
    out, (dquery, dkey, dvalue) = expected
    query, key, value = inputs("float32")
    cropped = reference.sinkhorn_attention(
        query[:, :ROWS], key[:, :COLS], value[:, :COLS], num_iters=3
    )
    np.testing.assert_allclose(out[:, :ROWS], cropped, atol=3e-6)
    assert not out[:, ROWS:].any()
    for dx, n in ((dquery, ROWS), (dkey, COLS), (dvalue, COLS)):
        assert (dx[:, :n] != 0).all()
        assert (dx[:, n:] == 0).all()
    for junk in JUNK:
        got = output_and_gradients(jnp.float32(junk))
        chex.assert_trees_all_equal(got, expected)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", PLAIN)
def test_junk_in_a_bias_where_a_mask_excludes_reaches_nothing(implementation):
    operands = with_junk(0.0)

    @jax.jit
    def gradients(junk):
        def loss(operands, bias):
            out = sinkhorn_attention(
                *operands, bias, OUTER, num_iters=3, implementation=implementation
            )
            return jnp.sin(out).sum()

        bias = jnp.where(OUTER, random(5, (1, N, T, S)), junk)
        return jax.value_and_grad(loss, (0, 1))(operands, bias)

    expected = gradients(jnp.asarray(0.0))
    assert (expected[1][1][..., ~np.asarray(OUTER)] == 0).all()
    for junk in JUNK:
        chex.assert_trees_all_equal(gradients(jnp.asarray(junk)), expected)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", PLAIN)
def test_padding_that_differs_between_the_heads(implementation):
    """A key is padding if no head that shares it may attend to it."""
    query, key, value = inputs("float32")
    shared = N // K
    mask = jnp.ones((1, N, T, S), bool).at[:, :shared, :, -1].set(False)
    mask = mask.at[:, 1, 0].set(False)  # A query of one head.
    bad = key.at[:, -1, 0].set(jnp.nan), value.at[:, -1, 0].set(jnp.inf)

    @jax.jit
    def gradients(query, key, value):
        def loss(*operands):
            out = sinkhorn_attention(
                *operands, mask=mask, num_iters=3, implementation=implementation
            )
            return jnp.sin(out).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

    expected = gradients(query, key, value)
    got = gradients(query.at[:, 0, 1].set(jnp.nan), *bad)
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("implementation", PLAIN)
def test_without_lengths_mask_and_bias_the_program_is_that_of_the_implementation(
    implementation,
):
    problem = Problem(
        **{"batch": B, "t": T, "s": S, "num_heads": N, "num_key_heads": K},
        **{"head_dim": H, "value_dim": D, "dtype": jnp.dtype("float32")},
        **{"options": Options(10), "scale": 1 / math.sqrt(H)},
    )

    def directly(*arrays):
        module = IMPLEMENTATIONS[implementation].load()
        return module.attend(problem, Operands(*arrays))[0]

    def called(*arrays):
        return sinkhorn_attention(*arrays, implementation=implementation)

    programs = [str(jax.make_jaxpr(f)(*inputs("float32"))) for f in (directly, called)]
    assert programs[0] == programs[1]


class TestAdditivePadding:
    """A bias as models of Hugging Face pass it."""

    @pytest.mark.few(4)
    @pytest.mark.parametrize("implementation", PLAIN)
    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
    def test_the_least_numbers_of_a_dtype_exclude(self, implementation, dtype):
        operands = inputs("float32")
        least = float(jnp.finfo(dtype).min)
        expected = reference.sinkhorn_attention(
            *(x[:, :n] for x, n in zip(operands, (T, COLS, COLS), strict=True))
        )
        for number in (least, least / 2, -np.inf):
            bias = jnp.where(valid_cols, 0, number).astype(dtype)[None, None, None]
            out = sinkhorn_attention(*operands, bias, implementation=implementation)
            np.testing.assert_allclose(out, expected, atol=3e-6)

    def test_a_bias_of_the_keys_alone_warns(self):
        query, key, value = inputs("float32", s=T)
        valid = jnp.arange(T) < ROWS
        for number in (-np.inf, float(jnp.finfo("float32").min)):
            bias = jnp.where(valid, 0, number).astype("float32")
            for shaped in (bias, jnp.broadcast_to(bias, (B, 1, T, T))):
                with pytest.warns(UserWarning, match="pour mass into the columns"):
                    sinkhorn_attention(query, key, value, shaped)
        # With the lengths of the queries these do not take part.
        lengths = LENGTHS["query_seq_lengths"]
        sinkhorn_attention(query, key, value, bias, query_seq_lengths=lengths)

    @pytest.mark.parametrize("number", [-1e4, -1e9])
    def test_a_large_negative_bias_warns_that_it_cancels(self, number):
        bias = jnp.where(valid_cols, 0, number).astype("float32")[None, None, None]
        with pytest.warns(UserWarning, match="does not exclude.*finfo"):
            sinkhorn_attention(*inputs("float32"), bias)

    def test_other_biases_are_silent(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for bias in (
                jnp.where(OUTER, 0, -1e9),  # Not constant over the queries.
                jnp.where(valid_cols, 0, -9e3)[None],
                random(5, (B, 1, 1, S)),
            ):
                sinkhorn_attention(*inputs("float64"), bias)
