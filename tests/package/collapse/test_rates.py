"""The rate of Sinkhorn's iteration: closed forms, NumPy, the iteration itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkhorn_jax import Exact, Truncated, collapse, sinkhorn, sinkhorn_potentials

RTOL = {"float64": 1e-10, "float32": 1e-4}


def plan_of(t=6, s=5, scale=1.5, seed=0, dtype="float64", num_iters=400):
    logits = np.random.default_rng(seed).normal(size=(t, s)) * scale
    logits = jnp.asarray(logits, dtype)
    return logits, jax.jit(lambda x: sinkhorn(x, num_iters))(logits)


def reference(plan):
    plan = np.asarray(plan, np.float64)
    a, b = plan.sum(axis=1), plan.sum(axis=0)
    return np.linalg.svd(plan / np.sqrt(np.outer(a, b)), compute_uv=False)[1] ** 2


def test_closed_forms():
    rate = jax.jit(lambda x: collapse.convergence_rate(x))
    for plan in (np.eye(4), np.eye(4)[[2, 0, 3, 1]], np.diag([1.0, 7.0, 0.1, 2.0])):
        np.testing.assert_allclose(rate(jnp.asarray(plan)), 1, rtol=1e-13)
    for plan in (np.full((4, 4), 0.25), np.outer([1.0, 2, 3, 4], [0.5, 2, 1, 1])):
        np.testing.assert_allclose(rate(jnp.asarray(plan)), 0, atol=1e-15)
    # Singular values 1, 1 - 2p.
    for p in (0.1, 0.4):
        plan = jnp.asarray([[1 - p, p], [p, 1 - p]])
        np.testing.assert_allclose(rate(plan), (1 - 2 * p) ** 2)
    # (1 - t) I + t 11^T / n has the value 1 - t, n - 1 times.
    plan = 0.7 * jnp.eye(5) + 0.3 / 5
    np.testing.assert_allclose(rate(plan), 0.49)
    assert rate(jnp.zeros((3, 4))) == 0
    assert rate(jnp.ones((1, 4))) == 0


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(("t", "s"), [(6, 5), (3, 8)])
def test_agrees_with_numpy(dtype, t, s):
    _, plan = plan_of(t, s, dtype=dtype)
    rate = collapse.convergence_rate(plan)
    np.testing.assert_allclose(rate, reference(plan), rtol=RTOL[dtype])
    assert rate.dtype == dtype
    for factor in (1e-30, 1e30):
        same = collapse.convergence_rate(plan * jnp.asarray(factor, dtype))
        np.testing.assert_allclose(same, rate, rtol=RTOL[dtype])


def test_leading_axes_are_a_batch():
    plans = jnp.exp(jax.random.normal(jax.random.key(5), (2, 3, 4, 6)))
    rates = collapse.convergence_rate(plans)
    each = [[collapse.convergence_rate(plan) for plan in some] for some in plans]
    np.testing.assert_allclose(rates, each, rtol=1e-12)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", RTOL)
def test_rows_and_columns_of_any_magnitude_count_alike(dtype):
    rate = lambda x: collapse.convergence_rate(jnp.asarray(x, dtype))
    blocks = np.diag([3e38, 1.0, 1e-30])
    np.testing.assert_allclose(rate(blocks), 1, rtol=RTOL[dtype])
    # The least block is coupled to none, the others hardly.
    coupled = blocks + np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(rate(coupled), 1, rtol=RTOL[dtype])
    # Two blocks, in one of which the columns of a row differ by many decades.
    np.testing.assert_allclose(
        rate([[1e-30, 2e-30, 0], [1e-35, 3e-35, 0], [0, 0, 1e30]]), 1, rtol=RTOL[dtype]
    )
    # Sums beyond the range of float32.
    plan = np.array([[3e38, 1e38, 2e38], [1e38, 3e38, 3e38], [1.0, 1e10, 1e20]])
    got, expected = rate(plan), reference(plan)
    np.testing.assert_allclose(got, expected, rtol=RTOL[dtype])
    gradient = jax.grad(collapse.convergence_rate)(jnp.asarray(plan[:2], dtype))
    assert np.isfinite(gradient).all()


def test_where_equals_cropping_and_gradients_are_finite():
    _, plan = plan_of()
    where = np.array([True, False, True, True, True, False, True, True])
    padded = np.full((2, 8, 5), np.nan)
    padded[:, where] = plan
    padded[1, 0] = 0.0  # A row without mass leaves as well.
    padded, where = jnp.asarray(padded), jnp.asarray(where)
    rate = jax.jit(jax.vmap(collapse.convergence_rate, (0, None)))(padded, where)
    cropped = [reference(plan), reference(plan[1:])]
    np.testing.assert_allclose(rate, cropped, rtol=RTOL["float64"])
    grad = jax.grad(lambda p: collapse.convergence_rate(p, where).sum())(padded)
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[:, ~where].any()
    gradient = jax.jit(jax.grad(collapse.convergence_rate))
    for plan in (jnp.eye(4), jnp.full((4, 4), 0.25), jnp.zeros((4, 4))):
        assert np.isfinite(gradient(plan)).all()


@pytest.mark.parametrize("seed", range(2))
def test_the_iteration_converges_at_this_rate(seed):
    logits, plan = plan_of(seed=seed, scale=2.0)
    rate = float(collapse.convergence_rate(plan))
    potentials = jax.jit(sinkhorn_potentials, static_argnums=1)
    errors = [float(potentials(logits, k).marginal_error) for k in (6, 10)]
    assert errors[1] > 1e-13
    np.testing.assert_allclose((errors[1] / errors[0]) ** 0.25, rate, rtol=0.05)
    predicted = errors[0] * collapse.remaining_error(jnp.asarray(rate), 4)
    np.testing.assert_allclose(errors[1], predicted, rtol=0.2)


def test_truncated_gradients_are_as_wrong_as_it_says():
    logits, plan = plan_of(scale=2.0)
    rate = collapse.convergence_rate(plan)
    weight = jnp.asarray(np.random.default_rng(5).normal(size=plan.shape))

    def grad(rule):
        loss = lambda x: (weight * sinkhorn(x, 40, gradient=rule)).sum()
        return np.asarray(jax.jit(jax.grad(loss))(logits))

    exact = grad(Exact())
    errors = [np.linalg.norm(grad(Truncated(k)) - exact) for k in (4, 8)]
    expected = collapse.remaining_error(rate, 4)
    np.testing.assert_allclose(errors[1] / errors[0], expected, rtol=0.2)


def test_iterations_invert_the_remaining_error():
    rate = jnp.asarray([0.5, 0.9, 0.25, 1.0, 0.0])
    count = collapse.iterations_to_reduce(rate, 0.125)
    np.testing.assert_array_equal(count, [3, 20, 2, np.inf, 1])
    left = collapse.remaining_error(rate, 3)
    np.testing.assert_allclose(left[:2], [0.125, 0.729])
    np.testing.assert_array_equal(collapse.iterations_to_reduce(rate, 2.0), 0)
    np.testing.assert_array_equal(collapse.remaining_error(rate, 0), 1)
    many = jnp.asarray(np.random.default_rng(0).uniform(0.01, 0.999, 500))
    for dtype in RTOL:
        rates = many.astype(dtype)
        least = np.asarray(collapse.iterations_to_reduce(rates, 1e-6), np.float64)
        exact = np.asarray(rates, np.float64)
        assert (exact**least <= 1e-6 * (1 + 1e-5)).all()
        assert (exact ** (least - 1) > 1e-6 * (1 - 1e-5)).all()
    grad = jax.grad(lambda r: collapse.iterations_to_reduce(r, 0.1).sum())(rate)
    assert not grad[:3].any()


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_python():
    assert collapse.remaining_error(0.5, 3) == 0.125
    assert collapse.iterations_to_reduce(0.5, 0.1) == 4
    assert collapse.remaining_error(0, 3) == 0
    assert collapse.iterations_to_reduce(0, 0.1) == 1
    assert collapse.iterations_to_reduce(1, 0.1) == np.inf
    assert collapse.iterations_to_reduce(0.5, 1) == 0


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_number_is_named():
    for rate in ("x", None, True):
        with pytest.raises(TypeError, match=r"^rate must be"):
            collapse.iterations_to_reduce(rate, 0.1)
    with pytest.raises(TypeError, match=r"^reduction must be an array, got str"):
        collapse.iterations_to_reduce(0.5, "x")
