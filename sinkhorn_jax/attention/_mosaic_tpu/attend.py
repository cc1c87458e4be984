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
from typing import Final

import jax
import jax.numpy as jnp

from ..._runtime.partition import by_part
from ..._runtime.shard_map import varying_like
from ..._runtime.vmap import fold_vmap
from .._heads import (
    join,
    join_batch,
    join_to_keys,
    split,
    split_batch,
    split_transposed,
)
from .._pallas_common import scale_queries, to_unit_by_head, why_not_options
from .._problem import AXES, Attended, Operands, Problem, part_of, vary_alike
from .backward import backward
from .blocks import check_fits, default_blocks
from .forward import forward

# The axes of lengths and of queries, keys and values, as in `_runtime.partition`.
_AXES: Final = ("b", AXES[:3])


@functools.partial(jax.jit, static_argnums=0)
def attend(problem: Problem, operands: Operands) -> Attended:
    """Output and, on request, marginal error.

    Raises:
        NotImplementedError: The TPU that is traced for has too little VMEM for the
            forward kernel. The backward pass raises it for the backward kernel.
    """
    check_fits(problem, default_blocks(problem, "forward"), "forward")
    operands = scale_queries(problem, vary_alike(operands))
    lengths = varying_like(_lengths(problem, operands), operands.query)
    return _attend(problem, lengths, operands[:3])


def why_not(problem: Problem) -> str | None:
    """The first limit of the kernels that the problem exceeds, or None."""
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return f"a TPU kernel takes float32 and bfloat16, got {problem.dtype}"
    return why_not_options(problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, lengths, arrays):
    return _attend_fwd(problem, lengths, arrays)[0]


def _attend_fwd(problem, lengths, arrays):
    def of_part(lengths, arrays):
        part = part_of(problem, Operands(*arrays))
        blocks = default_blocks(part, "forward")
        solve = functools.partial(forward, part, blocks)
        out, errors, history = fold_vmap(solve, *lengths, *_split(blocks, *arrays))
        error = errors[0][:, 0, 0] if errors else None
        out = join(part, out)[:, : part.t]
        return (out, *join_batch(part, (error, history)))

    out, error, history = by_part(of_part, _AXES, ("b.n.", "bn", "bn"), lengths, arrays)
    return (out, error), (lengths, arrays, history)


def _attend_bwd(problem, residuals, cotangents):
    check_fits(problem, default_blocks(problem, "backward"), "backward")
    lengths, arrays, history = residuals
    dout, _ = cotangents  # The marginal error is not differentiated.

    def of_part(lengths, arrays, history, dout):
        part = part_of(problem, Operands(*arrays))
        blocks = default_blocks(part, "backward")
        dout, size = to_unit_by_head(dout)
        dq, dk, dv = fold_vmap(
            functools.partial(backward, part, blocks),
            *(*lengths, *_split(blocks, *arrays), _rows(blocks, dout)),
            *split_batch(history),
        )
        dq, dk, dv = (x * size.reshape(-1, 1, 1) for x in (dq, dk, dv))
        dquery = join(part, dq)[:, : part.t]
        dkey, dvalue = (join_to_keys(part, x)[:, : part.s] for x in (dk, dv))
        return tuple(x.astype(part.dtype) for x in (dquery, dkey, dvalue))

    dout = varying_like(dout, arrays[0])
    names = *_AXES, "bn", "b.n."
    grads = by_part(of_part, names, _AXES[1], lengths, arrays, history, dout)
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
