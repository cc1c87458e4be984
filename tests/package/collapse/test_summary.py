"""The summary of a network: values, padding, transforms, and what it warns of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkhorn_jax import collapse, sinkhorn

L, B, N, T, D = 3, 4, 2, 6, 5


def network(seed=0, scale=2.0):
    """Tokens [L + 1, B, T, D], plans [L, B, N, T, T] and where [B, T]."""
    rng = np.random.default_rng(seed)
    where = np.arange(T) < np.array([6, 4, 3, 5])[:, None]
    logits = scale * rng.normal(size=(L, B, N, T, T))
    both = where[:, None, :, None] & where[:, None, None, :]
    plans = np.exp(np.where(both, logits, -np.inf))
    plans = np.where(both, plans, 0) / np.maximum(plans.sum(-1, keepdims=True), 1e-9)
    return rng.normal(size=(L + 1, B, T, D)), plans, where


def centred(x):
    return x - x.mean(0)


def test_agrees_with_a_loop_over_the_cropped_elements():
    tokens, plans, where = network()
    residual, ranks = np.zeros((L + 1, B)), np.zeros((L + 1, B))
    entropy, defect = np.zeros((L, B, N)), np.zeros((L, B, N))
    path = np.zeros((L, B))
    for b, n in enumerate(where.sum(1)):
        product = np.eye(n)
        for k in range(L + 1):
            x = tokens[k, b, :n]
            residual[k, b] = np.linalg.norm(centred(x)) / np.linalg.norm(x)
            s = np.linalg.svd(x, compute_uv=False)
            ranks[k, b] = (s**2).sum() / s.max() ** 2
        for k in range(L):
            heads = plans[k, b, :, :n, :n]
            entropy[k, b] = -(heads * np.log(heads)).sum(-1).mean(-1) / np.log(n)
            defect[k, b] = np.abs(heads.sum(1) - 1).sum(-1) / n
            product = heads.mean(0) @ product
            path[k, b] = np.linalg.norm(centred(product)) / np.linalg.norm(product)
    found = collapse.summarize(tokens, plans, where)
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-10)
    close(found.relative_residual, np.median(residual, 1))
    close(found.stable_rank, np.median(ranks, 1))
    close(found.attention_entropy, entropy.mean((1, 2)))
    close(found.column_defect, defect.mean((1, 2)))
    close(found.path_residual, np.median(path, 1))
    assert found.fewest_tokens == 3
    assert not found.warnings()
    assert len(found.table().splitlines()) == (L + 2) + 1 + (L + 1)
    assert max(map(len, found.table().splitlines())) <= 80


def test_weight_of_padding_counts_nowhere():
    tokens, plans, where = network()
    rng = np.random.default_rng(3)
    junk = np.where(where[:, None, None, :], plans, rng.uniform(size=plans.shape))
    expected, found = (collapse.summarize(tokens, p, where) for p in (plans, junk))
    np.testing.assert_allclose(found.path_residual, expected.path_residual, rtol=1e-12)
    np.testing.assert_allclose(found.column_defect, expected.column_defect, rtol=1e-12)


def test_batch_axes_of_plans_may_be_1():
    tokens, plans, where = network()
    alike = np.broadcast_to(plans[:, :1], plans.shape)
    for given in (where, None):
        found = collapse.summarize(tokens, plans[:, :1], given)
        expected = collapse.summarize(tokens, alike, given)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    for wrong in (plans[:, :2], plans[:, 0, 0]):
        with pytest.raises(ValueError, match=r"plans must be \(depth, \*batch"):
            collapse.summarize(tokens, wrong)
    with pytest.raises(ValueError, match="a layer, an element and a token"):
        collapse.summarize(tokens[:, :0])


def test_plans_that_are_not_square():
    tokens, plans, _ = network()
    found = collapse.summarize(tokens, jnp.ones((L, B, N, T, 4)) / 4)
    np.testing.assert_allclose(found.attention_entropy, 1.0)
    np.testing.assert_allclose(found.column_defect, 0.0, atol=1e-15)
    assert found.path_residual is None
    assert "path residual" not in found.table()
    assert collapse.summarize(tokens).column_defect is None
    # Without heads, and as sequences.
    single = collapse.summarize(list(tokens), list(plans[:, :, 0]))
    expected = collapse.summarize(tokens, plans[:, :, :1])
    np.testing.assert_array_equal(single.path_residual, expected.path_residual)


def test_transforms():
    tokens, plans, where = network()
    both = np.stack([tokens, 2 * tokens[::-1]])
    mapped = jax.jit(jax.vmap(lambda x: collapse.summarize(x, plans, where)))(both)
    alone = collapse.summarize(both[1], plans, where)
    np.testing.assert_allclose(mapped.stable_rank[1], alone.stable_rank, rtol=1e-12)
    slope = jax.grad(lambda x: collapse.summarize(x).relative_residual.sum())(tokens)
    assert jnp.isfinite(slope).all()
    low = collapse.summarize(tokens.astype("bfloat16"), dtype="float64")
    assert low.relative_residual.dtype == jnp.float64
    # What the dtype of the input rounds is no measurement.
    equal = jnp.ones_like(tokens) + 1e-3 * tokens
    low = collapse.summarize(equal.astype("bfloat16"), dtype="float64")
    assert "rounding in tokens 0" in low.warnings()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": lambda x: 1e-8 * x + 1}, "rounding in tokens 0, 1, 2, 3: there it"),
        (
            {"plans": lambda p: 0.05 * p + 0.95 / T},
            "of that of uniform attention in plans 0",
        ),
        (
            {"plans": lambda p: sinkhorn(jnp.log(p), 500)},
            "directly behind the last attention, that average",
        ),
    ],
)
def test_warnings(changes, message):
    given = {"tokens": lambda x: x, "plans": lambda p: p} | changes
    tokens, *_ = network()
    tokens = jnp.asarray(given["tokens"](tokens), "float32")
    plans = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (L, B, N, T, T)))
    (warning,) = collapse.summarize(tokens, given["plans"](plans)).warnings()
    assert message in warning


def test_weight_of_padding_warns():
    tokens, *_ = network()
    where = jnp.broadcast_to(jnp.arange(T) < T - 1, (B, T))
    plans = jnp.full((L, B, N, T, T), 1 / T)
    found = collapse.summarize(tokens, plans, where).warnings()
    assert any("above that of uniform attention" in warning for warning in found)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("states", [np.ones((3, 3)), np.ones(3), [np.ones(3)]])
def test_states_without_an_axis_of_layers_are_explained(states):
    message = r"^hidden_states must be \(depth, .*counts layers. Use x\[None\]"
    with pytest.raises(ValueError, match=message):
        collapse.summarize(states)


def test_an_unknown_dtype_is_explained():
    with pytest.raises(ValueError, match="float32 or float64, got 'foo'"):
        collapse.summarize(jnp.ones((2, 3, 4)), dtype="foo")


def test_a_single_token_warns():
    tokens, *_ = network()
    found = collapse.summarize(tokens, where=np.arange(T)[None] < np.ones((B, 1)))
    assert "fewer than two tokens" in found.warnings()[0]
    assert "fewer than two tokens" in found.table()
