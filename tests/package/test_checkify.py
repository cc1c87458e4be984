"""The checks by `traced_checks` of values that `jit` does not know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from sinkhorn_jax import (
    linen,
    sinkhorn,
    sinkhorn_attention,
    sinkhorn_potentials,
    traced_checks,
)

LOGITS = jax.random.normal(jax.random.key(0), (3, 5, 4))
TOKENS = jax.random.normal(jax.random.key(1), (2, 8, 2, 4), jnp.float32)
CAUSAL = jnp.tril(jnp.ones((8, 8), bool))


def found(function, *args):
    """The error that `checkify` reports for the compiled function, or None."""
    with traced_checks():
        error, _ = checkify.checkify(jax.jit(function))(*args)
    return error.get()


@pytest.mark.parametrize("implementation", ["scaling", "reference"])
def test_marginals(implementation):
    def plan(logits, a, b):
        options = {"row_marginal": a, "col_marginal": b}
        return sinkhorn(logits, **options, implementation=implementation)

    rows, cols = jnp.ones(5), jnp.full(4, 5 / 4)
    assert found(plan, LOGITS, rows, cols) is None
    loss = lambda *args: plan(*args).max()
    for function in (plan, jax.grad(loss), jax.vmap(plan, (0, None, None))):
        assert "the same total" in found(function, LOGITS, rows, rows[:4])
    assert "got a minimum of -1.0" in found(plan, LOGITS, -rows, -cols)
    assert "col_marginal must be" in found(plan, LOGITS, rows, cols * jnp.nan)


def test_marginals_of_what_traced_logits_exclude():
    rows, cols = jnp.ones(5), jnp.full(4, 5 / 4)
    potentials = lambda logits: sinkhorn_potentials(
        logits, row_marginal=rows, col_marginal=cols
    )
    assert found(potentials, LOGITS) is None
    assert "the same total" in found(potentials, LOGITS.at[:, 0].set(-jnp.inf))


def test_totals_of_each_segment():
    ids = jnp.arange(8) // 4 + 1

    def attend(rows, cols):
        return sinkhorn_attention(
            *[TOKENS] * 3,
            query_marginal=rows,
            key_marginal=cols,
            query_segment_ids=ids,
            key_segment_ids=ids,
        )

    rows = jnp.ones(8).at[0].set(2.0)
    assert found(attend, rows, rows) is None
    assert "the same total" in found(attend, rows, rows[::-1])


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", ["scaling", "streaming", "reference"])
def test_attention(implementation):
    def attend(tokens, **options):
        options["implementation"] = implementation
        return sinkhorn_attention(tokens, tokens, tokens, **options)

    with_lengths = lambda x, n: attend(x, query_seq_lengths=n, key_value_seq_lengths=n)
    assert found(with_lengths, TOKENS, jnp.array([8, 0], jnp.int8)) is None
    message = found(with_lengths, TOKENS, jnp.array([-1, 9]))
    assert "got a minimum of -1 and a maximum of 9" in message
    assert with_lengths(TOKENS[:0], jnp.zeros(0, int)).shape == (0, 8, 2, 4)

    with_mask = lambda x, mask: attend(x, mask=mask)
    assert "causal" in found(with_mask, TOKENS, CAUSAL)
    assert "causal" in found(with_mask, TOKENS, CAUSAL.T[None, None])
    padding = jnp.arange(8) < 7
    assert found(with_mask, TOKENS, padding[:, None] & padding[None]) is None
    halves = jnp.arange(8) // 4
    assert found(with_mask, TOKENS, halves[:, None] > halves[None]) is None
    with_bias = lambda x, bias: attend(x, bias=bias)
    assert "causal" in found(with_bias, TOKENS, jnp.where(CAUSAL, 0.0, -jnp.inf))
    assert found(with_bias, TOKENS, jnp.ones((8, 8))) is None


def test_layers():
    layer = linen.MultiHeadSinkhornAttention(num_heads=2)
    tokens = TOKENS[..., 0, :]
    params = layer.init(jax.random.key(0), tokens)
    apply = lambda x, **options: layer.apply(params, x, **options)
    with_lengths = lambda x, n: apply(x, query_seq_lengths=n)
    assert "query_seq_lengths" in found(with_lengths, tokens, jnp.array([9, 3]))
    assert "causal" in found(lambda x, m: apply(x, mask=m), tokens, CAUSAL)


def test_heads_that_leave_padding_out_do_not_count():
    with_mask = lambda x, mask: sinkhorn_attention(x, x, x, mask=mask)
    first = (np.arange(8) >= 3)[:, None] & (np.arange(8) < 2)
    opposite = jnp.asarray(np.stack([first, first[::-1, ::-1].T])[:, None])
    assert found(with_mask, TOKENS, opposite) is None
    with_mask(TOKENS, opposite)
    mixed = jnp.stack([CAUSAL, first])[:, None]
    assert "causal" in found(with_mask, TOKENS, mixed)
    with pytest.raises(ValueError, match="causal"):
        with_mask(TOKENS, mixed)


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("low", [-1e4, -np.inf])
def test_causal_biases_of_any_dtype(dtype, low):
    with_bias = lambda x, bias: sinkhorn_attention(x, x, x, bias=bias)
    bias = jnp.where(CAUSAL, 0, low).astype(dtype)
    assert "causal" in found(with_bias, TOKENS, bias)
    with pytest.raises(ValueError, match="causal"):
        with_bias(TOKENS, bias)
    junk = jnp.where(CAUSAL, 0, jnp.nan).astype(dtype)
    assert found(with_bias, TOKENS, junk) is None


def test_programs_have_no_checks_otherwise():
    lengths, valid = jnp.array([8, 9]), jnp.ones((8, 8), bool)
    attend = lambda x, n, mask: sinkhorn_attention(
        x, x, x, mask=mask, key_value_seq_lengths=n
    )
    plan = lambda x: sinkhorn(
        x, row_marginal=jnp.full(5, 0.8), col_marginal=jnp.ones(4)
    )
    for function, args in ((attend, (TOKENS, lengths, valid)), (plan, (LOGITS,))):
        assert not jax.make_jaxpr(function)(*args).effects
        with traced_checks():
            assert jax.make_jaxpr(function)(*args).effects
    causal = jax.jit(lambda x, mask: sinkhorn_attention(x, x, x, mask=mask))
    assert jnp.isfinite(causal(TOKENS, CAUSAL)).all()
