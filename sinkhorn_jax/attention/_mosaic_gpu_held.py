"""A head's kernel matrix in shared memory: its tiles, and products with vectors.

Vectors are in shared memory in tiles too, [T / tile, tile] or [S / tile, tile], and not
multiplied on the tensor cores, which would round them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ._mosaic_gpu_blocks import Blocks
from ._mosaic_gpu_strips import (
    COLS,
    TILE,
    Carry,
    Ref,
    along_cols,
    along_rows,
    of_cols,
    of_rows,
    operand,
    zero_tile,
)


class Held(NamedTuple):
    """The matrix, tile by tile: [T / tile, S / tile, tile, tile]."""

    ref: Ref

    def put(self, i: Int[Array, ""], j: Int[Array, ""], x: Float[Array, "I J"]) -> None:
        """Keep a tile, rounded to what the matrix is kept in."""
        self.ref[i, j] = x.astype(self.ref.dtype)

    def at(self, i: Int[Array, ""], j: Int[Array, ""]) -> Float[Array, "I J"]:
        """A tile as it is kept; each thread reads what it has put itself."""
        return plgpu.layout_cast(self.ref[i, j], TILE).astype(jnp.float32)

    def row_sums(self, i: Int[Array, ""], weights_ref: Ref) -> Float[Array, " I"]:
        """Of strip `i`, with a weight for each column."""

        def add(j, sums):
            kernel = self.at(i, j)
            return sums + kernel * along_cols(of_cols(weights_ref, j), kernel)

        _, num_cols, tile, _ = self.ref.shape
        return each(num_cols, add, zero_tile(tile)).sum(axis=1)

    def col_sums(self, j: Int[Array, ""], weights_ref: Ref) -> Float[Array, " J"]:
        """Of the columns of tile `j`, with a weight for each row."""

        def add(i, sums):
            kernel = self.at(i, j)
            return sums + kernel * along_rows(of_rows(weights_ref, i), kernel)

        num_rows, _, tile, _ = self.ref.shape
        return each(num_rows, add, zero_tile(tile)).sum(axis=0)


def matrix(blocks: Blocks) -> Any:
    """Shared memory for the kernel matrix of a head."""
    shape = blocks.num_row_tiles, blocks.num_col_tiles, blocks.tile, blocks.tile
    return operand(*shape, dtype=jnp.dtype(blocks.head_dtype))


def each(count: int, step: Callable[..., Carry], carry: Carry) -> Carry:
    """`step(i, carry)` for so many i."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)


def do_each(count: int, do: Callable[..., None]) -> None:
    """`do(i)` for so many i."""

    def step(i, nothing):
        do(i)
        return nothing

    each(count, step, jnp.int32(0))


def zeros_of_cols(tile: int) -> Float[Array, " J"]:
    """A vector with a number for each column of a tile."""
    return plgpu.layout_cast(jnp.zeros((tile,), jnp.float32), COLS)


def in_tiles(x: Float[Array, "*heads I"], tile: int) -> Float[Array, "*heads G tile"]:
    """A vector of each head, as a program keeps it."""
    return x.reshape(*x.shape[:-1], -1, tile)
