"""Sinkhorn attention as Pallas kernels for NVIDIA's Hopper GPUs.

Where shared memory holds the kernel matrix of a head, a program has a head: the forward
pass is one launch, the reverse sweep of the gradient another one, and its last pass a
third where the cotangents of all queries have room beside a tile. One block of threads
has room for 192 x 192 entries in float32, for 256 x 256 in bfloat16, which inputs in it
may have, rounded as the plan is before it meets the values. Larger ones, to 512 x 512
and a little more, lie in the shared memory of a cluster, of two to eight blocks of
threads, and so do others that more warpgroups can share then. With 10 iterations the
sweep makes every entry of the plan three times, and so does the last pass.

Otherwise a program has a strip of 64 rows and passes over all columns, tile by tile.
One pass is one launch, because column sums cross programs: each program writes its
share, the shares are added in one order, and results repeat to the bit. The shares are
the largest array there is, of T S / 64 numbers a head. A pass of the iteration makes
every entry once where the shared memory of a cluster holds a strip of it (6144 keys, or
5120 with more than 64 head dimensions), and twice beyond. So does each pass of the
reverse sweep, one for every iteration after another that seeds it. The last pass makes
entries three times for dq, and as often for dk and dv, with 10 iterations of up to some
5500 tokens, and four times with more.

Logits, potentials and sums are in float32. Products of the plan are in the inputs'
dtype with sums in float32, as in flash attention.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._runtime.vmap import fold_vmap
from .._pallas_common import to_unit, why_not_options
from .._problem import Operands, Problem, vary_alike
from .blocks import MAX_HEAD_DIM, MAX_ITERS, Blocks, default_blocks, padded_dim
from .streamed.backward import backward
from .streamed.forward import History, forward
from .streamed.forward import Operands as Padded


@functools.partial(jax.jit, static_argnums=0)
def attend(
    problem: Problem, operands: Operands
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]:
    """Output and, on request, marginal error."""
    return attend_in(problem, default_blocks(problem), operands)


def attend_in(
    problem: Problem, blocks: Blocks, operands: Operands
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]:
    """The same, cut as it is said."""
    operands = vary_alike(operands)
    rows = _valid(problem.batch, problem.t, operands.query_valid)
    cols = _valid(problem.batch, problem.s, operands.key_valid)
    # Rows without columns are padding, and the other way round.
    rows, cols = rows & cols.any(axis=1)[:, None], cols & rows.any(axis=1)[:, None]
    return _attend(
        problem, blocks, rows, cols, operands.query, operands.key, operands.value
    )


def why_not(problem: Problem) -> str | None:
    """It takes what its kernels were written for, and says what that is."""
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
        return f"it takes {MAX_ITERS} iterations, got {problem.options.num_iters}"
    return why_not_options(problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(problem, blocks, rows, cols, query, key, value):
    return _attend_fwd(problem, blocks, rows, cols, query, key, value)[0]


def _attend_fwd(problem, blocks, rows, cols, query, key, value):
    padded = _pad(problem, blocks, rows, cols, query, key, value)
    out, error, history = fold_vmap(
        functools.partial(_forward, problem, blocks), *padded
    )
    if error is not None:
        error = error.reshape(problem.batch, problem.num_heads)
    result = _join(problem, out, problem.t, problem.value_dim).astype(problem.dtype)
    return (result, error), (rows, cols, query, key, value, out, history)


def _attend_bwd(problem, blocks, residuals, cotangents):
    rows, cols, query, key, value, out, history = residuals
    dout, _ = cotangents  # The marginal error is not differentiated.
    groups = problem.num_heads // problem.num_key_heads
    dout, size = to_unit(_only(rows, dout))
    # The cotangent of the plan is linear in the values too: float16 must hold it.
    value, value_size = to_unit(_only(cols, value))
    value_size = jnp.repeat(value_size, groups, axis=2)
    out = out / value_size.reshape(-1, 1, 1)
    padded = _pad(problem, blocks, rows, cols, query, key, value)
    dq, dk, dv = fold_vmap(
        functools.partial(_backward, problem, blocks),
        *padded,
        *history,
        out,
        _split(dout, blocks.rows),
    )
    dq = _join(problem, dq, problem.t, problem.head_dim) * value_size * size

    def of_key_heads(x):
        return x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(axis=3)

    dk = _join(problem, dk, problem.s, problem.head_dim) * value_size * size
    dv = _join(problem, dv, problem.s, problem.value_dim) * size
    dk, dv = of_key_heads(dk), of_key_heads(dv)
    return None, None, *(x.astype(problem.dtype) for x in (dq, dk, dv))


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(problem, blocks, *padded):
    out, error, history = forward(problem, blocks, Padded(*padded))
    return out, error, _swap(history)


def _backward(problem, blocks, query, key, value, rows, cols, f, g, out, dout):
    padded = Padded(query, key, value, rows, cols)
    return backward(problem, blocks, padded, _swap(History(f, g)), out, dout)


def _swap(history):
    """Heads in front of iterations, for an axis of `vmap` to join them, or back."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), history)


def _valid(batch, length, valid):
    return jnp.ones((batch, length), jnp.bool_) if valid is None else valid


def _only(valid, x):
    """`x`, and 0 for padding: no weight takes infinity or NaN off what lies there."""
    return jnp.where(valid[:, :, None, None], x, 0)


def _pad(problem, blocks, rows, cols, query, key, value):
    def of_heads(valid, length):
        valid = jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])))
        return jnp.repeat(valid, problem.num_heads, axis=0)

    return Padded(
        _split(_only(rows, query), blocks.rows),
        _split(_only(cols, key), blocks.cols),
        _split(_only(cols, value), blocks.cols),
        of_heads(rows, blocks.rows),
        of_heads(cols, blocks.cols),
    )


def _split(x, length):
    """Heads in front, and zeros for what a tile has more."""
    x = jnp.swapaxes(x, 1, 2)
    x = x.reshape(-1, *x.shape[2:])
    more = length - x.shape[1], padded_dim(x.shape[2]) - x.shape[2]
    return jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1])))


def _join(problem, x, length, dim):
    x = x[:, :length, :dim]
    return jnp.swapaxes(x.reshape(problem.batch, -1, *x.shape[1:]), 1, 2)
