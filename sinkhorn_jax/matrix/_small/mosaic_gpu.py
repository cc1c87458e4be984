"""Sinkhorn on many small matrices as Pallas kernels for NVIDIA GPUs, Hopper and later.

One kernel forward and one backward. A thread works on a matrix of its own, which it
keeps in registers as far as they reach, and never waits for another; all iterations run
inside the kernel, in log space. The backward kernel runs the iteration again, keeps the
column potentials in shared memory, and sweeps back over them.

Matrices are transposed on the way in and out, the batch to the last axis, so that
neighbouring threads read neighbouring numbers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..._runtime.shard_map import varying_like
from .._problem import Potentials, Problem
from . import vjp as _small
from .vjp import History, Kernels, Memory, Ref

# A warpgroup, which is the least that a block has.
THREADS: Final = 128

# Of shared memory, for the column potentials in the backward kernel; a half of what a
# multiprocessor of Hopper has, so that two blocks fit.
HISTORY_BYTES: Final = 112 * 2**10


@functools.partial(jax.jit, static_argnums=0)
def plan(
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> Float[Array, "M T S"]:
    """The plan of every matrix of a batch."""
    return _small.plan(KERNELS, problem, logits, a, b)


@functools.partial(jax.jit, static_argnums=0)
def potentials(
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> Potentials:
    """The potentials of every matrix of a batch."""
    return _small.potentials(KERNELS, problem, logits, a, b)


def why_not(problem: Problem) -> str | None:
    """It takes what the kernels for small matrices take."""
    return _small.why_not(problem, "GPU")


def _read(ref, index, at):
    return tuple(ref[(*index, j, *at)] for j in range(ref.shape[len(index)]))


def _write(ref, index, at, cols):
    for j, x in enumerate(cols):
        ref[(*index, j, *at)] = x


# What does not fit the registers the compiler spills.
_MEMORY = Memory(_read, _write, keeps_dlogits=True)


def _forward_kernel(*refs: Ref, problem: Problem):
    # Logits [T, S, M], a [T, M], b [S, M]. Results: the plan, like logits; or f, like
    # a, g, like b, and error [M].
    _small.solve_tile(_MEMORY, problem, refs[:3], refs[3:], _lanes())


def _forward(
    problem: Problem,
    has_plan: bool,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> tuple[Array, ...]:
    _, t, s = logits.shape
    return _call(
        functools.partial(_forward_kernel, problem=problem),
        (logits, a, b),
        [(t, s)] if has_plan else [(t,), (s,), ()],
    )


def _backward_kernel(*refs: Ref, problem: Problem, num_cotangents: int):
    # Operands like the forward kernel's, then the cotangent of the plan, or those of f
    # and g; results dlogits, da and db, like logits, a and b, and for more than one
    # segment `starts_ref` [N, S, M] of a `History`. Scratch: its `steps_ref`, whose
    # lanes are [THREADS].
    operand_refs, refs = refs[:3], refs[3:]
    cotangent_refs, refs = refs[:num_cotangents], refs[num_cotangents:]
    out_refs, (*starts_ref, steps_ref) = refs[:3], refs[3:]
    at = _lanes()
    history = History(steps_ref, *(starts_ref or [None]), starts_at=at)
    _small.pull_back_tile(
        _MEMORY, problem, operand_refs, cotangent_refs, out_refs, history, at
    )


def _backward(
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
    *cotangents: Float[Array, "M ..."],
) -> tuple[Float[Array, "M T S"], Float[Array, "M T"], Float[Array, "M S"]]:
    _, t, s = logits.shape
    num_iters = problem.options.num_iters
    most = max(1, HISTORY_BYTES // (s * THREADS * logits.dtype.itemsize))
    num_segments = max(1, math.ceil(num_iters / most))
    length = max(1, math.ceil(num_iters / num_segments))
    starts = [(num_segments, s)] if num_segments > 1 else []
    dlogits, da, db, *_ = _call(
        functools.partial(
            _backward_kernel, problem=problem, num_cotangents=len(cotangents)
        ),
        (logits, a, b, *cotangents),
        [(t, s), (t,), (s,), *starts],
        scratch=[plgpu.SMEM((length, s, THREADS), logits.dtype)],
    )
    return dlogits, da, db


KERNELS: Final = Kernels(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    operands: Sequence[Float[Array, "M ..."]],
    out_shapes: Sequence[tuple[int, ...]],
    scratch: Sequence[Any] = (),
) -> tuple[Array, ...]:
    num = operands[0].shape[0]
    dtype = operands[0].dtype
    if num == 0:
        return tuple(jnp.zeros((0, *shape), dtype) for shape in out_shapes)
    num_blocks = pl.cdiv(num, THREADS)
    padded = num_blocks * THREADS

    def to_lanes(x):
        x = jnp.pad(x, ((0, padded - num), *[(0, 0)] * (x.ndim - 1)))
        return jnp.moveaxis(x, 0, -1)

    results = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*shape, padded), dtype) for shape in out_shapes
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        scratch_types=scratch,
        # The default is another backend in some versions of JAX.
        compiler_params=plgpu.CompilerParams(),
    )(*map(to_lanes, operands))
    # What varies over the axes of a `jax.shard_map` is lost on the way.
    results = varying_like(results, operands)
    return tuple(jnp.moveaxis(x, -1, 0)[:num] for x in results)


def _lanes():
    start = jax.lax.axis_index("block") * THREADS
    return (pl.ds(start, THREADS),)
