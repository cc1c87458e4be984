"""Sinkhorn in the linear domain: one exp per entry, then matrix-vector products.

The gradient is one reverse sweep of matrix-vector products and a correction of low
rank, where autodiff of a scan would keep a (T, S) array per iteration. A matrix that
the linear domain cannot represent takes log space, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.gradient import adjoint
from .._core.iteration import marginal_error
from .._core.solve import pull_back, solve, to_unit
from .._runtime.scheduling import map_matrices, matrices_in_flight
from ._problem import Potentials, Problem


@functools.partial(jax.jit, static_argnums=0)
def plan(
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> Float[Array, "M T S"]:
    """The plan of every matrix of a batch."""
    return _plan(problem, logits, a, b)


@functools.partial(jax.jit, static_argnums=0)
def potentials(
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> Potentials:
    """The potentials of every matrix of a batch."""
    return _potentials(problem, logits, a, b)


def why_not(problem: Problem) -> str | None:
    """It takes every problem."""
    del problem
    return None


def prefer(problem: Problem) -> bool:
    """It is the faster one for every shape that was measured."""
    del problem
    return True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plan(problem, logits, a, b):
    return _plan_fwd(problem, logits, a, b)[0]


def _plan_fwd(problem, logits, a, b):
    def output(domain, history, a, b):
        del a, b
        return domain.plan(*history.end(problem.options.finish))

    return _forward(problem, output, logits, a, b)


def _plan_bwd(problem, residuals, dplan):
    def cotangents(domain, history, a, b, dplan):
        r, c = history.end(problem.options.finish)
        # d plan_ij = plan_ij (d logits_ij + d f_i + d g_j)
        moved = domain.plan(r, c) * dplan
        df, dg = moved.sum(axis=1), moved.sum(axis=0)
        correction = adjoint(
            problem.options.gradient,
            domain,
            history,
            df,
            dg,
            a,
            b,
            problem.options.finish,
        )
        return domain.pull_back(r, c, dplan, correction), correction

    return _backward(problem, cotangents, residuals, dplan)


_plan.defvjp(_plan_fwd, _plan_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _potentials(problem, logits, a, b):
    return _potentials_fwd(problem, logits, a, b)[0]


def _potentials_fwd(problem, logits, a, b):
    def output(domain, history, a, b):
        f, g = domain.potentials(*history.end(problem.options.finish))
        error = marginal_error(domain, history, a, b, problem.options.finish)
        return Potentials(f, g, error, jnp.int32(history.num_iters))

    return _forward(problem, output, logits, a, b)


def _potentials_bwd(problem, residuals, cotangent):
    def cotangents(domain, history, a, b, dpotentials):
        df, dg = dpotentials
        r, c = history.end(problem.options.finish)
        correction = adjoint(
            problem.options.gradient,
            domain,
            history,
            df,
            dg,
            a,
            b,
            problem.options.finish,
        )
        direct = jnp.zeros((), r.dtype)  # Potentials see the logits only through sums.
        return domain.pull_back(r, c, direct, correction), correction

    # The other two fields are not differentiated.
    return _backward(problem, cotangents, residuals, (cotangent.f, cotangent.g))


_potentials.defvjp(_potentials_fwd, _potentials_bwd)


def _forward(problem, output, logits, a, b):
    def one(matrix):
        logits, a, b = matrix
        return solve(
            lambda: logits,
            lambda _: (a, b),
            output,
            problem.options,
        )

    out, solution = map_matrices(one, (logits, a, b), _in_flight(problem, logits))
    return out, (logits, a, b, solution)


def _backward(problem, cotangents, residuals, cotangent):
    def one(matrix):
        (logits, a, b, solution), cotangent = matrix
        # The pull-back is linear; a large cotangent must not take factors out of range.
        unit, size = to_unit(cotangent)

        def in_domain(domain):
            dlogits, correction = cotangents(domain, solution.history, a, b, unit)
            # f = log a - ..., so each row step adds its weight to d a; so for columns.
            da, db = (
                correction.row_weight.sum(axis=0),
                correction.col_weight.sum(axis=0),
            )
            return dlogits * size, da * size, db * size

        return pull_back(lambda: logits, solution, in_domain)

    logits = residuals[0]
    return map_matrices(one, (residuals, cotangent), _in_flight(problem, logits))


def _in_flight(problem, logits):
    return matrices_in_flight(
        problem.batch, problem.t, problem.s, logits.dtype.itemsize
    )
