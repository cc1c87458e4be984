"""One pass over the plan: its row sums, and the column sums that depend on them.

Where a cluster shares a query block, each thread block computes some of its tiles.
Partial column sums are added after the launch in the order of the query blocks.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._pallas_common import reciprocal
from ..._problem import Problem
from .. import tiles
from ..blocks import TILE, Blocks
from ..buffers import Buffers
from ..cluster import cluster_of
from ..launch import call_kernel, vector
from ..loops import for_each
from ..shared_memory import sweep_scratch
from ..smem_matrix import SmemMatrix


def sweep(
    problem: Problem,
    blocks: Blocks,
    query: Float[Array, "BN T H"],
    key_t: Float[Array, "BK H S"],
    f: Float[Array, "BN T"],
    g: Float[Array, "BN S"],
    weights: Float[Array, "BN S"],
    *,
    inverts: bool,
) -> tuple[Float[Array, "BN T"], Float[Array, "BN S"]]:
    """Row sums s = P weights, and the column sums P^T s of P = exp(Z + f + g).

    With `inverts`, the column sums are P^T (1 / s).
    """
    heads = f.shape[0]
    groups = heads // key_t.shape[0]
    num_blocks = blocks.cluster if blocks.keeps_query_block else 1

    def body(inputs, sums, smem):
        n, i = tiles.head_and_row_block(blocks.num_row_tiles)
        rows = tiles.span(i)
        cluster = cluster_of(1, None, num_blocks)
        first, num_tiles = cluster.owned(blocks.num_col_tiles)
        kernel_matrix = SmemMatrix(smem.kernel, 0, 1)
        buffers = Buffers(*smem.buffers)
        key_tile, g_tile, weights_tile = buffers.tile
        query_block, f_block = buffers.row_block
        buffers.load(inputs.query.at[n, rows], inputs.f.at[n, rows])
        query, f = tiles.left_operand(query_block), tiles.of_rows(f_block)

        def sources(j):
            cols, key_head = tiles.span(first + j), tiles.key_head_of(n, groups)
            key_t = inputs.key_t.at[key_head, :, cols]
            return key_t, inputs.g.at[n, cols], inputs.weights.at[n, cols]

        def kernel_at(stage):
            products = tiles.product(query, key_tile.at[stage])
            g = tiles.of_cols(g_tile, stage)
            return tiles.kernel_of(products, f, g, problem.scale)

        def add_rows(j, stage, total):
            kernel = kernel_at(stage)
            if blocks.keeps_query_block:
                kernel_matrix.put(jnp.int32(0), j, kernel)
            return total + tiles.row_sums(kernel, tiles.of_cols(weights_tile, stage))

        total = buffers.over_tiles(num_tiles, sources, add_rows, tiles.zeros(TILE))
        if num_blocks > 1:
            smem.part[...] = total
            cluster.barrier()
            total = cluster.sum_over_blocks(tiles.of_rows, smem.part)

        @cluster.in_first
        def _():
            sums.row_sums[n, rows] = total

        left = reciprocal(total) if inverts else total

        def put_col_sums(j, tile_sums):
            sums.partial_col_sums[n, i, tiles.span(first + j)] = tile_sums

        def read_columns(j):
            put_col_sums(j, kernel_matrix.col_sums(j, smem.left))

        def remake_columns(j, stage, nothing):
            put_col_sums(j, tiles.col_sums(kernel_at(stage), left))
            return nothing

        if blocks.keeps_query_block:
            smem.left[0] = left
            cluster.warpgroups.barrier()
            for_each(num_tiles, read_columns)
        else:
            buffers.over_tiles(num_tiles, sources, remake_columns, jnp.int32(0))
        cluster.leave()

    sums = call_kernel(
        body,
        "sinkhorn_attention_sweep",
        heads * blocks.num_row_tiles,
        dict(query=query, key_t=key_t, f=f, g=g, weights=weights),
        dict(
            row_sums=vector(heads, blocks.rows),
            partial_col_sums=vector(heads, blocks.num_row_tiles, blocks.cols),
        ),
        sweep_scratch(problem, blocks),
        cluster=num_blocks,
    )
    return sums.row_sums, sums.partial_col_sums.sum(axis=1)
