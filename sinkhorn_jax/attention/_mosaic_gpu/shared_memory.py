"""Shared memory of the kernels that may run out of it: every array, and its bytes.

Each `*_scratch` function lists the shared memory and the barriers of one kernel. The
kernel allocates what the list says, and its number of bytes follows from the list.
Kernels whose scratch has a small, fixed size declare it where they are launched.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._problem import Problem
from .blocks import TILE, Blocks, WarpgroupConfig, padded_dim, per_thread_block
from .buffers import buffer_types
from .refresh_groups import terms_per_matrix
from .tiles import operand, vectors

# A thread block may use 227 KiB on Hopper. 4 KiB remain for reductions and barriers.
SHARED_MEMORY: Final = 227 * 2**10 - 2**12

Scratch = Mapping[str, Any]


def num_bytes(scratch: Scratch) -> int:
    """Bytes of the arrays, of which Mosaic GPU aligns each to 1 KiB."""
    arrays = [
        x
        for x in jax.tree.leaves(tuple(scratch.values()))
        if not isinstance(x, plgpu.Barrier)
    ]
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in arrays]
    return sum(-(-size // 2**10) * 2**10 for size in sizes)


def resident_forward_scratch(
    problem: Problem, blocks: Blocks, config: WarpgroupConfig
) -> Scratch:
    """Scratch of `resident.forward`."""
    num_rows, num_cols = blocks.num_row_tiles, blocks.num_col_tiles
    num_warpgroups, num_stages = config.num_warpgroups, math.prod(config)
    h, d, tile = _dims(problem)
    # Tiles of values are loaded to where tiles of keys were, if they have one shape:
    # they are never needed at the same time.
    value_tile = None if h == d == TILE else tile(num_stages, TILE, d)
    return dict(
        kernel=_kernel_matrix(blocks, num_rows, num_cols),  # E
        row_blocks=[tile(num_warpgroups, TILE, h)],
        tiles=[tile(num_stages, h, TILE)],
        value_tile=value_tile,
        f=vectors(num_rows),
        base_f=vectors(num_rows),
        r=vectors(num_rows),
        g=vectors(num_cols),
        base_g=vectors(num_cols),
        c=vectors(num_cols),
        col_marginal=vectors(num_cols),
        partial_col_sums=vectors(2, num_cols) if blocks.cluster > 1 else None,
        vectors_barrier=plgpu.Barrier(num_arrivals=3),
        row_block_barrier=plgpu.Barrier(num_barriers=num_warpgroups),
        tile_barrier=plgpu.Barrier(num_barriers=num_stages),
        warpgroups_barrier=plgpu.Barrier(num_arrivals=num_warpgroups),
    )


def resident_reverse_scratch(
    problem: Problem, blocks: Blocks, config: WarpgroupConfig
) -> Scratch:
    """Scratch of `resident.reverse`."""
    num_rows, num_cols = blocks.num_row_tiles, blocks.num_col_tiles
    num_warpgroups, num_stages = config.num_warpgroups, math.prod(config)
    *dims, tile = _dims(problem)
    pair_barrier = functools.partial(plgpu.Barrier, num_arrivals=2)
    return dict(
        kernel=_kernel_matrix(blocks, num_cols, num_rows),  # The transpose of E.
        row_blocks=[tile(num_warpgroups, TILE, x) for x in dims],
        tiles=[tile(num_stages, x, TILE) for x in dims],
        df=vectors(num_rows),
        f=vectors(num_rows),
        left=vectors(num_rows),  # -r_k lambda_k
        g=vectors(num_cols),
        dg=vectors(num_cols),
        right=vectors(num_cols),  # c_{k+1} mu_{k+1} / b
        r=vectors(2, num_rows),
        next_c=vectors(2, num_cols),
        c=vectors(2, num_cols),
        partial_sums=vectors(2, num_rows) if blocks.cluster > 1 else None,
        df_barrier=plgpu.Barrier(),
        base_barrier=pair_barrier(),
        row_block_barrier=plgpu.Barrier(num_barriers=num_warpgroups),
        seed_row_block_barrier=pair_barrier(num_barriers=num_warpgroups),
        tile_barrier=plgpu.Barrier(num_barriers=num_stages),
        seed_tile_barrier=pair_barrier(num_barriers=num_stages),
        scalings_barrier=plgpu.Barrier(num_arrivals=3, num_barriers=2),
        warpgroups_barrier=plgpu.Barrier(num_arrivals=num_warpgroups),
    )


def resident_logits_cotangent_scratch(
    problem: Problem, blocks: Blocks, num_stages: int
) -> Scratch:
    """Scratch of `resident.logits_cotangent`."""
    h, d, tile = _dims(problem)
    terms = terms_per_matrix(problem)
    dq = operand(blocks.num_row_tiles, TILE, h, dtype=jnp.dtype("float32"))
    return dict(
        query=tile(num_stages, TILE, h),
        query_t=tile(num_stages, h, TILE),
        dout=tile(num_stages, TILE, d),
        dout_t=tile(num_stages, d, TILE),
        key=tile(TILE, h),
        key_t=tile(h, TILE),
        value_t=tile(d, TILE),
        f=vectors(num_stages, len(terms)),
        g=vectors(len(terms)),
        left=vectors(num_stages, sum(terms)),
        right=vectors(sum(terms)),
        dq=dq,
        dz=tile(TILE, TILE),
        plan=tile(TILE, TILE),
        key_barrier=plgpu.Barrier(num_arrivals=5),
        query_barrier=plgpu.Barrier(num_arrivals=6, num_barriers=num_stages),
    )


def sweep_scratch(problem: Problem, blocks: Blocks) -> Scratch:
    """Scratch of `streamed.sweep`."""
    h, _, tile = _dims(problem)
    keeps = blocks.keeps_query_block
    own_tiles = per_thread_block(blocks.num_col_tiles, blocks.cluster)
    kernel = operand(1, own_tiles, TILE, TILE, dtype=jnp.dtype("float32"))
    return dict(
        buffers=buffer_types(
            [tile(TILE, h), vectors()], [tile(2, h, TILE), vectors(2), vectors(2)]
        ),
        kernel=kernel if keeps else None,  # E of the query block.
        left=vectors(1) if keeps else None,
        part=vectors() if keeps and blocks.cluster > 1 else None,
    )


def streamed_logits_cotangent_scratch(
    problem: Problem, num_stages: int, *, has_other: bool
) -> Scratch:
    """Scratch of `streamed.logits_cotangent`, for dK and dV if it `has_other`."""
    h, d, tile = _dims(problem)
    terms = terms_per_matrix(problem)
    tile_barrier = plgpu.Barrier(num_arrivals=5 + has_other, num_barriers=num_stages)
    return dict(
        x=tile(TILE, h),
        dx=tile(TILE, d),
        f=vectors(len(terms)),
        left=vectors(sum(terms)),
        y_t=tile(num_stages, h, TILE),
        y=tile(num_stages, TILE, h),
        dy_t=tile(num_stages, d, TILE),
        g=vectors(num_stages, len(terms)),
        right=vectors(num_stages, sum(terms)),
        row_block_barrier=plgpu.Barrier(num_arrivals=4),
        tile_barrier=tile_barrier,
        other=tile(num_stages, TILE, d) if has_other else None,
    )


def resident_fits(problem: Problem, blocks: Blocks) -> bool:
    """Whether a resident head fits, with one warpgroup, forward and in reverse."""
    return all(
        num_bytes(scratch(problem, blocks, WarpgroupConfig(1, 1))) <= SHARED_MEMORY
        for scratch in (resident_forward_scratch, resident_reverse_scratch)
    )


def resident_logits_cotangent_stages(problem: Problem, blocks: Blocks) -> int:
    """Stages of `resident.logits_cotangent`; 0 if that kernel cannot be used."""
    if blocks.regime == "resident":
        for num_stages in (2, 1):
            scratch = resident_logits_cotangent_scratch(problem, blocks, num_stages)
            if num_bytes(scratch) <= SHARED_MEMORY:
                return num_stages
    return 0


def streamed_logits_cotangent_stages(problem: Problem) -> int:
    """Stages of `streamed.logits_cotangent`: 2, or 1 where there is no room for 2."""
    scratch = streamed_logits_cotangent_scratch(problem, 2, has_other=True)
    return 2 if num_bytes(scratch) <= SHARED_MEMORY else 1


def kernel_matrix_bytes(blocks: Blocks) -> int:
    """Bytes of E in a thread block of a resident head: forward or reverse, the larger.

    The cluster shares the query blocks of E forward, and the key blocks in reverse.
    """
    num_rows, num_cols = blocks.num_row_tiles, blocks.num_col_tiles
    return max(
        num_bytes(dict(kernel=_kernel_matrix(blocks, *counts)))
        for counts in ((num_rows, num_cols), (num_cols, num_rows))
    )


def _kernel_matrix(blocks, num_row_blocks, num_tiles):
    shape = per_thread_block(num_row_blocks, blocks.cluster), num_tiles, TILE, TILE
    return operand(*shape, dtype=jnp.dtype(blocks.kernel_dtype))


def _dims(problem):
    """Padded dimensions of keys and values, and `operand` in the inputs' dtype."""
    h, d = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    return h, d, functools.partial(operand, dtype=problem.dtype)
