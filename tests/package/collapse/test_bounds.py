"""Bounds on the residual: random trials, closed forms, NumPy, derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sinkhorn_jax import collapse, sinkhorn

# What rounding may add to a left side that equals its bound, in float64.
SLACK = 1 + 1e-9
# Some hundred roundings; the logarithm of a bound near 1 has no relative accuracy.
RTOL = {"float64": 1e-12, "float32": 2e-5}
LIMIT = 300  # Iterations after which the columns below are exact to 1e-9.


def norm(x, order):
    if order != "1inf":
        return np.linalg.norm(x, order, axis=(-2, -1))
    one, inf = (np.linalg.norm(x, o, axis=(-2, -1)) for o in (1, np.inf))
    return np.sqrt(one * inf)


def centred(x):
    return x - x.mean(axis=-2, keepdims=True)


# Trials of one shape are a batch: every shape and number of iterations compiles once.
@functools.cache
def networks(n, width, dim, num_heads, num_iters, depth=3, trials=100):
    """Random pure attention: weights [B, L, N, ...], tokens and plans by layer."""
    rng = np.random.default_rng([n, width, dim, num_heads, num_iters])
    scale = lambda low, high: 10 ** rng.uniform(low, high, (trials, 1, 1))
    x = rng.normal(size=(trials, n, width)) * scale(-2, 0.5)
    x = x + rng.normal(size=(trials, 1, width)) * scale(-2, 0.5)
    shape = (trials, depth, num_heads, width, width)
    qk = rng.normal(size=shape) * scale(-1, 0)[..., None, None]
    value = rng.normal(size=shape) * width**-0.5
    plan_of = jax.jit(functools.partial(sinkhorn, num_iters=num_iters))
    tokens, plans = [x], []
    for layer in range(depth):
        x = tokens[-1][:, None]
        logits = x @ qk[:, layer] @ x.swapaxes(-1, -2) * dim**-0.5
        plans.append(np.asarray(plan_of(jnp.asarray(logits))))
        tokens.append((plans[-1] @ x @ value[:, layer]).sum(axis=1))
    return qk, value, tokens, plans


SHAPES = [(2, 3, 2, 1), (7, 6, 4, 2)]


@pytest.mark.few(3)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_iters", [0, 1, LIMIT])
def test_the_column_sum_bound_holds(shape, num_iters):
    _, value, tokens, plans = networks(*shape, num_iters)
    residual = np.linalg.norm(centred(tokens[0]), 2, axis=(1, 2))
    for head in range(shape[-1]):
        plan, w = plans[0][:, head], value[:, 0, head]
        out = norm(centred(plan @ tokens[0] @ w), 2)
        bound = collapse.column_sum_bound(
            jnp.asarray(plan), jnp.asarray(residual), jnp.asarray(norm(w, 2))
        )
        assert (out <= np.asarray(bound) * SLACK).all()


NORMALISERS = [
    (0, "softmax", True),
    (0, "softmax", False),
    (1, "sinkhorn", False),
    (LIMIT, "sinkhorn", False),
    (LIMIT, "sinkhorn limit", False),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("num_iters", "normaliser", "has_mean"), NORMALISERS)
def test_the_bound_over_depth_holds(shape, num_iters, normaliser, has_mean):
    n, _, dim, _ = shape
    qk, value, tokens, plans = networks(*shape, num_iters)
    residuals = np.stack([norm(centred(x), 2) for x in tokens], axis=1)
    mean = np.linalg.norm(tokens[0].mean(axis=1), axis=1)
    bound = collapse.pure_attention_log_bound(
        jnp.asarray(np.log(residuals[:, 0])),
        jnp.asarray(norm(qk, 2)),
        jnp.asarray(norm(value, 2)),
        dim,
        n,
        normaliser,
        jnp.asarray(mean) if has_mean else None,
    )
    exact = np.ones(len(mean), bool)
    if normaliser == "sinkhorn limit":
        columns = np.stack([plan.sum(axis=-2) for plan in plans])  # [L, B, N, T]
        exact = np.abs(columns - 1).max(axis=(0, 2, 3)) < 1e-9
        assert exact.mean() > 0.8
    # From rounding of the residual on there is nothing to compare.
    largest = np.stack([np.abs(x).max(axis=(1, 2)) for x in tokens], axis=1)
    is_seen = (residuals > 1e-12 * largest) & exact[:, None]
    logs = np.log(residuals, where=is_seen, out=np.full(residuals.shape, -np.inf))
    assert (logs <= np.asarray(bound) + 1e-3).all()
    assert is_seen[:, 1:].mean() > 0.3


def test_logits_deviate_as_the_proof_says():
    for num_iters in (0, 1, LIMIT):
        qk, _, tokens, plans = networks(2, 3, 2, 1, num_iters)
        delta = collapse.log_deviation(jnp.asarray(plans[0][:, 0]))
        square = norm(centred(tokens[0]), 2) ** 2
        bound = 2 * norm(qk[:, 0, 0], 2) * square / 2**0.5
        is_finite = np.isfinite(delta)
        assert (np.asarray(delta) <= bound * SLACK + 1e-12)[is_finite].all()
        assert is_finite.mean() > 0.9


@pytest.mark.parametrize("num_iters", [0, LIMIT])
def test_the_bound_of_dong_holds_with_the_gamma_of_its_proof(num_iters):
    n, _, dim, _ = 5, 4, 3, 1
    qk, value, tokens, plans = networks(5, 4, dim, 1, num_iters)
    res = centred(tokens[0])
    # Any column factor serves as w: here the geometric mean of the rows.
    with np.errstate(divide="ignore"):
        e = res @ qk[:, 0, 0] @ res.swapaxes(1, 2) / dim**0.5
        w = np.exp((np.log(plans[0][:, 0]) - e).mean(axis=1))
    w /= w.sum(axis=1, keepdims=True)
    o = np.ptp(e, axis=2)
    gamma = np.sqrt(w.max(axis=1) * o.sum(axis=1) / o.max(axis=1))
    assert (gamma <= np.sqrt(n * w.max(axis=1)) * SLACK).all()
    logs = collapse.dong_log_bound(
        jnp.asarray(np.log(norm(res, "1inf"))),
        jnp.asarray(norm(qk[:, :1], 1)),
        jnp.asarray(norm(value[:, :1], "1inf")),
        dim,
    )
    # The residual about w, which is no less than the least that the bound is on.
    about = tokens[0] - (w[:, None] @ tokens[0])
    out = norm(plans[0][:, 0] @ about @ value[:, 0, 0], "1inf")
    is_small = o.max(axis=1) < 1.256
    assert is_small.sum() > 10
    assert (np.log(out) <= np.asarray(logs)[:, 1] + np.log(gamma) + 1e-9)[
        is_small
    ].all()


column_bound = jax.jit(lambda *x: collapse.column_sum_bound(*x))


@jax.jit
def deviation(plan):
    return collapse.log_deviation(plan)


def test_log_deviation_in_closed_form():
    uniform = jnp.full((4, 4), 0.25)
    assert deviation(uniform) == 0
    rank_one = jnp.outer(jnp.ones(3), jnp.asarray([0.5, 0.2, 0.3]))
    np.testing.assert_allclose(deviation(rank_one), 0, atol=1e-15)
    for plan in (np.eye(4), np.eye(4)[[2, 0, 3, 1]]):
        assert deviation(jnp.asarray(plan)) == np.inf
        bound = column_bound(jnp.asarray(plan), *jnp.ones(2))
        assert bound == np.inf
    two = jnp.asarray([[0.75, 0.25], [0.25, 0.75]])
    np.testing.assert_allclose(deviation(two), np.log(2))
    np.testing.assert_allclose(
        column_bound(two, jnp.asarray(3.0), jnp.asarray(5.0)), 15.0
    )
    # One column holds everything: c = (n, 0, 0), and the rows are equal.
    first = jnp.zeros((3, 3)).at[:, 0].set(1.0)
    assert column_bound(first, *jnp.ones(2)) == 0


def test_column_bound_agrees_with_numpy_and_crops():
    rng = np.random.default_rng(0)
    plan = rng.dirichlet(np.ones(5), size=(2, 4))
    c = plan.sum(axis=1)
    delta = np.abs(np.log(4 * plan / c[:, None])).max(axis=(1, 2))
    expected = np.expm1(delta) * np.linalg.norm(c, axis=1) / 2 * 3.0 * 0.5
    where = np.array([True, False, True, True, False, True])
    padded = np.full((2, 6, 5), np.nan)
    padded[:, where] = plan
    norms = [np.full(2, 3.0), np.full(2, 0.5)]
    for dtype, rtol in RTOL.items():
        args = [jnp.asarray(x, dtype) for x in (plan, *norms)]
        bound = jax.jit(collapse.column_sum_bound)
        np.testing.assert_allclose(bound(*args), expected, rtol=rtol)
        args[0] = jnp.asarray(padded, dtype)
        cropped = bound(*args, jnp.asarray(where))
        np.testing.assert_allclose(cropped, expected, rtol=rtol)
        assert cropped.dtype == dtype
        grad = jax.grad(lambda p, b=bound, a=args: b(p, *a[1:], where).sum())(args[0])
        assert np.isfinite(grad).all()
        assert not np.asarray(grad)[:, ~where].any()


def cubic(log_residual, log_factors):
    logs = [log_residual]
    for factor in log_factors:
        logs.append(factor + 3 * logs[-1])
    return logs


@pytest.mark.parametrize("dtype", RTOL)
def test_bounds_over_depth_in_closed_form(dtype):
    array = lambda x: jnp.asarray(x, dtype)
    rng = np.random.default_rng(0)
    qk, value = rng.uniform(0.5, 2.0, (2, 6, 3))
    r, d, n = -4.0, 16, 8
    args = (array(r), array(qk), array(value), d)
    beta = (qk * value).sum(axis=1)
    rtol = RTOL[dtype]
    dong = collapse.dong_log_bound(*args, gamma=1.5)
    np.testing.assert_allclose(dong, cubic(r, np.log(6 / 4 * beta)), rtol=rtol)
    reported = collapse.reported_log_bound(*args, n, prefactor=0.25)
    expected = cubic(r, np.log(0.25 * 8**3 / 16 * beta))
    np.testing.assert_allclose(reported, expected, rtol=rtol)
    # With delta this small the project's bound is cubic as well, 2 / sqrt(d) sum beta.
    logs = collapse.pure_attention_log_bound(*args, n, "sinkhorn limit")
    expected = cubic(r, np.log(2 / 4 * beta))
    np.testing.assert_allclose(logs, expected, rtol=1e-3)
    # The uniform column factor, beta and depth of Dong et al.: their power.
    ones = array(np.ones((4, 1)))
    power = collapse.dong_log_bound(array(r), 3 * ones, ones, d)
    exponent = (3**4 - 1) / 2
    last = exponent * np.log(4 * 3 / 4) + 3**4 * r
    np.testing.assert_allclose(power[-1], last, rtol=rtol)
    assert {x.dtype.name for x in (dong, reported, logs, power)} == {dtype}


def test_the_order_of_the_normalisers():
    rng = np.random.default_rng(1)
    qk, value = jnp.asarray(rng.uniform(0.5, 2.0, (2, 5, 2)))
    for r in (-5.0, 0.0, 3.0):
        bound = functools.partial(
            collapse.pure_attention_log_bound, jnp.asarray(r), qk, value, 4, 8
        )
        limit, sinkhorn_, softmax = map(
            bound, ("sinkhorn limit", "sinkhorn", "softmax")
        )
        with_mean = bound("softmax", jnp.asarray(0.1))
        assert (limit <= sinkhorn_).all()
        assert (sinkhorn_ <= softmax).all()
        assert (with_mean <= softmax).all()
        # Without attention's help, but never more than values of doubly stochastic.
        plain = r + np.cumsum(np.log(np.asarray(value).sum(axis=1)))
        assert (np.asarray(limit[1:]) <= plain + 1e-12).all()


ALL = {
    "dong": lambda *x: collapse.dong_log_bound(*x, 4),
    "reported": lambda *x: collapse.reported_log_bound(*x, 4, 8),
    **{
        name: lambda *x, name=name: collapse.pure_attention_log_bound(*x, 4, 8, name)
        for name in ("softmax", "sinkhorn", "sinkhorn limit")
    },
    "mean": lambda *x: collapse.pure_attention_log_bound(
        *x, 4, 8, "softmax", jnp.asarray(0.3, x[0].dtype)
    ),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ALL)
def test_bounds_over_depth_under_transforms(name):
    rng = np.random.default_rng(2)
    r = jnp.asarray(rng.uniform(-3, -1, 2))
    qk, value = jnp.asarray(rng.uniform(0.5, 2.0, (2, 2, 3, 2)))
    bound = jax.jit(ALL[name])
    out = bound(r, qk, value)
    assert out.shape == (2, 4)
    mapped = jax.jit(jax.vmap(bound))(r, qk, value)
    np.testing.assert_allclose(mapped, out, rtol=RTOL["float64"])
    shared = bound(r, qk[0], value[0])
    np.testing.assert_allclose(shared[0], out[0], rtol=RTOL["float64"])
    if name == "sinkhorn":
        check_grads(bound, (r, qk, value), 1, ("rev",), 1e-6, 1e-6)
    # Far below and far above what exp can hold.
    for far in (-1e3, 1e3):
        args = [jnp.asarray(x, "float32") for x in (jnp.full(2, far), qk, value)]
        grad = jax.jit(jax.value_and_grad(lambda *x: bound(*x).sum(), (0, 1, 2)))
        chex.assert_tree_all_finite(grad(*args))
    assert np.isneginf(bound(r, qk, jnp.zeros_like(value))[:, 1:]).all()


@pytest.mark.usefixtures("unchecked")
def test_errors():
    ones = jnp.ones((3, 2))
    zero = jnp.asarray(0.0)
    with pytest.raises(ValueError, match=r"\(3,\) and \(3,\).*norm\[\.\.\., None\]"):
        collapse.dong_log_bound(zero, ones[:, 0], ones[:, 0], 4)
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2, 2\)"):
        collapse.reported_log_bound(zero, ones, ones[:2], 4, 8)
    with pytest.raises(ValueError, match="Unknown normaliser 'sparsemax'; expected"):
        collapse.pure_attention_log_bound(zero, ones, ones, 4, 8, "sparsemax")
    with pytest.raises(TypeError, match="floating, got int64"):
        collapse.log_deviation(jnp.ones((2, 2), int))


@pytest.mark.usefixtures("unchecked")
def test_numbers_and_lists_of_python():
    norms = [[0.5, 0.25]], [[1.0, 2.0]]
    pure, dong = collapse.pure_attention_log_bound, collapse.dong_log_bound
    for bound, given in ((pure, (8, 4, "softmax")), (dong, (8,))):
        expected = bound(jnp.float64(-1.0), *map(jnp.asarray, norms), *given)
        np.testing.assert_allclose(bound(-1.0, *norms, *given), expected)


def test_the_softmax_bound_with_a_mean_in_closed_form():
    """One layer multiplies r by (exp(2 r^2 |A| / sqrt(d)) - 1) sqrt(b) |W_V|.

    Here b = exp(sqrt(2) (m + r) r |A| / sqrt(d)) is less than n.
    """
    r, m, qk, value, d, n = 0.05, 3.0, 1.5, 2.0, 16, 8
    array = lambda x: jnp.full((1, 1), x)
    logs = collapse.pure_attention_log_bound(
        jnp.log(r), array(qk), array(value), d, n, "softmax", mean_norm=jnp.float64(m)
    )
    spread = np.sqrt(2) * (m + r) * r * qk / np.sqrt(d)
    factor = np.expm1(2 * r**2 * qk / np.sqrt(d)) * np.exp(spread / 2) * value
    np.testing.assert_allclose(logs, np.log([r, factor * r]), rtol=1e-12)
