"""The kernel matrix E in shared memory, and its products with vectors.

Vectors are in shared memory in tiles, [T / tile, tile] or [S / tile, tile]. They do not
go through the tensor cores, which would round them. No sum crosses the warps of a
warpgroup, because Pallas has one place in shared memory for such sums that all
warpgroups of a thread block would use at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from . import tiles
from .blocks import TILE
from .loops import fold
from .types import Ref


class SmemMatrix(NamedTuple):
    """E or its transpose, or the row blocks of it that a thread block owns.

    Attributes:
        ref: [row blocks, columns / tile, tile, tile].
        first: Index of the first row block here among all row blocks.
        count: Number of row blocks here.
    """

    ref: Ref
    first: Int[Array, ""] | int
    count: Int[Array, ""] | int

    def put(self, i: Int[Array, ""], j: Int[Array, ""], x: Float[Array, "I J"]) -> None:
        """Stores tile j of row block i, rounded to the dtype of the matrix."""
        self.ref[i - self.first, j] = x.astype(self.ref.dtype)

    def at(self, i: Int[Array, ""], j: Int[Array, ""]) -> Float[Array, "I J"]:
        """Tile j of row block i as stored. Each thread reads what it wrote itself."""
        kernel = plgpu.layout_cast(self.ref[i - self.first, j], tiles.TILE_LAYOUT)
        return kernel.astype(jnp.float32)

    def row_sums(self, i: Int[Array, ""], weights_ref: Ref) -> Float[Array, " I"]:
        """Row block i of E weights; only for the warpgroup that stored row block i."""

        def add(j, sums):
            kernel = self.at(i, j)
            weights = tiles.of_cols(weights_ref, j)
            return sums + kernel * tiles.along_cols(weights, kernel)

        num_tiles = self.ref.shape[1]
        return fold(num_tiles, add, tiles.zero_tile()).sum(axis=1)

    def col_sums(self, j: Int[Array, ""], weights_ref: Ref) -> Float[Array, " J"]:
        """Tile j of E^T weights over the row blocks here; see `of_col_sums`."""

        def add(i, sums):
            kernel = plgpu.layout_cast(self.ref[i, j], tiles.COL_SUM_TILE_LAYOUT)
            kernel = kernel.astype(jnp.float32)
            weights = weights_ref[i + self.first]
            weights = plgpu.layout_cast(weights, tiles.COL_SUM_TILE_LAYOUT.reduce(1))
            weights = jax.lax.broadcast_in_dim(weights, kernel.shape, (0,))
            return sums + kernel * plgpu.layout_cast(weights, tiles.COL_SUM_TILE_LAYOUT)

        zero = jnp.zeros((TILE, TILE), jnp.float32)
        zero = plgpu.layout_cast(zero, tiles.COL_SUM_TILE_LAYOUT)
        return fold(self.count, add, zero).sum(axis=0)
