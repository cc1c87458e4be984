"""Collapse measures: closed forms, NumPy in float64, cropping, derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from support import collapse_measures
from support.collapse_measures import entropy

from sinkhorn_jax import collapse

RTOL = {
    # Some hundred roundings in the SVD and the sums of matrices this small.
    "float64": 1e-13,
    "float32": 1e-5,
    # Computed in float32; the reference starts from the same rounded input.
    "bfloat16": 1e-5,
    "float16": 1e-5,
    # Subgradients and slopes lose what singular values and their gaps divide by.
    "float64 gradient": 1e-11,
    "float32 gradient": 1e-4,
    # Central differences in float64: rounding of 1e-15 over a step of 1e-6.
    "check_grads": 1e-6,
}
# What is 0 exactly may come out as one rounding, and 1e-17 adds 4e-16 to an entropy.
ATOL = 1e-14

NORMS = ("fro", "spectral", "1inf")
MEASURES = {
    **{n: functools.partial(collapse.relative_residual, norm=n) for n in NORMS},
    "stable_rank": collapse.stable_rank,
    "effective_rank": collapse.effective_rank,
    "attention_entropy": collapse.attention_entropy,
}


# All in one program, because compilation takes most of a test's time.
@jax.jit
def measures(x, where=None):
    return {name: measure(x, where=where) for name, measure in MEASURES.items()}


@jax.jit
def gradients(x, where=None):
    return jax.jacrev(lambda x: jax.tree.map(jnp.sum, measures(x, where)))(x)


def reference(x):
    stable_rank, effective_rank = collapse_measures.ranks(x)
    return {
        **collapse_measures.relative_residuals(x),
        "stable_rank": stable_rank,
        "effective_rank": effective_rank,
        "attention_entropy": collapse_measures.attention_entropy(x),
    }


def with_singular_values(s):
    u, v = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 4, 4))).Q
    return u, v, jnp.asarray(u * np.asarray(s) @ v.T)


def tokens(*shape, dtype="float64"):
    # Positive, so that it is a plan as well and every measure takes it.
    return jnp.asarray(np.random.default_rng(1).uniform(0.1, 2.0, shape), dtype)


EYE = dict(zip(MEASURES, [0.75**0.5, 1.0, 1.5, 4.0, 4.0, 0.0], strict=True))
UNIFORM = dict(zip(MEASURES, [0.0, 0.0, 0.0, 1.0, 1.0, np.log(4.0)], strict=True))
A = np.array([1.0, 2.0, 6.0, -1.0])  # A - 2 sums to 0.
B = np.array([0.5, -3.0, 1.0, 0.0])
RANK_ONE = {
    "fro": (26 / 42) ** 0.5,
    "spectral": (26 / 42) ** 0.5,
    "1inf": (8 * 4 / (10 * 6)) ** 0.5,
    "stable_rank": 1.0,
    "effective_rank": 1.0,
}
KNOWN = {"stable_rank": 21 / 16, "effective_rank": 7.0 / 1024.0 ** (1 / 7)}


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.eye(4), EYE),
        (np.eye(4)[[2, 0, 3, 1]], EYE),
        (np.full((4, 4), 0.25), UNIFORM),
        (np.outer(A, B), RANK_ONE),
        (with_singular_values([4.0, 2.0, 1.0, 0.0])[2], KNOWN),
    ],
    ids=["identity", "permutation", "uniform", "rank one", "known singular values"],
)
def test_closed_forms(x, expected):
    out = measures(jnp.asarray(x))
    out = {name: out[name] for name in expected}
    chex.assert_trees_all_close(out, expected, rtol=RTOL["float64"], atol=ATOL)


@pytest.mark.parametrize(
    ("dtype", "t", "d"),
    [
        *[("float64", 5, 4), ("float64", 3, 9), ("float64", 1, 5)],
        *[("float32", 5, 4), ("bfloat16", 5, 4), ("float16", 5, 4)],
    ],
)
def test_agrees_with_numpy(dtype, t, d):
    x = tokens(2, t, d, dtype=dtype)
    out = measures(x)
    expected = jax.tree.map(lambda *m: np.stack(m), *map(reference, x))
    chex.assert_trees_all_close(
        jax.tree.map(np.float64, out), expected, rtol=RTOL[dtype], atol=ATOL
    )
    for array in (*out.values(), collapse.residual(x)):
        assert array.dtype == (dtype if dtype == "float64" else "float32")


def test_residual_is_zero_at_collapse_and_accurate_near_it():
    # So many that the mean is rounded, and even the mean of what it leaves.
    equal = jnp.broadcast_to(tokens(1, 16, dtype="float32"), (10_007, 16))
    assert not jax.jit(collapse.residual)(equal).any()
    x = (1e3 + 1e-3 * tokens(7, 3)).astype("float32")
    expected = np.asarray(x, np.float64)
    expected -= expected.mean(axis=0)
    np.testing.assert_allclose(collapse.residual(x), expected, rtol=RTOL["float32"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 7.0])
def test_where_equals_cropping(bad):
    where = np.array([True, False, True, True, False, True])
    cropped = tokens(2, 4, 4)
    x = np.full((2, 6, 4), bad)
    x[:, where] = cropped
    x = jnp.asarray(x)
    out, expected = measures(x, where), measures(cropped)
    chex.assert_trees_all_close(out, expected, rtol=RTOL["float64"])
    grads = jax.tree.map(np.asarray, gradients(x, where))
    kept = jax.tree.map(lambda g: g[:, where], grads)
    tol = RTOL["float64 gradient"]
    chex.assert_trees_all_close(kept, gradients(cropped), rtol=tol, atol=tol)
    res = np.asarray(collapse.residual(x, jnp.asarray(where)))
    np.testing.assert_allclose(res[:, where], collapse.residual(cropped), atol=ATOL)
    for array in (*grads.values(), res):
        assert not array[:, ~where].any()


def test_where_broadcasts_against_the_batch():
    x = tokens(2, 3, 5, 4)
    where = np.arange(5) < np.array([4, 5, 0])[:, None]  # [3, 5]
    out = jax.tree.map(np.asarray, measures(x, where))
    for i, n in enumerate([4, 5]):
        expected = measures(x[:, i, :n])
        mine = jax.tree.map(lambda m, i=i: m[:, i], out)
        chex.assert_trees_all_close(mine, expected, rtol=RTOL["float64"])
    assert not any(m[:, 2].any() for m in out.values())


def test_derivatives():
    tol = RTOL["check_grads"]
    for f in (measures, jax.jit(collapse.residual)):
        check_grads(f, (tokens(5, 4),), 1, ("fwd", "rev"), tol, tol)


def test_effective_rank_gradient_with_repeated_and_zero_singular_values():
    s = np.array([2.0, 2.0, 1.0, 0.0])
    u, v, x = with_singular_values(s)
    # d exp(H) = -exp(H) sum_k (log p_k + H) ds_k / sum(s), over s_k > 0.
    p = s[:3] / s.sum()
    slope = -np.exp(entropy(p)) * (np.log(p) + entropy(p)) / s.sum()
    out = jax.grad(collapse.effective_rank)(x)
    np.testing.assert_allclose(out, u[:, :3] * slope @ v[:, :3].T, atol=1e-13)
    # Repeated but none zero: smooth, so that differences see the same derivative.
    x = with_singular_values([2.0, 2.0, 1.0, 1.0])[2]
    tol = RTOL["check_grads"]
    check_grads(jax.jit(collapse.effective_rank), (x,), 1, ("fwd", "rev"), tol, tol)


def test_effective_rank_gradient_leaves_out_what_matrix_rank_counts_as_0():
    u, v = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 64, 64))).Q
    floor = 64 * np.finfo(np.float64).eps  # Relative to the largest singular value.
    for size, is_left_out in ((0.2, True), (20.0, False)):
        s = np.zeros(64)
        s[:2] = 1.0, size * floor
        slope = np.asarray(jax.grad(collapse.effective_rank)(jnp.asarray(u * s @ v.T)))
        assert np.linalg.matrix_rank(u * s @ v.T) == (1 if is_left_out else 2)
        assert (abs(u[:, 1] @ slope @ v[:, 1]) < 1) == is_left_out


def test_an_empty_batch_has_no_measures():
    for measure in (collapse.relative_residual, collapse.stable_rank):
        assert measure(jnp.zeros((0, 3, 2))).shape == (0,)
    assert collapse.attention_entropy(jnp.ones((2, 0, 3, 3))).shape == (2, 0)


def test_derivatives_are_finite_where_there_is_none():
    zeros = jnp.zeros((5, 4), "float32")
    equal = jnp.broadcast_to(jnp.array([0.1, 0.7, 0.0, 1.3], "float32"), (5, 4))
    tangent = tokens(5, 4, dtype="float32")
    jvp = jax.jit(lambda x: jax.jvp(measures, (x,), (tangent,)))
    for x in (zeros, equal, jnp.eye(5, 4, dtype="float32"), zeros.at[1, 2].set(1)):
        chex.assert_tree_all_finite((gradients(x), jvp(x)))
    nothing = np.zeros(5, bool)
    for f in (measures, gradients):
        for leaf in jax.tree.leaves((f(zeros), f(equal, nothing))):
            assert not leaf.any()
        collapsed = f(equal)
        assert not any(collapsed[norm].any() for norm in NORMS)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_in_float32(scale):
    x = tokens(5, 4, dtype="float32")
    chex.assert_trees_all_close(measures(x * scale), measures(x), rtol=RTOL["float32"])
    grads = jax.tree.map(lambda g: g * scale, gradients(x * scale))
    tol = RTOL["float32 gradient"]
    chex.assert_trees_all_close(grads, gradients(x), rtol=tol, atol=tol)


def test_attention_entropy_rescales_rows_and_leaves_out_empty_ones():
    plan = np.array(tokens(5, 8))
    plan[:, 3] = 0.0
    scaled = plan * np.array([1e-30, 1.0, 7.0, 1e-3, 1e30])[:, None]
    scaled = jnp.asarray(np.concatenate([scaled, np.zeros((2, 8))]))
    out, grad = jax.jit(jax.value_and_grad(collapse.attention_entropy))(scaled)
    expected = np.mean([entropy(row) for row in plan])
    np.testing.assert_allclose(out, expected, rtol=RTOL["float64"])
    assert not grad[5:].any()
    assert not grad[:, 3].any()


def test_nan_that_counts_shows_in_its_own_matrix():
    out = measures(tokens(2, 5, 4).at[0, 1, 2].set(jnp.nan))
    for measure in out.values():
        np.testing.assert_array_equal(jnp.isnan(measure), [True, False])


class TransformsTest(chex.TestCase):
    # Without the variants that hand over NumPy arrays, which jaxtyping rejects.
    @chex.variants(with_jit=True, without_jit=True)
    def test_jit_and_vmap(self):
        x = tokens(2, 5, 4)
        where = jnp.array([[True] * 5, [True, False, True, True, False]])
        out = self.variant(jax.vmap(measures.__wrapped__))(x, where)
        expected = measures(x, where)
        chex.assert_trees_all_close(out, expected, rtol=RTOL["float64"], atol=ATOL)

    def test_values_do_not_retrace(self):
        x = tokens(2, 5, 4)
        traced = jax.jit(chex.assert_max_traces(measures.__wrapped__, n=1))
        for where in (np.ones(5, bool), np.zeros(5, bool)):
            traced(x, where)


@pytest.mark.parametrize("norm", NORMS)
def test_residual_over_depth_is_the_loop_over_layers(norm):
    hidden = tokens(3, 2, 5, 4)
    where = jnp.array([[True] * 5, [True, True, False, True, False]])
    for mask in (None, where):
        out = collapse.residual_over_depth(hidden, norm, mask)
        loop = [measures(x, mask)[norm] for x in hidden]
        np.testing.assert_allclose(out, jnp.stack(loop), rtol=RTOL["float64"])


def test_without_x64():
    with jax.enable_x64(False):
        x = tokens(5, 4, dtype="float32")
        for out in measures(x).values():
            assert out.dtype == jnp.float32


X = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("x", "where", "error", "match"),
    [
        (X.astype(int), None, TypeError, "floating, got int64.*astype"),
        (X.astype(complex), None, TypeError, "real and floating, got complex128"),
        (X[0, 0], None, ValueError, r"got shape \(4,\).*Use \w+\[None\]"),
        (X[:, :0], None, ValueError, r"neither axis empty, got shape \(2, 0, 4\)"),
        (X[..., :0], None, ValueError, r"neither axis empty, got shape \(2, 3, 0\)"),
        (X, np.ones(3), TypeError, "where must be boolean, got float64.*where > 0"),
        (X, np.ones((2, 3, 4), bool), ValueError, r"got shape \(2, 3, 4\).*features"),
        (X, np.ones((3, 3), bool), ValueError, r"broadcast to \(2, 3\).*\(3, 3\)"),
        (X, np.ones((2, 1), bool), ValueError, r"must end in 3 .*\(2, 1\)"),
        (X, np.ones((), bool), ValueError, r"got shape \(\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_why_and_what_instead(x, where, error, match):
    for measure in (collapse.residual, *MEASURES.values()):
        with pytest.raises(error, match=match):
            measure(jnp.asarray(x), where=where)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("x", "got"), [(None, "got None"), ("x", "got str")])
def test_what_is_no_array_is_named(x, got):
    for measure in (collapse.residual, *MEASURES.values()):
        with pytest.raises(TypeError, match=rf"^(x|plan) must be an array, {got}"):
            measure(x)
    with pytest.raises(TypeError, match=r"^where must be an array, got str"):
        collapse.stable_rank(jnp.asarray(X), where="x")


@pytest.mark.usefixtures("unchecked")
def test_errors_of_norm_and_depth():
    for measure in (collapse.relative_residual, collapse.residual_over_depth):
        with pytest.raises(ValueError, match=r"Unknown norm 'l2'; expected .*'1inf'"):
            measure(jnp.asarray(X), "l2")
    with pytest.raises(ValueError, match=r"got \(3, 4\).*use relative_residual"):
        collapse.residual_over_depth(jnp.ones((3, 4)))
