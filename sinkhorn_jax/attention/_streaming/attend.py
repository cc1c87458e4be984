"""Sinkhorn attention in linear memory: logits in query blocks, computed in every pass.

A pass computes the logits of one query block after another, each with all keys. Its row
step and its part of the next column step's sums come from one exponential:

    E = exp(Z + f + g)      r = 1 / (E c)      sums = r^T E      next c = b / sums

The plan is diag(r) E diag(c). The potentials f and g are fixed while the scalings r and
c move, and absorb the scalings before these drift out of range. So sums are as exact as
in the linear domain, however large the potentials are, and passes with the same f and g
compute the same bits of E. No step after the first changes a scaling by more than a
factor, which is max(T, S) for uniform marginals, so checking the drift once per
iteration is enough.

The backward pass makes one pass for the seeds and dV, one for each iteration of the
reverse sweep of docs/architecture.md, and one for the cotangents of queries, keys and
bias.
"""

import functools
from typing import Final

import jax

from ..._core.gradient import Implicit
from ..._core.precision import accum_dtype
from ..._runtime.arguments import are_known
from .._heads import Passes, attend_by_head
from .._problem import Attended, Operands, Problem, vary_alike
from .backward import backward
from .forward import forward
from .query_blocks import QueryBlocks, choose_layout

# Where `scaling` needs more than this for one head, `streaming` is taken unasked.
MEMORY_BUDGET: Final = 2**30  # Bytes.
SCALING_TS_ARRAYS: Final = 5  # Forward and backward, as `python -m benchmarks` reports.


@functools.partial(jax.jit, static_argnums=0)
def attend(problem: Problem, operands: Operands) -> Attended:
    """Output and, on request, marginal error."""
    return attend_by_head(problem, _passes, vary_alike(operands))


def why_not(problem: Problem) -> str | None:
    """A reason for what needs other iterations than `num_iters` of them."""
    if problem.options.tolerance is not None:
        return f"it takes no tolerance, got {problem.options.tolerance}"
    if isinstance(problem.options.gradient, Implicit):
        return "it takes gradient=Exact() and Truncated(k), not Implicit"
    if problem.token_axis is not None and problem.window is not None:
        return "it takes no local_window_size where sequence_axis divides the tokens"
    return None


def prefer(problem: Problem) -> bool:
    """Whether the arrays of the faster `scaling` exceed the memory budget."""
    if not are_known(problem.t, problem.s):
        return False
    itemsize = accum_dtype(problem.dtype).itemsize
    return SCALING_TS_ARRAYS * problem.t * problem.s * itemsize > MEMORY_BUDGET


def _passes(problem: Problem) -> Passes:
    rows, in_flight = choose_layout(problem)

    def head_forward(heads, index):
        return forward(QueryBlocks(heads, index, rows), heads.value(index))

    def head_backward(heads, index, history, query_t, do_t, df, size):
        blocks, value_t = QueryBlocks(heads, index, rows), heads.value(index).T
        cotangents = backward(blocks, query_t, value_t, do_t, df, history)
        return jax.tree.map(lambda x: x * size, cotangents)

    return Passes(head_forward, head_backward, in_flight)
