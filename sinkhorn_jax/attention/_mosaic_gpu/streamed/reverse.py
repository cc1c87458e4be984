"""The reverse sweep (docs/architecture.md (4), (5)) of streamed heads.

A launch of `_seed` is followed by one launch of `sweep` for each k from L - 1 down to
0. It undoes column step k + 1 and row step k together, because both plans have f_k: Q_k
and R_{k+1} are exp(Z + f_k + g_{k+1}), up to a factor of each column of Q_k.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._problem import Problem
from .. import tiles
from ..blocks import TILE, Blocks
from ..buffers import Buffers, buffer_types
from ..correction import potential_ratio
from ..launch import call_kernel, vector
from ..types import PaddedOperands, PotentialCotangents, PotentialHistory
from .sweep import sweep


def reverse_sweep(
    problem: Problem,
    blocks: Blocks,
    operands: PaddedOperands,
    history: PotentialHistory,
    dout: Float[Array, "BN T D"],
    df: Float[Array, "BN T"],
) -> PotentialCotangents:
    """Cotangents of all potentials; `df` = rowsum(dO * O) is a first seed of f_L."""
    query, key, value, _, cols = operands
    f, g = history
    if problem.options.num_iters == 0:
        return PotentialCotangents(df[None], g[:0])
    key_t, value_t = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    col_marginal = operands.col_marginal
    rest, sums = _seed(problem, blocks, query, key_t, dout, value_t, f[-1], g[-1], df)

    def undo(sums, potentials):
        # Column step k + 1 and row step k, from column sums of E of g_{k+2}.
        f, g, before = potentials
        weight = potential_ratio(g, before, cols) * sums / col_marginal
        minus_df, sums = sweep(
            problem, blocks, query, key_t, f, g, weight, inverts=False
        )
        return sums, (-minus_df, weight)

    before = jnp.concatenate([g[2:], g[-1:]])
    _, (dfs, dgs) = jax.lax.scan(undo, sums, (f[:-1], g[1:], before), reverse=True)
    return PotentialCotangents(jnp.concatenate([dfs, (df + rest)[None]]), dgs)


def _seed(problem, blocks, query, key_t, dout, value_t, f, g, df):
    """Row and column sums of P * (dO V^T - df), where P = exp(Z + f + g).

    They are the seeds of docs/architecture.md (6): the row sums are what df lacks of
    the cotangent of f_L, and the column sums are the cotangent of g_L.
    """
    heads, h, d = f.shape[0], query.shape[2], dout.shape[2]
    groups = heads // key_t.shape[0]

    def body(inputs, sums, smem):
        n, i = tiles.head_and_row_block(blocks.num_row_tiles)
        rows = tiles.span(i)
        buffers = Buffers(*smem.buffers)
        key_tile, value_tile, g_tile = buffers.tile
        query_block, dout_block, f_block, df_block = buffers.row_block
        block = inputs.query, inputs.dout, inputs.f, inputs.df
        buffers.load(*(x.at[n, rows] for x in block))
        f, df = tiles.of_rows(f_block), tiles.of_rows(df_block)

        def sources(j):
            cols, key_head = tiles.span(j), tiles.key_head_of(n, groups)
            key_t, value_t = inputs.key_t, inputs.value_t
            sides = key_t.at[key_head, :, cols], value_t.at[key_head, :, cols]
            return *sides, inputs.g.at[n, cols]

        def step(j, stage, row_sums):
            products = tiles.product(query_block, key_tile.at[stage])
            g = tiles.of_cols(g_tile, stage)
            plan = tiles.kernel_of(products, f, g, problem.scale)
            dplan = tiles.product(dout_block, value_tile.at[stage])
            moved = plan * (dplan - tiles.along_rows(df, plan))
            sums.partial_col_sums[n, i, tiles.span(j)] = moved.sum(axis=0)
            return row_sums + moved.sum(axis=1)

        sums.row_sums[n, rows] = buffers.over_tiles(
            blocks.num_col_tiles, sources, step, tiles.zeros(TILE)
        )

    tile = functools.partial(tiles.operand, dtype=problem.dtype)
    sums = call_kernel(
        body,
        "sinkhorn_attention_seed",
        heads * blocks.num_row_tiles,
        dict(query=query, key_t=key_t, dout=dout, value_t=value_t, f=f, df=df, g=g),
        dict(
            row_sums=vector(heads, blocks.rows),
            partial_col_sums=vector(heads, blocks.num_row_tiles, blocks.cols),
        ),
        dict(
            buffers=buffer_types(
                [tile(TILE, h), tile(TILE, d), tiles.vectors(), tiles.vectors()],
                [tile(2, h, TILE), tile(2, d, TILE), tiles.vectors(2)],
            )
        ),
    )
    return sums.row_sums, sums.partial_col_sums.sum(axis=1)
