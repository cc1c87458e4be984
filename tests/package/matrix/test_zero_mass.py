"""A row or column of mass 0 is padding, whether its mass is known at tracing or not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.hostile import hostile_logits
from support.matrices import random

from sinkhorn_jax import Exact, Implicit, Truncated, sinkhorn, sinkhorn_potentials
from sinkhorn_jax.matrix import IMPLEMENTATIONS

# `Implicit` solves its system to 1e-13. Gradients are sums of some hundred terms of
# order 1, with float32 in the kernels.
ATOL = {"float64": 1e-11, "float32": 1e-4}

# The interpreter of TPU kernels is slow.
implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "mosaic_tpu"))
        for name in IMPLEMENTATIONS
    ],
)
dtype_of = lambda name: "float32" if "mosaic" in name else "float64"

A, B = np.array([1.0, 0.0, 2.0, 1.5]), np.array([1.0, 2.0, 0.0, 0.5, 1.0])
KEPT = np.ix_(A > 0, B > 0)

CASES = {
    "rows": {},
    "columns": {"finish": "columns"},
    "no iterations": {"num_iters": 0},
    "truncated": {"gradient": Truncated(1)},
    "implicit": {"gradient": Implicit(tolerance=1e-13), "num_iters": 200},
    "tolerance": {"tolerance": 0.03, "num_iters": 20},
    "tolerance, columns": {"tolerance": 0.03, "num_iters": 20, "finish": "columns"},
}


def results(logits, a, b, implementation, case, where=None):
    """Plan, potentials, and gradients with respect to the logits and the marginals."""
    options = {"num_iters": 4, "implementation": implementation} | CASES[case]
    options["where"] = where
    w = random(9, logits.shape, logits.dtype)

    def loss(logits, a, b):
        given = options | {"row_marginal": a, "col_marginal": b}
        solution = sinkhorn_potentials(logits, **given)
        given.pop("tolerance", None)
        plan = sinkhorn(logits, **given)
        loss = (jnp.sin(solution.f) * w[:, 0]).sum()
        loss += (jnp.cos(solution.g) * w[0]).sum() + (plan**2 * w).sum()
        return loss, (plan, solution)

    gradient, values = jax.grad(loss, (0, 1, 2), has_aux=True)(logits, a, b)
    return values, gradient


@pytest.mark.few(1)
@implementations
@pytest.mark.parametrize("case", CASES)
def test_zero_mass_equals_an_excluded_row_or_column(implementation, case):
    dtype = dtype_of(implementation)
    a, b = jnp.asarray(A, dtype), jnp.asarray(B, dtype)
    logits = random(0, (4, 5), dtype, 2.0)
    solve = jax.jit(results, static_argnums=(3, 4))
    got = solve(logits, a, b, implementation, case)
    excluded = solve(
        logits,
        jnp.where(a == 0, 7, a),
        b,
        implementation,
        case,
        jnp.asarray(A > 0)[:, None],
    )
    chex.assert_trees_all_close(got, excluded, atol=ATOL["float64"])
    (plan, (f, g, error, num_iters)), gradient = got
    chex.assert_tree_all_finite((plan, f, g, error, gradient))
    dlogits, da, db = gradient
    assert not any(x[A == 0].any() for x in (plan, f, dlogits, da))
    assert not any(x[..., B == 0].any() for x in (plan, g, dlogits, db))
    finish = CASES[case].get("finish", "rows")
    expected = reference.potentials(
        logits[KEPT], int(num_iters), A[A > 0], B[B > 0], finish
    )
    kept = f[A > 0], g[B > 0], error
    chex.assert_trees_all_close(kept, expected, atol=ATOL[dtype])


@pytest.mark.usefixtures("unchecked")
@implementations
def test_known_and_unknown_mass_give_the_same(implementation):
    dtype = dtype_of(implementation)
    a, b = A.astype(dtype), B.astype(dtype)
    logits = random(0, (4, 5), dtype)
    solve = lambda z, a, b: sinkhorn(
        z, 3, row_marginal=a, col_marginal=b, implementation=implementation
    )
    plan = solve(logits, a, b)
    atol = 4 * float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(jax.jit(solve)(logits, a, b), plan, atol=atol)
    known = jax.jit(lambda z: solve(z, a, b))(logits)
    chex.assert_trees_all_close(known, plan, atol=atol)
    each = jax.vmap(solve, (None, 0, None))(logits, jnp.stack([a, a[::-1]]), b)
    chex.assert_trees_all_close(each[0], plan, atol=atol)
    expected = reference.sinkhorn(logits[KEPT], 3, A[A > 0], B[B > 0])
    np.testing.assert_allclose(plan[KEPT], expected, atol=ATOL[dtype])


@pytest.mark.parametrize("gradient", [Exact(), Implicit(tolerance=1e-5)], ids=str)
def test_zero_mass_where_the_linear_domain_does_not_suffice(gradient):
    name = "0 on a cross, -120 elsewhere"
    logits = jnp.asarray(hostile_logits(8)[name])
    mass = jnp.ones(8, "float32").at[3].set(0)

    @jax.jit
    def solve(logits, a, b):
        given = {"row_marginal": a, "col_marginal": b, "gradient": gradient}
        plan = lambda z, a, b: sinkhorn(z, 50, **given | {"row_marginal": a})
        total = lambda *x: (plan(*x) ** 2).sum()
        return plan(logits, a, b), jax.grad(total, (0, 1, 2))(logits, a, b)

    plan, gradient = solve(logits, mass, mass)
    chex.assert_tree_all_finite(gradient)
    kept = np.asarray(mass) > 0
    expected = reference.sinkhorn(logits[kept][:, kept], 50)
    np.testing.assert_allclose(plan[kept][:, kept], expected, atol=3e-5)


@pytest.mark.usefixtures("unchecked")
@implementations
def test_no_mass_at_all_is_an_empty_plan(implementation):
    plan = sinkhorn(
        random(0, (4, 5), "float32"),
        col_marginal=np.zeros(5),
        implementation=implementation,
    )
    assert not plan.any()


@implementations
def test_a_mass_of_nan_that_is_unknown_at_tracing_is_not_hidden(implementation):
    solve = jax.jit(
        lambda z, a: (
            sinkhorn_potentials(
                z, 3, row_marginal=a, implementation=implementation
            ).marginal_error
        )
    )
    a = jnp.asarray(A, "float32").at[0].set(np.nan)
    assert np.isnan(solve(random(0, (4, 5), "float32"), a))
