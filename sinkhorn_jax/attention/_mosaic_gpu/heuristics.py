"""The default division of a head, and the warpgroups of a resident head.

Every choice here is a guess that no device has confirmed. What has to fit into shared
memory is not a guess: `shared_memory.py` computes it.
`python -m benchmarks.gpu_block_search` times the alternatives.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from .._problem import Problem
from . import shared_memory
from .blocks import (
    MAX_CLUSTER,
    TILE,
    Blocks,
    WarpgroupConfig,
    kernel_dtypes,
    padded_dim,
    per_thread_block,
)
from .refresh_groups import max_refresh_interval


class ResidentLimits(NamedTuple):
    """Sizes of E, in KiB, up to which a resident head makes a choice.

    Attributes:
        as_float32: E is in float32 up to this size of the whole matrix, and otherwise
            in bfloat16 if the inputs are.
        per_thread_block: The cluster is the smallest that leaves each thread block no
            more of E than this. The rest of shared memory is for warpgroups.
    """

    as_float32: int
    per_thread_block: int


# By the padded head dimension of the keys plus that of the values.
RESIDENT_LIMITS: Final[Mapping[int, ResidentLimits]] = MappingProxyType(
    {
        128: ResidentLimits(96, 152),  # a guess: not measured
        192: ResidentLimits(64, 96),  # a guess: not measured
        256: ResidentLimits(64, 72),  # a guess: not measured
    }
)
# Clusters that may share a query block of a streamed head, the preferred one first.
STREAMED_CLUSTERS: Final = (1, 2, 4, 8)  # a guess: not measured
# Thread blocks on a multiprocessor of a streamed head, the preferred number first: a
# second one works while the first one waits.
STREAMED_BLOCKS_AT_ONCE: Final = (2, 1)  # a guess: not measured


def default_blocks(problem: Problem) -> Blocks:
    """Returns resident blocks if any fit into shared memory, and streamed otherwise.

    Without iterations a streamed head is best: nothing would be used twice.
    """
    streamed = _streamed(problem)
    if problem.options.num_iters == 0:
        return streamed
    dims = padded_dim(problem.head_dim) + padded_dim(problem.value_dim)
    limits = RESIDENT_LIMITS[dims]
    is_small = 4 * streamed.rows * streamed.cols <= limits.as_float32 * 2**10
    dtypes = kernel_dtypes(problem)
    heads = [
        dataclasses.replace(
            streamed,
            regime="resident",
            refresh_every=max_refresh_interval(problem),
            kernel_dtype=dtypes[0] if is_small else dtypes[-1],
            keeps_query_block=True,
            cluster=cluster,
        )
        for cluster in range(1, MAX_CLUSTER + 1)
    ]
    heads = [blocks for blocks in heads if shared_memory.resident_fits(problem, blocks)]
    most = limits.per_thread_block * 2**10
    # The smallest cluster within the limit, or if there is none, that with the least E.
    return min(
        heads,
        key=lambda blocks: max(most, shared_memory.kernel_matrix_bytes(blocks)),
        default=streamed,
    )


def _streamed(problem):
    blocks = Blocks(
        num_row_tiles=-(-problem.t // TILE),
        num_col_tiles=-(-problem.s // TILE),
        regime="streamed",
    )
    for at_once in STREAMED_BLOCKS_AT_ONCE:
        for cluster in STREAMED_CLUSTERS:
            shared = dataclasses.replace(blocks, cluster=cluster)
            if (
                at_once
                * shared_memory.num_bytes(shared_memory.sweep_scratch(problem, shared))
                <= shared_memory.SHARED_MEMORY
            ):
                return shared
    return dataclasses.replace(blocks, keeps_query_block=False)


def resident_forward_warpgroups(problem: Problem, blocks: Blocks) -> WarpgroupConfig:
    """Warpgroups of a resident head's forward pass."""
    counts = blocks.num_row_tiles, blocks.num_col_tiles
    scratch = shared_memory.resident_forward_scratch
    return _warpgroups(problem, blocks, scratch, *counts)


def resident_reverse_warpgroups(problem: Problem, blocks: Blocks) -> WarpgroupConfig:
    """Warpgroups of a resident head's reverse sweep."""
    counts = blocks.num_col_tiles, blocks.num_row_tiles
    scratch = shared_memory.resident_reverse_scratch
    return _warpgroups(problem, blocks, scratch, *counts)


def _warpgroups(problem, blocks, scratch, num_row_blocks, num_tiles):
    """The fewest warpgroups that fit and share the work in the fewest rounds.

    They share the row blocks of a thread block for row sums, and the tiles of a row
    block for column sums. Two stages are taken before one. (A guess: not measured.)
    """
    counts = per_thread_block(num_row_blocks, blocks.cluster), num_tiles
    configs = [
        WarpgroupConfig(num_warpgroups, num_stages)
        for num_warpgroups in range(1, blocks.max_warpgroups + 1)
        for num_stages in (2, 1)
    ]
    return min(
        (
            x
            for x in configs
            if shared_memory.num_bytes(scratch(problem, blocks, x))
            <= shared_memory.SHARED_MEMORY
        ),
        key=lambda x: sum(-(-count // x.num_warpgroups) for count in counts),
        default=WarpgroupConfig(1, 1),
    )
