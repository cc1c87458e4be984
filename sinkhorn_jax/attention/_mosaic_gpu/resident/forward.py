"""The forward pass in one launch, with a head's kernel matrix in shared memory.

A block of threads has a head, or a cluster of blocks has it, each some of its strips;
warpgroups share them and the tiles. With the potentials f and g of a plan whose columns
are right it makes E = exp(Z + f + g) once, and then only multiplies by it: with v = 1,

    u = 1 / (E v)        f_k = f + log u
    v = share / (E^T u)  g_k = g + log v

in float32, and not on the tensor cores, which would round u and v.

No row of such a plan sums to less than 1 / S or more than T, and a row step and a
column step keep that: together they take u up by S at most, and v by T. So what E has
rounded to 0 cannot matter before (T S)^k comes near to the range of float32, and E is
made afresh from the potentials after so many steps (`max_period`). Nothing has to be
detected. Of each entry that is two exponentials for the softmax and the first column
step, and one for every such period.

In bfloat16 E has half the bytes and the same range. Its entries are off by 2^-9, and
like them those of the plan, which are rounded as much before they meet the values; rows
are right for the plan as it is kept, and the potentials are those of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from ..._pallas_common import reciprocal
from ..._problem import Problem
from ..blocks import Blocks, resident_crew, values_lie_with_keys
from ..smem_matrix import Held, do_each, in_tiles, matrix, of_sums, team
from ..tiles import (
    Ref,
    add_product,
    along_cols,
    along_rows,
    call_kernel,
    kernel_of,
    left_operand,
    load,
    log_sum,
    of_cols,
    of_rows,
    operand,
    over_tiles,
    product,
    shared_head,
    span,
    total_log,
    vector,
    zeros,
)


class Side(NamedTuple):
    """Where one factor of the logits is, as strips of rows and as tiles of columns."""

    strip: Callable[[Int[Array, ""]], Ref]
    tile: Callable[[Int[Array, ""]], Ref]
    num_tiles: int


def solve(
    problem: Problem,
    blocks: Blocks,
    query: Float[Array, "BN T H"],
    key: Float[Array, "BK S H"],
    value: Float[Array, "BK S D"],
    rows: Bool[Array, "BN T"],
    cols: Bool[Array, "BN S"],
    share: Float[Array, "BN 1"],
) -> tuple[
    Float[Array, "BN T D"],
    Float[Array, "K BN T"],
    Float[Array, "K BN S"],
    Float[Array, "BN S"] | None,
]:
    """Output, potentials of all iterations, and on request the sums of the columns."""
    heads, tile, h, d = rows.shape[0], blocks.tile, query.shape[2], value.shape[2]
    groups = heads // key.shape[0]
    num_rows, num_cols = blocks.num_row_tiles, blocks.num_col_tiles
    num_iters, period = problem.options.num_iters, blocks.period
    has_sums = problem.return_marginal_error
    size, num_slots = resident_crew(problem, blocks)
    lies_with_keys = values_lie_with_keys(problem, blocks)

    def body(*refs: Ref):
        # query [BN, T, H], key [BK, S, H], query_t [BN, H, T], key_t [BK, H, S], value
        # [BK, S, D], f [BN, T / tile, tile], g, share [BN, S / tile, tile]; out [BN, T,
        # D], fs [K, BN, T], gs [K, BN, S], sums [BN, S] or none. Shared: kernel [T /
        # tile, S / tile, tile, tile]; f, the f of the kernel and u [T / tile, tile],
        # the like of g, and share; in a cluster, a block's part of the sums of columns
        # [2, S / tile, tile]. Of each warpgroup: a strip [tile, H], tiles [slots, H,
        # tile], and tiles of values [slots, tile, D] if not in the same place.
        query_ref, key_ref, query_t_ref, key_t_ref, value_ref, *rest = refs
        rows_ref, cols_ref, share_ref, out_ref, fs_ref, gs_ref, *rest = rest
        sums_ref: Ref = rest.pop(0) if has_sums else None
        e_tile, x_tile, y_tile, *rest = rest
        v_tile = y_tile if lies_with_keys else rest.pop(0)
        f_tile, base_f, u_tile, g_tile, base_g, weight_tile, share_tile, *rest = rest
        part_tile: Ref = rest.pop(0) if blocks.cluster > 1 else None
        once, strip_barrier, barrier, meeting = rest
        n = jax.lax.axis_index("program")
        kv = shared_head(n, groups)
        crew = team(size, meeting, blocks.cluster)
        held = Held(e_tile, *crew.own(num_rows))
        my_first_slot = crew.me * jnp.int32(num_slots)
        crew.load(
            once,
            [
                (rows_ref.at[n], f_tile),
                (cols_ref.at[n], g_tile),
                (share_ref.at[n], share_tile),
            ],
        )
        queries = Side(
            lambda i: query_ref.at[n, span(i, tile)],
            lambda i: query_t_ref.at[n, :, span(i, tile)],
            num_rows,
        )
        keys = Side(
            lambda j: key_ref.at[kv, span(j, tile)],
            lambda j: key_t_ref.at[kv, :, span(j, tile)],
            num_cols,
        )

        def of_products(x, i, y, step, carry):
            # step(j, products of strip i of x and tile j of y, carry)
            plgpu.commit_smem()  # All threads are done with the last strip.
            mine = x_tile.at[crew.me]
            load(strip_barrier.at[crew.me], [(x.strip(i), mine)])
            strip = left_operand(mine)

            def multiply(j, slot, carry):
                return step(j, product(strip, y_tile.at[slot]), carry)

            return over_tiles(
                y.num_tiles,
                num_slots,
                barrier,
                lambda j: [(y.tile(j), y_tile)],
                multiply,
                carry,
                first_slot=my_first_slot,
            )

        def log_sums(x, i, y, other_tile):
            def step(j, products, carry):
                return log_sum(carry, products, of_cols(other_tile, j), problem.scale)

            least = zeros(tile) + jnp.finfo(jnp.float32).min
            return total_log(*of_products(x, i, y, step, (least, zeros(tile))))

        def softmax(i):
            # Read before a barrier, written after it: four threads share a row.
            valid = of_rows(f_tile, i) == 0
            put_f(0, i, -log_sums(queries, i, keys, g_tile), valid)

        def put_f(k, i, f, valid):
            f = jnp.where(valid, f, -jnp.inf)
            f_tile[i] = f
            fs_ref[k, n, span(i, tile)] = f

        def put_g(k, j, g, valid):
            g = jnp.where(valid, g, -jnp.inf)
            g_tile[j] = g

            @crew.when_own(j, num_cols)
            def _():
                gs_ref[k, n, span(j, tile)] = g

        def first_column_step(j):
            gs_ref[0, n, span(j, tile)] = of_rows(g_tile, j)
            share = of_rows(share_tile, j)
            valid = share > 0
            # The keys are the rows of these products: no sum crosses warps.
            g = jnp.log(jnp.where(valid, share, 1.0)) - log_sums(
                keys, j, queries, f_tile
            )
            put_g(1, j, g, valid)

        def make(i):
            f = of_rows(f_tile, i)
            base_f[i] = f

            def step(j, products, nothing):
                kernel = kernel_of(products, f, of_cols(g_tile, j), problem.scale)
                held.put(i, j, kernel)
                return nothing

            of_products(queries, i, keys, step, jnp.int32(0))

        def rebase(j):
            base_g[j] = of_rows(g_tile, j)
            weight_tile[j] = zeros(tile) + 1

        def row_step(k, i):
            sums = held.row_sums(i, weight_tile)
            u_tile[i] = reciprocal(sums)
            valid = sums != 0
            f = of_rows(base_f, i) - jnp.log(jnp.where(valid, sums, 1.0))
            put_f(k + jnp.int32(1), i, f, valid)

        def put_part(k, j):
            part_tile[slot_of(k), j] = held.col_sums(j, u_tile)

        def slot_of(k):
            # Others may still read the part before; all have met since the one before.
            return jax.lax.rem(k, jnp.int32(2))

        def col_step(k, j):
            if blocks.cluster > 1:
                sums = crew.sums_of_blocks(of_sums, part_tile, slot_of(k), j)
            else:
                sums = held.col_sums(j, u_tile)

            @pl.when(k + jnp.int32(1) < num_iters)
            def _():
                weight = of_sums(share_tile, j) * reciprocal(sums)
                weight_tile[j] = weight
                valid = sums != 0
                g = of_sums(base_g, j) + jnp.log(jnp.where(valid, weight, 1.0))
                put_g(k + jnp.int32(2), j, g, valid)

            if has_sums:

                @pl.when(k + jnp.int32(1) == num_iters)
                def _():
                    total = sums * of_sums(weight_tile, j)

                    @crew.when_own(j, num_cols)
                    def _():
                        sums_ref[n, span(j, tile)] = total

        def iterate(k):
            @pl.when(jax.lax.rem(k, jnp.int32(period)) == 0)
            def _():
                crew.share_own(num_rows, make)
                crew.share(num_cols, rebase)
                crew.meet()

            def col_steps():
                if blocks.cluster > 1:
                    crew.share(num_cols, lambda j: put_part(k, j))
                    crew.meet_all()
                crew.share(num_cols, lambda j: col_step(k, j))

            crew.share_own(num_rows, lambda i: row_step(k, i))
            crew.meet()
            if has_sums:
                col_steps()
            else:
                pl.when(k + jnp.int32(1) < num_iters)(col_steps)
            crew.meet()

        def apply(i):
            u = of_rows(u_tile, i)

            def copies(j):
                return ((value_ref.at[kv, span(j, tile)], v_tile),)

            def accumulate(acc_ref):
                def step(j, slot, nothing):
                    kernel = held.at(i, j)
                    weight = along_cols(of_cols(weight_tile, j), kernel)
                    # Rows that are right before they are rounded: float16 has them.
                    plan = kernel * along_rows(u, kernel) * weight
                    add_product(acc_ref, plan, v_tile.at[slot])
                    return nothing

                over_tiles(
                    num_cols,
                    num_slots,
                    barrier,
                    copies,
                    step,
                    jnp.int32(0),
                    first_slot=my_first_slot,
                )
                return acc_ref[...]

            out_ref[n, span(i, tile)] = pl.run_scoped(
                accumulate, plgpu.WGMMAAccumulatorRef((tile, d), jnp.float32)
            )

        crew.share_own(num_rows, softmax)
        crew.gather(f_tile)
        crew.share_own(num_cols, first_column_step)
        crew.gather(g_tile)
        do_each(num_iters, iterate)
        crew.share_own(num_rows, apply)
        crew.leave()

    def padding(valid):
        return jnp.where(valid, jnp.float32(0), -jnp.inf)

    row_vector = plgpu.SMEM((num_rows, tile), jnp.float32)
    col_vector = plgpu.SMEM((num_cols, tile), jnp.float32)
    values = operand(size * num_slots, tile, d, dtype=problem.dtype)
    values = [] if lies_with_keys else [values]
    parts = [plgpu.SMEM((2, num_cols, tile), jnp.float32)] if blocks.cluster > 1 else []
    sums = [vector(heads, blocks.cols)] if has_sums else []
    out, fs, gs, *sums = call_kernel(
        body,
        "sinkhorn_attention_resident",
        heads,
        [
            vector(heads, blocks.rows, d),
            vector(num_iters + 1, heads, blocks.rows),
            vector(num_iters + 1, heads, blocks.cols),
            *sums,
        ],
        [
            matrix(num_rows, num_cols, blocks),
            operand(size, tile, h, dtype=problem.dtype),
            operand(size * num_slots, h, tile, dtype=problem.dtype),
            *values,
            *[row_vector] * 3,
            *[col_vector] * 4,
            *parts,
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_barriers=size),
            plgpu.Barrier(num_barriers=size * num_slots),
            plgpu.Barrier(num_arrivals=size),
        ],
        query,
        key,
        jnp.swapaxes(query, 1, 2),
        jnp.swapaxes(key, 1, 2),
        value,
        in_tiles(padding(rows), tile),
        in_tiles(padding(cols), tile),
        in_tiles(jnp.where(cols, share, 0), tile),
        num_warpgroups=size,
        cluster=blocks.cluster,
    )
    return out, fs, gs, sums[0] if sums else None
