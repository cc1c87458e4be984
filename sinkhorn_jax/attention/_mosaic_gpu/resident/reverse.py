"""The reverse sweep in one launch, with a head's kernel matrix in shared memory.

A block of threads has a head, or a cluster of blocks has it, each the strips of some
keys; warpgroups share them and the tiles. With E = exp(Z + f_c + g_c) of an iteration c
the seeds are what dO V^T - df_L has left of E in its rows, which is added to df_L, and
then in its columns. E is made for the former, and once for each group of iterations,
the first time with the latter. Its transpose is held, with keys as rows, for those sums
to stay in the registers of a warp. From the cotangent of g_{k+1} it then finds

    x = E (v' dg_{k+1} / b)      df_k = -u x      dg_k = v * E^T (u * u x)

with the factors u, v' and v of `_mosaic_gpu_correction`, which says why nothing that
matters is lost of E. Of each entry that is one exponential for a group, and one for
the seeds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..._problem import Problem
from ..blocks import Blocks, groups, reverse_crew
from ..correction import Cotangents, base_of, moved
from ..smem_matrix import Held, in_tiles, matrix, of_sums, team
from ..streamed.forward import History, Operands
from ..tiles import (
    Ref,
    along_cols,
    along_rows,
    call_kernel,
    kernel_of,
    left_operand,
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


class Side(NamedTuple):
    """Where factors of the logits and of the plan's cotangent are, of rows or columns.

    Attributes:
        strips: Both, with a row for each row of a strip.
        tiles: Both, with a column for each column of a tile.
        num_tiles: How many.
    """

    strips: Callable[[Int[Array, ""]], tuple[Ref, Ref]]
    tiles: Callable[[Int[Array, ""]], tuple[Ref, Ref]]
    num_tiles: int


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
    num_iters = problem.options.num_iters
    size, num_slots = reverse_crew(problem, blocks)
    sides = query, dout, key, value
    bases, factors = _factors(problem, operands, history)
    # Groups after the first one are equally long, but for the last.
    (_, start, _), *others = groups(problem)
    length = others[0].last - others[0].first + 1 if others else 1

    def body(*refs: Ref):
        # query, dout [BN, T, H or D], key, value [BK, S, H or D], their transposes, df
        # [BN, T / tile, tile], f [G, BN, T / tile, tile], g [G, BN, S / tile, tile], u
        # [L, BN, T / tile, tile], next_v, v [L, BN, S / tile, tile]; dfs [K, BN, T],
        # dgs [L, BN, S]. Shared: kernel [S / tile, T / tile, tile, tile]; df, f, left
        # [T / tile, tile], g, dg, right [S / tile, tile], u [2, T / tile, tile],
        # next_v, v [2, S / tile, tile]; in a cluster, a block's part of the sums over
        # keys [2, T / tile, tile]. Of each warpgroup: strips [tile, H or D], and tiles
        # [slots, H or D, tile].
        query_ref, dout_ref, key_ref, value_ref, *rest = refs
        query_t_ref, dout_t_ref, key_t_ref, value_t_ref, *rest = rest
        df_ref, f_ref, g_ref, u_ref, next_v_ref, v_ref, dfs_ref, dgs_ref, *rest = rest
        e_tile, x_tile, dx_tile, y_tile, dy_tile, df_tile, f_tile, left_tile, *rest = (
            rest
        )
        g_tile, dg_tile, right_tile, u_tile, next_v_tile, v_tile_of_step, *rest = rest
        part_tile: Ref = rest.pop(0) if blocks.cluster > 1 else None
        once, base_barrier, strip_barrier, seed_barrier, *rest = rest
        barrier, seeds, steps, meeting = rest
        n = jax.lax.axis_index("program")
        kv = shared_head(n, kv_groups)
        crew = team(size, meeting, blocks.cluster)
        held = Held(e_tile, *crew.own(num_cols))
        my_strip, my_dstrip = x_tile.at[crew.me], dx_tile.at[crew.me]
        my_first_slot = crew.me * jnp.int32(num_slots)
        queries = Side(
            lambda i: (query_ref.at[n, span(i, tile)], dout_ref.at[n, span(i, tile)]),
            lambda i: (
                query_t_ref.at[n, :, span(i, tile)],
                dout_t_ref.at[n, :, span(i, tile)],
            ),
            num_rows,
        )
        keys = Side(
            lambda j: (key_ref.at[kv, span(j, tile)], value_ref.at[kv, span(j, tile)]),
            lambda j: (
                key_t_ref.at[kv, :, span(j, tile)],
                value_t_ref.at[kv, :, span(j, tile)],
            ),
            num_cols,
        )

        def load_base(q):
            # All are done with the last one.
            copies = [(f_ref.at[q, n], f_tile), (g_ref.at[q, n], g_tile)]
            crew.load(base_barrier, copies)

        def over_my_tiles(num_tiles, barrier_ref, copies, step, carry):
            return over_tiles(
                num_tiles,
                num_slots,
                barrier_ref,
                copies,
                step,
                carry,
                first_slot=my_first_slot,
            )

        def make(j):
            plgpu.commit_smem()  # All threads are done with the last strip.
            load(strip_barrier.at[crew.me], [(keys.strips(j)[0], my_strip)])
            strip, g = left_operand(my_strip), of_rows(g_tile, j)

            def step(i, slot, nothing):
                products = product(strip, y_tile.at[slot])
                f = of_cols(f_tile, i)
                held.put(j, i, kernel_of(products, g, f, problem.scale))
                return nothing

            def copies(i):
                return [(queries.tiles(i)[0], y_tile)]

            over_my_tiles(num_rows, barrier, copies, step, jnp.int32(0))

        def with_cotangents(x, i, y, step, carry):
            # step(j, products and the plan's cotangents, strip i by tile j, carry)
            plgpu.commit_smem()
            targets = my_strip, my_dstrip
            load(seed_barrier.at[crew.me], list(zip(x.strips(i), targets, strict=True)))

            def copies(j):
                return list(zip(y.tiles(j), (y_tile, dy_tile), strict=True))

            def multiply(j, slot, carry):
                products = product(my_strip, y_tile.at[slot])
                dplan = product(my_dstrip, dy_tile.at[slot])
                return step(j, products, dplan, carry)

            return over_my_tiles(y.num_tiles, seeds, copies, multiply, carry)

        def seed_row(i):
            f, df = of_rows(f_tile, i), of_rows(df_tile, i)

            def step(j, products, dplan, rest):
                plan = kernel_of(products, f, of_cols(g_tile, j), problem.scale)
                return rest + (plan * (dplan - along_rows(df, plan))).sum(axis=1)

            df = df + with_cotangents(queries, i, keys, step, zeros(tile))
            df_tile[i] = df
            dfs_ref[num_iters, n, span(i, tile)] = df

        def make_and_seed(j):
            g = of_rows(g_tile, j)

            def step(i, products, dplan, dg):
                plan = kernel_of(products, g, of_cols(f_tile, i), problem.scale)
                held.put(j, i, plan)
                more = plan * (dplan - along_cols(of_cols(df_tile, i), plan))
                return dg + more.sum(axis=1)

            dg = with_cotangents(keys, j, queries, step, zeros(tile))
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
                    crew.share_own(num_cols, make)
                    crew.meet()

            def put_right(j):
                right_tile[j] = of_cols(next_v_tile, slot, j) * of_cols(dg_tile, j)

            def put_part(i):
                # A slot is free again when all have met for the other one.
                part_tile[slot, i] = held.col_sums(i, right_tile)

            def row_step(i):
                u = of_sums(u_tile, slot, i)
                if blocks.cluster > 1:
                    minus_df = u * crew.sums_of_blocks(of_sums, part_tile, slot, i)
                else:
                    minus_df = u * held.col_sums(i, right_tile)
                left_tile[i] = u * minus_df

                @crew.when_own(i, num_rows)
                def _():
                    dfs_ref[k, n, span(i, tile)] = -minus_df

            def col_step(j):
                dg = of_rows(v_tile_of_step, slot, j) * held.row_sums(j, left_tile)
                dg_tile[j] = dg
                dgs_ref[k - jnp.int32(1), n, span(j, tile)] = dg

            crew.share_own(num_cols, put_right)
            crew.meet()
            if blocks.cluster > 1:
                crew.share(num_rows, put_part)
                crew.meet_all()
            crew.share(num_rows, row_step)
            crew.meet()
            pl.when(k > 0)(lambda: crew.share_own(num_cols, col_step))
            crew.meet()
            return nothing

        crew.load(once, [(df_ref.at[n], df_tile)])
        load_base(0)
        crew.share_own(num_rows, seed_row)
        crew.gather(df_tile)
        crew.share_own(num_cols, make_and_seed)
        crew.meet()
        over_tiles(
            num_iters,
            2,
            steps,
            factors_of,
            undo,
            jnp.int32(0),
            starts=crew.by_one,
        )
        crew.leave()

    def vectors(*shape):
        return plgpu.SMEM((*shape, tile), jnp.float32)

    parts = [vectors(2, num_rows)] if blocks.cluster > 1 else []
    dfs, dgs = call_kernel(
        body,
        "sinkhorn_attention_resident_reverse",
        heads,
        [
            vector(num_iters + 1, heads, blocks.rows),
            vector(num_iters, heads, blocks.cols),
        ],
        [
            matrix(num_cols, num_rows, blocks),
            *(operand(size, tile, x, dtype=problem.dtype) for x in (h, d)),
            *(operand(size * num_slots, x, tile, dtype=problem.dtype) for x in (h, d)),
            *[vectors(num_rows)] * 3,
            *[vectors(num_cols)] * 3,
            vectors(2, num_rows),
            *[vectors(2, num_cols)] * 2,
            *parts,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=size),
            plgpu.Barrier(num_arrivals=2, num_barriers=size),
            plgpu.Barrier(num_barriers=size * num_slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=size * num_slots),
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
            plgpu.Barrier(num_arrivals=size),
        ],
        *sides,
        *(jnp.swapaxes(x, 1, 2) for x in sides),
        *(in_tiles(x, tile) for x in (df, *bases, *factors)),
        num_warpgroups=size,
        cluster=blocks.cluster,
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
