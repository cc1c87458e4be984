"""The reverse sweep in one launch, with a head's kernel matrix in shared memory.

A block of threads has a head. It makes E = exp(Z + f_c + g_c) of an iteration c once
for a group of iterations, the first time together with the seeds, which are sums of
rows and columns of E * (dO V^T - df_L). From the cotangent of g_{k+1} it then finds

    x = E (v' dg_{k+1} / b)      df_k = -u x      dg_k = v * E^T (u * u x)

with the factors u, v' and v of `_mosaic_gpu_correction`, which says why nothing that
matters is lost of E. Of each entry that is one exponential for a group.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ._mosaic_gpu_blocks import Blocks, groups, reverse_slots
from ._mosaic_gpu_correction import Cotangents, base_of, moved
from ._mosaic_gpu_forward import History, Operands
from ._mosaic_gpu_held import Held, do_each, in_tiles, matrix, zeros_of_cols
from ._mosaic_gpu_strips import (
    Ref,
    along_rows,
    call_kernel,
    kernel_of,
    load,
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


def reverse(
    problem: Problem,
    blocks: Blocks,
    operands: Operands,
    history: History,
    dout: Float[Array, "BN T D"],
    df: Float[Array, "BN T"],
) -> Cotangents:
    """Cotangents of all potentials, from that of the output.

    `df` is that of f_L, as the output has it; what the rounded plan of it left out is
    added from the plan itself.
    """
    query, key, value, *_ = operands
    heads, tile, h, d = len(df), blocks.tile, query.shape[2], dout.shape[2]
    kv_groups = heads // key.shape[0]
    num_rows, num_cols = blocks.num_row_tiles, blocks.num_col_tiles
    num_iters, num_slots = problem.options.num_iters, reverse_slots(problem, blocks)
    bases, factors = _factors(problem, operands, history)
    # Groups after the first one are equally long, but for the last.
    (_, start, _), *others = groups(problem)
    length = others[0].last - others[0].first + 1 if others else 1

    def body(*refs: Ref):
        # query [BN, T, H], key [BK, H, S], dout [BN, T, D], value [BK, D, S], df [BN,
        # T / tile, tile], f [G, BN, T / tile, tile], g [G, BN, S / tile, tile], u [L,
        # BN, T / tile, tile], next_v, v [L, BN, S / tile, tile]; dfs [K, BN, T], dgs
        # [L, BN, S]. Shared: kernel; query [tile, H], key [slots, H, tile], dout [tile,
        # D], value [slots, D, tile]; df, f, left [T / tile, tile], g, dg, right [S /
        # tile, tile], u [2, T / tile, tile], next_v, v [2, S / tile, tile].
        query_ref, key_ref, dout_ref, value_ref, df_ref, f_ref, g_ref, *rest = refs
        u_ref, next_v_ref, v_ref, dfs_ref, dgs_ref, e_tile, *rest = rest
        q_tile, k_tile, do_tile, v_tile, df_tile, f_tile, left_tile, *rest = rest
        g_tile, dg_tile, right_tile, u_tile, next_v_tile, v_tile_of_step, *rest = rest
        once, base_barrier, row_barrier, seed_barrier, barrier, seeds, steps = rest
        n = jax.lax.axis_index("program")
        held = Held(e_tile)

        def load_base(q):
            plgpu.commit_smem()  # All threads are done with the last one.
            load(base_barrier, [(f_ref.at[q, n], f_tile), (g_ref.at[q, n], g_tile)])

        def key_copies(j):
            return (key_ref.at[shared_head(n, kv_groups), :, span(j, tile)], k_tile)

        def put_kernel(i, j, slot):
            products = product(q_tile, k_tile.at[slot])
            f, g = of_rows(f_tile, i), of_cols(g_tile, j)
            kernel = kernel_of(products, f, g, problem.scale)
            held.put(i, j, kernel)
            return kernel

        def make(i):
            plgpu.commit_smem()  # All threads are done with the last strip.
            load(row_barrier, [(query_ref.at[n, span(i, tile)], q_tile)])

            def step(j, slot, nothing):
                put_kernel(i, j, slot)
                return nothing

            over_tiles(
                num_cols,
                num_slots,
                barrier,
                lambda j: [key_copies(j)],
                step,
                jnp.int32(0),
            )

        def make_and_seed(i):
            plgpu.commit_smem()
            rows = span(i, tile)
            load(
                seed_barrier,
                [(query_ref.at[n, rows], q_tile), (dout_ref.at[n, rows], do_tile)],
            )

            def copies(j):
                value = value_ref.at[shared_head(n, kv_groups), :, span(j, tile)]
                return key_copies(j), (value, v_tile)

            df = of_rows(df_tile, i)

            def step(j, slot, rest):
                plan = put_kernel(i, j, slot)
                dplan = product(do_tile, v_tile.at[slot])
                more = plan * (dplan - along_rows(df, plan))
                total = of_cols(dg_tile, j) + more.sum(axis=0)
                # All have read before one writes: several threads share a column.
                plgpu.commit_smem()
                dg_tile[j] = total
                return rest + more.sum(axis=1)

            rest = over_tiles(num_cols, num_slots, seeds, copies, step, zeros(tile))
            left_tile[i] = rest
            dfs_ref[num_iters, n, rows] = df + rest

        def start_seed(j):
            dg_tile[j] = zeros_of_cols(tile)

        def end_seed(j):
            dg = of_cols(dg_tile, j) - held.col_sums(j, left_tile)
            plgpu.commit_smem()  # As above.
            dg_tile[j] = dg
            dgs_ref[num_iters - 1, n, span(j, tile)] = dg

        def factors_of(step):
            k = jnp.int32(num_iters - 1) - step
            return [
                (u_ref.at[k, n], u_tile),
                (next_v_ref.at[k, n], next_v_tile),
                (v_ref.at[k, n], v_tile_of_step),
            ]

        def undo(step, slot, nothing):
            # Column step k + 1 and row step k.
            k = jnp.int32(num_iters - 1) - step
            if others:
                since = jnp.int32(start - 1) - k

                @pl.when((since >= 0) & (jax.lax.rem(since, jnp.int32(length)) == 0))
                def _():
                    load_base(jax.lax.div(since, jnp.int32(length)) + jnp.int32(1))
                    do_each(num_rows, make)
                    plgpu.commit_smem()

            def put_right(j):
                right_tile[j] = of_cols(next_v_tile, slot, j) * of_cols(dg_tile, j)

            def row_step(i):
                u = of_rows(u_tile, slot, i)
                minus_df = u * held.row_sums(i, right_tile)
                left_tile[i] = u * minus_df
                dfs_ref[k, n, span(i, tile)] = -minus_df

            def col_step(j):
                dg = of_cols(v_tile_of_step, slot, j) * held.col_sums(j, left_tile)
                dg_tile[j] = dg
                dgs_ref[k - jnp.int32(1), n, span(j, tile)] = dg

            do_each(num_cols, put_right)
            plgpu.commit_smem()
            do_each(num_rows, row_step)
            plgpu.commit_smem()
            pl.when(k > 0)(lambda: do_each(num_cols, col_step))
            plgpu.commit_smem()
            return nothing

        load(once, [(df_ref.at[n], df_tile)])
        load_base(0)
        do_each(num_cols, start_seed)
        do_each(num_rows, make_and_seed)
        plgpu.commit_smem()
        do_each(num_cols, end_seed)
        plgpu.commit_smem()
        over_tiles(num_iters, 2, steps, factors_of, undo, jnp.int32(0))

    def vectors(*shape):
        return plgpu.SMEM((*shape, tile), jnp.float32)

    dfs, dgs = call_kernel(
        body,
        "sinkhorn_attention_resident_reverse",
        heads,
        [
            vector(num_iters + 1, heads, blocks.rows),
            vector(num_iters, heads, blocks.cols),
        ],
        [
            matrix(blocks),
            operand(tile, h, dtype=problem.dtype),
            operand(num_slots, h, tile, dtype=problem.dtype),
            operand(tile, d, dtype=problem.dtype),
            operand(num_slots, d, tile, dtype=problem.dtype),
            *[vectors(num_rows)] * 3,
            *[vectors(num_cols)] * 3,
            vectors(2, num_rows),
            *[vectors(2, num_cols)] * 2,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=num_slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=num_slots),
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
        ],
        query,
        jnp.swapaxes(key, 1, 2),
        dout,
        jnp.swapaxes(value, 1, 2),
        *(in_tiles(x, tile) for x in (df, *bases, *factors)),
    )
    return Cotangents(dfs, dgs / operands.share[None])


def _factors(problem, operands, history):
    """Bases f and g of all groups, and of all k from 0 on u, v' / b and v."""
    f, g = history
    rows, cols = operands.rows[None], operands.cols[None]
    bases, us, next_vs, vs = [], [], [], []
    # In the order of k.
    for base, first, last in reversed(groups(problem)):
        base_f, base_g = base_of(history, base)
        bases.insert(0, (base_f, base_g))
        last = min(last, problem.options.num_iters - 1)
        us.append(moved(f[first : last + 1], base_f[None], rows))
        next_vs.append(moved(g[first + 1 : last + 2], base_g[None], cols))
        # Row step 0 hands nothing on to g_0, which is a constant.
        vs.append(moved(g[max(first, 1) : last + 1], base_g[None], cols))
    fs, gs = (jnp.stack(x) for x in zip(*bases, strict=True))
    u, next_v = (jnp.concatenate(x) for x in (us, next_vs))
    v = jnp.concatenate([jnp.zeros_like(next_v[:1]), *vs])
    return (fs, gs), (u, next_v / operands.share[None], v)
