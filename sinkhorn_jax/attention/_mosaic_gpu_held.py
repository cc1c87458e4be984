"""A head's kernel matrix in shared memory: its tiles, and products with vectors.

Vectors are in shared memory in tiles too, [T / tile, tile] or [S / tile, tile], and not
multiplied on the tensor cores, which would round them.

The matrix leaves no room for a second block of threads, so that several warpgroups of
one block share it. Each takes every so many-th strip or tile, and all meet before one
reads what another wrote. No sum crosses the warps of a warpgroup: Pallas has one place
in shared memory for such sums, whichever warpgroup they are of.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ._mosaic_gpu_blocks import Blocks
from ._mosaic_gpu_strips import (
    TILE,
    Carry,
    Ref,
    along_cols,
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
    """The matrix or its transpose in tiles: [rows / tile, cols / tile, tile, tile]."""

    ref: Ref

    def put(self, i: Int[Array, ""], j: Int[Array, ""], x: Float[Array, "I J"]) -> None:
        """Keep a tile, rounded to what the matrix is kept in."""
        self.ref[i, j] = x.astype(self.ref.dtype)

    def at(self, i: Int[Array, ""], j: Int[Array, ""]) -> Float[Array, "I J"]:
        """A tile as it is kept; each thread reads what it has put itself."""
        return plgpu.layout_cast(self.ref[i, j], TILE).astype(jnp.float32)

    def row_sums(self, i: Int[Array, ""], weights_ref: Ref) -> Float[Array, " I"]:
        """Of strip `i`, with a weight for each column; by who has put it."""

        def add(j, sums):
            kernel = self.at(i, j)
            return sums + kernel * along_cols(of_cols(weights_ref, j), kernel)

        _, num_cols, tile, _ = self.ref.shape
        return each(num_cols, add, zero_tile(tile)).sum(axis=1)

    def col_sums(self, j: Int[Array, ""], weights_ref: Ref) -> Float[Array, " J"]:
        """Of the columns of tile `j`, with a weight for each row; see `of_sums`."""
        num_rows, _, tile, _ = self.ref.shape

        def add(i, sums):
            kernel = plgpu.layout_cast(self.ref[i, j], DOWN).astype(jnp.float32)
            weights = plgpu.layout_cast(weights_ref[i], DOWN.reduce(1))
            weights = jax.lax.broadcast_in_dim(weights, kernel.shape, (0,))
            return sums + kernel * plgpu.layout_cast(weights, DOWN)

        zero = plgpu.layout_cast(jnp.zeros((tile, tile), jnp.float32), DOWN)
        return each(num_rows, add, zero).sum(axis=0)


def of_sums(ref: Ref, *index: Any) -> Float[Array, " J"]:
    """A vector in shared memory as numbers for sums of columns."""
    return plgpu.layout_cast(ref[index], DOWN.reduce(0))


def matrix(num_strips: int, num_tiles: int, blocks: Blocks) -> Any:
    """Shared memory for the kernel matrix of a head, or its transpose."""
    shape = num_strips, num_tiles, blocks.tile, blocks.tile
    return operand(*shape, dtype=jnp.dtype(blocks.head_dtype))


class Team(NamedTuple):
    """The warpgroups of a block of threads, as one of them sees it.

    Attributes:
        size: How many.
        me: Which of them this is.
        barrier_ref: Where they meet, with an arrival for each.
    """

    size: int
    me: Int[Array, ""]
    barrier_ref: Ref

    def meet(self) -> None:
        """All of them see what each has written until here, and copies do too."""
        plgpu.commit_smem()
        if self.size > 1:
            plgpu.barrier_arrive(self.barrier_ref)
            plgpu.barrier_wait(self.barrier_ref)

    def share(self, count: int, do: Callable[[Int[Array, ""]], None]) -> None:
        """`do(i)` for so many i, each by one of them, and the same one every time."""

        def take_turn(turn):
            i = turn * jnp.int32(self.size) + self.me
            if count % self.size:
                pl.when(i < count)(lambda: do(i))
            else:
                do(i)

        do_each(-(-count // self.size), take_turn)

    def by_one(self, do: Callable[[], None]) -> None:
        """Do it once, for all."""
        if self.size > 1:
            pl.when(self.me == 0)(do)
        else:
            do()

    def load(self, barrier_ref: Ref, copies: Sequence[tuple[Ref, Ref]]) -> None:
        """Copy for all, who wait for it. One arrival for each copy."""
        self.by_one(lambda: start(barrier_ref, copies))
        plgpu.barrier_wait(barrier_ref)


def team(size: int, barrier_ref: Ref) -> Team:
    """Of so many warpgroups, inside a kernel."""
    me = jax.lax.axis_index("warpgroup") if size > 1 else jnp.int32(0)
    return Team(size, me, barrier_ref)


def each(count: int, step: Callable[..., Carry], carry: Carry) -> Carry:
    """`step(i, carry)` for so many i."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)


def do_each(count: int, do: Callable[..., None]) -> None:
    """`do(i)` for so many i."""

    def step(i, nothing):
        do(i)
        return nothing

    each(count, step, jnp.int32(0))


def in_tiles(x: Float[Array, "*heads I"], tile: int) -> Float[Array, "*heads G tile"]:
    """A vector of each head, as a program keeps it."""
    return x.reshape(*x.shape[:-1], -1, tile)
