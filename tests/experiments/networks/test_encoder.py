"""The encoder on texts and images: padding, intermediates, and each switch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.encoders import (
    ATOL,
    image_encoder,
    images,
    text_encoder,
    text_params,
    texts,
)

from experiments.networks import ensemble, tokens
from experiments.networks.encoder import apply_with_plans, num_parameters


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, words, lengths, has_skip=True):
    return apply_with_plans(model, params, words, lengths, has_skip=has_skip)


def init_images(model, x):
    return jax.jit(model.init)(jax.random.key(0), x)["params"]


# Texts.


def test_padding_changes_nothing():
    model = text_encoder()
    params = text_params(model)
    words = np.array([[3, 4, 5, 6, 0, 0], [7, 8, 9, 10, 1, 2]], np.int32)
    others = np.where([[0, 0, 0, 0, 1, 1]] * 2, 10 - words, words).astype(np.int32)
    lengths = np.array([4, 4], np.int32)
    crops = forward(model, params, words[:, :4], lengths)
    for padded in (words, others):
        logits, (hidden, plans, _) = forward(model, params, padded, lengths)
        cropped, (hidden_crop, plans_crop, _) = crops
        np.testing.assert_allclose(logits, cropped, atol=ATOL)
        np.testing.assert_allclose(hidden[:, :, :4], hidden_crop, atol=ATOL)
        np.testing.assert_allclose(plans[..., :4, :4], plans_crop, atol=ATOL)
        np.testing.assert_array_equal(plans[..., 4:, :], 0)
        np.testing.assert_array_equal(plans[..., 4:], 0)


def test_intermediates():
    model = text_encoder()
    words, lengths = np.ones((3, 6), np.int32), np.array([6, 2, 4], np.int32)
    params = text_params(model)
    logits, (hidden, plans, where) = forward(model, params, words, lengths)
    assert logits.shape == (3, 2)
    assert hidden.shape == (3, 3, 6, 8)
    assert plans.shape == (2, 3, 2, 6, 6)
    assert {x.dtype.name for x in (logits, hidden, plans)} == {"float32"}
    rows = np.arange(6) < lengths[:, None]
    np.testing.assert_array_equal(where, rows)
    sums = np.broadcast_to(rows[None, :, None], (2, 3, 2, 6))
    np.testing.assert_allclose(plans.sum(axis=-1), sums, atol=ATOL)
    without = jax.jit(model.apply)({"params": params}, words, lengths)
    np.testing.assert_allclose(without[0], logits, atol=ATOL)
    assert without[1].plans is None


@pytest.mark.parametrize(
    "options", [{"finish": "columns"}, {"logit_scale": 0.25, "num_iters": 0}]
)
def test_the_reported_plan_is_the_one_that_is_applied(options):
    pure = {"depth": 1, "layer_norm": "none", "has_mlp": False}
    model = text_encoder(**pure | options)
    words, lengths = np.arange(6, dtype=np.int32)[None], np.array([6], np.int32)
    params = text_params(model)
    _, (hidden, plans, _) = forward(model, params, words, lengths, has_skip=False)
    kernels = {
        name: np.asarray(layer["kernel"][0], np.float64)
        for name, layer in params["layers"]["attention"].items()
    }
    x = np.asarray(hidden[0, 0], np.float64)
    query, key, value = (
        np.einsum("td,dnh->nth", x, kernels[name]) for name in ("query", "key", "value")
    )
    scale = options.get("logit_scale", 1.0) / 2.0  # The heads' dimension is 4.
    expected = np.exp(scale * query @ key.swapaxes(1, 2))
    expected /= expected.sum(axis=2, keepdims=True)
    for _ in range(model.num_iters):
        expected /= expected.sum(axis=2, keepdims=True)
        expected /= expected.sum(axis=1, keepdims=True)
    assert plans[0, 0].std() > 0.02
    np.testing.assert_allclose(plans[0, 0], expected, atol=ATOL)
    out = np.einsum("nts,nsh,nhd->td", expected, value, kernels["out"])
    np.testing.assert_allclose(hidden[1, 0], out, atol=20 * ATOL)


@pytest.mark.few(1)
@pytest.mark.parametrize("layer_norm", ["none", "pre", "post"])
def test_skips_and_layer_norms(layer_norm):
    model = text_encoder(num_iters=0, has_mlp=False, layer_norm=layer_norm)
    words, lengths = np.arange(6, dtype=np.int32)[None], np.array([6], np.int32)
    params = text_params(model)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: x * jnp.asarray("attention" not in str(path), x.dtype), params
    )
    with_skip = forward(model, silent, words, lengths, has_skip=True)[1].hidden_states
    without = forward(model, silent, words, lengths, has_skip=False)[1].hidden_states
    np.testing.assert_allclose(without[1:], 0, atol=1e-6)
    x = np.asarray(with_skip[0], np.float64)
    normal = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    expected = normal if layer_norm == "post" else x
    np.testing.assert_allclose(with_skip[1], expected, atol=1e-4)
    # LayerNorm hides the scale of its input from the attention.
    larger = params | {
        "Embed_0": {"embedding": params["Embed_0"]["embedding"] * np.float32(4)},
        "position": params["position"] * np.float32(4),
    }
    plans = [forward(model, p, words, lengths)[1].plans[0] for p in (params, larger)]
    is_same = np.allclose(*plans, atol=1e-3)
    assert is_same == (layer_norm == "pre")


def test_the_mlp_adds_parameters():
    one = texts(np.ones((1, 6)))
    sizes = [
        num_parameters(ensemble.init(text_encoder(has_mlp=m), (0,), one))
        for m in (False, True)
    ]
    norm, mlp = 2 * 8, (8 * 32 + 32) + (32 * 8 + 8)
    assert sizes[1] - sizes[0] == 2 * (mlp + norm)


def test_parameters_do_not_depend_on_the_normaliser():
    one = texts(np.ones((1, 6)))
    softmax, sinkhorn, columns = (
        ensemble.init(text_encoder(**options), (0, 3), one)
        for options in ({"num_iters": 0}, {}, {"finish": "columns"})
    )
    jax.tree.map(np.testing.assert_array_equal, softmax, sinkhorn)
    jax.tree.map(np.testing.assert_array_equal, softmax, columns)


# Images.


def test_patches_are_squares():
    x = images(channels=2)
    actual = np.asarray(tokens.patches(jnp.asarray(x), 2))
    assert actual.shape == (2, 6, 8)
    np.testing.assert_array_equal(actual[1, 4].reshape(2, 2, 2), x[1, 2:4, 2:4])
    with pytest.raises(ValueError, match="must divide the image's sides"):
        tokens.patches(jnp.asarray(x), 4)


@pytest.mark.slow
def test_a_convolutional_stem_makes_as_many_tokens_and_overlaps():
    x = images(height=8, width=12)
    model = image_encoder(patch_size=4, has_conv_stem=True)
    params = init_images(model, x)
    embed = lambda x: model.apply({"params": params}, x)[1].hidden_states[0]
    assert embed(x).shape == (2, 6, 8)
    # A pixel beside the border of the second token's square changes the first, too.
    other = x.copy()
    other[0, 0, 4] ^= 128
    moved = np.abs(embed(other) - embed(x)).max(axis=-1)
    assert (moved[0, :2] > 0).all()
    np.testing.assert_array_equal(moved[0, 2:], 0)
    np.testing.assert_array_equal(moved[1], 0)
    # Sides are rounded up.
    params = init_images(model, images(height=9))
    assert params["position"].shape == (3 * 2, 8)


def test_each_place_of_an_image_can_have_its_projection():
    x = images()
    x[0] = x[0, 0, 0]  # All squares are equal.
    model = image_encoder(patch_size=2, has_own_projections=True, position="none")
    params = init_images(model, x)
    embed = lambda x: model.apply({"params": params}, x)[1].hidden_states[0]
    kernel = params["patch"]["kernel"]
    assert kernel.shape == (6, 4, 8)
    squares = np.asarray(tokens.patches(jnp.asarray(x), 2)) / np.float32(255)
    expected = np.stack(
        [squares[:, i] @ np.asarray(kernel[i]) for i in range(6)], axis=1
    )
    np.testing.assert_allclose(embed(x), expected, atol=1e-6)
    assert np.abs(np.diff(embed(x)[0], axis=0)).min() > 0
    # Each is drawn as if it were alone: the variance is that of 4 inputs.
    many = image_encoder(patch_size=2, has_own_projections=True, width=512)
    kernel = init_images(many, x)["patch"]["kernel"]
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), 0.5, rtol=0.05)


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("pooling", ["mean", "max", "class_token"])
def test_recomputed_layers_are_the_same_layers(pooling):
    x = images()
    model = image_encoder(pooling=pooling)
    params = init_images(model, x)

    def loss(model, params):
        logits, intermediates = apply_with_plans(model, params, x)
        return jnp.square(logits).sum(), intermediates

    run = lambda model: jax.jit(
        jax.value_and_grad(lambda p: loss(model, p), has_aux=True)
    )(params)
    expected = run(model)
    actual = run(image_encoder(pooling=pooling, has_remat=True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected
    )
    num_tokens = 7 if pooling == "class_token" else 6
    intermediates = expected[0][1]
    assert intermediates.plans.shape == (2, 2, 2, num_tokens, num_tokens)
    assert intermediates.where.all()


def test_skips_of_attention_and_mlp_are_separate():
    x = images()
    model = image_encoder(layer_norm="none", num_iters=0)
    params = init_images(model, x)
    zero = jax.tree_util.tree_map_with_path(
        lambda path, p: p * 0 if "Dense" in str(path) else p, params
    )
    hidden = {}
    for skips in [(True, True), (True, False), (False, True)]:
        hidden[skips] = model.apply(
            {"params": zero}, x, has_skip=skips[0], has_mlp_skip=skips[1]
        )[1].hidden_states
    np.testing.assert_array_equal(hidden[True, False][1:], 0)  # The MLP is silent.
    assert (hidden[False, True][1] != 0).any()
    difference = hidden[True, True][1] - hidden[False, True][1]
    np.testing.assert_allclose(difference, hidden[True, True][0], atol=1e-6)


def test_mean_pooling_does_not_see_where_a_doubly_stochastic_plan_sends_values():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 4)), jnp.float32)
    plan = jnp.asarray(np.eye(6)[np.array([3, 0, 5, 1, 2, 4])], jnp.float32)
    where = jnp.ones((1, 6), bool)
    for pooling in ("mean", "max"):  # A permutation changes neither.
        moved = tokens.pool(plan[None] @ values, where, pooling)
        np.testing.assert_allclose(moved, tokens.pool(values, where, pooling), 1e-5)
    mixed = jnp.full((1, 6, 6), 1 / 6, jnp.float32) @ values
    same = [
        np.allclose(
            tokens.pool(mixed, where, p), tokens.pool(values, where, p), atol=1e-5
        )
        for p in ("mean", "max")
    ]
    assert same == [True, False]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("pooling", "num_iters", "is_seen"),
    [("mean", 200, False), ("class_token", 200, True), ("mean", 0, True)],
)
def test_mean_pooling_sees_no_doubly_stochastic_attention(pooling, num_iters, is_seen):
    """With skip connections and linear layers, the mean token stays what it was.

    It is the mean of x + P x W, and the columns of P sum to 1.
    """
    model = text_encoder(
        num_iters=num_iters, pooling=pooling, layer_norm="none", has_mlp=False
    )
    words, lengths = np.arange(6, dtype=np.int32)[None], np.array([6], np.int32)
    params = text_params(model)

    def logit(params, scale):
        scaled = model.clone(logit_scale=scale)
        return scaled.apply({"params": params}, jnp.asarray(words), lengths)[0][0, 0]

    value_and_grad = jax.jit(jax.value_and_grad(logit), static_argnums=1)
    lengths = jnp.asarray(lengths)
    value, gradient = value_and_grad(params, 1.0)
    attention = gradient["layers"]["attention"]
    size = {name: np.abs(each["kernel"]).max() for name, each in attention.items()}
    other = jax.jit(logit, static_argnums=1)(params, 0.25)
    reversed_keys = jax.tree_util.tree_map_with_path(
        lambda path, x: x[::-1] if "query" in str(path) else x, params
    )
    others = [other, value_and_grad(reversed_keys, 1.0)[0]]
    plans = forward(model, params, words, lengths)[1].plans
    assert plans[0].std() > 0.05  # Attention is far from uniform.
    for each in others:
        assert np.allclose(each, value, rtol=1e-4, atol=1e-4) == (not is_seen)
    for name in ("query", "key"):
        assert (size[name] > 1e-3 * size["value"]) == is_seen


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "first"}, "pooling must be one of"),
        ({"position": "rotary"}, "position must be one of"),
        ({"layer_norm": "before"}, "layer_norm must be one of"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"vocab_size": 3}, "Give vocab_size for texts or patch_size"),
        ({"vocab_size": 3, "patch_size": None}, "Texts need seq_len"),
        ({"has_conv_stem": True, "patch_size": 6}, "must be a power of two"),
    ],
)
def test_bad_encoders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        image_encoder(**options)


def test_columns_without_a_column_step_are_refused_by_the_attention():
    model = image_encoder(finish="columns", num_iters=0)
    with pytest.raises(ValueError, match="needs num_iters of at least 1"):
        jax.eval_shape(model.init, jax.random.key(0), images())
