"""Sinkhorn attention in the linear domain, one kernel matrix per head in flight.

Nothing of size (T, S) outlives a head: the backward pass makes the kernel matrix again
from the queries and keys and the scalings of every iteration, (T + S) numbers each.
"""

import functools

import jax
from jaxtyping import Array, Float

from .._core.domain import Product
from .._core.gradient import adjoint
from .._core.iteration import marginal_error
from .._core.precision import dot
from .._core.solve import pull_back, solve, to_unit
from ._heads import Heads
from ._problem import Operands, Problem, vary_alike


@functools.partial(jax.jit, static_argnums=0)
def attend(
    problem: Problem, operands: Operands
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]:
    """Output and, on request, marginal error."""
    return _attend(problem, vary_alike(operands))


def why_not(problem: Problem) -> str | None:
    """It takes every problem."""
    del problem
    return None


def prefer(problem: Problem) -> bool:
    """It is the faster one for every shape that was measured."""
    del problem
    return True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, operands):
    return _attend_fwd(problem, operands)[0]


def _attend_fwd(problem, operands):
    heads = Heads(problem, operands)

    def head(index):
        q, k, v = heads.query(index), heads.key(index), heads.value(index)
        keep = heads.keep(index)

        def output(domain, history, a, b):
            r, c = history.end(problem.options.finish)
            if keep is None:
                out = domain.apply(r, c, v)
            else:
                out = dot(domain.plan(r, c) * keep, v)
            if not problem.return_marginal_error:
                return out, None
            return out, marginal_error(domain, history, a, b, problem.options.finish)

        return solve(
            lambda: heads.logits(index, q, k.T),
            heads.marginals,
            output,
            problem.options,
        )

    (out, error), solution = heads.map(head, heads.indices)
    out = heads.join(out)
    if error is not None:
        error = error.reshape(problem.batch, problem.num_heads)
    return (out.astype(problem.dtype), error), (operands, out, solution)


def _attend_bwd(problem, residuals, cotangents):
    operands, out, solution = residuals
    dout, _ = cotangents  # The marginal error is not differentiated.
    heads = Heads(problem, operands)
    dout = dout.astype(heads.dtype)
    # d f of the result: rowsum(plan * d plan) = rowsum(dout * out), dropout or not.
    df = (dout * out).sum(axis=-1)

    def head(inputs):
        index, solution, q_t, cotangent = inputs
        # The pull-back is linear; a large cotangent must not take factors out of range.
        (do_t, df), size = to_unit(cotangent)
        q, k, v = heads.query(index), heads.key(index), heads.value(index)
        keep = heads.keep(index)

        def in_domain(domain):
            a, b = heads.marginals(domain)
            r, c = solution.history.end(problem.options.finish)
            if keep is None:
                dplan = Product(do_t, v.T)
                dv_t = domain.apply_left(do_t, r, c)
            else:
                dplan = dot(do_t.T, v.T) * keep
                dv_t = dot(do_t, domain.plan(r, c) * keep)
            correction = adjoint(
                problem.options.gradient,
                domain,
                solution.history,
                df,
                (v.T * dv_t).sum(axis=0),
                a,
                b,
                problem.options.finish,
            )
            dz = domain.pull_back(r, c, dplan, correction)
            grads = (dot(dz, k), dot(q_t, dz), dv_t), heads.sum_to_bias(dz)
            return jax.tree.map(lambda x: x * size, grads)

        return pull_back(lambda: heads.logits(index, q, k.T), solution, in_domain)

    inputs = (
        heads.indices,
        solution,
        heads.split_transposed(operands.query.astype(heads.dtype) * problem.scale),
        (heads.split_transposed(dout), heads.split(df)),
    )
    (dq, dk_t, dv_t), dbias = heads.map_and_sum_bias(head, inputs)
    return (heads.cotangents(dq, dk_t, dv_t, dbias),)


_attend.defvjp(_attend_fwd, _attend_bwd)
