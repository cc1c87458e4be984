"""All measures of all layers in one call: values, cost, precision, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import collapse_measures
from support.jaxprs import equations

from sinkhorn_jax import collapse

NORMS = ("fro", "spectral", "1inf")
# Some hundred roundings in the SVD and the sums of matrices this small.
RTOL = {"float64": 1e-13, "float32": 1e-5}
# What is 0 exactly may come out as one rounding, and 1e-17 adds 4e-16 to an entropy.
ATOL = 1e-14


def reference(x, plan):
    """The measures of one layer."""
    return collapse.Measures(
        collapse_measures.relative_residuals(x),
        *collapse_measures.ranks(x),
        collapse_measures.attention_entropy(plan),
    )


def stack(measures):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *measures)


def tokens(*shape, dtype="float64"):
    # Positive, so that it can be plans as well.
    return jnp.asarray(np.random.default_rng(1).uniform(0.1, 2.0, shape), dtype)


def one_by_one(x, plans, where):
    """The same from the single functions, with the rows of the plans' heads alike."""
    ratio = lambda n: jax.vmap(lambda x: collapse.relative_residual(x, n, where))(x)
    return collapse.Measures(
        {norm: ratio(norm) for norm in NORMS},
        jax.vmap(lambda x: collapse.stable_rank(x, where))(x),
        jax.vmap(lambda x: collapse.effective_rank(x, where))(x),
        collapse.attention_entropy(plans, where[:, None, :]),
    )


def test_closed_forms():
    a, b = np.array([1.0, 2.0, 6.0, -1.0]), np.array([0.5, -3.0, 1.0, 0.0])
    u, v = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 4, 4))).Q
    identity, uniform = np.eye(4), np.full((4, 4), 0.25)
    permutation = identity[[2, 0, 3, 1]]
    known = u * np.array([4.0, 2.0, 1.0, 0.0]) @ v.T
    x = jnp.asarray([identity, permutation, uniform, np.outer(a, b), known])
    plans = jnp.asarray([identity, permutation, uniform])
    out = collapse.measures_over_depth(x, plans)
    chex.assert_trees_all_close(
        out._replace(relative_residual=jax.tree.map(lambda r: r[:4], out[0])),
        collapse.Measures(
            {
                "fro": np.sqrt([0.75, 0.75, 0.0, 26 / 42]),
                "spectral": np.array([1.0, 1.0, 0.0, np.sqrt(26 / 42)]),
                "1inf": np.array([1.5, 1.5, 0.0, np.sqrt(8 * 4 / (10 * 6))]),
            },
            np.array([4.0, 4.0, 1.0, 1.0, 21 / 16]),
            np.array([4.0, 4.0, 1.0, 1.0, 7.0 / 1024.0 ** (1 / 7)]),
            np.array([0.0, 0.0, np.log(4.0)]),
        ),
        rtol=RTOL["float64"],
        atol=ATOL,
    )


@pytest.mark.parametrize("dtype", RTOL)
def test_agrees_with_numpy(dtype):
    x, plans = tokens(3, 5, 4, dtype=dtype), tokens(3, 5, 6, dtype=dtype)
    out = collapse.measures_over_depth(x, plans)
    for leaf in jax.tree.leaves(out):
        assert leaf.dtype == dtype
    chex.assert_trees_all_close(
        jax.tree.map(np.float64, out),
        stack([reference(*layer) for layer in zip(x, plans, strict=True)]),
        rtol=RTOL[dtype],
    )


def test_equals_the_single_functions_with_padding_heads_and_an_embedding():
    x = tokens(3, 2, 5, 4)  # [L, B, T, D]
    plans = tokens(2, 2, 3, 5, 5)  # [K, B, N, T, S]
    where = jnp.array([[True] * 5, [True, True, False, True, False]])
    out = collapse.measures_over_depth(x, plans, where)
    assert out.attention_entropy.shape == (2, 2, 3)
    expected = jax.jit(one_by_one)(x, plans, where)
    chex.assert_trees_all_close(out, expected, rtol=RTOL["float64"], atol=ATOL)


def test_gradients_are_those_of_the_single_functions_and_finite_at_collapse():
    x, plans = tokens(2, 2, 5, 4), tokens(2, 2, 1, 5, 5)
    where = jnp.array([[True] * 5, [True, True, False, True, False]])
    total = lambda m: sum(leaf.sum() for leaf in jax.tree.leaves(m))
    grad, expected = (
        jax.jit(jax.grad(lambda *a, f=f: total(f(*a)), argnums=(0, 1)))
        for f in (collapse.measures_over_depth, one_by_one)
    )
    chex.assert_trees_all_close(
        grad(x, plans, where), expected(x, plans, where), rtol=1e-11, atol=1e-11
    )
    equal = jnp.broadcast_to(jnp.array([0.1, 0.7, 0.0, 1.3]), (2, 5, 4))
    collapsed = jnp.stack([jnp.zeros_like(equal), equal])
    for hard in (collapsed, jnp.broadcast_to(jnp.eye(5, 4), x.shape)):
        chex.assert_tree_all_finite(grad(hard, jnp.zeros_like(plans), where))


def test_layers_share_one_program_with_two_svds():
    def program(num_layers):
        x, plans = tokens(num_layers, 2, 5, 4), tokens(num_layers, 2, 5, 5)
        jaxpr = jax.make_jaxpr(collapse.measures_over_depth)(x, plans).jaxpr
        return [equation.primitive.name for equation in equations(jaxpr)]

    assert program(2) == program(64)
    assert program(2).count("svd") == 2
    traced = jax.jit(
        chex.assert_max_traces(collapse.measures_over_depth.__wrapped__, n=1)
    )
    for scale in (1.0, 0.0, np.nan):
        traced(tokens(2, 5, 4) * scale)


def test_temporary_memory_is_that_of_a_layer():
    def temporary(num_layers):
        x = jax.ShapeDtypeStruct((num_layers, 64, 64), "float32")
        compiled = collapse.measures_over_depth.lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer = 64 * 64 * 4
    assert temporary(32) - temporary(2) < layer


def test_float64_on_request():
    x, plans = tokens(2, 5, 4, dtype="float32"), tokens(2, 5, 5, dtype="float32")
    out = collapse.measures_over_depth(x, plans, dtype="float64")
    wide = collapse.measures_over_depth(x.astype("float64"), plans.astype("float64"))
    chex.assert_trees_all_equal_dtypes(out, wide)
    chex.assert_trees_all_close(out, wide, rtol=RTOL["float64"])
    half = collapse.measures_over_depth(x.astype("bfloat16"))
    assert half.stable_rank.dtype == "float32"
    assert half.attention_entropy is None


X = np.ones((2, 3, 4))
over_depth = collapse.measures_over_depth


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: over_depth(X[0]), ValueError, r"got \(3, 4\).*Use x\[None\]"),
        (lambda: over_depth(X, X[0]), ValueError, r"got \(3, 4\).*Use plan\[None\]"),
        (lambda: over_depth(X[None], X), ValueError, "plans must have the batch axes"),
        (lambda: over_depth(X.astype(int)), TypeError, "floating, got int64"),
        (lambda: over_depth(X, X.astype(int)), TypeError, "plan must be .* got int64"),
        (
            lambda: over_depth(X.astype(int), dtype="float64"),
            TypeError,
            "floating, got int64",
        ),
        (lambda: over_depth(X, dtype="bfloat16"), ValueError, "got bfloat16.*None"),
        (lambda: over_depth(X, dtype="foo"), ValueError, "float32 or .*got 'foo'"),
        (lambda: over_depth(X, None, X[0] > 0), ValueError, r"must end in 3"),
        (
            lambda: jax.enable_x64(False)(over_depth)(X, dtype="float64"),
            ValueError,
            r"no float64 now.*enable_x64\(True\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_why_and_what_instead(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_sequence_of_layers_is_stacked():
    x, plans = tokens(3, 2, 5, 4), tokens(2, 2, 6, 5, 5)
    expected = collapse.measures_over_depth(x, plans)
    for sequence in (list, tuple):
        out = collapse.measures_over_depth(sequence(x), sequence(plans))
        chex.assert_trees_all_equal(out, expected)
        out = collapse.residual_over_depth(sequence(x))
        chex.assert_trees_all_equal(out, expected.relative_residual["fro"])


@pytest.mark.usefixtures("unchecked")
def test_a_sequence_of_unequal_layers_is_explained():
    for function in (collapse.measures_over_depth, collapse.residual_over_depth):
        with pytest.raises(ValueError, match=r"one shape.*\[4, 4\], float64\[5, 4\]"):
            function([tokens(5, 4), tokens(4, 4)])
        with pytest.raises(ValueError, match=r"at least one layer.*got no layer"):
            function([])
        with pytest.raises(TypeError, match=r"hidden_states\[1\] must be an array"):
            function([tokens(5, 4), None])
