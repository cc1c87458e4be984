"""Sinkhorn attention as Pallas kernels for TPUs.

One kernel forward and one backward, in one of two regimes. Where the kernel matrix of a
head fits VMEM it stays there: one exponential an entry makes it, and an iteration is a
matrix-vector product on either side. Beyond that, strips of rows pass by once for every
iteration, with one exponential an entry each, and nothing of size (T, S) is stored.
The grid of a TPU core runs in order, so sums over strips are plain accumulators, added
up in the same order every time.

Potentials and sums are in float32. Products of the plan are in the inputs' dtype with
sums in float32, as in flash attention.

Blocks are cut for the VMEM of the TPU at hand, or of the smallest generation where
there is none. To compile ahead of time for another, trace under its mesh:

    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step).lower(*arrays)  # Arrays sharded over the mesh.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._runtime.shard_map import varying_like
from ..._runtime.vmap import fold_vmap
from .._pallas_common import to_unit, why_not_options
from .._problem import Operands, Problem, vary_alike
from .backward import backward
from .blocks import check_fits, default_blocks
from .forward import forward


@functools.partial(jax.jit, static_argnums=0)
def attend(
    problem: Problem, operands: Operands
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]:
    """Output and, on request, marginal error.

    Raises:
        NotImplementedError: The TPU that is traced for lacks VMEM. If only the backward
            kernel lacks it, the pull-back raises that.
    """
    blocks = default_blocks(problem, "forward")
    check_fits(problem, blocks, "forward")
    operands = vary_alike(operands)
    lengths = _lengths(problem, operands)
    num_rows, num_cols = varying_like(lengths, operands.query)
    return _attend(
        problem,
        blocks,
        default_blocks(problem, "backward"),
        num_rows,
        num_cols,
        operands.query,
        operands.key,
        operands.value,
    )


def why_not(problem: Problem) -> str | None:
    """It takes what its kernels were written for, and says what that is."""
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return f"a TPU kernel takes float32 and bfloat16, got {problem.dtype}"
    return why_not_options(problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(problem, blocks, backward_blocks, num_rows, num_cols, query, key, value):
    args = num_rows, num_cols, query, key, value
    return _attend_fwd(problem, blocks, backward_blocks, *args)[0]


def _attend_fwd(
    problem, blocks, backward_blocks, num_rows, num_cols, query, key, value
):
    del backward_blocks
    out, error, bases, scalings = fold_vmap(
        functools.partial(forward, problem, blocks),
        num_rows,
        num_cols,
        *_split(blocks, query, key, value),
    )
    if error is not None:
        error = error.reshape(problem.batch, problem.num_heads)
    out = _from_rows(problem, out)
    return (out, error), (num_rows, num_cols, query, key, value, bases, scalings)


def _attend_bwd(problem, forward_blocks, blocks, residuals, cotangents):
    del forward_blocks
    check_fits(problem, blocks, "backward")
    num_rows, num_cols, query, key, value, bases, scalings = residuals
    dout, _ = cotangents  # The marginal error is not differentiated.
    dout, size = to_unit(varying_like(dout, query))
    dq, dk, dv = fold_vmap(
        functools.partial(backward, problem, blocks),
        num_rows,
        num_cols,
        *_split(blocks, query, key, value),
        _rows(dout, blocks.padded_rows),
        bases,
        scalings,
    )
    dq, dk, dv = (x * size.reshape(-1, 1, 1) for x in (dq, dk, dv))
    grads = _from_rows(problem, dq), _from_cols(problem, dk), _from_cols(problem, dv)
    return None, None, *(x.astype(problem.dtype) for x in grads)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _lengths(problem, operands):
    def length(valid, full):
        if valid is None:
            return jnp.full(problem.batch, full, jnp.int32)
        return valid.sum(axis=1, dtype=jnp.int32)

    rows = length(operands.query_valid, problem.t)
    cols = length(operands.key_valid, problem.s)
    # Rows without columns are padding, and the other way round.
    is_empty = (rows == 0) | (cols == 0)
    return jnp.where(is_empty, 0, rows), jnp.where(is_empty, 0, cols)


def _split(blocks, query, key, value):
    return (
        _rows(query, blocks.padded_rows),
        _cols(key, blocks.cols),
        _cols(value, blocks.cols),
    )


def _rows(x: Float[Array, "B T N H"], length: int) -> Float[Array, "BN T_ H"]:
    """Heads flattened with the batch, and rows padded to the length."""
    x = jnp.swapaxes(x, 1, 2)
    x = x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))


def _cols(x: Float[Array, "B S K H"], length: int) -> Float[Array, "BK H S_"]:
    """Likewise, with columns last: a short axis there would be padded to 128."""
    x = jnp.moveaxis(x, 1, 3)
    x = x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])))


def _from_rows(problem, x):
    x = x.reshape(problem.batch, -1, *x.shape[1:])
    return jnp.swapaxes(x, 1, 2)[:, : problem.t]


def _from_cols(problem, x):
    """Of key heads: what their query heads give is added up."""
    groups = problem.num_heads // problem.num_key_heads
    x = x.reshape(problem.batch, problem.num_key_heads, groups, *x.shape[1:])
    return jnp.moveaxis(x.sum(axis=2), 3, 1)[:, : problem.s]
