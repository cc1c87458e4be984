"""The forward pass in one launch, with a head's kernel matrix in shared memory.

A block of threads has a head. With the potentials f and g of a plan whose columns are
right it makes E = exp(Z + f + g) once, and then only multiplies by it: with v = 1,

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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from ._kernels import reciprocal
from ._mosaic_gpu_blocks import Blocks
from ._mosaic_gpu_held import Held, do_each, in_tiles, matrix, zeros_of_cols
from ._mosaic_gpu_strips import (
    Ref,
    add_product,
    along_cols,
    along_rows,
    call_kernel,
    kernel_of,
    load,
    log_sum,
    log_sum_of_cols,
    of_cols,
    of_rows,
    operand,
    over_tiles,
    product,
    shared_head,
    span,
    vector,
    zeros,
)
from ._problem import Problem


def solve(
    problem: Problem,
    blocks: Blocks,
    query: Float[Array, "BN T H"],
    key_t: Float[Array, "BK H S"],
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
    groups = heads // key_t.shape[0]
    num_rows, num_cols = blocks.num_row_tiles, blocks.num_col_tiles
    num_iters, period = problem.options.num_iters, blocks.period
    has_sums = problem.return_marginal_error

    def body(*refs: Ref):
        # query [BN, T, H], key [BK, H, S], value [BK, S, D], f [BN, T / tile, tile],
        # g, share [BN, S / tile, tile]; out [BN, T, D], fs [K, BN, T], gs [K, BN, S],
        # sums [BN, S] or none. Shared: kernel [T / tile, S / tile, tile, tile]; query
        # [tile, H], key [2, H, tile], value [2, tile, D], plan [tile, tile]; f, the f
        # of the kernel and u [T / tile, tile], the like of g, and share.
        query_ref, key_ref, value_ref, rows_ref, cols_ref, share_ref, *rest = refs
        out_ref, fs_ref, gs_ref, *rest = rest
        sums_ref: Ref = rest.pop(0) if has_sums else None
        e_tile, q_tile, k_tile, v_tile, p_tile, *rest = rest
        f_tile, base_f, u_tile, g_tile, base_g, weight_tile, share_tile, *rest = rest
        once, row_barrier, barrier = rest
        n = jax.lax.axis_index("program")
        held = Held(e_tile)
        load(
            once,
            [
                (rows_ref.at[n], f_tile),
                (cols_ref.at[n], g_tile),
                (share_ref.at[n], share_tile),
            ],
        )

        def of_products(i, step, carry):
            # step(j, products of strip i and tile j, carry)
            plgpu.commit_smem()  # All threads are done with the last strip.
            load(row_barrier, [(query_ref.at[n, span(i, tile)], q_tile)])

            def copies(j):
                key = key_ref.at[shared_head(n, groups), :, span(j, tile)]
                return ((key, k_tile),)

            def multiply(j, slot, carry):
                return step(j, product(q_tile, k_tile.at[slot]), carry)

            return over_tiles(num_cols, 2, barrier, copies, multiply, carry)

        def softmax(i):
            # Read before a barrier, written after it: four threads share a row.
            valid = of_rows(f_tile, i) == 0

            def step(j, products, carry):
                return log_sum(carry, products, of_cols(g_tile, j), problem.scale)

            least = zeros(tile) + jnp.finfo(jnp.float32).min
            top, total = of_products(i, step, (least, zeros(tile)))
            put_f(0, i, -(top + jnp.log(total)), valid)

        def put_f(k, i, f, valid):
            f = jnp.where(valid, f, -jnp.inf)
            f_tile[i] = f
            fs_ref[k, n, span(i, tile)] = f

        def put_g(k, j, g, valid):
            g = jnp.where(valid, g, -jnp.inf)
            g_tile[j] = g
            gs_ref[k, n, span(j, tile)] = g

        # Until there is a kernel matrix, the vectors of its columns are running maxima
        # and sums under them.
        top_tile, total_tile = base_g, weight_tile

        def start_first_column_step(j):
            gs_ref[0, n, span(j, tile)] = of_cols(g_tile, j)
            nothing = zeros_of_cols(tile)
            top_tile[j] = nothing + jnp.finfo(jnp.float32).min
            total_tile[j] = nothing

        def add_to_columns(i):
            f = of_rows(f_tile, i)

            def step(j, products, nothing):
                carry = of_cols(top_tile, j), of_cols(total_tile, j)
                logits = products * jnp.float32(problem.scale)
                top, total = log_sum_of_cols(carry, logits, f)
                # All have read before one writes: several threads share a column.
                plgpu.commit_smem()
                top_tile[j] = top
                total_tile[j] = total
                return nothing

            of_products(i, step, jnp.int32(0))

        def first_column_step(j):
            share = of_cols(share_tile, j)
            valid = share > 0
            top, total = of_cols(top_tile, j), of_cols(total_tile, j)
            g = jnp.log(jnp.where(valid, share, 1.0)) - (top + jnp.log(total))
            put_g(1, j, g, valid)

        def make(i):
            f = of_rows(f_tile, i)
            base_f[i] = f

            def step(j, products, nothing):
                kernel = kernel_of(products, f, of_cols(g_tile, j), problem.scale)
                held.put(i, j, kernel)
                return nothing

            of_products(i, step, jnp.int32(0))

        def rebase(j):
            base_g[j] = of_cols(g_tile, j)
            weight_tile[j] = zeros_of_cols(tile) + 1

        def row_step(k, i):
            sums = held.row_sums(i, weight_tile)
            u_tile[i] = reciprocal(sums)
            valid = sums != 0
            f = of_rows(base_f, i) - jnp.log(jnp.where(valid, sums, 1.0))
            put_f(k + jnp.int32(1), i, f, valid)

        def col_step(k, j):
            sums = held.col_sums(j, u_tile)

            @pl.when(k + jnp.int32(1) < num_iters)
            def _():
                weight = of_cols(share_tile, j) * reciprocal(sums)
                weight_tile[j] = weight
                valid = sums != 0
                g = of_cols(base_g, j) + jnp.log(jnp.where(valid, weight, 1.0))
                put_g(k + jnp.int32(2), j, g, valid)

            if has_sums:

                @pl.when(k + jnp.int32(1) == num_iters)
                def _():
                    total = sums * of_cols(weight_tile, j)
                    sums_ref[n, span(j, tile)] = total

        def iterate(k):
            @pl.when(jax.lax.rem(k, jnp.int32(period)) == 0)
            def _():
                do_each(num_rows, make)
                do_each(num_cols, rebase)
                plgpu.commit_smem()

            def col_steps():
                do_each(num_cols, lambda j: col_step(k, j))

            do_each(num_rows, lambda i: row_step(k, i))
            plgpu.commit_smem()
            if has_sums:
                col_steps()
            else:
                pl.when(k + jnp.int32(1) < num_iters)(col_steps)
            plgpu.commit_smem()

        def apply(i):
            u = of_rows(u_tile, i)

            def copies(j):
                value = value_ref.at[shared_head(n, groups), span(j, tile)]
                return ((value, v_tile),)

            def accumulate(acc_ref):
                def step(j, slot, nothing):
                    kernel = held.at(i, j)
                    weight = along_cols(of_cols(weight_tile, j), kernel)
                    # Rows that are right before they are rounded: float16 has them.
                    plan = kernel * along_rows(u, kernel) * weight
                    add_product(acc_ref, plan, p_tile, v_tile.at[slot])
                    return nothing

                over_tiles(num_cols, 2, barrier, copies, step, jnp.int32(0))
                return acc_ref[...]

            out_ref[n, span(i, tile)] = pl.run_scoped(
                accumulate, plgpu.WGMMAAccumulatorRef((tile, d), jnp.float32)
            )

        do_each(num_rows, softmax)
        plgpu.commit_smem()
        do_each(num_cols, start_first_column_step)
        do_each(num_rows, add_to_columns)
        plgpu.commit_smem()
        do_each(num_cols, first_column_step)
        plgpu.commit_smem()
        do_each(num_iters, iterate)
        do_each(num_rows, apply)

    def padding(valid):
        return jnp.where(valid, jnp.float32(0), -jnp.inf)

    row_vector = plgpu.SMEM((num_rows, tile), jnp.float32)
    col_vector = plgpu.SMEM((num_cols, tile), jnp.float32)
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
            matrix(blocks),
            operand(tile, h, dtype=problem.dtype),
            operand(2, h, tile, dtype=problem.dtype),
            operand(2, tile, d, dtype=problem.dtype),
            operand(tile, tile, dtype=problem.dtype),
            *[row_vector] * 3,
            *[col_vector] * 4,
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=2),
        ],
        query,
        key_t,
        value,
        in_tiles(padding(rows), tile),
        in_tiles(padding(cols), tile),
        in_tiles(jnp.where(cols, share, 0), tile),
    )
    return out, fs, gs, sums[0] if sums else None
