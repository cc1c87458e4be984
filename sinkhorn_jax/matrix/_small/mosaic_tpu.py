"""Sinkhorn on many small matrices as Pallas kernels for TPUs.

One kernel forward and one backward. A register holds the same entry of 1024 matrices,
so that no operation crosses lanes and none is left idle; all iterations run inside the
kernel, in log space. The backward kernel runs the iteration again, keeps the column
potentials in VMEM, and sweeps back over them: nothing but the operands is stored.

Matrices are transposed on the way in and out, the batch to the last axes, and padded to
a whole number of registers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..._runtime.shard_map import kernel_result
from .._problem import Potentials, Problem
from . import vjp as _small
from .tile import loop
from .vjp import History, Kernels, Memory, Ref

# A register of float32.
SUBLANES: Final = 8
LANES: Final = 128

# Of logits in a block, where one register an entry is less: larger blocks hide more of
# the time that a program takes to start and to fetch its operands.
BLOCK_BYTES: Final = 2**19
# Of column potentials in the backward kernel. Where all of them take more, it keeps
# some and makes those between them again.
HISTORY_BYTES: Final = 2**22
# What the compiler spills, in arrays of one register an entry: they are more than the
# 64 registers from 8 x 8 matrices on.
SPILLS: Final = 12


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
    return _small.why_not(problem, "TPU")


def _read(ref, index, at):
    return ref[(*index, slice(None), *at)]


def _write(ref, index, at, cols):
    ref[(*index, slice(None), *at)] = cols


# 64 registers, which other things fill.
_MEMORY = Memory(_read, _write, keeps_dlogits=False)


def _forward_kernel(*refs: Ref, problem: Problem, num_tiles: int):
    # R is SUBLANES times the registers an entry in a block: logits [T, S, R, LANES], a
    # [T, R, LANES], b [S, R, LANES]. Results: the plan, like logits; or f, like a, g,
    # like b, and error [R, LANES].
    def solve(at):
        _small.solve_tile(_MEMORY, problem, refs[:3], refs[3:], at)

    _for_every_tile(num_tiles, refs[0], solve)


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
        half_steps=2 * problem.options.num_iters + 1,
        name="sinkhorn_small_forward",
    )


def _backward_kernel(*refs: Ref, problem: Problem, num_scratch: int, num_tiles: int):
    # Operands like the forward kernel's, then the cotangent of the plan, or those of f
    # and g; results dlogits, da and db, like logits, a and b. Scratch: `steps_ref` and
    # for more than one segment `starts_ref` of a `History`, whose lanes are [SUBLANES,
    # LANES].
    refs, scratch_refs = refs[:-num_scratch], refs[-num_scratch:]
    operand_refs, cotangent_refs, out_refs = refs[:3], refs[3:-3], refs[-3:]
    history = History(*scratch_refs, *[None] * (2 - num_scratch), starts_at=())

    def pull_back(at):
        _small.pull_back_tile(
            _MEMORY, problem, operand_refs, cotangent_refs, out_refs, history, at
        )

    _for_every_tile(num_tiles, refs[0], pull_back)


def _backward(
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
    *cotangents: Float[Array, "M ..."],
) -> tuple[Float[Array, "M T S"], Float[Array, "M T"], Float[Array, "M S"]]:
    _, t, s = logits.shape
    num_iters = problem.options.num_iters
    register = SUBLANES * LANES * logits.dtype.itemsize
    lengths = segment_lengths(num_iters, HISTORY_BYTES // (s * register))
    dlogits, da, db = _call(
        functools.partial(_backward_kernel, problem=problem, num_scratch=len(lengths)),
        (logits, a, b, *cotangents),
        [(t, s), (t,), (s,)],
        # Forward, once more where the history is made twice, and back.
        half_steps=2 * num_iters * (1 + len(lengths)) + 2,
        scratch=[
            pltpu.VMEM((length, s, SUBLANES, LANES), logits.dtype) for length in lengths
        ],
        name="sinkhorn_small_backward",
    )
    return dlogits, da, db


def segment_lengths(num_iters: int, most: int) -> tuple[int, ...]:
    """Of a segment of iterations and, if it does not hold all, the number of segments.

    Args:
        num_iters: Iterations.
        most: How many go into a single segment. More are cut into as many segments as
            these have iterations.
    """
    if num_iters <= max(1, most):
        return (max(1, num_iters),)
    length = math.ceil(math.sqrt(num_iters))
    return length, math.ceil(num_iters / length)


KERNELS: Final = Kernels(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    operands: Sequence[Float[Array, "M ..."]],
    out_shapes: Sequence[tuple[int, ...]],
    *,
    half_steps: int,
    scratch: Sequence[Any] = (),
    name: str,
) -> tuple[Array, ...]:
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
    numbers = sum(map(math.prod, [*in_shapes, *out_shapes]))  # Of a matrix.
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
            # Blocks are there twice: one in use, one on its way. A limit above what a
            # generation has is cut down to that.
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
    """`fn` of where each register of a block is; the last block may hold fewer."""
    in_block = ref.shape[-2] // SUBLANES
    left = num_tiles - pl.program_id(0) * in_block

    def one(i, carry):
        # A multiple, for the compiler to see an aligned address.
        start = pl.multiple_of(i * SUBLANES, SUBLANES)
        fn((pl.ds(start, SUBLANES), slice(None)))
        return carry

    loop(jnp.minimum(left, in_block), one, jnp.int32(0))
