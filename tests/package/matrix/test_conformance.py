"""Converged plans against OTT-JAX and POT on 300 problems, and against closed forms.

Both solve entropic optimal transport: for a cost C and a regularisation epsilon,

    min <P, C> - epsilon H(P),   H(P) = -sum P (log P - 1),

over the plans P with given marginals. That is `sinkhorn` of the logits -C / epsilon
after infinitely many iterations. Their potentials are epsilon f and epsilon g, up to a
constant that moves from one to the other.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkhorn_jax import Implicit, sinkhorn, sinkhorn_potentials

SHAPES = [(5, 7), (8, 8), (12, 3)]
NUM_PROBLEMS = 100  # Of each shape.
NUM_ITERS = 2000
TOLERANCE = 1e-10

shapes = pytest.mark.parametrize("shape", SHAPES)


@functools.cache
def problems(shape):
    """Costs, marginals and epsilons from 1e-3 to 10, [problem, ...].

    The cost has a term of each row and each column, which are large beside epsilon, and
    one of each entry, which is not, because it decides how fast Sinkhorn converges.
    Half of the problems have a row and a column of mass 0.
    """
    rng = np.random.default_rng(shape)
    epsilon = 10 ** np.linspace(-3, 1, NUM_PROBLEMS)
    row, column = (rng.uniform(-1, 1, (NUM_PROBLEMS, size)) for size in shape)
    entry = rng.uniform(-1, 1, (NUM_PROBLEMS, *shape))
    entry *= np.minimum(epsilon, 0.5)[:, None, None]
    cost = row[:, :, None] + column[:, None, :] + entry
    a, b = (rng.dirichlet(np.ones(size), NUM_PROBLEMS) for size in shape)
    for marginal in (a, b):
        marginal[::2, rng.integers(marginal.shape[1])] = 0.0
        marginal /= marginal.sum(axis=1, keepdims=True)
    return cost, a, b, epsilon


@functools.cache
def weights(shape):
    return np.random.default_rng(0).normal(size=shape)


def solve(function, cost, a, b, epsilon, **options):
    options |= {"row_marginal": a, "col_marginal": b, "tolerance": 1e-15}
    return function(-cost / epsilon, NUM_ITERS, **options)


@functools.cache
def ours(shape):
    """Plans, f + g where there is mass, values of the dual and gradients."""

    def one(cost, a, b, epsilon):
        plan = solve(sinkhorn, cost, a, b, epsilon)
        f, g, *_ = solve(sinkhorn_potentials, cost, a, b, epsilon)
        both = jnp.where(jnp.outer(a, b) > 0, epsilon * (f[:, None] + g[None]), 0.0)
        # The plan has mass 1.
        value = epsilon * (jnp.vdot(f, a) + jnp.vdot(g, b) - 1.0)
        weighted = lambda cost: jnp.vdot(
            solve(sinkhorn, cost, a, b, epsilon, gradient=Implicit(tolerance=1e-14)),
            weights(shape),
        )
        return plan, both, value, epsilon * jax.grad(weighted)(cost)

    return jax.device_get(jax.jit(jax.vmap(one))(*problems(shape)))


@pytest.mark.few(1)
@shapes
def test_gradients_are_those_of_the_equations(shape):
    """The marginals stay when the cost changes: a linear system for the potentials."""
    for plan, gradient in zip(ours(shape)[0], ours(shape)[3], strict=True):
        weighted = plan * weights(shape)
        system = np.block(
            [[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]]
        )
        sums = np.concatenate([weighted.sum(1), weighted.sum(0)])
        # Without a unique solution, because of the constant and of the zeros.
        change = np.linalg.pinv(system, rcond=1e-12, hermitian=True) @ sums
        f, g = np.split(change, [len(plan)])
        expected = plan * (f[:, None] + g) - weighted
        np.testing.assert_allclose(gradient, expected, atol=TOLERANCE)


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore")
@shapes
def test_agrees_with_ott(shape):
    pytest.importorskip("ott")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn as ott_sinkhorn

        def one(cost, a, b, epsilon):
            def solution(cost):
                of_cost = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)
                problem = linear_problem.LinearProblem(of_cost, a, b)
                solver = ott_sinkhorn.Sinkhorn(
                    threshold=1e-15, max_iterations=NUM_ITERS
                )
                return solver(problem)

            def weighted(cost):
                return jnp.vdot(solution(cost).matrix, weights(shape))

            found = solution(cost)
            both = jnp.where(jnp.outer(a, b) > 0, found.f[:, None] + found.g, 0.0)
            # OTT's value has the entropy relative to the product of the marginals.
            entropy = sum(jax.scipy.special.entr(x).sum() for x in (a, b))
            value = found.reg_ot_cost - epsilon * (entropy + 1.0)
            return found.matrix, both, value, epsilon * jax.grad(weighted)(cost)

        expected = jax.device_get(jax.jit(jax.vmap(one))(*problems(shape)))
    chex.assert_trees_all_close(ours(shape)[:3], expected[:3], atol=TOLERANCE)
    # OTT's gradients are NaN where a marginal is 0.
    found, gradient = ours(shape)[3], expected[3]
    assert np.isfinite(found).all()
    # They are from conjugate gradients, less exact than the equations above.
    np.testing.assert_allclose(found[1::2], gradient[1::2], atol=1e-8)


@pytest.mark.few(1)
@shapes
def test_agrees_with_pot(shape):
    pot = pytest.importorskip("ot")
    for plan, both, cost, a, b, epsilon in zip(
        *ours(shape)[:2], *problems(shape), strict=True
    ):
        keep = np.ix_(a > 0, b > 0)  # POT takes the logarithm of the marginals.
        # It ends with a warning and an overflow where its potentials are large.
        with np.errstate(over="ignore"):
            expected, log = pot.bregman.sinkhorn_log(
                a[a > 0],
                b[b > 0],
                cost[keep],
                epsilon,
                numItermax=NUM_ITERS,
                stopThr=1e-14,
                log=True,
                warn=False,
            )
        np.testing.assert_allclose(plan[keep], expected, atol=TOLERANCE)
        potentials = epsilon * (log["log_u"][:, None] + log["log_v"])
        np.testing.assert_allclose(both[keep], potentials, atol=TOLERANCE)


@pytest.mark.few(1)
@shapes
def test_the_value_is_that_of_the_plan(shape):
    plan, _, value, _ = ours(shape)
    cost, *_, epsilon = problems(shape)
    terms = plan * (np.log(np.where(plan > 0, plan, 1.0)) - 1.0)
    expected = (plan * cost).sum((1, 2)) + epsilon * terms.sum((1, 2))
    np.testing.assert_allclose(value, expected, atol=TOLERANCE)


def test_two_by_two():
    logits = np.random.default_rng(0).normal(size=(50, 2, 2)) * 3
    plan = sinkhorn(jnp.asarray(logits), 20_000, tolerance=1e-15)
    odd = logits[:, 0, 0] + logits[:, 1, 1] - logits[:, 0, 1] - logits[:, 1, 0]
    diagonal = 1 / (1 + np.exp(-odd / 2))
    expected = np.stack([diagonal, 1 - diagonal, 1 - diagonal, diagonal], axis=1)
    np.testing.assert_allclose(plan.reshape(-1, 4), expected, atol=TOLERANCE)


def test_logits_of_rank_one_give_the_product_of_the_marginals():
    _, a, b, _ = problems(SHAPES[0])
    rng = np.random.default_rng(0)
    row, column = (rng.normal(size=x.shape) * 30 for x in (a, b))
    options = {"row_marginal": jnp.asarray(a), "col_marginal": jnp.asarray(b)}
    logits = jnp.asarray(row[:, :, None] + column[:, None])
    plan = sinkhorn(logits, 1, **options)
    np.testing.assert_allclose(plan, a[:, :, None] * b[:, None], atol=1e-14)


def test_small_epsilons_give_the_best_assignment():
    scipy = pytest.importorskip("scipy.optimize")
    cost = np.random.default_rng(0).uniform(size=(20, 6, 6))
    plan = sinkhorn(jnp.asarray(-cost / 2e-3), 20_000, tolerance=1e-6)
    for each, found in zip(cost, plan, strict=True):
        expected = np.zeros((6, 6))
        expected[scipy.linear_sum_assignment(each)] = 1.0
        np.testing.assert_array_equal(np.round(found), expected)


def test_scaled_rows_and_columns_have_the_same_plan():
    cost, a, b, epsilon = (x[50] for x in problems(SHAPES[0]))
    options = {"row_marginal": jnp.asarray(a), "col_marginal": jnp.asarray(b)}
    row, column = (np.linspace(-40, 40, size) for size in SHAPES[0])
    logits = jnp.asarray(-cost / epsilon)
    expected = sinkhorn(logits, NUM_ITERS, **options)
    found = sinkhorn(logits + (row[:, None] + column), NUM_ITERS, **options)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
