"""The last pass of the gradient in one launch, for heads that are held.

A block of threads has a head and goes through its keys, tile by tile, and for each of
them through all queries. The cotangent of the logits is made once for dq, dk and dv:
those of the keys and values are sums over the queries, in registers, that of a query
grows in shared memory. They come transposed, because then no operand of a product is.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..._problem import Problem
from ..blocks import Blocks, num_terms, whole_slots
from ..correction import Correction, dlogits
from ..smem_matrix import do_each
from ..tiles import (
    TILE,
    Ref,
    call_kernel,
    load,
    of_cols,
    of_rows,
    operand,
    over_tiles,
    product,
    shared_head,
    span,
)


def pull_back_whole(
    problem: Problem,
    blocks: Blocks,
    terms: Correction,
    query: Float[Array, "BN T H"],
    key: Float[Array, "BK S H"],
    value: Float[Array, "BK S D"],
    dout: Float[Array, "BN T D"],
) -> tuple[Float[Array, "BN T H"], Float[Array, "BN S H"], Float[Array, "BN S D"]]:
    """Products dZ key, dZ^T query and P^T dout."""
    heads, tile, h, d = len(query), blocks.tile, query.shape[2], dout.shape[2]
    groups, dtype = heads // key.shape[0], problem.dtype
    num_rows, num_cols = blocks.num_row_tiles, blocks.num_col_tiles
    num_slots = whole_slots(problem, blocks)
    counts = num_terms(problem)
    num_matrices, rank = len(counts), sum(counts)

    def body(*refs: Ref):
        # query [BN, T, H], query_t [BN, H, T], dout [BN, T, D], dout_t [BN, D, T], key
        # [BK, S, H], key_t [BK, H, S], value_t [BK, D, S], f [BN, M, T], g [BN, M, S],
        # left [BN, R, T], right [BN, R, S]; dq [BN, T, H], dk [BN, H, S], dv [BN, D,
        # S]. Shared: the like in tiles, those of queries after an axis of slots; dq
        # [T / tile, tile, H], dz and plan [tile, tile].
        q_ref, q_t_ref, do_ref, do_t_ref, k_ref, k_t_ref, v_t_ref, *rest = refs
        f_ref, g_ref, left_ref, right_ref, dq_ref, dk_ref, dv_ref, *rest = rest
        q_tile, q_t_tile, do_tile, do_t_tile, k_tile, k_t_tile, v_t_tile, *rest = rest
        f_tile, g_tile, left_tile, right_tile, dq_tile, dz_tile, p_tile, *rest = rest
        col_barrier, barrier = rest
        n = jax.lax.axis_index("program")
        key_head = shared_head(n, groups)

        def copies(i):
            rows = span(i, tile)
            return (
                (q_ref.at[n, rows], q_tile),
                (q_t_ref.at[n, :, rows], q_t_tile),
                (do_ref.at[n, rows], do_tile),
                (do_t_ref.at[n, :, rows], do_t_tile),
                (f_ref.at[n, :, rows], f_tile),
                (left_ref.at[n, :, rows], left_tile),
            )

        def start_dq(i):
            dq_tile[i] = plgpu.layout_cast(jnp.zeros((tile, h), jnp.float32), TILE)

        def of_keys(j):
            cols = span(j, tile)
            plgpu.commit_smem()  # All threads are done with the last ones.
            load(
                col_barrier,
                [
                    (k_ref.at[key_head, cols], k_tile),
                    (k_t_ref.at[key_head, :, cols], k_t_tile),
                    (v_t_ref.at[key_head, :, cols], v_t_tile),
                    (g_ref.at[n, :, cols], g_tile),
                    (right_ref.at[n, :, cols], right_tile),
                ],
            )

            def accumulate(dk_acc_ref, dv_acc_ref):
                def step(i, slot, nothing):
                    def put_plan(plan):
                        p_tile[...] = plan.astype(dtype)

                    dz_tile[...] = dlogits(
                        problem,
                        product(q_tile.at[slot], k_t_tile),
                        product(do_tile.at[slot], v_t_tile),
                        lambda m: (of_rows(f_tile, slot, m), of_cols(g_tile, m)),
                        lambda k: (of_rows(left_tile, slot, k), of_cols(right_tile, k)),
                        put_plan,
                    ).astype(dtype)
                    # Ordinary writes become visible to the tensor cores.
                    plgpu.commit_smem()
                    plgpu.wgmma(dv_acc_ref, do_t_tile.at[slot], p_tile)
                    plgpu.wgmma(dk_acc_ref, q_t_tile.at[slot], dz_tile)
                    plgpu.wgmma_wait(0)
                    more = product(dz_tile, k_tile)
                    # Each thread reads back what it has written itself.
                    dq_tile[i] = plgpu.layout_cast(dq_tile[i], TILE) + more
                    # All warps are done with dz and the plan.
                    plgpu.commit_smem()
                    return nothing

                over_tiles(num_rows, num_slots, barrier, copies, step, jnp.int32(0))
                return dk_acc_ref[...], dv_acc_ref[...]

            dk_ref[n, :, cols], dv_ref[n, :, cols] = pl.run_scoped(
                accumulate,
                plgpu.WGMMAAccumulatorRef((h, tile), jnp.float32),
                plgpu.WGMMAAccumulatorRef((d, tile), jnp.float32),
            )

        def end_dq(i):
            dq_ref[n, span(i, tile)] = plgpu.layout_cast(dq_tile[i], TILE)

        do_each(num_rows, start_dq)
        do_each(num_cols, of_keys)
        do_each(num_rows, end_dq)

    def vectors(*shape):
        return plgpu.SMEM((*shape, tile), jnp.float32)

    def result(*shape):
        return jax.ShapeDtypeStruct((heads, *shape), jnp.float32)

    dq, dk_t, dv_t = call_kernel(
        body,
        "sinkhorn_attention_resident_pull_back",
        heads,
        [result(blocks.rows, h), result(h, blocks.cols), result(d, blocks.cols)],
        [
            operand(num_slots, tile, h, dtype=dtype),
            operand(num_slots, h, tile, dtype=dtype),
            operand(num_slots, tile, d, dtype=dtype),
            operand(num_slots, d, tile, dtype=dtype),
            operand(tile, h, dtype=dtype),
            operand(h, tile, dtype=dtype),
            operand(d, tile, dtype=dtype),
            vectors(num_slots, num_matrices),
            vectors(num_matrices),
            vectors(num_slots, rank),
            vectors(rank),
            operand(num_rows, tile, h, dtype=jnp.dtype("float32")),
            operand(tile, tile, dtype=dtype),
            operand(tile, tile, dtype=dtype),
            plgpu.Barrier(num_arrivals=5),
            plgpu.Barrier(num_arrivals=6, num_barriers=num_slots),
        ],
        query,
        jnp.swapaxes(query, 1, 2),
        dout,
        jnp.swapaxes(dout, 1, 2),
        key,
        jnp.swapaxes(key, 1, 2),
        jnp.swapaxes(value, 1, 2),
        *terms,
    )
    return dq, jnp.swapaxes(dk_t, 1, 2), jnp.swapaxes(dv_t, 1, 2)
