"""Sinkhorn attention as Pallas kernels for TPUs.

There is one kernel forward and one backward, in one of two regimes. Where the kernel
matrix of a head fits VMEM it is resident: it is computed with one exponential per
entry, and an iteration is a matrix-vector product on either side. Otherwise it is
streamed: every iteration computes it again, one query block after another, with one
exponential per entry, and nothing of size (T, S) is stored. The grid of a TPU core runs
in order, so sums over query blocks are plain accumulators, always added up in the same
order.

Potentials and sums are in float32. Products of the plan are in the inputs' dtype with
sums in float32, as in flash attention.

Blocks are chosen for the VMEM of the TPU that is traced for: see `vmem_capacity`, and
`sinkhorn_attention` for how to name one.
"""

import functools

import jax
import jax.numpy as jnp

from ..._runtime.shard_map import varying_like
from ..._runtime.vmap import fold_vmap
from .._heads import join, join_to_keys, split, split_transposed
from .._pallas_common import scale_queries, to_unit_by_head, why_not_options
from .._problem import Attended, Operands, Problem, vary_alike
from .backward import backward
from .blocks import check_fits, default_blocks
from .forward import forward


@functools.partial(jax.jit, static_argnums=0)
def attend(problem: Problem, operands: Operands) -> Attended:
    """Output and, on request, marginal error.

    Raises:
        NotImplementedError: The TPU that is traced for has too little VMEM for the
            forward kernel. The backward pass raises it for the backward kernel.
    """
    blocks = tuple(default_blocks(problem, x) for x in ("forward", "backward"))
    check_fits(problem, blocks[0], "forward")
    operands = scale_queries(problem, vary_alike(operands))
    lengths = varying_like(_lengths(problem, operands), operands.query)
    return _attend(problem, blocks, lengths, operands[:3])


def why_not(problem: Problem) -> str | None:
    """The first limit of the kernels that the problem exceeds, or None."""
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return f"a TPU kernel takes float32 and bfloat16, got {problem.dtype}"
    return why_not_options(problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(problem, blocks, lengths, arrays):
    return _attend_fwd(problem, blocks, lengths, arrays)[0]


def _attend_fwd(problem, blocks, lengths, arrays):
    blocks, _ = blocks
    solve = functools.partial(forward, problem, blocks)
    out, errors, history = fold_vmap(solve, *lengths, *_split(blocks, *arrays))
    error = None
    if errors:
        error = errors[0][:, 0, 0].reshape(problem.batch, problem.num_heads)
    return (join(problem, out)[:, : problem.t], error), (lengths, arrays, history)


def _attend_bwd(problem, blocks, residuals, cotangents):
    _, blocks = blocks
    check_fits(problem, blocks, "backward")
    lengths, arrays, history = residuals
    dout, _ = cotangents  # The marginal error is not differentiated.
    dout, size = to_unit_by_head(varying_like(dout, arrays[0]))
    dq, dk, dv = fold_vmap(
        functools.partial(backward, problem, blocks),
        *(*lengths, *_split(blocks, *arrays), _rows(blocks, dout)),
        *history,
    )
    dq, dk, dv = (x * size.reshape(-1, 1, 1) for x in (dq, dk, dv))
    dquery = join(problem, dq)[:, : problem.t]
    dkey, dvalue = (join_to_keys(problem, x)[:, : problem.s] for x in (dk, dv))
    grads = tuple(x.astype(problem.dtype) for x in (dquery, dkey, dvalue))
    return (None, None), grads


_attend.defvjp(_attend_fwd, _attend_bwd)


def _lengths(problem, operands):
    def length(valid, full):
        if valid is None:
            return jnp.full(problem.batch, full, jnp.int32)
        return valid.sum(axis=1, dtype=jnp.int32)

    rows = length(operands.query_valid, problem.t)
    cols = length(operands.key_valid, problem.s)
    # Rows without columns are padding, and columns without rows.
    is_empty = (rows == 0) | (cols == 0)
    return jnp.where(is_empty, 0, rows), jnp.where(is_empty, 0, cols)


def _split(blocks, query, key, value):
    return _rows(blocks, query), _cols(blocks, key), _cols(blocks, value)


def _cols(blocks, x):
    x = split_transposed(x)  # A short last axis would be padded to 128.
    return jnp.pad(x, ((0, 0), (0, 0), (0, blocks.cols - x.shape[2])))


def _rows(blocks, x):
    x = split(x)
    return jnp.pad(x, ((0, 0), (0, blocks.padded_rows - x.shape[1]), (0, 0)))
