"""Sinkhorn attention as Pallas kernels for NVIDIA's Hopper GPUs.

There are two regimes. A **resident** head keeps its kernel matrix E in
shared memory for all iterations: the forward pass is one launch, the reverse sweep a
second one and the logits cotangent a third, if its shared memory suffices. E of up to
192 x 192 entries in float32, or 256 x 256 in bfloat16, fits one thread block. Larger
ones, to about 512 x 512, lie in the shared memory of a cluster of two to eight thread
blocks. A **streamed** head has a launch for each pass over its plan. A thread block has
64 queries, and passes over the keys tile by tile. Column sums cross thread blocks: each
query block writes its partial column sums, and they are added in one order, so that
results repeat to the bit.

| file | contents |
|---|---|
| `blocks.py`, `heuristics.py` | the division of a head, and its defaults |
| `shared_memory.py` | arrays and barriers of each kernel, and their bytes |
| `refresh_groups.py` | which iterations share one E |
| `passes.py` | the forward and backward pass, in either regime |
| `resident/`, `streamed/`, `correction.py` | the kernels |
| `tiles.py`, `smem_matrix.py` | products and sums of tiles, and of E |
| `loops.py`, `buffers.py`, `launch.py` | loops, copies of tiles, the launch |
| `warpgroups.py`, `cluster.py` | barriers, and who computes what |

`resident/kernel.py` says why every wait at a barrier ends.

Logits, potentials and sums are in float32. Products of the plan are in the inputs'
dtype with sums in float32, as in flash attention.
"""

import functools
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._runtime.partition import by_part
from ..._runtime.vmap import fold_vmap
from .._heads import join_batch, split_batch
from .._pallas_common import scale_queries, to_unit_by_head, why_not_options
from .._problem import AXES, Operands, Problem, part_of, vary_alike
from . import passes
from .blocks import MAX_HEAD_DIM, MAX_ITERS, Blocks, padded_dim
from .heuristics import default_blocks
from .types import PaddedOperands

# The axes of valid rows and columns, queries, keys and values (`_runtime.partition`).
_AXES: Final = ("b", "b", AXES[:3])


@functools.partial(jax.jit, static_argnums=0)
def attend(
    problem: Problem, operands: Operands
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]:
    """Output, and the marginal error if the problem asks for it."""
    return attend_in(problem, default_blocks(problem), operands)


def attend_in(
    problem: Problem, blocks: Blocks, operands: Operands
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]:
    """Output and, on request, marginal error, computed in the given blocks."""
    operands = scale_queries(problem, vary_alike(operands))
    rows = _valid(problem.batch, problem.t, operands.query_valid)
    cols = _valid(problem.batch, problem.s, operands.key_valid)
    # A row without any valid column is padding, and so is a column without rows.
    rows, cols = rows & cols.any(axis=1)[:, None], cols & rows.any(axis=1)[:, None]
    return _attend(problem, blocks, rows, cols, operands[:3])


def why_not(problem: Problem) -> str | None:
    """The reason why the kernels cannot run the problem, or None."""
    if problem.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f"a GPU kernel takes bfloat16 and float16, got {problem.dtype}: the tensor "
            "cores would round it; 'scaling' and 'streaming' do not"
        )
    if max(problem.head_dim, problem.value_dim) > MAX_HEAD_DIM:
        return (
            f"it takes head dimensions up to {MAX_HEAD_DIM}, got {problem.head_dim} "
            f"and {problem.value_dim} of the values"
        )
    if problem.options.num_iters > MAX_ITERS:
        return f"it takes up to {MAX_ITERS} iterations, got {problem.options.num_iters}"
    return why_not_options(problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(problem, blocks, rows, cols, arrays):
    return _attend_fwd(problem, blocks, rows, cols, arrays)[0]


def _attend_fwd(problem, blocks, rows, cols, arrays):
    def of_part(rows, cols, arrays):
        part = part_of(problem, Operands(*arrays))
        padded = _pad(part, blocks, rows, cols, *arrays)
        solve = functools.partial(passes.forward, part, blocks)
        out, error, history = fold_vmap(solve, *padded)
        result = _from_heads(part, out, part.t, part.value_dim)
        result = result.astype(part.dtype)
        return (result, *join_batch(part, (error, out, history)))

    results = "b.n.", "bn", "bn", "bn"
    out = by_part(of_part, _AXES, results, rows, cols, arrays)
    result, error, *history = out
    return (result, error), (rows, cols, arrays, *history)


def _attend_bwd(problem, blocks, residuals, cotangents):
    def of_part(rows, cols, arrays, out, history, dout):
        part = part_of(problem, Operands(*arrays))
        query, key, value = arrays
        out, history = split_batch((out, history))
        dout, size = to_unit_by_head(_zero_padding(rows, dout))
        # dP = dO V^T is linear in the values too; scaled, dZ stays in float16's range.
        value, value_size = to_unit_by_head(_zero_padding(cols, value))
        value_size = jnp.repeat(value_size, part.groups, axis=2)
        out = out / value_size.reshape(-1, 1, 1)
        padded = _pad(part, blocks, rows, cols, query, key, value)
        dq, dk, dv = fold_vmap(
            functools.partial(passes.backward, part, blocks),
            *padded,
            *history,
            out,
            _to_heads(dout, blocks.rows),
        )

        def sum_groups(x):
            return x.reshape(*x.shape[:2], -1, part.groups, x.shape[-1]).sum(axis=3)

        dq = _from_heads(part, dq, part.t, part.head_dim) * value_size * size
        dk = _from_heads(part, dk, part.s, part.head_dim) * value_size * size
        dv = _from_heads(part, dv, part.s, part.value_dim) * size
        grads = dq, sum_groups(dk), sum_groups(dv)
        return tuple(x.astype(part.dtype) for x in grads)

    dout, _ = cotangents  # The marginal error is not differentiated.
    names = *_AXES, "bn", "bn", "b.n."
    return None, None, by_part(of_part, names, _AXES[2], *residuals, dout)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _valid(batch, length, valid):
    return jnp.ones((batch, length), jnp.bool_) if valid is None else valid


def _zero_padding(valid, x):
    """`x` with 0 for padding, where a weight of 0 would not remove NaN or infinity."""
    return jnp.where(valid[:, :, None, None], x, 0)


def _pad(problem, blocks, rows, cols, query, key, value):
    def repeat_heads(valid, length):
        valid = jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])))
        return jnp.repeat(valid, problem.num_heads, axis=0)

    return PaddedOperands(
        _to_heads(_zero_padding(rows, query), blocks.rows),
        _to_heads(_zero_padding(cols, key), blocks.cols),
        _to_heads(_zero_padding(cols, value), blocks.cols),
        repeat_heads(rows, blocks.rows),
        repeat_heads(cols, blocks.cols),
    )


def _to_heads(x, length):
    """Heads first, padded with zeros to `length` and to whole tiles."""
    x = jnp.swapaxes(x, 1, 2)
    x = x.reshape(-1, *x.shape[2:])
    more = length - x.shape[1], padded_dim(x.shape[2]) - x.shape[2]
    return jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1])))


def _from_heads(problem, x, length, dim):
    x = x[:, :length, :dim]
    return jnp.swapaxes(x.reshape(problem.batch, -1, *x.shape[1:]), 1, 2)
