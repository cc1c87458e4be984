"""Arguments of the layers that do not fit are named, and lists are arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sinkhorn_jax.linen
import sinkhorn_jax.nnx

HEADS, FEATURES, T = 2, 8, 6
X = np.random.default_rng(0).normal(size=(2, T, FEATURES)).astype("float32")

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module", params=["linen", "nnx"])
def call(request):
    """A layer as a function of its inputs."""
    if request.param == "linen":
        layer = sinkhorn_jax.linen.MultiHeadSinkhornAttention(HEADS, num_iters=1)
        parameters = layer.init(jax.random.key(2), jnp.asarray(X))
        return lambda *inputs, **given: layer.apply(parameters, *inputs, **given)
    return sinkhorn_jax.nnx.MultiHeadSinkhornAttention(
        HEADS, FEATURES, num_iters=1, decode=False, rngs=nnx.Rngs(2)
    )


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("mask", np.ones((3, 1, T, T)), ValueError, r"= \(2, 2, 6, 6\), got .*\(3, 1,"),
        ("query_seq_lengths", np.ones(3, int), ValueError, r"= \(2,\), got .*\(3,\)"),
        ("query_seq_lengths", [6, 3, 1], ValueError, r"= \(2,\), got shape \(3,\)"),
        ("query_seq_lengths", "6", TypeError, "be an array, got str"),
        ("query_segment_ids", np.ones((2, 5), int), ValueError, r"= \(2, 6\), got"),
        ("query_segment_ids", "112233", TypeError, "be an array, got str"),
        ("key_marginal", np.ones(5), ValueError, r"= \(2, 2, 6\), got shape \(5,\)"),
        ("key_marginal", np.ones((2, 2, 4, T)), ValueError, r"\(2, 2, 6\), got"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(call, name, value, error, says):
    with pytest.raises(error, match=f"^{name} must .*{says}"):
        call(jnp.asarray(X), **{name: value})


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([X[0, 0]], r"inputs_q must be .*got shape \(8,\)"),
        ([X[:, :0]], r"inputs_q must not be empty, got shape \(2, 0, 8\)"),
        ([X, X[0, 0]], r"inputs_k must be .*got shape \(8,\)"),
        ([X, X[:, :0]], r"inputs_k must not be empty, got shape \(2, 0, 8\)"),
        ([X, X[:1]], r"batch axes, got shapes \(2, 6, 8\) and \(1, 6, 8\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(call, inputs, says):
    with pytest.raises(ValueError, match=says):
        call(*map(jnp.asarray, inputs))


def test_lists_are_arrays(call):
    x = jnp.asarray(X)
    for given in (
        {"query_seq_lengths": [6, 3]},
        {"query_segment_ids": [[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]]},
    ):
        expected = call(x, **jax.tree.map(jnp.asarray, given, is_leaf=_is_list))
        chex.assert_trees_all_equal(call(x, **given), expected)


def _is_list(x):
    return isinstance(x, list)


@pytest.mark.parametrize("framework", [sinkhorn_jax.linen, sinkhorn_jax.nnx])
def test_no_tokens_are_explained_by_the_attention_function(framework):
    function = framework.attention_fn(1)
    x = jnp.asarray(X)[:, :, None]
    for args, says in (
        ((x[:, :0], x, x), r"query must not be empty, got shape \(2, 0, 1, 8\)"),
        ((x, x[:, :0], x[:, :0]), r"key must not be empty, got shape \(2, 0, 1, 8\)"),
    ):
        with pytest.raises(ValueError, match=says):
            function(*args)
    mask = jnp.ones((3, 1, T, T), bool)
    with pytest.raises(ValueError, match=r"mask must broadcast to .*got shape \(3, 1"):
        function(x, x, x, mask=mask)
