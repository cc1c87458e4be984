"""`sinkhorn_jax.nnx.attention_fn` in Flax's own multi-head layer."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax.nnx import attention_fn

HEADS, FEATURES, T = 2, 8, 6


def layer(num_iters=3, **options):
    """A layer whose parameters do not depend on the arguments."""
    options = {"decode": False, "attention_fn": attention_fn(num_iters)} | options
    return nnx.MultiHeadAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)


def tokens(*batch):
    return jax.random.normal(jax.random.key(0), (*batch, T, FEATURES), "float32")


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"normalize_qk": True}])
def test_no_iterations_is_softmax_with_the_same_parameters(options):
    x = tokens(3)
    softmax = layer(attention_fn=nnx.dot_product_attention, **options)
    chex.assert_trees_all_close(layer(0, **options)(x), softmax(x), atol=1e-6)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bool", "int32"])
def test_padding_equals_cropping(batch, dtype):
    x, valid = tokens(*batch), jnp.arange(T) < 4
    mask = nnx.make_attention_mask(valid, valid, dtype=dtype)
    mask = jnp.broadcast_to(mask, (*batch, 1, T, T))
    out = layer()(x, mask=mask)
    cropped = layer()(x[..., :4, :])
    chex.assert_trees_all_close(out[..., :4, :], cropped, atol=1e-6)


def test_sown_weights_are_the_plan():
    x = tokens(2)
    attention = layer(num_kv_heads=1)
    _, sown = nnx.capture(attention, nnx.Intermediate)(x, sow_weights=True)
    (plan,) = sown["attention_weights"].get_value()
    value = jnp.repeat(attention.value(x), HEADS, axis=-2)
    attended = jnp.einsum("bnts,bsnh->btnh", plan, value)
    chex.assert_trees_all_close(attention.out(attended), attention(x), atol=1e-6)
    np.testing.assert_allclose(plan.sum(-1), 1, atol=1e-6)


def test_bias_and_dropout():
    query = jax.random.normal(jax.random.key(0), (3, T, HEADS, 4))
    bias = jax.random.normal(jax.random.key(1), (HEADS, T, T))
    dropout = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(2)}
    out = attention_fn(3)(query, query, query, bias, broadcast_dropout=False, **dropout)
    expected = sinkhorn_attention(*[query] * 3, bias, num_iters=3, **dropout)
    chex.assert_trees_all_close(out, expected, atol=1e-12)
    still = attention_fn(3)(query, query, query, bias, deterministic=True, **dropout)
    expected = sinkhorn_attention(*[query] * 3, bias, num_iters=3)
    chex.assert_trees_all_close(still, expected, atol=1e-12)


def test_causal_attention_and_decoding_are_explained():
    with pytest.raises(ValueError, match="is_causal=True leaves the identity"):
        layer()(tokens(3), is_causal=True)
    causal = nnx.make_causal_mask(jnp.ones((3, T)))
    with pytest.raises(ValueError, match="identity as the only doubly stochastic"):
        layer()(tokens(3), mask=causal)
    decoder = layer(decode=True)
    decoder.init_cache((3, T, FEATURES))
    with (
        jax.numpy_dtype_promotion("standard"),  # Flax's own cache index needs it.
        pytest.raises(ValueError, match="single row"),
    ):
        decoder(tokens(3)[:, :1])


def test_bad_options_are_refused_when_the_function_is_made():
    with pytest.raises(ValueError, match="negative"):
        attention_fn(-1)


def test_the_function_can_be_pickled_and_compared():
    function = attention_fn(3, finish="columns")
    restored = pickle.loads(pickle.dumps(function))
    assert restored == function
    outs = [layer(attention_fn=f)(tokens(3)) for f in (function, restored)]
    chex.assert_trees_all_equal(*outs)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_implementation_is_refused_when_the_function_is_made():
    with pytest.raises(ValueError, match=r"'flash'.*scaling.*reference"):
        attention_fn(implementation="flash")
