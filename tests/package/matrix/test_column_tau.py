"""`column_tau` of the matrix functions: from the softmax to doubly stochastic."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.matrices import S, T, marginals, random

from sinkhorn_jax import Implicit, Truncated, sinkhorn, sinkhorn_potentials
from sinkhorn_jax.matrix import IMPLEMENTATIONS

TAUS = [0.0, 0.01, 0.3, 0.99, 1.0]
BATCH = len(TAUS)
PLAIN = [name for name in IMPLEMENTATIONS if "mosaic" not in name]

plain = pytest.mark.parametrize("implementation", PLAIN)


def problem():
    a, b = marginals((BATCH,))
    return random(3, (BATCH, T, S), scale=2.0), a, b, jnp.array(TAUS)


@plain
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_agrees_with_the_oracle(implementation, finish):
    logits, a, b, tau = problem()
    plan = sinkhorn(
        logits,
        4,
        row_marginal=a,
        col_marginal=b,
        column_tau=tau,
        finish=finish,
        implementation=implementation,
    )
    expected = reference.sinkhorn(logits, 4, a, b, finish, tau)
    np.testing.assert_allclose(plan, expected, atol=1e-14)


@plain
def test_potentials_agree_with_the_oracle(implementation):
    logits, a, b, tau = problem()
    result = sinkhorn_potentials(
        logits,
        4,
        row_marginal=a,
        col_marginal=b,
        column_tau=tau,
        implementation=implementation,
    )
    expected = reference.potentials(logits, 4, a, b, tau=tau)
    chex.assert_trees_all_close(tuple(result[:3]), expected, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@plain
def test_0_is_the_softmax_itself(implementation, dtype):
    logits = random(3, (T, S), dtype, scale=5.0)
    plans = [
        sinkhorn(logits, num_iters, column_tau=tau, implementation=implementation)
        for num_iters, tau in [(7, 0.0), (0, 1.0)]
    ]
    # XLA may fuse the two programs otherwise, and round the last bit otherwise.
    np.testing.assert_allclose(*plans, rtol=4 * float(jnp.finfo(dtype).eps))


@plain
def test_a_number_is_an_array_of_it_for_each_matrix(implementation):
    logits, *_ = problem()

    def plan(tau):
        return sinkhorn(logits, column_tau=tau, implementation=implementation)

    np.testing.assert_array_equal(plan(0.3), plan(jnp.full(BATCH, 0.3)))
    np.testing.assert_allclose(plan(1.0), plan(jnp.ones(())), atol=1e-14)


def loss(function, implementation, options):
    def of_result(logits, a, b, tau):
        marginals = {"row_marginal": a, "col_marginal": b, "column_tau": tau}
        result = function(logits, implementation=implementation, **marginals, **options)
        leaves = [result] if function is sinkhorn else result[:2]
        return sum((x * random(7 + i, x.shape)).sum() for i, x in enumerate(leaves))

    return jax.jit(jax.grad(of_result, argnums=(0, 1, 2, 3)))


@pytest.mark.few(1)
@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_potentials])
@pytest.mark.parametrize(
    "options",
    [
        {"num_iters": 0},
        {"num_iters": 4},
        {"num_iters": 4, "finish": "columns"},
        {"num_iters": 6, "gradient": Truncated(2)},
        {"num_iters": 300, "gradient": Implicit(tolerance=1e-13)},
        {"num_iters": 5, "tolerance": 0.05},
    ],
    ids=str,
)
def test_gradients_agree_with_autodiff(function, options):
    got = loss(function, "scaling", options)(*problem())
    expected = loss(function, "reference", options)(*problem())
    chex.assert_trees_all_close(got, expected, atol=1e-10)


@pytest.mark.few(1)
@plain
def test_the_implicit_gradient_is_the_limit(implementation):
    # Without the matrix of tau = 1, whose potentials are free by a constant, and of
    # 0.99, which takes long to converge.
    problem_ = jax.tree.map(lambda x: x[:3], problem())
    implicit = {"num_iters": 60, "gradient": Implicit(tolerance=1e-13)}
    got = loss(sinkhorn_potentials, implementation, implicit)(*problem_)
    expected = loss(sinkhorn_potentials, implementation, {"num_iters": 60})(*problem_)
    chex.assert_trees_all_close(got, expected, atol=1e-10)


@plain
def test_the_derivative_by_tau_is_that_of_differences(implementation):
    logits, a, b, _ = problem()

    def value(tau):
        plan = sinkhorn(
            logits,
            3,
            row_marginal=a,
            col_marginal=b,
            column_tau=tau,
            implementation=implementation,
        )
        return (plan * random(7, plan.shape)).sum()

    tau, step = jnp.array(0.6), 1e-6
    difference = (value(tau + step) - value(tau - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(value)(tau), difference, rtol=1e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("tau", [0.3, 0.9])
def test_converges_to_the_relaxed_transport_of_ott(tau):
    ott_geometry = pytest.importorskip("ott.geometry.geometry")
    linear = pytest.importorskip("ott.problems.linear.linear_problem")
    solver = pytest.importorskip("ott.solvers.linear.sinkhorn")
    logits, a, b, _ = jax.tree.map(lambda x: x[0], problem())
    b = 1.7 * b
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        geometry = ott_geometry.Geometry(cost_matrix=-logits, epsilon=1.0)
        relaxed = linear.LinearProblem(geometry, a=a, b=b, tau_b=tau)
        expected = solver.Sinkhorn(threshold=1e-14, max_iterations=20_000)(relaxed)
    options = {"row_marginal": a, "col_marginal": b, "column_tau": tau}
    plan = sinkhorn(logits, 1000, **options)
    np.testing.assert_allclose(plan, expected.matrix, atol=1e-10)


@pytest.mark.few(1)
@plain
def test_columns_obey_the_first_order_condition(implementation):
    # The penalty tau / (1 - tau) KL(columns | b) has the derivative
    # tau / (1 - tau) log(columns / b), which is -g at the optimum.
    logits, a, b, tau = problem()
    options = {"row_marginal": a, "col_marginal": b, "column_tau": tau}
    f, g, *_ = sinkhorn_potentials(
        logits, 3000, implementation=implementation, **options
    )
    sums = jnp.exp(logits + f[..., None] + g[:, None, :]).sum(axis=1)
    left, right = (1 - tau)[:, None] * g, -tau[:, None] * jnp.log(sums / b)
    np.testing.assert_allclose(left, right, atol=1e-10)


@pytest.mark.few(6)
@plain
@pytest.mark.parametrize("offset", [200.0, -200.0])
@pytest.mark.parametrize("tau", TAUS)
def test_float32_with_offset_columns(implementation, offset, tau):
    logits = random(3, (16, 24), "float32", scale=2.0).at[:, ::5].add(offset)
    plan = sinkhorn(logits, 10, column_tau=tau, implementation=implementation)
    expected = reference.sinkhorn(logits, 10, tau=tau)
    np.testing.assert_allclose(plan, expected, atol=2e-6)


@plain
def test_totals_may_differ_below_1(implementation):
    logits, a, b, _ = problem()
    options = {"row_marginal": a, "col_marginal": 2 * b}
    plan = sinkhorn(logits, column_tau=0.5, implementation=implementation, **options)
    np.testing.assert_allclose(plan.sum(axis=2), a, atol=1e-13)
    with pytest.raises(ValueError, match=r"same total.*column_tau below 1"):
        sinkhorn(logits, column_tau=problem()[3], **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("tau", "error", "says"),
    [
        (1.5, ValueError, "between 0 .* and 1 .*, got 1.5"),
        (-0.1, ValueError, "got -0.1"),
        (float("nan"), ValueError, "got nan"),
        (jnp.array([0.5, 2.0]), ValueError, "a minimum of 0.5 and a maximum of 2.0"),
        (jnp.array([0.5, 0.5, 0.5]), ValueError, "must broadcast to"),
        (jnp.array([1, 0]), TypeError, "floating"),
        ("learned", TypeError, "must be a number"),
        (None, TypeError, "column_tau"),
    ],
    ids=str,
)
def test_bad_input(tau, error, says):
    with pytest.raises(error, match=says):
        sinkhorn(jnp.zeros((2, T, S)), column_tau=tau)


@pytest.mark.few(1)
@plain
def test_transforms(implementation):
    logits, _, _, tau = problem()

    def plan(logits, tau):
        return sinkhorn(logits, 3, column_tau=tau, implementation=implementation)

    expected = plan(logits, tau)
    _, scanned = jax.lax.scan(lambda _, x: (None, plan(*x)), None, (logits, tau))
    for got in (jax.jit(plan)(logits, tau), jax.vmap(plan)(logits, tau), scanned):
        np.testing.assert_allclose(got, expected, atol=1e-14)


def test_kernels_say_that_they_do_not_take_it():
    logits = jnp.zeros((2, 4, 4), "float32")
    for name in set(IMPLEMENTATIONS) - set(PLAIN):
        with pytest.raises(NotImplementedError, match="column_tau"):
            jax.eval_shape(
                lambda name=name: sinkhorn(logits, column_tau=0.5, implementation=name)
            )
