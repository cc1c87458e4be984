"""The forward pass of streamed heads.

A full iteration is one launch of `sweep` and two updates of vectors between launches.
For the plan P = exp(Z + f + g), whose columns are exact,

    s = P 1        f -= log s        g += log b - log(P^T (1 / s))

The rows of P sum to at most max(T, S) and at least its inverse, because they were exact
before the column step. So no exponential and no sum leaves the range of float32, and no
maximum needs to be subtracted. The softmax and the first column step have no such
bounds; they subtract running maxima (`_log_row_sums`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..._pallas_common import reciprocal
from ..._problem import Problem
from .. import tiles
from ..blocks import TILE, Blocks
from ..buffers import Buffers, buffer_types
from ..launch import call_kernel, vector
from ..types import ForwardResult, PaddedOperands, PotentialHistory
from .sweep import sweep


def forward(
    problem: Problem, blocks: Blocks, operands: PaddedOperands
) -> ForwardResult:
    """Output, potentials of all iterations and, if they are asked for, column sums."""
    query, key, value, rows, cols = operands
    num_iters, col_marginal = problem.options.num_iters, operands.col_marginal
    query_t, key_t = (jnp.swapaxes(x, 1, 2) for x in (query, key))

    def row_step(f, sums):
        return jnp.where(rows, f - jnp.log(jnp.where(rows, sums, 1.0)), -jnp.inf)

    def col_step(g, sums):
        log_ratio = jnp.log(col_marginal / jnp.where(cols, sums, 1.0))
        return jnp.where(cols, g + log_ratio, -jnp.inf)

    def sweep_of(f, g):
        return sweep(
            problem, blocks, query, key_t, f, g, jnp.ones_like(g), inverts=True
        )

    g = jnp.where(cols, jnp.zeros(cols.shape, jnp.float32), -jnp.inf)
    f = -_log_row_sums(problem, query, key_t, g)
    f = jnp.where(rows, f, -jnp.inf)
    fs, gs = f[None], g[None]
    if num_iters:
        g = jnp.log(col_marginal) - _log_row_sums(problem, key, query_t, f)
        g = jnp.where(cols, g, -jnp.inf)

        def iterate(state, _):
            f, g = state
            row_sums, col_sums = sweep_of(f, g)
            following = row_step(f, row_sums), col_step(g, col_sums)
            return following, (following[0], g)

        (f, g), more = jax.lax.scan(iterate, (f, g), None, length=num_iters - 1)
        fs, gs = jnp.concatenate([fs, more[0]]), jnp.concatenate([gs, more[1]])
    out, sums = _apply(problem, blocks, query, key_t, value, f, g)
    col_sums = sweep_of(f, g)[1] if problem.return_marginal_error else None
    if num_iters:
        f = row_step(f, sums)
        fs, gs = jnp.concatenate([fs, f[None]]), jnp.concatenate([gs, g[None]])
    return ForwardResult(out, PotentialHistory(fs, gs), col_sums)


def _log_row_sums(problem, x, y_t, g):
    """Logarithms of the row sums of exp(Z + g), where Z = scale * x y.

    One of x [X, I, H] and y_t [Y, H, J] has the queries, the other one the keys; g is
    [BN, J]. The result is -inf for a row that is all padding.
    """
    heads, (_, length, h) = g.shape[0], x.shape
    x_groups, y_groups = heads // x.shape[0], heads // y_t.shape[0]

    def body(inputs, results, smem):
        n, i = tiles.head_and_row_block(length // TILE)
        rows = tiles.span(i)
        buffers = Buffers(*smem.buffers)
        y_tile, g_tile = buffers.tile
        buffers.load(inputs.x.at[tiles.key_head_of(n, x_groups), rows])
        row_block = tiles.left_operand(buffers.row_block[0])

        def sources(j):
            cols, y_head = tiles.span(j), tiles.key_head_of(n, y_groups)
            return inputs.y_t.at[y_head, :, cols], inputs.g.at[n, cols]

        def step(j, stage, carry):
            del j
            products = tiles.product(row_block, y_tile.at[stage])
            g = tiles.of_cols(g_tile, stage)
            return tiles.log_sum(carry, products, g, problem.scale)

        # The least float32 and not -inf: -inf - -inf is NaN.
        least = tiles.zeros(TILE) + jnp.finfo(jnp.float32).min
        results.top[n, rows], results.total[n, rows] = buffers.over_tiles(
            y_t.shape[2] // TILE, sources, step, (least, tiles.zeros(TILE))
        )

    tile = functools.partial(tiles.operand, dtype=problem.dtype)
    results = call_kernel(
        body,
        "sinkhorn_attention_log_row_sums",
        heads * (length // TILE),
        dict(x=x, y_t=y_t, g=g),
        dict(top=vector(heads, length), total=vector(heads, length)),
        dict(
            buffers=buffer_types([tile(TILE, h)], [tile(2, h, TILE), tiles.vectors(2)])
        ),
    )
    return tiles.total_log(results.top, results.total)


def _apply(problem, blocks, query, key_t, value, f, g):
    """Returns diag(1/s) P V and s = P 1, where P = exp(Z + f + g).

    The last row step is fused with the product with the values.
    """
    heads, h, d = f.shape[0], query.shape[2], value.shape[2]
    tile = functools.partial(tiles.operand, dtype=problem.dtype)
    results = call_kernel(
        functools.partial(_apply_kernel, problem),
        "sinkhorn_attention_apply",
        heads * blocks.num_row_tiles,
        dict(query=query, key_t=key_t, value=value, f=f, g=g),
        dict(out=vector(heads, blocks.rows, d), row_sums=vector(heads, blocks.rows)),
        dict(
            buffers=buffer_types(
                [tile(TILE, h), tiles.vectors()],
                [tile(2, h, TILE), tile(2, TILE, d), tiles.vectors(2)],
            )
        ),
    )
    return results.out, results.row_sums


def _apply_kernel(problem, inputs, results, smem):
    heads, length = inputs.f.shape
    n, i = tiles.head_and_row_block(length // TILE)
    rows = tiles.span(i)
    buffers = Buffers(*smem.buffers)
    key_tile, value_tile, g_tile = buffers.tile
    query_block, f_block = buffers.row_block
    buffers.load(inputs.query.at[n, rows], inputs.f.at[n, rows])
    query, f = tiles.left_operand(query_block), tiles.of_rows(f_block)

    def sources(j):
        cols, key_head = (
            tiles.span(j),
            tiles.key_head_of(n, heads // inputs.value.shape[0]),
        )
        key_t, value = inputs.key_t, inputs.value
        sides = key_t.at[key_head, :, cols], value.at[key_head, cols]
        return *sides, inputs.g.at[n, cols]

    def accumulate(acc_ref):
        def step(j, stage, sums):
            del j
            products = tiles.product(query, key_tile.at[stage])
            g = tiles.of_cols(g_tile, stage)
            kernel = tiles.kernel_of(products, f, g, problem.scale)
            tiles.add_product(acc_ref, kernel, value_tile.at[stage])
            return sums + kernel.sum(axis=1)

        num_tiles = inputs.value.shape[1] // TILE
        sums = buffers.over_tiles(num_tiles, sources, step, tiles.zeros(TILE))
        return acc_ref[...], sums

    accumulator = plgpu.WGMMAAccumulatorRef((TILE, value_tile.shape[2]), jnp.float32)
    out, sums = pl.run_scoped(accumulate, accumulator)
    results.out[n, rows] = out * tiles.along_rows(reciprocal(sums), out)
    results.row_sums[n, rows] = sums
