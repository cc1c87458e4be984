"""Sinkhorn attention in the linear domain, one kernel matrix for each head in flight.

Nothing of size (T, S) outlives a head: the backward pass computes the kernel matrix
again from queries and keys, and reads the scalings of every iteration, (T + S) numbers
each.
"""

import functools

import jax

from .._core.adjoint import adjoint
from .._core.domain import Product
from .._core.iteration import marginal_error
from .._core.precision import dot
from .._core.solve import solve, solve_backward
from ._heads import HeadCotangents, Passes, attend_by_head
from ._problem import Attended, Operands, Problem, vary_alike


@functools.partial(jax.jit, static_argnums=0)
def attend(problem: Problem, operands: Operands) -> Attended:
    """Output and, on request, marginal error."""
    return attend_by_head(problem, _passes, vary_alike(operands))


def why_not(_: Problem) -> None:
    """None: this implementation takes every problem."""


def prefer(_: Problem) -> bool:
    """True: in the committed rows, all on CPUs, it is fastest for num_iters >= 1."""
    return True


def _passes(_: Problem) -> Passes:
    return Passes(_forward, _backward)


def _forward(heads, index):
    q, k, v = heads.query(index), heads.key(index), heads.value(index)
    keep, options = heads.keep(index), heads.problem.options

    def output(domain, history, marginals):
        r, c = history.end(options.finish)
        if keep is None:
            out = domain.apply(r, c, v)
        else:
            out = dot(domain.plan(r, c) * keep, v)
        if not heads.problem.return_marginal_error:
            return out, None
        return out, marginal_error(domain, history, marginals, options.finish)

    logits = lambda: heads.logits(index, q, k.T)
    marginals = lambda domain: heads.marginals(index, domain.rows, domain.cols)
    return solve(logits, marginals, output, options)


def _backward(heads, index, solution, q_t, do_t, df, size):
    q, k, v = heads.query(index), heads.key(index), heads.value(index)
    keep, options = heads.keep(index), heads.problem.options

    def in_domain(domain):
        marginals = heads.marginals(index, domain.rows, domain.cols)
        r, c = solution.history.end(options.finish)
        if keep is None:
            dplan = Product(do_t, v.T)
            dv_t = domain.apply_left(do_t, r, c)
        else:
            dplan = dot(do_t.T, v.T) * keep
            dv_t = dot(do_t, domain.plan(r, c) * keep)
        history, dg = solution.history, (v.T * dv_t).sum(axis=0)
        correction = adjoint(options, domain, history, df, dg, marginals, of_plan=True)
        dz = domain.logits_cotangent(r, c, dplan, correction)
        marginals = heads.given_marginals(correction.marginals)
        head = HeadCotangents(dot(dz, k), dot(q_t, dz), dv_t, marginals)
        return jax.tree.map(lambda x: x * size, (head, heads.sum_to_bias(dz)))

    return solve_backward(lambda: heads.logits(index, q, k.T), solution, in_domain)
