"""Sinkhorn as a `lax.scan` of log-space half steps, differentiated by JAX itself.

This is the readable definition. Forward mode, Hessians and all other transforms work.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.adjoint import plan_sums, solve_columns
from .._core.domain import Log
from .._core.gradient import Implicit, kept_iterations
from .._core.iteration import iterate, relative_defect
from .._core.marginals import Marginals
from ._problem import Matrices, Potentials, Problem


class Solution(NamedTuple):
    """The plans and the potentials of a batch."""

    plan: Float[Array, "*batch T S"]
    potentials: Potentials


@functools.partial(jax.jit, static_argnums=0)
def solve(problem: Problem, matrices: Matrices) -> Solution:
    """The plan and the potentials of every matrix of a batch."""
    solve_all = functools.partial(_solve, problem.options)
    for _ in problem.batch:
        solve_all = jax.vmap(solve_all)
    return solve_all(*matrices)


@functools.partial(jax.jit, static_argnums=0)
def plan(problem: Problem, matrices: Matrices) -> Float[Array, "*batch T S"]:
    """The plan of every matrix of a batch."""
    return solve(problem, matrices).plan


@functools.partial(jax.jit, static_argnums=0)
def potentials(problem: Problem, matrices: Matrices) -> Potentials:
    """The potentials of every matrix of a batch."""
    return solve(problem, matrices).potentials


def why_not(problem: Problem) -> str | None:
    """None: it takes every problem."""
    del problem
    return None


def prefer(problem: Problem) -> bool:
    """True: it is the last of the table."""
    del problem
    return True


def _solve(options, logits, *marginals):
    marginals = Marginals(*marginals)
    a, b, tau = marginals
    # f and g are those of the shifted logits, until they are returned.
    domain = Log.of(logits)
    num_iters = _num_iters(options, logits, marginals)
    # Iterations before the last `depth` are not differentiated.
    depth = kept_iterations(options.gradient, options.num_iters)
    truncates = depth < options.num_iters

    def full_iteration(potentials, i):
        _, g = potentials
        if truncates:
            g = jnp.where(i == num_iters - depth, jax.lax.stop_gradient(g), g)
        f = domain.row_step(g, a)
        g = domain.col_step(f, b)
        if tau is not None:
            g = domain.part_way(g, tau)
        if options.tolerance is not None:
            # A matrix within the tolerance keeps its potentials in the remaining
            # steps: a `while_loop`, which could stop, has no reverse mode.
            f, g = jax.tree.map(
                lambda new, old: jnp.where(i < num_iters, new, old), (f, g), potentials
            )
        return (f, g), None

    f, g = jnp.zeros_like(a), domain.start()
    steps = jnp.arange(options.num_iters, dtype=jnp.int32)
    (f, g), _ = jax.lax.scan(full_iteration, (f, g), steps)
    if truncates and depth == 0:
        g = jax.lax.stop_gradient(g)
    if options.finish == "rows":
        f = domain.row_step(g, a)
        error = relative_defect(domain, g, domain.col_step(f, b), a, b)
    else:
        error = relative_defect(domain, f, domain.row_step(g, a), a, a)
    if isinstance(options.gradient, Implicit):
        f, g = jax.lax.stop_gradient((f, g))
        f, g = _at_the_fixed_point(options.gradient, logits, marginals, f, g)
    error = jax.lax.stop_gradient(error)
    potentials = Potentials(*domain.potentials(f, g), error, jnp.int32(num_iters))
    return Solution(domain.plan(f, g), potentials)


def _num_iters(options, logits, marginals):
    if options.tolerance is None:
        return options.num_iters
    logits, marginals = jax.lax.stop_gradient((logits, marginals))
    return iterate(Log.of(logits), marginals, options).num_iters


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _at_the_fixed_point(gradient, logits, marginals, f, g):
    del gradient, logits, marginals
    return f, g


@_at_the_fixed_point.defjvp
def _at_the_fixed_point_jvp(gradient, primals, tangents):
    # The marginals of P = exp(Z + f + g) stay at a and b, so their tangents,
    # P * (dZ + df + dg) summed over columns and over rows, are da and db. With tau,
    # g = tau h stays, where h is the whole column step.
    logits, (_, b, tau), *_ = primals
    dlogits, (da, db, dtau), *_ = tangents
    # The f and g of the primals are constants; these have a derivative themselves.
    f, g = _at_the_fixed_point(gradient, *primals)
    domain = Log.of(logits)
    moved = domain.plan(f, g) * dlogits
    rows, cols = da - moved.sum(axis=1), db - moved.sum(axis=0)
    row_sums, col_sums = plan_sums(domain, f, g)
    if tau is not None:
        cols = db * col_sums / jnp.where(b == 0, 1, b) - moved.sum(axis=0)
    rhs = cols - domain.apply_left(rows / row_sums, f, g)
    if tau is not None:
        _, h = domain.potentials(f, domain.col_step(f, b))
        rhs = tau * rhs + dtau * col_sums * h
    dg = solve_columns(domain, f, g, rhs, tau, gradient)
    df = jnp.where(domain.rows, (rows - domain.apply(f, g, dg)) / row_sums, 0)
    return (f, g), (df, dg)
