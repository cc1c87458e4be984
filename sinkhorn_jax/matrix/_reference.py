"""Sinkhorn as a `lax.scan` of log-space half steps, differentiated by JAX itself.

The readable definition. Any transform works on it: forward mode, Hessians, `vmap`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.domain import Log
from .._core.gradient import Implicit, kept_iterations, solve_marginals
from .._core.iteration import iterate_until, relative_defect
from ._problem import Potentials, Problem


@functools.partial(jax.jit, static_argnums=0)
def plan(
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> Float[Array, "M T S"]:
    """The plan of every matrix of a batch."""
    f, g, *_ = potentials(problem, logits, a, b)
    return jnp.exp(logits + f[:, :, None] + g[:, None, :])


@functools.partial(jax.jit, static_argnums=0)
def potentials(
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> Potentials:
    """The potentials of every matrix of a batch."""
    return jax.vmap(functools.partial(_potentials, problem.options))(logits, a, b)


def why_not(problem: Problem) -> str | None:
    """It takes every problem."""
    del problem
    return None


def prefer(problem: Problem) -> bool:
    """Whatever nothing before it takes."""
    del problem
    return True


def _potentials(options, logits, a, b):
    domain = _domain(logits, a, b)
    num_iters = _num_iters(options, logits, a, b)
    # What is older than the last `depth` iterations is a constant.
    depth = kept_iterations(options.gradient, options.num_iters)
    truncates = depth < options.num_iters

    def full_iteration(potentials, i):
        _, g = potentials
        if truncates:
            g = jnp.where(i == num_iters - depth, jax.lax.stop_gradient(g), g)
        f = domain.row_step(g, a)
        g = domain.col_step(f, b)
        if options.tolerance is not None:
            # A while_loop would have no reverse mode; finished matrices stand still.
            f, g = jax.tree.map(
                lambda new, old: jnp.where(i < num_iters, new, old), (f, g), potentials
            )
        return (f, g), None

    f, g = jnp.zeros_like(a), jnp.zeros_like(b)
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
        f, g = _at_the_fixed_point(options.gradient, logits, a, b, f, g)
    return Potentials(f, g, jax.lax.stop_gradient(error), jnp.int32(num_iters))


def _domain(logits, a, b):
    # Not shifted: the definition, to the letter.
    return Log(logits, a > 0, b > 0, jnp.zeros_like(a), jnp.zeros_like(b))


def _num_iters(options, logits, a, b):
    if options.tolerance is None:
        return options.num_iters
    logits, a, b = jax.lax.stop_gradient((logits, a, b))
    return iterate_until(
        _domain(logits, a, b),
        jnp.zeros_like(b),
        a,
        b,
        options.num_iters,
        options.tolerance,
        options.finish,
    ).num_iters


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _at_the_fixed_point(gradient, logits, a, b, f, g):
    del gradient, logits, a, b
    return f, g


@_at_the_fixed_point.defjvp
def _at_the_fixed_point_jvp(gradient, primals, tangents):
    # The marginals of P = exp(Z + f + g) stay at a and b, so their tangents,
    # P * (dZ + df + dg) summed over columns and over rows, are da and db.
    logits, a, b, *_ = primals
    dlogits, da, db, *_ = tangents
    # Not the f and g of the primals, which are constants: this has a derivative too.
    f, g = _at_the_fixed_point(gradient, *primals)
    domain = _domain(logits, a, b)
    moved = domain.plan(f, g) * dlogits
    rows, cols = da - moved.sum(axis=1), db - moved.sum(axis=0)
    return (f, g), solve_marginals(domain, f, g, rows, cols, gradient)
