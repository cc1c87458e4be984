"""A kernel matrix, or strips of it, in shared memory: tiles, products with vectors.

Vectors are in shared memory in tiles too, [T / tile, tile] or [S / tile, tile], and not
multiplied on the tensor cores, which would round them.

A whole matrix leaves no room for a second block of threads, so that several warpgroups
of one block share it. Each takes every so many-th strip or tile, and all meet before
one reads what another wrote. No sum crosses the warps of a warpgroup: Pallas has one
place in shared memory for such sums, whichever warpgroup they are of. A strip that is
made anew in every pass has one warpgroup.

Where one block has no room, or too little for several warpgroups, a cluster of them
holds the matrix, each some of the strips. Every block has all vectors. It makes those
entries that belong to its strips, and reads the others out of the shared memory of the
blocks that made them; sums of columns it adds up from all blocks, in one order, so that
all have the same bits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import nvvm
from jaxtyping import Array, Float, Int

from .blocks import Blocks, strips_of_block
from .tiles import (
    TILE,
    Carry,
    Ref,
    along_cols,
    at_once,
    of_cols,
    operand,
    start,
    zero_tile,
)

# How registers hold a tile whose columns are summed: each warp has all rows of 16
# columns. Eight rows of 16 bytes are in different banks.
DOWN: Final = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (16,), (4,))),
    warp_dims=(-3,),
    lane_dims=(-2, -4),
    vector_dim=-1,
)


class Held(NamedTuple):
    """The matrix or its transpose, or some strips of it, in square tiles.

    Attributes:
        ref: [strips, cols / tile, tile, tile].
        first: Which of all strips is the first one here.
        count: How many are here.
    """

    ref: Ref
    first: Int[Array, ""] | int
    count: Int[Array, ""] | int

    def put(self, i: Int[Array, ""], j: Int[Array, ""], x: Float[Array, "I J"]) -> None:
        """Keep a tile, rounded to what the matrix is kept in."""
        self.ref[i - self.first, j] = x.astype(self.ref.dtype)

    def at(self, i: Int[Array, ""], j: Int[Array, ""]) -> Float[Array, "I J"]:
        """A tile as it is kept; each thread reads what it has put itself."""
        kernel = plgpu.layout_cast(self.ref[i - self.first, j], TILE)
        return kernel.astype(jnp.float32)

    def row_sums(self, i: Int[Array, ""], weights_ref: Ref) -> Float[Array, " I"]:
        """Of strip `i`, with a weight for each column; by who has put it."""

        def add(j, sums):
            kernel = self.at(i, j)
            return sums + kernel * along_cols(of_cols(weights_ref, j), kernel)

        _, num_cols, tile, _ = self.ref.shape
        return each(num_cols, add, zero_tile(tile)).sum(axis=1)

    def col_sums(self, j: Int[Array, ""], weights_ref: Ref) -> Float[Array, " J"]:
        """Of the columns of tile `j`, with a weight for each row; see `of_sums`.

        Of the strips that are here.
        """
        tile = self.ref.shape[2]

        def add(i, sums):
            kernel = plgpu.layout_cast(self.ref[i, j], DOWN).astype(jnp.float32)
            weights = plgpu.layout_cast(weights_ref[i + self.first], DOWN.reduce(1))
            weights = jax.lax.broadcast_in_dim(weights, kernel.shape, (0,))
            return sums + kernel * plgpu.layout_cast(weights, DOWN)

        zero = plgpu.layout_cast(jnp.zeros((tile, tile), jnp.float32), DOWN)
        return each(self.count, add, zero).sum(axis=0)


def of_sums(ref: Ref, *index: Any) -> Float[Array, " J"]:
    """A vector in shared memory as numbers for sums of columns."""
    return plgpu.layout_cast(ref[index], DOWN.reduce(0))


def matrix(num_strips: int, num_tiles: int, blocks: Blocks) -> Any:
    """Shared memory for a block's part of a head's kernel matrix or its transpose."""
    num_strips = strips_of_block(num_strips, blocks.cluster)
    shape = num_strips, num_tiles, blocks.tile, blocks.tile
    return operand(*shape, dtype=jnp.dtype(blocks.head_dtype))


class Team(NamedTuple):
    """The warpgroups that share a head, or a strip of one, as one of them sees it.

    Attributes:
        size: How many in each block of threads.
        me: Which of these this is.
        barrier_ref: Where they meet, with an arrival for each; None if it is alone.
        num_blocks: Blocks of threads that share it.
        block: Which of them this is.
    """

    size: int
    me: Int[Array, ""]
    barrier_ref: Ref
    num_blocks: int
    block: Int[Array, ""]

    def meet(self) -> None:
        """All of this block see what each has written until here, and copies do too."""
        plgpu.commit_smem()
        if self.size > 1:
            plgpu.barrier_arrive(self.barrier_ref)
            plgpu.barrier_wait(self.barrier_ref)

    def meet_all(self) -> None:
        """All of all blocks do."""
        if self.num_blocks > 1:
            plgpu.commit_smem()
            meet_in_cluster()
        else:
            self.meet()

    def share(self, count: int, do: Callable[[Int[Array, ""]], None]) -> None:
        """`do(i)` for so many i, each by one of the block, and always the same one."""

        def take_turn(turn):
            i = turn * jnp.int32(self.size) + self.me
            if count % self.size:
                pl.when(i < count)(lambda: do(i))
            else:
                do(i)

        do_each(-(-count // self.size), take_turn)

    def own(self, count: int) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
        """The first one of so many strips that this block has, and how many it has.

        Or of the tiles of one strip.
        """
        if self.num_blocks == 1:
            return 0, count
        most = strips_of_block(count, self.num_blocks)
        first = self.block * jnp.int32(most)
        if count % self.num_blocks == 0:
            return first, most
        here = jax.lax.min(jnp.int32(count) - first, jnp.int32(most))
        return first, jax.lax.max(here, jnp.int32(0))

    def share_own(self, count: int, do: Callable[[Int[Array, ""]], None]) -> None:
        """`do(i)` for those of so many strips that this block has."""
        first, here = self.own(count)
        if isinstance(here, int):
            self.share(here, lambda i: do(i + first))
        else:
            most = strips_of_block(count, self.num_blocks)
            self.share(most, lambda i: pl.when(i < here)(lambda: do(i + first)))

    def when_first(self, do: Callable[[], None]) -> None:
        """Do it in the first block."""
        if self.num_blocks > 1:
            pl.when(self.block == 0)(do)
        else:
            do()

    def when_own(
        self, i: Int[Array, ""], count: int
    ) -> Callable[[Callable[[], None]], None]:
        """As `pl.when`: if this block has strip `i` of so many."""
        if self.num_blocks == 1:
            return at_once
        return pl.when(self._owner(i, count) == self.block)

    def gather(self, ref: Ref) -> None:
        """Every block has all of a vector, once each has made that of its strips."""
        self.meet_all()
        if self.num_blocks == 1:
            return
        count = ref.shape[0]

        def fetch(i):
            owner = self._owner(i, count)

            @pl.when(owner != self.block)
            def _():
                ref[i] = of_sums(plgpu.cluster_ref(ref, {"block": owner}), i)

        self.share(count, fetch)
        self.meet()

    def sums_of_blocks(
        self, read: Callable[..., Float[Array, " J"]], ref: Ref, *index: Any
    ) -> Float[Array, " J"]:
        """What all blocks have there, as one reads it, added up; once they have met."""
        parts = [
            read(plgpu.cluster_ref(ref, {"block": jnp.int32(block)}), *index)
            for block in range(self.num_blocks)
        ]
        return functools.reduce(jnp.add, parts)

    def leave(self) -> None:
        """At the end: shared memory ends with its block, and others may read it."""
        if self.num_blocks > 1:
            self.meet_all()

    def by_one(self, do: Callable[[], None]) -> None:
        """Do it once, for all of the block."""
        if self.size > 1:
            pl.when(self.me == 0)(do)
        else:
            do()

    def load(self, barrier_ref: Ref, copies: Sequence[tuple[Ref, Ref]]) -> None:
        """Copy for the block, which waits for it. One arrival for each copy."""
        self.by_one(lambda: start(barrier_ref, copies))
        plgpu.barrier_wait(barrier_ref)

    def _owner(self, i, count):
        return jax.lax.div(i, jnp.int32(strips_of_block(count, self.num_blocks)))


def team(size: int, barrier_ref: Ref, num_blocks: int) -> Team:
    """Of so many warpgroups in each of so many blocks of threads, inside a kernel."""
    me = jax.lax.axis_index("warpgroup") if size > 1 else jnp.int32(0)
    block = jax.lax.axis_index("block") if num_blocks > 1 else jnp.int32(0)
    return Team(size, me, barrier_ref, num_blocks, block)


@plgpu.inline_mgpu()
def meet_in_cluster(*_: Any) -> None:
    """All threads of a cluster see what each has written until here.

    The barriers of Pallas promise no more than that blocks have arrived.
    """
    nvvm.cluster_arrive()  # With release and, below, acquire, unless told otherwise.
    nvvm.cluster_wait()


def each(
    count: int | Int[Array, ""], step: Callable[..., Carry], carry: Carry
) -> Carry:
    """`step(i, carry)` for so many i."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)


def do_each(count: int | Int[Array, ""], do: Callable[..., None]) -> None:
    """`do(i)` for so many i."""

    def step(i, nothing):
        do(i)
        return nothing

    each(count, step, jnp.int32(0))


def in_tiles(x: Float[Array, "*heads I"], tile: int) -> Float[Array, "*heads G tile"]:
    """A vector of each head, as a program keeps it."""
    return x.reshape(*x.shape[:-1], -1, tile)
