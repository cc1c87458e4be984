"""What the forward and the backward GPU kernels do alike with a tile, and with a strip.

The first part are plain functions of arrays. The second part moves tiles: a warpgroup
has some rows and goes over all columns tile by tile. It is a block of threads alone, or
one of several that share a head or a strip (`_mosaic_gpu_held`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..._runtime.shard_map import varying_like

# A reference to memory inside a kernel. Pallas has no public type for one.
Ref = Any
Carry = TypeVar("Carry")

TILE: Final = plgpu.Layout.WGMMA  # How a warpgroup's registers hold a tile,
ROWS: Final = TILE.reduce(1)  # a number for each row of it,
COLS: Final = TILE.reduce(0)  # and for each column.
# The hardware has powers of two, and a power of e costs some operations more.
LOG2_E: Final = math.log2(math.e)


def along_rows(x: Float[Array, " I"], like: Float[Array, "I J"]) -> Float[Array, "I J"]:
    """A number for each row, in all columns."""
    # By way of a column of one, as indexing does it, a tile has no layout.
    return jax.lax.broadcast_in_dim(x, like.shape, (0,))


def along_cols(x: Float[Array, " J"], like: Float[Array, "I J"]) -> Float[Array, "I J"]:
    """A number for each column, in all rows."""
    return jax.lax.broadcast_in_dim(x, like.shape, (1,))


def kernel_of(
    products: Float[Array, "I J"],
    f: Float[Array, " I"],
    g: Float[Array, " J"],
    scale: float,
) -> Float[Array, "I J"]:
    """exp(logits + f + g); a potential of -inf makes padding of its row or column."""
    f, g = f * jnp.float32(LOG2_E), g * jnp.float32(LOG2_E)
    logits = products * jnp.float32(scale * LOG2_E)
    return jnp.exp2((logits + along_rows(f, logits)) + along_cols(g, logits))


def log_sum(
    carry: tuple[Float[Array, " I"], Float[Array, " I"]],
    products: Float[Array, "I J"],
    g: Float[Array, " J"],
    scale: float,
) -> tuple[Float[Array, " I"], Float[Array, " I"]]:
    """Row maxima and sums under them, with another tile; start from least and 0.

    Maxima are logarithms to base 2, of exp(logits + g); see `total_log`.
    """
    top, total = carry
    x = products * jnp.float32(scale * LOG2_E)
    x = x + along_cols(g * jnp.float32(LOG2_E), x)
    next_top = jnp.maximum(top, x.max(axis=1))
    more = jnp.exp2(x - along_rows(next_top, x)).sum(axis=1)
    return next_top, total * jnp.exp2(top - next_top) + more


def total_log(top: Float[Array, "..."], total: Float[Array, "..."]) -> Array:
    """Natural logarithms of the sums that `log_sum` has come to."""
    return top * jnp.float32(1 / LOG2_E) + jnp.log(total)


def less_outer(
    x: Float[Array, "I J"], left: Float[Array, " I"], right: Float[Array, " J"]
) -> Float[Array, "I J"]:
    """`x` less the outer product of `left` and `right`."""
    return x - along_rows(left, x) * along_cols(right, x)


def row_sums(kernel: Float[Array, "I J"], weights: Float[Array, " J"]):
    """Of the columns, weighted; not on the tensor cores, which would round them."""
    return (kernel * along_cols(weights, kernel)).sum(axis=1)


def col_sums(kernel: Float[Array, "I J"], weights: Float[Array, " I"]):
    """Of the rows, weighted; as `row_sums`."""
    return (kernel * along_rows(weights, kernel)).sum(axis=0)


def operand(*shape: int, dtype: jnp.dtype) -> Any:
    """Shared memory for what the tensor cores multiply, in their order."""
    width = min(128 // dtype.itemsize, shape[-1])
    swizzle = width * dtype.itemsize
    transforms = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def left_operand(ref: Ref) -> Float[Array, "I K"]:
    """An operand in registers, out of shared memory, for many products."""
    return plgpu.layout_cast(ref[...], TILE)


def product(x: Ref | Float[Array, "I K"], y_ref: Ref) -> Float[Array, "I J"]:
    """Of an operand in registers or shared memory, and one in shared memory.

    Reading two operands of tiles as small as these takes shared memory as long as the
    tensor cores take to multiply them. Kernels that need their registers for more than
    that leave both there.
    """

    def multiply(acc_ref):
        start_product(acc_ref, x, y_ref)
        return acc_ref[...]  # Waits for the tensor cores.

    shape = x.shape[0], y_ref.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_product(acc_ref: Ref, x: Float[Array, "I J"], y_ref: Ref) -> None:
    """Add the product of `x`, rounded to the dtype of `y_ref`, and `y_ref`."""
    start_product(acc_ref, x.astype(y_ref.dtype), y_ref)
    # What was multiplied is about to be overwritten.
    plgpu.wgmma_wait(0)


def start_product(acc_ref: Ref, x: Ref | Float[Array, "I K"], y_ref: Ref) -> None:
    """Begin to add a product. Pallas interprets only those of shared memory."""
    plgpu.wgmma(acc_ref, x, y_ref)


def zeros(*shape: int) -> Float[Array, "..."]:
    """A vector with a number for each row of a tile."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ROWS)


def zero_tile(tile: int) -> Float[Array, "I J"]:
    """As a product's accumulator is held."""
    return plgpu.layout_cast(jnp.zeros((tile, tile), jnp.float32), TILE)


def of_rows(ref: Ref, *index: Any) -> Float[Array, " I"]:
    """A vector in shared memory as numbers for the rows of a tile."""
    return plgpu.layout_cast(ref[index or ...], ROWS)


def of_cols(ref: Ref, *index: Any) -> Float[Array, " J"]:
    """A vector in shared memory as numbers for the columns of a tile."""
    return plgpu.layout_cast(ref[index or ...], COLS)


def span(i: Int[Array, ""], tile: int) -> Any:
    """Where tile `i` is in an array of all rows, or of all columns."""
    return pl.ds(i * jnp.int32(tile), tile)


def head_and_strip(num_strips: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Of this program; strips of one head follow each other and share its keys."""
    program = jax.lax.axis_index("program")
    return (
        jax.lax.div(program, jnp.int32(num_strips)),
        jax.lax.rem(program, jnp.int32(num_strips)),
    )


def shared_head(n: Int[Array, ""], groups: int) -> Int[Array, ""]:
    """The key head of a query head."""
    return jax.lax.div(n, jnp.int32(groups))


def start(barrier_ref: Ref, copies: Sequence[tuple[Ref, Ref]]) -> None:
    """Begin to copy to shared memory. One arrival for each copy."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier_ref)


def load(barrier_ref: Ref, copies: Sequence[tuple[Ref, Ref]]) -> None:
    """Copy to shared memory, and wait for it. One arrival for each copy."""
    start(barrier_ref, copies)
    plgpu.barrier_wait(barrier_ref)


def at_once(do: Callable[[], None]) -> None:
    """Do it, as every warpgroup."""
    do()


def over_tiles(
    num_tiles: int | Int[Array, ""],
    num_slots: int,
    barrier_ref: Ref,
    copies: Callable[[Int[Array, ""]], Sequence[tuple[Ref, Ref]]],
    body: Callable[[Int[Array, ""], Int[Array, ""], Carry], Carry],
    carry: Carry,
    *,
    first_slot: Int[Array, ""] | int = 0,
    starts: Callable[[Callable[[], None]], None] = at_once,
) -> Carry:
    """`body(j, slot, carry)` for each tile j, whose copies lie in that slot.

    Args:
        num_tiles: How many, at least one if it is a number.
        num_slots: 2 to copy the next tile while one is in use, or 1.
        barrier_ref: One barrier for each slot, with one arrival for each copy.
        copies: Sources and targets for a tile; targets have a leading axis of slots.
            `body` must not leave a matrix product of them unfinished.
        body: What to do with a tile.
        carry: What it starts from.
        first_slot: Of the slots, and barriers, that are this warpgroup's.
        starts: Who starts the copies, if several warpgroups share the tiles; `body`
            must then end where all meet.
    """

    def slot_of(j):
        return first_slot + jax.lax.rem(j, jnp.int32(num_slots))

    def fetch(j):
        slot = slot_of(j)

        def start_copies():
            # All threads are done with what the slot had, also as copies see it.
            plgpu.commit_smem()
            into_slot = [(source, target.at[slot]) for source, target in copies(j)]
            start(barrier_ref.at[slot], into_slot)

        starts(start_copies)

    def step(j, carry):
        slot = slot_of(j)
        if num_slots == 1:
            fetch(j)
        else:
            pl.when(j + jnp.int32(1) < num_tiles)(lambda: fetch(j + jnp.int32(1)))
        plgpu.barrier_wait(barrier_ref.at[slot])
        return body(j, slot, carry)

    if num_slots > 1:
        is_any = at_once if isinstance(num_tiles, int) else pl.when(num_tiles > 0)
        is_any(lambda: fetch(jnp.int32(0)))
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_tiles), step, carry)


def call_kernel(
    body: Callable[..., None],
    name: str,
    num_programs: int,
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    *arrays: Array,
    num_warpgroups: int = 1,
    cluster: int = 1,
) -> Sequence[Array]:
    """Run a kernel of so many programs.

    Several warpgroups have an axis "warpgroup", several blocks of threads that make up
    a program an axis "block".
    """
    if num_programs == 0:  # No kernel has an empty grid.
        return [jnp.zeros(x.shape, x.dtype) for x in out_type]
    # Exponentials are off by a few units in the last place of float32, and potentials
    # by one more where they become logarithms to base 2: with logits of 300 that is
    # some 2e-4 of the plan, far below what bfloat16 or float16 rounds.
    params, threads = plgpu.CompilerParams(approx_math=True), {}
    if num_warpgroups > 1:
        threads = {"num_threads": num_warpgroups, "thread_name": "warpgroup"}
        # Sums across warps would meet in one place. Without room they do not lower.
        params = dataclasses.replace(params, reduction_scratch_bytes=0)
    if cluster > 1:
        threads |= {"cluster": (cluster,), "cluster_names": ("block",)}
        # By the other semantics, the default from JAX 0.11 on, a slice of what another
        # block has does not lower.
        lane = plgpu.LoweringSemantics.Lane
        params = dataclasses.replace(params, lowering_semantics=lane)
    results = plgpu.kernel(
        body,
        out_type=list(out_type),
        scratch_types=list(scratch),
        # One axis, because only one of a GPU's has room for all strips of all heads.
        grid=(num_programs,),
        grid_names=("program",),
        compiler_params=params,
        kernel_name=name,
        **threads,
    )(*arrays)
    # What varies over the axes of a `jax.shard_map` is lost on the way.
    return varying_like(results, arrays)


def vector(*shape: int) -> jax.ShapeDtypeStruct:
    """The type of potentials, weights and sums."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
