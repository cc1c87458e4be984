"""Tiles in registers and shared memory: layouts, kernel matrices, sums, products."""

import math
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from .blocks import TILE
from .types import Ref

# Layouts in the registers of a warpgroup: a tile is laid out like the accumulator of a
# matrix product, a vector like the row sums or the column sums of such a tile.
TILE_LAYOUT: Final = plgpu.Layout.WGMMA
ROW_LAYOUT: Final = TILE_LAYOUT.reduce(1)
COL_LAYOUT: Final = TILE_LAYOUT.reduce(0)
# A tile whose columns are summed without a reduction across warps: each warp has all
# rows of 16 columns. Reads of eight rows of 16 bytes are in different banks.
COL_SUM_TILE_LAYOUT: Final = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (16,), (4,))),
    warp_dims=(-3,),
    lane_dims=(-2, -4),
    vector_dim=-1,
)
COL_SUM_LAYOUT: Final = COL_SUM_TILE_LAYOUT.reduce(0)
# The hardware computes powers of 2. A power of e needs some more operations.
LOG2_E: Final = math.log2(math.e)


def along_rows(x: Float[Array, " I"], like: Float[Array, "I J"]) -> Float[Array, "I J"]:
    """The matrix that has x[i] in all of row i."""
    # Not x[:, None], because a tile of one column has no layout.
    return jax.lax.broadcast_in_dim(x, like.shape, (0,))


def along_cols(x: Float[Array, " J"], like: Float[Array, "I J"]) -> Float[Array, "I J"]:
    """The matrix that has x[j] in all of column j."""
    return jax.lax.broadcast_in_dim(x, like.shape, (1,))


def kernel_of(
    products: Float[Array, "I J"],
    f: Float[Array, " I"],
    g: Float[Array, " J"],
    scale: float,
) -> Float[Array, "I J"]:
    """The kernel matrix exp(scale * products + f + g); 0 for potentials of -inf."""
    f, g = f * jnp.float32(LOG2_E), g * jnp.float32(LOG2_E)
    logits = products * jnp.float32(scale * LOG2_E)
    return jnp.exp2((logits + along_rows(f, logits)) + along_cols(g, logits))


def log_sum(
    carry: tuple[Float[Array, " I"], Float[Array, " I"]],
    products: Float[Array, "I J"],
    g: Float[Array, " J"],
    scale: float,
) -> tuple[Float[Array, " I"], Float[Array, " I"]]:
    """Running row maxima m of x, and sums of 2^(x - m), with one more tile of x.

    x is (scale * products + g) / log 2. The initial carry is the least float32 and 0;
    `total_log` gives the result.
    """
    top, total = carry
    x = products * jnp.float32(scale * LOG2_E)
    x = x + along_cols(g * jnp.float32(LOG2_E), x)
    next_top = jnp.maximum(top, x.max(axis=1))
    more = jnp.exp2(x - along_rows(next_top, x)).sum(axis=1)
    return next_top, total * jnp.exp2(top - next_top) + more


def total_log(top: Float[Array, "..."], total: Float[Array, "..."]) -> Array:
    """Natural logarithms of the row sums, from the last carry of `log_sum`."""
    return top * jnp.float32(1 / LOG2_E) + jnp.log(total)


def less_outer(
    x: Float[Array, "I J"], left: Float[Array, " I"], right: Float[Array, " J"]
) -> Float[Array, "I J"]:
    """The matrix x - left right^T."""
    return x - along_rows(left, x) * along_cols(right, x)


def row_sums(
    kernel: Float[Array, "I J"], weights: Float[Array, " J"]
) -> Float[Array, " I"]:
    """The product E weights, not on the tensor cores, which would round both."""
    return (kernel * along_cols(weights, kernel)).sum(axis=1)


def col_sums(
    kernel: Float[Array, "I J"], weights: Float[Array, " I"]
) -> Float[Array, " J"]:
    """The product E^T weights, as `row_sums`."""
    return (kernel * along_rows(weights, kernel)).sum(axis=0)


def operand(*shape: int, dtype: jnp.dtype) -> Any:
    """Shared memory for an operand of the tensor cores, swizzled."""
    width = min(128 // dtype.itemsize, shape[-1])
    swizzle = width * dtype.itemsize
    transforms = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def vectors(*shape: int) -> Any:
    """Shared memory for vectors that belong to the rows or the columns of a tile."""
    return plgpu.SMEM((*shape, TILE), jnp.float32)


def left_operand(ref: Ref) -> Float[Array, "I K"]:
    """An operand, loaded from shared memory to registers for several products."""
    return plgpu.layout_cast(ref[...], TILE_LAYOUT)


def product(x: Ref | Float[Array, "I K"], y_ref: Ref) -> Float[Array, "I J"]:
    """The matrix product x y of an operand in registers or shared memory, and `y_ref`.

    For tiles as small as these, reading both operands from shared memory takes as long
    as multiplying them. A kernel that has registers left loads x once.
    """

    def multiply(acc_ref):
        start_product(acc_ref, x, y_ref)
        return acc_ref[...]  # Waits for the tensor cores.

    shape = x.shape[0], y_ref.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_product(acc_ref: Ref, x: Float[Array, "I J"], y_ref: Ref) -> None:
    """Adds x y to the accumulator and waits, with x rounded to the dtype of `y_ref`."""
    start_product(acc_ref, x.astype(y_ref.dtype), y_ref)
    # The caller overwrites the operands next.
    plgpu.wgmma_wait(0)


def start_product(acc_ref: Ref, x: Ref | Float[Array, "I K"], y_ref: Ref) -> None:
    """Starts to add x y to the accumulator.

    A function of its own for the tests: Pallas interprets only products of operands
    that are in shared memory.
    """
    plgpu.wgmma(acc_ref, x, y_ref)


def zeros(*shape: int) -> Float[Array, "..."]:
    """A vector of zeros for the rows of a tile."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ROW_LAYOUT)


def zero_tile() -> Float[Array, "I J"]:
    """A tile of zeros, in the layout of an accumulator."""
    return plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), TILE_LAYOUT)


def of_rows(ref: Ref, *index: Any) -> Float[Array, " I"]:
    """A vector in shared memory, loaded for the rows of a tile."""
    return plgpu.layout_cast(ref[index or ...], ROW_LAYOUT)


def of_cols(ref: Ref, *index: Any) -> Float[Array, " J"]:
    """A vector in shared memory, loaded for the columns of a tile."""
    return plgpu.layout_cast(ref[index or ...], COL_LAYOUT)


def of_col_sums(ref: Ref, *index: Any) -> Float[Array, " J"]:
    """A vector in shared memory, loaded in the layout of `SmemMatrix.col_sums`."""
    return plgpu.layout_cast(ref[index], COL_SUM_LAYOUT)


def in_tiles(x: Float[Array, "*heads I"]) -> Float[Array, "*heads G tile"]:
    """A vector of each head, cut into tiles."""
    return x.reshape(*x.shape[:-1], -1, TILE)


def span(i: Int[Array, ""]) -> Any:
    """The slice of tile `i` in an array of all rows, or of all columns."""
    return pl.ds(i * jnp.int32(TILE), TILE)


def head_and_row_block(num_row_blocks: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Head and row block of this program.

    Row blocks of one head are consecutive, because they read the same keys.
    """
    program = jax.lax.axis_index("program")
    return (
        jax.lax.div(program, jnp.int32(num_row_blocks)),
        jax.lax.rem(program, jnp.int32(num_row_blocks)),
    )


def key_head_of(n: Int[Array, ""], group_size: int) -> Int[Array, ""]:
    """The key head of query head `n`, where `group_size` query heads share one."""
    return jax.lax.div(n, jnp.int32(group_size))
