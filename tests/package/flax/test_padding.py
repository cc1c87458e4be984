"""Tokens that are padding because they have no partner: no value of theirs matters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sinkhorn_jax.linen
import sinkhorn_jax.nnx
from sinkhorn_jax._flax_mask import LayerMask

HEADS, FEATURES, T, S = 2, 8, 6, 5
THREE = {"query_segment_ids": [[1, 1, 2, 2, 3, 3]]}
TWO = {"key_segment_ids": [[1, 1, 2, 2, 2]]}
# Queries and keys with a partner, S, window, and arguments of the call.
CASES = {
    "query segment": (4, 5, None, THREE | TWO),
    "key segment": (
        4,
        2,
        None,
        {"query_segment_ids": [[1, 1, 1, 1, 3, 3]], **TWO},
    ),
    "window and lengths": (4, 3, 1, {"key_value_seq_lengths": [3]}),
    "window": (4, 3, 1, {}),
    "segments and window": (
        3,
        2,
        1,
        {"query_segment_ids": [[1] * 6], "key_segment_ids": [[1, 1, 2, 2, 2]]},
    ),
    "segments and lengths": (4, None, None, THREE | {"key_value_seq_lengths": [4]}),
    "lengths without a key": (
        0,
        0,
        None,
        {"query_seq_lengths": [6], "key_value_seq_lengths": [0]},
    ),
    "segments and a mask of pairs": (
        2,
        2,
        None,
        THREE | TWO | {"mask": np.arange(6)[:, None] + np.arange(5) < 4},
    ),
    "segments and a mask of keys": (
        4,
        3,
        None,
        THREE | TWO | {"mask": np.arange(5)[None] < 3},
    ),
    "segments and marginals of heads": (
        2,
        2,
        None,
        THREE
        | TWO
        | {
            # The second segment has queries in one head and keys in the other.
            "query_marginal": [[[1.0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]],
            "key_marginal": [[[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 0]]],
        },
    ),
}
FEW_KEYS = {"window": 3}


def tokens(seed, length):
    return jax.random.normal(jax.random.key(seed), (1, length, FEATURES), "float32")


def apply(framework, window):
    """A layer as a function of its parameters, and the parameters."""
    if framework == "linen":
        layer = sinkhorn_jax.linen.MultiHeadSinkhornAttention(
            HEADS, num_iters=2, local_window_size=window, column_tau=0.5
        )
        return layer.apply, layer.init(jax.random.key(2), tokens(0, T))
    layer = sinkhorn_jax.nnx.MultiHeadSinkhornAttention(
        *(HEADS, FEATURES),
        num_iters=2,
        local_window_size=window,
        column_tau=0.5,
        rngs=nnx.Rngs(2),
    )
    graph, parameters = nnx.split(layer)
    return lambda p, *args, **kw: nnx.merge(graph, p)(*args, **kw), parameters


@pytest.mark.few(3)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("case", CASES)
def test_nan_in_tokens_without_a_partner_reaches_no_gradient(case, framework):
    queries, keys, window, given = CASES[case]
    given = {
        name: jnp.asarray(x, "float32" if "marginal" in name else None)
        for name, x in given.items()
    }
    call, parameters = apply(framework, window)
    inputs = [tokens(0, T)]
    if keys is not None:
        inputs.append(tokens(1, FEW_KEYS.get(case, S)))

    @jax.jit
    @jax.value_and_grad
    def loss(parameters, used):
        return (call(parameters, *used, **given)[:, :queries] ** 2).sum()

    def gradients(junk):
        counts = zip(inputs, (queries, keys), strict=False)
        return loss(parameters, [x.at[:, n:].set(junk) for x, n in counts])

    expected = gradients(0.0)
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_equal(gradients(np.nan), expected)


@pytest.mark.parametrize("window", [None, 1, (1, 2)])
def test_a_layer_without_padding_computes_nothing_for_it(window):
    """In a window around itself every token has a partner."""
    x = tokens(0, T)
    masks = LayerMask(None).checked(x, None, None, HEADS).of_self_attention()
    used, *_ = masks.zero_padding(x, None, None, window)
    assert used is x
