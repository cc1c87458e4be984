"""Gradients against autodiff of the reference, and against finite differences."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.test_util import check_grads
from support.hostile import hostile_logits, large_offsets
from support.matrices import S, T, marginals, random, sparse_with_padding

from sinkhorn_jax import Exact, Implicit, Truncated, sinkhorn, sinkhorn_potentials
from sinkhorn_jax.matrix import IMPLEMENTATIONS

FLOAT64_GRADIENT_ATOL = 1e-10  # Sums of some hundred terms of order 1.

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

GRADIENT_CASES = {
    "rows": {},
    "columns": {"finish": "columns"},
    "no iterations": {"num_iters": 0},
    "one iteration": {"num_iters": 1, "finish": "columns"},
    "marginals": {"marginals": True},
    "marginals, columns": {"marginals": True, "finish": "columns"},
    "sparse with padding": {"masked": True},
    "truncated": {"gradient": Truncated(2), "marginals": True},
    "truncated, columns": {"gradient": Truncated(1), "finish": "columns"},
    "truncated to the last row step": {"gradient": Truncated(0)},
    "implicit": {
        "gradient": Implicit(tolerance=1e-12),
        "num_iters": 300,
        "marginals": True,
    },
    "implicit, masked": {
        "gradient": Implicit(tolerance=1e-12),
        "num_iters": 200,
        "masked": True,
    },
    "tolerance": {"tolerance": 0.03, "num_iters": 20},
    "tolerance, columns": {"tolerance": 0.03, "num_iters": 20, "finish": "columns"},
    "tolerance, truncated": {
        "tolerance": 0.01,
        "num_iters": 20,
        "gradient": Truncated(1),
    },
    "tolerance, truncated to more than ran": {
        "tolerance": 0.03,
        "num_iters": 20,
        "gradient": Truncated(12),
        "marginals": True,
    },
    "tolerance, marginals, columns": {
        "tolerance": 0.03,
        "num_iters": 20,
        "finish": "columns",
        "marginals": True,
        "masked": True,
    },
}


def gradients(implementation, logits, a, b, options):
    """The gradient of a function of the plan and the potentials."""
    options = {"num_iters": 4, "implementation": implementation} | options
    where = sparse_with_padding() if options.pop("masked", False) else None
    with_marginals = options.pop("marginals", False)
    w = random(9, logits.shape)

    def loss(logits, a, b):
        given = {"row_marginal": a, "col_marginal": b} if with_marginals else {}
        given |= {"where": where}
        f, g, *_ = sinkhorn_potentials(logits, **options, **given)
        loss = (jnp.sin(f) * w[..., 0]).sum() + (jnp.cos(g) * w[..., 0, :]).sum()
        if "tolerance" not in options:
            loss += (sinkhorn(logits, **options, **given) ** 2 * w).sum()
        return loss

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(logits, a, b)


def assert_gradients_agree(case):
    logits, (a, b) = random(0, (2, T, S), scale=2.0), marginals((2,))
    options = GRADIENT_CASES[case]
    chex.assert_trees_all_close(
        gradients("scaling", logits, a, b, options),
        gradients("reference", logits, a, b, options),
        atol=FLOAT64_GRADIENT_ATOL,
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_agree_with_autodiff_of_the_reference(case):
    assert_gradients_agree(case)


@pytest.fixture
def in_log_space(monkeypatch):
    """No matrix counts as representable in the linear domain."""
    solve = "sinkhorn_jax._core.solve.is_representable"
    monkeypatch.setattr(solve, lambda *_: jnp.bool_(False))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.few(2)
@pytest.mark.usefixtures("in_log_space")
@pytest.mark.parametrize("case", [x for x in GRADIENT_CASES if "tolerance" in x])
def test_gradients_in_log_space_agree_with_autodiff_of_the_reference(case):
    assert_gradients_agree(case)


@pytest.mark.few(1)
@pytest.mark.parametrize("finish", ["rows", "columns"])
@pytest.mark.parametrize("gradient", [Exact(), Truncated(100)], ids=str)
def test_iterations_that_stop_early_with_potentials_of_several_hundred(
    finish, gradient
):
    x, y = jnp.linspace(0, 1, 3), jnp.linspace(3, 5, 3)
    logits = -((x[:, None] - y[None]) ** 2) / 0.005

    def solve(logits, implementation):
        f, g, _, num_iters = sinkhorn_potentials(
            logits,
            400,
            finish=finish,
            gradient=gradient,
            tolerance=0.2,
            implementation=implementation,
        )
        return jnp.sin(f).sum() + jnp.cos(g).sum(), num_iters

    got, num_iters = jax.grad(solve, has_aux=True)(logits.astype("float32"), "scaling")
    exact, expected_iters = jax.grad(solve, has_aux=True)(logits, "reference")
    assert num_iters == expected_iters < 400
    # In float32, potentials of several hundred have an error of 1e-4.
    chex.assert_trees_all_close(got.astype("float64"), exact, atol=2e-3)


@pytest.mark.few(1)
@implementations
def test_gradients_agree_with_finite_differences(implementation):
    logits, (a, b) = random(0, (T, S)), marginals()
    w = random(1, (T, S))

    def loss(logits, a, b):
        # Scaled to one total, so that every perturbation is a pair of marginals.
        a, b = a / a.sum(), b / b.sum()
        plan = sinkhorn(
            logits, 3, row_marginal=a, col_marginal=b, implementation=implementation
        )
        return (plan * w).sum()

    modes = ["rev"] if implementation == "scaling" else ["rev", "fwd"]
    order = 1 if implementation == "scaling" else 2
    check_grads(jax.jit(loss), (logits, a, b), order, modes)


@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_hostile_gradients_of_scaling_in_float32(finish):
    named = hostile_logits(16)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    weights = random(1, logits.shape, "float32")

    def loss(logits, weights, implementation):
        plan = sinkhorn(logits, 50, finish=finish, implementation=implementation)
        return (plan * weights).sum()

    gradient = jax.grad(loss)(logits, weights, "scaling")
    exact = jax.grad(loss)(
        logits.astype("float64"), weights.astype("float64"), "reference"
    )
    error = abs(gradient.astype("float64") - exact).max((1, 2))
    error = dict(zip(named, error, strict=True))
    assert max(error.values()) < 1e-5, error


@pytest.mark.few(1)
@implementations
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_gradients_with_large_offsets(implementation, finish):
    named = large_offsets(8)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    weights = random(1, logits.shape, "float32")

    def loss(logits, weights, implementation):
        plan = sinkhorn(logits, 10, finish=finish, implementation=implementation)
        return (plan * weights).sum()

    gradient = jax.grad(loss)(logits, weights, implementation)
    exact = jax.grad(loss)(
        logits.astype("float64"), weights.astype("float64"), "reference"
    )
    error = abs(gradient.astype("float64") - exact).max((1, 2))
    error = dict(zip(named, error, strict=True))
    assert max(error.values()) < 1e-5, error


def rounding_errors(t, s, num_iters, finish, of_plan, block=False):
    """Errors of float32 gradients of `scaling`, relative to the largest if above 1."""
    logits, weights = (random(i, (t, s), "float32", 2.0 - i) for i in (0, 1))
    where = jnp.ones((t, s), bool)
    if block:  # Two separate blocks: what cancels does so in each of them.
        where = (jnp.arange(t)[:, None] < t // 2) == (jnp.arange(s)[None] < s // 2)
    a, b = jnp.ones(t, "float32"), jnp.full(s, t / s, "float32")

    def loss(logits, a, b, weights, implementation):
        options = {"row_marginal": a, "col_marginal": b, "finish": finish}
        options |= {"where": where, "implementation": implementation}
        if of_plan:
            return (jnp.cos(sinkhorn(logits, num_iters, **options)) * weights).sum()
        f, g, *_ = sinkhorn_potentials(logits, num_iters, **options)
        return (f * weights[:, 0]).sum() + (g * weights[0]).sum()

    def gradients(dtype, implementation):
        operands = (x.astype(dtype) for x in (logits, a, b, weights))
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=4)
        return gradient(*operands, implementation)

    got, exact = gradients("float32", "scaling"), gradients("float64", "reference")
    return [
        float(abs(x.astype("float64") - y).max() / max(1, abs(y).max()))
        for x, y in zip(got, exact, strict=True)
    ]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("t", "s", "num_iters"), [(1, 16, 1000), (16, 1, 1000), (64, 2, 100)]
)
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_rounding_errors_do_not_add_up_over_the_iterations(t, s, num_iters, finish):
    errors = rounding_errors(t, s, num_iters, finish, of_plan=True)
    assert max(errors) < 2e-6, errors


@pytest.mark.few(2)
@pytest.mark.parametrize("of_plan", [True, False])
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_rounding_errors_do_not_add_up_at_the_fixed_point(finish, of_plan):
    errors = rounding_errors(16, 2, 300, finish, of_plan)
    assert max(errors) < 4e-6, errors


def test_rounding_errors_do_not_add_up_in_separate_blocks():
    errors = rounding_errors(32, 4, 300, "rows", of_plan=True, block=True)
    assert max(errors) < 4e-6, errors


@pytest.mark.few(1)
@pytest.mark.usefixtures("in_log_space")
@pytest.mark.parametrize("of_plan", [True, False])
def test_rounding_errors_do_not_add_up_in_log_space(of_plan):
    errors = rounding_errors(16, 2, 300, "rows", of_plan)
    assert max(errors) < 4e-6, errors


def test_large_cotangents_stay_in_range():
    logits = jnp.stack([jnp.asarray(x) for x in hostile_logits(16).values()])
    weights = random(1, logits.shape, "float32")

    def gradient(size):
        loss = lambda z: (sinkhorn(z, 50) * weights * size).sum()
        return jax.grad(loss)(logits) / size

    sizes = jnp.float32(1), jnp.float32(1e20)
    chex.assert_trees_all_close(*map(gradient, sizes), atol=1e-6)


@pytest.mark.slow
def test_truncated_to_all_iterations_is_exact():
    logits = random(0, (T, S))

    def gradient(method):
        return jax.grad(lambda z: (sinkhorn(z, 3, gradient=method) ** 2).sum())(logits)

    chex.assert_trees_all_equal(gradient(Truncated(3)), gradient(Exact()))
    chex.assert_trees_all_equal(gradient(Truncated(9)), gradient(Exact()))


def test_implicit_is_the_limit_of_exact():
    logits = random(0, (T, S))

    def gradient(method):
        return jax.grad(lambda z: (sinkhorn(z, 200, gradient=method) ** 2).sum())(
            logits
        )

    chex.assert_trees_all_close(
        gradient(Implicit(tolerance=1e-12)),
        gradient(Exact()),
        atol=FLOAT64_GRADIENT_ATOL,
    )
