"""How the GPU kernels cut a head: tiles, and what shared memory they take."""

import dataclasses
import itertools
import math
from typing import Final, Literal, NamedTuple, get_args

import jax.numpy as jnp

from .._problem import Problem

# Bytes that a block of threads may have on Hopper, less what reductions and barriers
# take.
SHARED_MEMORY: Final = 227 * 2**10 - 2**12
MAX_HEAD_DIM: Final = 128  # More, and the accumulators of a tile leave the registers.
# The last pass of the gradient keeps vectors of all iterations at a tile.
MAX_ITERS: Final = 64
# Blocks of threads that every GPU since Hopper lets into one cluster.
MAX_CLUSTER: Final = 8
# Multiprocessors that a cluster lies within: an H100 has them in groups of 16 or 18.
GROUP: Final = 16
HeadDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Lengths in a kernel. They change speed, never results beyond rounding.

    Attributes:
        tile: Queries and keys in a tile, which is square: one warpgroup has it.
        num_row_tiles: Tiles that cover all queries.
        num_col_tiles: Tiles that cover all keys.
        is_held: Whether the kernel matrix of a strip stays in shared memory between
            the sums over its rows and those over its columns. Otherwise it is made
            twice, and no cluster shares it.
        period: Iterations for which the kernel matrix of a head stays in shared
            memory, in one launch for all. 0 for a launch each.
        head_dtype: Of that matrix: float32, or bfloat16 for more room, or for more
            warpgroups with it. It has the same range; its entries are rounded like the
            plan before it meets the values.
        cluster: Blocks of threads that share a head that stays, each with some of its
            strips, or a strip that is held, each with some of its columns. They
            exchange sums.
        max_warpgroups: That may share what a block has of such a head. With 4, a
            thread has 128 registers.
    """

    tile: int
    num_row_tiles: int
    num_col_tiles: int
    is_held: bool
    period: int = 0
    head_dtype: HeadDtype = "float32"
    cluster: int = 1
    max_warpgroups: int = 4

    def __post_init__(self):
        if self.tile != 64:
            raise ValueError(
                f"Blocks.tile must be 64, got {self.tile}: a warpgroup's matrix "
                "product has 64 rows, and either side of a tile becomes its rows."
            )
        for name, least in (
            ("num_row_tiles", 1),
            ("num_col_tiles", 1),
            ("period", 0),
            ("cluster", 1),
            ("max_warpgroups", 1),
        ):
            if (count := getattr(self, name)) < least:
                raise ValueError(
                    f"Blocks.{name} must be at least {least}, got {count}."
                )
        if self.cluster > MAX_CLUSTER:
            raise ValueError(
                f"Blocks.cluster must be at most {MAX_CLUSTER}, got {self.cluster}: "
                "not every GPU has room for larger ones."
            )
        if self.head_dtype not in (known := get_args(HeadDtype)):
            raise ValueError(
                f"Blocks.head_dtype must be one of {known}, got {self.head_dtype!r}: "
                "no other has the range of float32."
            )

    @property
    def rows(self) -> int:
        """Queries, padded."""
        return self.tile * self.num_row_tiles

    @property
    def cols(self) -> int:
        """Keys, padded."""
        return self.tile * self.num_col_tiles


class Crew(NamedTuple):
    """Who works on a head in one block of threads.

    Attributes:
        size: Warpgroups. They share its kernel matrix and its vectors.
        num_slots: Tiles that each has under way at once: 2, or 1 for room.
    """

    size: int
    num_slots: int


def default_blocks(problem: Problem) -> Blocks:
    """Tiles that cover the problem; what shared memory has room for is held.

    By counting, not by measuring: a warpgroup is taken to need the same time for each
    tile, and as many blocks of threads to be busy as clusters of them have room for.
    """
    tile = 64
    blocks = Blocks(
        tile=tile,
        num_row_tiles=-(-problem.t // tile),
        num_col_tiles=-(-problem.s // tile),
        is_held=True,
    )
    strips = _held_strips(problem, blocks)
    if problem.options.num_iters == 0:  # No iterations to hold a head for.
        return strips
    period = max_period(problem)
    clusters, dtypes = range(1, MAX_CLUSTER + 1), head_dtypes(problem)
    heads = [
        dataclasses.replace(blocks, period=period, head_dtype=dtype, cluster=cluster)
        for cluster, dtype in itertools.product(clusters, dtypes)
    ]
    known = [x for x in heads if _has_room(problem, x)]
    return min(known, key=lambda x: _time_of_head(problem, x), default=strips)


def _held_strips(problem, blocks):
    """Over the cluster that passes the most tiles at once; made twice without room.

    Two blocks on a multiprocessor keep it busy while one of them waits, and what more
    would do is not counted; nor is how much less a tile takes to be read than made.
    """

    def time(blocks):
        at_once = min(2, SHARED_MEMORY // sweep_bytes(problem, blocks))
        num_tiles = strips_of_block(blocks.num_col_tiles, blocks.cluster)
        return num_tiles / _busy(blocks.cluster, at_once)

    clusters = range(1, MAX_CLUSTER + 1)
    shared = [dataclasses.replace(blocks, cluster=x) for x in clusters]
    held = [x for x in shared if sweep_bytes(problem, x) <= SHARED_MEMORY]
    return min(held, key=time, default=dataclasses.replace(blocks, is_held=False))


def _has_room(problem, blocks):
    """For a head that stays, forward and backward."""
    return all(
        needs(problem, blocks, Crew(1, 1)) <= SHARED_MEMORY
        for needs in (resident_bytes, reverse_bytes)
    )


def _time_of_head(problem, blocks):
    """In turns of an iteration, forward and backward, for each cluster at work.

    That blocks of a cluster wait for each other and read each other's sums is left out.
    """
    turns = _turns(blocks, resident_crew(problem, blocks).size)
    turns += _turns(_transposed(blocks), reverse_crew(problem, blocks).size)
    return turns / _busy(blocks.cluster)


def _busy(cluster, at_once=1):
    """Clusters at work in a group of multiprocessors, with so many blocks on each."""
    return GROUP * at_once // cluster


def _turns(blocks, size):
    """Tiles one after the other in an iteration, of a block with so many warpgroups.

    Each takes whole strips for the sums of rows, and whole columns of tiles for others.
    """
    num_strips = strips_of_block(blocks.num_row_tiles, blocks.cluster)
    num_tiles = blocks.num_col_tiles
    return -(-num_strips // size) * num_tiles + -(-num_tiles // size) * num_strips


def _transposed(blocks):
    """Whose strips are those of the reverse sweep: keys."""
    return dataclasses.replace(
        blocks, num_row_tiles=blocks.num_col_tiles, num_col_tiles=blocks.num_row_tiles
    )


def head_dtypes(problem: Problem) -> tuple[HeadDtype, ...]:
    """That a kernel matrix may be kept in: float16 inputs would lose in bfloat16."""
    wide: tuple[HeadDtype, ...] = get_args(HeadDtype)
    return wide if problem.dtype == jnp.bfloat16 else wide[:1]


def max_period(problem: Problem) -> int:
    """Iterations until an entry of a kernel matrix that float32 lost could matter.

    Each takes an entry up by T S at most, and sums have as many entries and are no
    further from 1. Less than 1e-8 of any sum is lost. The same holds backwards, from
    an iteration to those before it.
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    most = math.log(1e-8 / tiny) / math.log(max(2, problem.t * problem.s))
    return max(1, int(most) - 1)


def resident_crew(problem: Problem, blocks: Blocks) -> Crew:
    """Of a resident head's forward pass."""
    return _best_crew(problem, blocks, resident_bytes, blocks)


def resident_bytes(problem: Problem, blocks: Blocks, crew: Crew) -> int:
    """What a resident head needs of shared memory in each block of threads."""
    tile, slots = blocks.tile, crew.size * crew.num_slots
    h, d = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    sizes = [crew.size * h, slots * h]
    if not values_lie_with_keys(problem, blocks):
        sizes.append(slots * d)
    operands = [problem.dtype.itemsize * tile * x for x in sizes]
    vectors = [4 * blocks.rows] * 3 + [4 * blocks.cols] * 4
    if blocks.cluster > 1:
        vectors.append(2 * 4 * blocks.cols)
    kernel = _head_bytes(blocks, blocks.num_row_tiles, blocks.cols)
    return kernel + sum(map(allocated, operands + vectors))


def values_lie_with_keys(problem: Problem, blocks: Blocks) -> bool:
    """Whether their tiles have one place: one shape, and never used at once."""
    h, d = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    return h == d == blocks.tile


def reverse_crew(problem: Problem, blocks: Blocks) -> Crew:
    """Of a resident head's reverse sweep."""
    return _best_crew(problem, blocks, reverse_bytes, _transposed(blocks))


def reverse_bytes(problem: Problem, blocks: Blocks, crew: Crew) -> int:
    """What the reverse sweep of a resident head needs, as `resident_bytes`."""
    tile, slots = blocks.tile, crew.size * crew.num_slots
    h, d = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    sizes = crew.size * h, slots * h, crew.size * d, slots * d
    operands = [problem.dtype.itemsize * tile * x for x in sizes]
    vectors = [4 * blocks.rows] * 3 + [4 * blocks.cols] * 3
    of_steps = [8 * blocks.rows] + [8 * blocks.cols] * 2
    if blocks.cluster > 1:
        of_steps.append(2 * 4 * blocks.rows)
    kernel = _head_bytes(blocks, blocks.num_col_tiles, blocks.rows)
    return kernel + sum(map(allocated, operands + vectors + of_steps))


def _best_crew(problem, blocks, needs, strips):
    """Of the warpgroups that there is room for, the fewest with the fewest turns."""
    crews = [
        Crew(size, num_slots)
        for size in range(1, blocks.max_warpgroups + 1)
        for num_slots in (2, 1)
    ]
    known = [x for x in crews if needs(problem, blocks, x) <= SHARED_MEMORY]
    return min(known, key=lambda x: _turns(strips, x.size), default=Crew(1, 1))


def strips_of_block(num_strips: int, cluster: int) -> int:
    """How many of so many, or of the tiles of one, a block of a cluster has.

    The last blocks may have fewer, or none.
    """
    return -(-num_strips // cluster)


def _head_bytes(blocks, num_strips, length):
    rows = blocks.tile * strips_of_block(num_strips, blocks.cluster)
    return jnp.dtype(blocks.head_dtype).itemsize * rows * length


def sweep_bytes(problem: Problem, blocks: Blocks) -> int:
    """What a pass over one strip needs of shared memory."""
    h = padded_dim(problem.head_dim)
    operand = problem.dtype.itemsize * blocks.tile * h
    vectors = allocated(4 * blocks.tile) + 2 * allocated(2 * 4 * blocks.tile)
    held = 0
    if blocks.is_held:
        num_tiles = strips_of_block(blocks.num_col_tiles, blocks.cluster)
        held = 4 * blocks.tile**2 * num_tiles + allocated(4 * blocks.tile)
        held += allocated(4 * blocks.tile) * (blocks.cluster > 1)
    return 3 * operand + vectors + held


def allocated(num_bytes: int) -> int:
    """What an array takes: Mosaic GPU starts the next one at a multiple of 1 KiB."""
    return -(-num_bytes // 2**10) * 2**10


class Group(NamedTuple):
    """Iterations `first` to `last`, whose steps share the kernel matrix of `base`."""

    base: int
    first: int
    last: int


def groups(problem: Problem) -> list[Group]:
    """Of the iterations whose steps the gradient undoes, the last ones first.

    The first base is the last iteration, for its kernel matrix is the plan of the
    result. The others are in the middle, `max_period` from either end at most.
    """
    last, reach = problem.options.num_iters, max_period(problem)
    result = [Group(last, max(0, last - reach), last)] if last else []
    while result and result[-1].first > 0:
        last = result[-1].first - 1
        first = max(0, last - 2 * reach)
        result.append(Group((first + last + 1) // 2, first, last))
    return result


def num_terms(problem: Problem) -> list[int]:
    """Steps of each group, and of row step 0, which is far from all others."""
    num_iters = problem.options.num_iters
    # Iteration k stands for row step k and column step k + 1, where there is one.
    return [
        min(last, num_iters - 1) - first + 1 + last - max(first, 1) + 1
        for _, first, last in groups(problem)
    ] + [1]


def whole_slots(problem: Problem, blocks: Blocks) -> int:
    """Tiles under way at once in a last pass of one launch; 0 if there is no room."""
    if not blocks.period:
        return 0
    h, d = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    of_tile = problem.dtype.itemsize * blocks.tile
    once = of_tile * (2 * h + d + 2 * blocks.tile) + 4 * blocks.rows * h
    once += _term_bytes(problem, blocks.tile, 1)
    for num_slots in (2, 1):
        at_once = num_slots * of_tile * 2 * (h + d)
        at_once += _term_bytes(problem, blocks.tile, num_slots)
        if once + at_once <= SHARED_MEMORY:
            return num_slots
    return 0


def pull_back_slots(problem: Problem, tile: int) -> int:
    """Tiles under way at once in the last pass of the gradient: 2, or 1 for room."""
    h, d = padded_dim(problem.head_dim), padded_dim(problem.value_dim)
    itemsize = problem.dtype.itemsize
    once = itemsize * tile * (h + d) + _term_bytes(problem, tile, 1)
    at_once = 2 * itemsize * tile * (2 * h + 2 * d) + _term_bytes(problem, tile, 2)
    return 2 if once + at_once <= SHARED_MEMORY else 1


def _term_bytes(problem, tile, num_slots):
    """Of a tile's potentials of each kernel matrix, and factors of each step."""
    terms = num_terms(problem)
    vector = 4 * num_slots * tile
    return allocated(vector * len(terms)) + allocated(vector * sum(terms))


def padded_dim(head_dim: int) -> int:
    """A head dimension with the zeros that fill up rows of a swizzled tile."""
    return -(-head_dim // 64) * 64
