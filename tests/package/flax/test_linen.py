"""`sinkhorn_jax.linen.attention_fn` in Flax's own multi-head layer."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support import reference

from sinkhorn_jax import Truncated, sinkhorn_attention
from sinkhorn_jax.linen import attention_fn

HEADS, FEATURES, T = 2, 8, 6


def layer(**options):
    num_iters = options.pop("num_iters", 3)
    options = {"dtype": "float32", **options}
    return nn.MultiHeadDotProductAttention(
        HEADS, attention_fn=attention_fn(num_iters), **options
    )


def inputs(*batch):
    x = jax.random.normal(jax.random.key(0), (*batch, T, FEATURES), "float32")
    return x, layer().init(jax.random.key(1), x)


def padding_mask(*batch, dtype="float32"):
    valid = jnp.arange(T) < 4
    mask = nn.make_attention_mask(valid, valid, dtype=dtype)
    return jnp.broadcast_to(mask, (*batch, 1, T, T))


def test_no_iterations_is_softmax_with_the_same_parameters():
    x, parameters = inputs(3)
    softmax = nn.MultiHeadDotProductAttention(HEADS, dtype="float32")
    chex.assert_trees_all_close(
        layer(num_iters=0).apply(parameters, x), softmax.apply(parameters, x), atol=1e-6
    )


@pytest.mark.few(3)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bool", "int32", "bfloat16"])
def test_padding_equals_cropping(batch, dtype):
    x, parameters = inputs(*batch)
    out = layer().apply(parameters, x, mask=padding_mask(*batch, dtype=dtype))
    cropped = layer().apply(parameters, x[..., :4, :])
    chex.assert_trees_all_close(out[..., :4, :], cropped, atol=1e-6)


def test_masks_broadcast_against_several_batch_axes():
    x, parameters = inputs(2, 3)
    mask = jnp.ones((1, 3, 1, T, T)).at[:, 1, :, :, 4:].set(0).at[:, 1, :, 4:].set(0)
    out = layer().apply(parameters, x, mask=mask)
    cropped = layer().apply(parameters, x[:, 1, :4])
    chex.assert_trees_all_close(out[:, 1, :4], cropped, atol=1e-6)
    whole = layer().apply(parameters, x[:, ::2])
    chex.assert_trees_all_close(out[:, ::2], whole, atol=1e-6)


def test_bias():
    query = jax.random.normal(jax.random.key(0), (2, 3, T, HEADS, 4))
    bias = jax.random.normal(jax.random.key(1), (3, HEADS, T, T))
    out = attention_fn(3)(query, query, query, bias)
    for i in range(2):
        expected = sinkhorn_attention(*[query[i]] * 3, bias, num_iters=3)
        chex.assert_trees_all_close(out[i], expected, atol=1e-12)


def test_broadcast_dropout_is_honoured():
    # Every head and element sees the same queries, keys and values.
    query = jax.random.normal(jax.random.key(0), (1, T, 1, 4))
    query = jnp.broadcast_to(query, (3, T, HEADS, 4))
    options = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.5}

    def attend(**more):
        out = attention_fn(3)(query, query, query, **options, **more)
        return jnp.moveaxis(out, 2, 1).reshape(3 * HEADS, T, 4)

    shared, own = attend(broadcast_dropout=True), attend(broadcast_dropout=False)
    for i in range(1, 3 * HEADS):
        chex.assert_trees_all_close(shared[i], shared[0], atol=1e-12)
        assert abs(own[i] - own[0]).max() > 1e-3
    assert abs(shared[0] - attend(deterministic=True)[0]).max() > 1e-3


def test_layer_dropout_needs_no_more_than_flax_gives():
    x, parameters = inputs(3)
    dropping = layer(dropout_rate=0.5)
    rngs = {"dropout": jax.random.key(2)}
    out = dropping.apply(parameters, x, deterministic=False, rngs=rngs)
    same = dropping.apply(parameters, x, deterministic=False, rngs=rngs)
    chex.assert_trees_all_equal(out, same)
    still = dropping.apply(parameters, x, deterministic=True)
    chex.assert_trees_all_close(still, layer().apply(parameters, x))
    assert abs(out - still).max() > 1e-3


def test_sown_weights_are_the_plan():
    x, parameters = inputs(2, 3)
    mask = padding_mask(2, 3)
    out, state = layer().apply(
        parameters, x, mask=mask, sow_weights=True, mutable=["intermediates"]
    )
    (plan,) = state["intermediates"]["attention_weights"]
    chex.assert_shape(plan, (2, 3, HEADS, T, T))
    query, key, value = (
        np.einsum("...d,dnh->...nh", x, parameters["params"][name]["kernel"])
        for name in ("query", "key", "value")
    )
    logits = np.einsum("abtnh,absnh->abnts", query, key) / np.sqrt(FEATURES / HEADS)
    expected = reference.sinkhorn(np.where(mask != 0, logits, -np.inf), 3)
    np.testing.assert_allclose(plan, expected, atol=1e-6)
    attended = np.einsum("abnts,absnh->abtnh", expected, value)
    kernel = parameters["params"]["out"]["kernel"]
    np.testing.assert_allclose(
        out, np.einsum("abtnh,nhd->abtd", attended, kernel), atol=1e-5
    )


def test_half_precision_layers():
    x, parameters = inputs(3)
    out = layer(dtype="bfloat16").apply(parameters, x)
    assert out.dtype == "bfloat16"
    expected = layer().apply(parameters, x)
    chex.assert_trees_all_close(out.astype("float32"), expected, atol=5e-2)


def test_causal_masks_and_decoding_are_explained():
    x, parameters = inputs(3)
    causal = nn.make_causal_mask(jnp.ones((3, T)))
    with pytest.raises(ValueError, match="identity as the only doubly stochastic"):
        layer().apply(parameters, x, mask=causal)
    with pytest.raises(ValueError, match="identity as the only doubly stochastic"):
        layer().apply(parameters, x, mask=causal * padding_mask(3))
    decoder = layer(decode=True)
    # Flax's own cache index does not survive strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        variables = decoder.init(jax.random.key(1), x)
        with pytest.raises(ValueError, match="single row"):
            decoder.apply(variables, x[:, :1], mutable=["cache"])


def test_bad_options_are_refused_when_the_function_is_made():
    with pytest.raises(ValueError, match="negative"):
        attention_fn(-1)


def test_the_function_can_be_pickled_and_compared():
    function = attention_fn(3, gradient=Truncated(2), finish="columns")
    restored = pickle.loads(pickle.dumps(function))
    assert restored == function
    assert hash(restored) == hash(function)
    assert attention_fn(4) != attention_fn(3)
    x, parameters = inputs(3)
    outs = [
        nn.MultiHeadDotProductAttention(HEADS, attention_fn=f).apply(parameters, x)
        for f in (function, restored)
    ]
    chex.assert_trees_all_equal(*outs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"implementation": "flash"}, ValueError, r"'flash'.*scaling.*reference"),
        ({"scale": "1.5"}, TypeError, "scale must be a number, got '1.5'"),
        ({"scale": jnp.ones(HEADS)}, TypeError, "scale.*multiply the query"),
        ({"gradient": "exact"}, TypeError, "instance of Exact"),
    ],
)
def test_wrong_options_are_refused_when_the_function_is_made(options, error, says):
    with pytest.raises(error, match=says):
        attention_fn(**options)


@pytest.mark.usefixtures("unchecked")  # NumPy arrays are not annotated.
def test_a_causal_mask_that_is_a_constant_of_jit_is_explained():
    x, parameters = inputs(3)
    causal = nn.make_causal_mask(jnp.ones((3, T)))
    for mask in (causal, np.asarray(causal), causal.astype(bool)):
        with pytest.raises(ValueError, match="identity as the only doubly stochastic"):
            jax.jit(lambda x, mask=mask: layer().apply(parameters, x, mask=mask))(x)


def test_a_bias_of_the_keys_alone_warns():
    query = jax.random.normal(jax.random.key(0), (3, T, HEADS, 4))
    valid = jnp.arange(T) < 4
    bias = jnp.where(valid, 0, float(jnp.finfo("float32").min)).astype("float32")
    with pytest.warns(UserWarning, match="pour mass into the columns"):
        out = attention_fn(3)(query, query, query, bias[None, None, None])
    cropped = attention_fn(3)(query, query[:, :4], query[:, :4])
    chex.assert_trees_all_close(out, cropped, atol=1e-12)


@pytest.mark.parametrize("junk", [np.nan, np.inf, 3e38])
def test_junk_in_padding_reaches_neither_outputs_nor_the_sown_plan(junk):
    x, parameters = inputs(3)
    bound = layer().bind(parameters, mutable=["intermediates"])

    def attend(x):
        query = x.reshape(3, T, HEADS, FEATURES // HEADS)
        return attention_fn(3)(query, query, query, mask=padding_mask(3), module=bound)

    out, pull_back = jax.vjp(attend, x.at[:, 4:].set(junk))
    expected, pull_clean = jax.vjp(attend, x)
    chex.assert_trees_all_equal(out, expected)
    (dx,), (clean,) = pull_back(out), pull_clean(out)
    chex.assert_trees_all_equal(dx, clean)
    assert (dx[:, 4:] == 0).all()
