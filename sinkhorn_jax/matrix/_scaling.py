"""Sinkhorn in the linear domain: one exp per entry, then matrix-vector products.

The gradient is one reverse sweep and a correction of low rank; autodiff of a scan would
keep a (T, S) array per iteration. A matrix that the linear domain cannot represent is
computed in log space, forward and backward.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.adjoint import adjoint
from .._core.iteration import marginal_error
from .._core.marginals import Marginals
from .._core.solve import solve, solve_backward, to_unit
from .._runtime.partition import by_part
from .._runtime.scheduling import map_matrices, matrices_in_flight
from ._problem import Matrices, Potentials, Problem


@functools.partial(jax.jit, static_argnums=0)
def plan(problem: Problem, matrices: Matrices) -> Float[Array, "*batch T S"]:
    """The plan of every matrix of a batch."""
    return _solve(problem, True, matrices)


@functools.partial(jax.jit, static_argnums=0)
def potentials(problem: Problem, matrices: Matrices) -> Potentials:
    """The potentials of every matrix of a batch."""
    return _solve(problem, False, matrices)


def why_not(problem: Problem) -> str | None:
    """None: it takes every problem."""
    del problem
    return None


def prefer(problem: Problem) -> bool:
    """True: the kernels before it in the table run only when they are named."""
    del problem
    return True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solve(problem, has_plan, matrices):
    return _solve_fwd(problem, has_plan, matrices)[0]


def _solve_fwd(problem, has_plan, matrices):
    finish = problem.options.finish

    def output(domain, history, marginals):
        scalings = history.end(finish)
        if has_plan:
            return domain.plan(*scalings)
        f, g = domain.potentials(*scalings)
        if marginals.tau is not None:  # The part of a scaling may have underflowed.
            full_c = history.full_c[history.num_iters]
            g = marginals.tau * domain.potentials(scalings[0], full_c)[1]
        # The iteration starts from g = 0, but exp(n) may have underflowed.
        g = jnp.where(history.num_iters == 0, 0, g)
        error = marginal_error(domain, history, marginals, finish)
        return Potentials(f, g, error, jnp.int32(history.num_iters))

    def one(matrix):
        logits, *marginals = matrix
        in_any_domain = lambda _: Marginals(*marginals)
        return solve(lambda: logits, in_any_domain, output, problem.options)

    def of_part(matrices):
        part = problem.part_of(matrices)
        flat = part.flatten(matrices)
        return part.unflatten(map_matrices(one, flat, _in_flight(part, matrices)))

    out, solution = by_part(of_part, problem.axes, problem.axes, matrices)
    return out, (matrices, solution)


def _solve_bwd(problem, has_plan, residuals, cotangent):
    if not has_plan:  # The other two fields are not differentiated.
        cotangent = cotangent.f, cotangent.g

    def one(matrix):
        ((logits, *marginals), solution), cotangent = matrix
        unit, size = to_unit(cotangent)

        def in_domain(domain):
            r, c = solution.history.end(problem.options.finish)
            if has_plan:
                # d plan_ij = plan_ij (d logits_ij + d f_i + d g_j)
                direct = unit
                moved = domain.plan(r, c) * unit
                df, dg = moved.sum(axis=1), moved.sum(axis=0)
            else:
                # Potentials depend on the logits through the half steps alone.
                direct = jnp.zeros((), r.dtype)
                df, dg = unit
            history = solution.history
            correction = adjoint(
                *(problem.options, domain, history, df, dg, Marginals(*marginals)),
                of_plan=has_plan,
            )
            dlogits = domain.logits_cotangent(r, c, direct, correction)
            cotangents = Matrices(dlogits, *correction.marginals)
            return jax.tree.map(lambda x: x * size, cotangents)

        return solve_backward(lambda: logits, solution, in_domain)

    def of_part(*arrays):
        (matrices, _), _ = arrays
        part = problem.part_of(matrices)
        flat = part.flatten(arrays)
        return part.unflatten(map_matrices(one, flat, _in_flight(part, matrices)))

    return (by_part(of_part, problem.axes, problem.axes, residuals, cotangent),)


_solve.defvjp(_solve_fwd, _solve_bwd)


def _in_flight(problem, matrices):
    itemsize = matrices.logits.dtype.itemsize
    num = math.prod(problem.batch)
    return matrices_in_flight(num, problem.t, problem.s, itemsize)
