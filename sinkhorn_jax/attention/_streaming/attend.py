"""Sinkhorn attention in linear memory: strips of logits, made anew in every pass.

A pass holds some rows of the logits Z at a time, with all their columns. So a row step
and the column sums that the next column step needs come from one exponential:

    E = exp(Z + f + g)      r = 1 / (E c)      sums = r^T E      next c = b / sums

The plan is r E c. f and g are potentials that stay while r and c move; before those
drift out of range f and g take them up. So sums are as exact as in the linear domain,
however large the potentials are, and E is the same to the bit in every pass that has
the same f and g. As the marginals are uniform, no step after the first changes a
scaling by more than a factor max(T, S): nothing is lost between two looks.

The backward pass goes through the iterations in reverse, one exponential each, and then
makes the cotangents of queries and keys with a correction of rank 2 L + 1.
"""

import functools
from typing import Final

import jax
from jaxtyping import Array, Float

from ..._core.gradient import Implicit
from ..._core.precision import accum_dtype
from ..._core.solve import to_unit
from .._heads import Heads
from .._problem import Operands, Problem, vary_alike
from .backward import backward
from .forward import forward
from .strips import Strips, layout

# In bytes. Unasked, `scaling` is taken while what it holds for one head fits into this,
# and beyond that `streaming`.
MEMORY_BUDGET: Final = 2**30
SCALING_TS_ARRAYS: Final = 5  # Forward and backward, as `python -m benchmarks` reports.


@functools.partial(jax.jit, static_argnums=0)
def attend(
    problem: Problem, operands: Operands
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]:
    """Output and, on request, marginal error."""
    return _attend(problem, layout(problem), vary_alike(operands))


def why_not(problem: Problem) -> str | None:
    """It differentiates the iteration that it ran, not the fixed point."""
    if isinstance(problem.options.gradient, Implicit):
        return "it takes gradient=Exact() and Truncated(k), not Implicit"
    return None


def prefer(problem: Problem) -> bool:
    """Where the arrays of the faster `scaling` do not fit the memory budget."""
    itemsize = accum_dtype(problem.dtype).itemsize
    return SCALING_TS_ARRAYS * problem.t * problem.s * itemsize > MEMORY_BUDGET


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(problem, cut, operands):
    return _attend_fwd(problem, cut, operands)[0]


def _attend_fwd(problem, cut, operands):
    heads = Heads(problem, operands, cut.heads_in_flight)

    def head(index):
        return forward(Strips(heads, index, cut.rows), heads.value(index))

    out, error, history = heads.map(head, heads.indices)
    out = heads.join(out)
    if error is not None:
        error = error.reshape(problem.batch, problem.num_heads)
    return (out.astype(problem.dtype), error), (operands, out, history)


def _attend_bwd(problem, cut, residuals, cotangents):
    operands, out, history = residuals
    dout, _ = cotangents  # The marginal error is not differentiated.
    heads = Heads(problem, operands, cut.heads_in_flight)
    dout = dout.astype(heads.dtype)
    # d f of the result: rowsum(plan * d plan) = rowsum(dout * out), dropout or not.
    df = (dout * out).sum(axis=-1)

    def head(inputs):
        index, history, query_t, cotangent = inputs
        # The pull-back is linear; a large cotangent must not take factors out of range.
        (do_t, df), size = to_unit(cotangent)
        strips = Strips(heads, index, cut.rows)
        grads = backward(strips, query_t, heads.value(index).T, do_t, df, history)
        return jax.tree.map(lambda x: x * size, grads)

    inputs = (
        heads.indices,
        history,
        heads.split_transposed(
            heads.low(operands.query.astype(heads.dtype) * problem.scale)
        ),
        (heads.split_transposed(dout), heads.split(df)),
    )
    (dq, dk_t, dv_t), dbias = heads.map_and_sum_bias(head, inputs)
    return (heads.cotangents(dq, dk_t, dv_t, dbias),)


_attend.defvjp(_attend_fwd, _attend_bwd)
