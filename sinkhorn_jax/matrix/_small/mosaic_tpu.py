"""Sinkhorn on many small matrices as Pallas kernels for TPUs.

There is one kernel forward and one backward. A register contains the same entry of 1024
matrices, so no operation crosses lanes and no lane is idle. All iterations run inside
the kernel, in log space. The backward kernel repeats the iteration, keeps the column
potentials in VMEM, and sweeps back over them; only the operands are stored in between.

The batch is moved to the last axes on the way in, padded to a whole number of
registers, and moved back on the way out.
"""

import functools
import math
from typing import Final

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..._runtime.shard_map import kernel_result
from .._problem import Problem
from . import kernel_bodies, vjp
from .kernel_bodies import Memory, Ref, SegmentedHistory
from .tile import loop

# The shape of a register of float32.
SUBLANES: Final = 8
LANES: Final = 128

# Bytes of the logits of a block, which has a register per entry at least. Larger blocks
# hide more of the time in which a program starts and fetches its operands.
BLOCK_BYTES: Final = 2**19
# Bytes of the column potentials in the backward kernel. If all of them take more, it
# keeps some and computes those in between again.
HISTORY_BYTES: Final = 2**22
# Estimate of what the compiler spills, in arrays of one register per entry: from 8 x 8
# matrices on, one such array fills the 64 registers.
SPILLS: Final = 12


def why_not(problem: Problem) -> str | None:
    """The first limit of the kernels that the problem exceeds, or None."""
    return vjp.why_not(problem, "TPU")


def _read(ref, index, at):
    return ref[(*index, slice(None), *at)]


def _write(ref, index, at, cols):
    ref[(*index, slice(None), *at)] = cols


# The 64 registers are full without the logits cotangent.
_MEMORY = Memory(_read, _write, keeps_dlogits=False)


def _forward_kernel(*refs: Ref, problem: Problem, num_tiles: int):
    # R is SUBLANES times the tiles of a block. Operands: logits [T, S, R, LANES],
    # a [T, R, LANES], b [S, R, LANES]. Results: the plan, like logits; or f, like a, g,
    # like b, and error [R, LANES].
    def solve(at):
        kernel_bodies.forward_tile(_MEMORY, problem, refs[:3], refs[3:], at)

    _for_every_tile(num_tiles, refs[0], solve)


def _forward(problem, has_plan, logits, a, b):
    _, t, s = logits.shape
    return _call(
        functools.partial(_forward_kernel, problem=problem),
        (logits, a, b),
        [(t, s)] if has_plan else [(t,), (s,), ()],
        half_steps=2 * problem.options.num_iters + 1,
        name="sinkhorn_small_forward",
    )


def _backward_kernel(*refs: Ref, problem: Problem, num_scratch: int, num_tiles: int):
    # Operands: those of the forward kernel, then the cotangent of the plan, or those of
    # f and g. Results: dlogits, da and db, like logits, a and b. Scratch: `steps_ref`
    # [K, S, SUBLANES, LANES], and for more than one segment `starts_ref` like it.
    refs, scratch_refs = refs[:-num_scratch], refs[-num_scratch:]
    operand_refs, cotangent_refs, out_refs = refs[:3], refs[3:-3], refs[-3:]
    history = SegmentedHistory(*scratch_refs, *[None] * (2 - num_scratch), starts_at=())

    def differentiate(at):
        kernel_bodies.backward_tile(
            _MEMORY, problem, operand_refs, cotangent_refs, out_refs, history, at
        )

    _for_every_tile(num_tiles, refs[0], differentiate)


def _backward(problem, logits, a, b, *cotangents):
    _, t, s = logits.shape
    num_iters = problem.options.num_iters
    register = SUBLANES * LANES * logits.dtype.itemsize
    lengths = segment_lengths(num_iters, HISTORY_BYTES // (s * register))
    dlogits, da, db = _call(
        functools.partial(_backward_kernel, problem=problem, num_scratch=len(lengths)),
        (logits, a, b, *cotangents),
        [(t, s), (t,), (s,)],
        # Forward, once more if potentials are computed again, and back.
        half_steps=2 * num_iters * (1 + len(lengths)) + 2,
        scratch=[
            pltpu.VMEM((length, s, SUBLANES, LANES), logits.dtype) for length in lengths
        ],
        name="sinkhorn_small_backward",
    )
    return dlogits, da, db


def segment_lengths(num_iters: int, most: int) -> tuple[int, ...]:
    """The iterations of a segment; if there are several segments, also their number.

    Args:
        num_iters: Iterations in all.
        most: The largest single segment. More iterations are cut into about as many
            segments as each has iterations.
    """
    if num_iters <= max(1, most):
        return (max(1, num_iters),)
    length = math.ceil(math.sqrt(num_iters))
    return length, math.ceil(num_iters / length)


plan, potentials = vjp.solvers(vjp.Kernels(_forward, _backward))


def _call(kernel, operands, out_shapes, *, half_steps, scratch=(), name):
    num, t, s = operands[0].shape
    dtype = operands[0].dtype
    if num == 0:
        return tuple(jnp.zeros((0, *shape), dtype) for shape in out_shapes)
    num_tiles = pl.cdiv(num, SUBLANES * LANES)
    register = SUBLANES * LANES * dtype.itemsize
    in_block = min(num_tiles, max(1, BLOCK_BYTES // (t * s * register)))

    def spec(shape):
        block = *shape, in_block * SUBLANES, LANES
        return pl.BlockSpec(block, lambda i: (*[0] * len(shape), i, 0))

    in_shapes = [x.shape[1:] for x in operands]
    numbers = sum(map(math.prod, [*in_shapes, *out_shapes]))  # Per matrix.
    scratch_bytes = sum(math.prod(x.shape) * dtype.itemsize for x in scratch)
    results = pl.pallas_call(
        functools.partial(kernel, num_tiles=num_tiles),
        out_shape=[
            kernel_result(operands[0], (*shape, num_tiles * SUBLANES, LANES), dtype)
            for shape in out_shapes
        ],
        grid=(pl.cdiv(num_tiles, in_block),),
        in_specs=[spec(shape) for shape in in_shapes],
        out_specs=[spec(shape) for shape in out_shapes],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            # Double buffer: one copy of a block is in use while the next arrives. The
            # compiler lowers a limit that exceeds the VMEM of the TPU.
            vmem_limit_bytes=2 * numbers * in_block * register
            + scratch_bytes
            + SPILLS * t * s * register,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * half_steps * num * t * s,
            transcendentals=half_steps * num * t * s,
            bytes_accessed=numbers * num * dtype.itemsize,
        ),
        name=name,
    )(*(_to_lanes(x, num_tiles) for x in operands))
    return tuple(_from_lanes(x, num) for x in results)


def _to_lanes(x, num_tiles):
    num, *shape = x.shape
    missing = num_tiles * SUBLANES * LANES - num
    x = jnp.pad(x, ((0, missing), *[(0, 0)] * len(shape)))
    return jnp.moveaxis(x, 0, -1).reshape(*shape, num_tiles * SUBLANES, LANES)


def _from_lanes(x, num):
    return jnp.moveaxis(x.reshape(*x.shape[:-2], -1), -1, 0)[:num]


def _for_every_tile(num_tiles, ref, fn):
    """Calls `fn` with the lanes of each tile of a block; the last may have fewer."""
    in_block = ref.shape[-2] // SUBLANES
    left = num_tiles - pl.program_id(0) * in_block

    def one(i, carry):
        # Tells the compiler that the address is aligned.
        start = pl.multiple_of(i * SUBLANES, SUBLANES)
        fn((pl.ds(start, SUBLANES), slice(None)))
        return carry

    loop(jnp.minimum(left, in_block), one, jnp.int32(0))
