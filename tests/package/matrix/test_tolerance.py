"""Iterations that stop at a marginal error."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from support import reference
from support.jaxprs import equations
from support.matrices import S, T, random

from sinkhorn_jax import sinkhorn, sinkhorn_potentials
from sinkhorn_jax.matrix import IMPLEMENTATIONS

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.few(2)
@implementations
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_tolerance_stops_each_matrix_by_itself(implementation, finish):
    scales = jnp.array([0.1, 1.0, 3.0])[:, None, None]
    logits = random(0, (3, T, S)) * scales
    options = {"finish": finish, "implementation": implementation}
    stopped = sinkhorn_potentials(logits, 30, tolerance=1e-3, **options)
    assert (stopped.marginal_error <= 1e-3).all()
    assert stopped.num_iters[0] < stopped.num_iters[1] < stopped.num_iters[2]
    for z, n, f, g, error in zip(
        logits,
        stopped.num_iters,
        stopped.f,
        stopped.g,
        stopped.marginal_error,
        strict=True,
    ):
        fixed = reference.potentials(z, int(n), finish=finish)
        chex.assert_trees_all_close((f, g, error), fixed, atol=1e-12)
        if n > 1:
            assert reference.potentials(z, int(n) - 1, finish=finish)[2] > 1e-3


@pytest.mark.few(1)
@implementations
def test_tolerance_can_be_met_by_the_softmax_and_missed_at_the_limit(implementation):
    solve = functools.partial(sinkhorn_potentials, implementation=implementation)
    flat = solve(jnp.zeros((T, S)), 5, tolerance=1e-6)
    assert flat.num_iters == 0
    sharp = solve(random(0, (T, S), scale=9.0), 2, tolerance=1e-9)
    assert sharp.num_iters == 2
    assert sharp.marginal_error > 1e-9


@pytest.mark.parametrize("function", ["value", "gradient"])
def test_a_batch_copies_no_history_in_its_loops(function):
    """A select of the history in each iteration would take quadratic time."""
    limit = 77

    def value(logits):
        return sinkhorn(logits, limit, tolerance=1e-6, implementation="scaling").sum()

    traced = {"value": value, "gradient": jax.grad(value)}[function]
    jaxpr = jax.make_jaxpr(traced)(jnp.zeros((3, T, S)))
    loops = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "while"]
    assert loops
    bodies = [loop.params["body_jaxpr"].jaxpr for loop in loops]
    inside = [eqn for body in bodies for eqn in equations(body)]
    selected = [
        out.aval.shape
        for eqn in inside
        if eqn.primitive.name == "select_n"
        for out in eqn.outvars
    ]
    assert selected
    assert not any(limit + 1 in shape for shape in selected)
