"""Sinkhorn on many small matrices as Pallas kernels for NVIDIA GPUs, Hopper and later.

There is one kernel forward and one backward. Each thread computes one matrix, in
registers as far as they suffice, and never waits for another thread. All iterations run
inside the kernel, in log space. The backward kernel repeats the iteration, keeps the
column potentials in shared memory, and sweeps back over them.

The batch is moved to the last axis on the way in, and back on the way out, so that
neighbouring threads read neighbouring numbers.
"""

import functools
import math
from typing import Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..._runtime.shard_map import varying_like
from .._problem import Problem
from . import kernel_bodies, vjp
from .kernel_bodies import Memory, Ref, SegmentedHistory

# Threads of a block: one warpgroup, the least.
THREADS: Final = 128
# Shared memory of a block for the column potentials in the backward kernel: half of
# what a multiprocessor of Hopper has, so that two blocks fit.
HISTORY_BYTES: Final = 112 * 2**10


def why_not(problem: Problem) -> str | None:
    """The first limit of the kernels that the problem exceeds, or None."""
    return vjp.why_not(problem, "GPU")


def _read(ref, index, at):
    return tuple(ref[(*index, j, *at)] for j in range(ref.shape[len(index)]))


def _write(ref, index, at, cols):
    for j, x in enumerate(cols):
        ref[(*index, j, *at)] = x


# What does not fit the registers is spilled by the compiler.
_MEMORY = Memory(_read, _write, keeps_dlogits=True)


def _forward_kernel(*refs: Ref, problem: Problem):
    # Logits [T, S, M], a [T, M], b [S, M]. Results: the plan, like logits; or f, like
    # a, g, like b, and error [M].
    kernel_bodies.forward_tile(_MEMORY, problem, refs[:3], refs[3:], _lanes())


def _forward(problem, has_plan, logits, a, b):
    _, t, s = logits.shape
    return _call(
        functools.partial(_forward_kernel, problem=problem),
        (logits, a, b),
        [(t, s)] if has_plan else [(t,), (s,), ()],
    )


def _backward_kernel(*refs: Ref, problem: Problem, num_cotangents: int):
    # Operands: those of the forward kernel, then the cotangent of the plan, or those of
    # f and g. Results: dlogits, da and db, like logits, a and b, and for more than one
    # segment `starts_ref` [N, S, M]. Scratch: `steps_ref` [K, S, THREADS].
    operand_refs, refs = refs[:3], refs[3:]
    cotangent_refs, refs = refs[:num_cotangents], refs[num_cotangents:]
    out_refs, (*starts_ref, steps_ref) = refs[:3], refs[3:]
    at = _lanes()
    history = SegmentedHistory(steps_ref, *(starts_ref or [None]), starts_at=at)
    kernel_bodies.backward_tile(
        _MEMORY, problem, operand_refs, cotangent_refs, out_refs, history, at
    )


def _backward(problem, logits, a, b, *cotangents):
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


plan, potentials = vjp.solvers(vjp.Kernels(_forward, _backward))


def _call(kernel, operands, out_shapes, scratch=()):
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
        # In some versions of JAX the default is another backend.
        compiler_params=plgpu.CompilerParams(),
    )(*map(to_lanes, operands))
    # The kernel loses over which axes of a `jax.shard_map` its operands vary.
    results = varying_like(results, operands)
    return tuple(jnp.moveaxis(x, -1, 0)[:num] for x in results)


def _lanes():
    start = jax.lax.axis_index("block") * THREADS
    return (pl.ds(start, THREADS),)
