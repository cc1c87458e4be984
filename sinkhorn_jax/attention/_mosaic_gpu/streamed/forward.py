"""Forward GPU kernels of Sinkhorn attention: a launch for every pass over the plan.

For heads that shared memory does not hold. With the plan P = exp(Z + f + g) of the
logits Z, whose columns are right, a pass is

    s = P 1        f -= log s        g += log b - log(P^T (1 / s))

No row is above max(T, S) here, and none is below its inverse, because the rows were
right before the columns were: so neither an exponential nor a sum leaves the range of
float32, and no maximum needs to come off. Each program writes its strip's share of the
column sums, and the shares are added in order of the strips.

Only the softmax and the first column step know nothing of what they will meet. They
subtract running maxima, the column step with keys for rows and queries for columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from ..._pallas_common import reciprocal
from ..._problem import Problem
from ..blocks import Blocks, strips_of_block
from ..resident.forward import solve
from ..smem_matrix import Held, do_each, team
from ..tiles import (
    Ref,
    add_product,
    along_rows,
    call_kernel,
    col_sums,
    head_and_strip,
    kernel_of,
    left_operand,
    load,
    log_sum,
    of_cols,
    of_rows,
    operand,
    over_tiles,
    product,
    row_sums,
    shared_head,
    span,
    total_log,
    vector,
    zeros,
)


class Operands(NamedTuple):
    """Padded operands of all heads, and what of them is valid."""

    query: Float[Array, "BN T H"]
    key: Float[Array, "BK S H"]
    value: Float[Array, "BK S D"]
    rows: Bool[Array, "BN T"]
    cols: Bool[Array, "BN S"]

    @property
    def share(self) -> Float[Array, "BN 1"]:
        """What a valid column sums to."""
        rows = self.rows.sum(axis=1, dtype=jnp.float32, keepdims=True)
        cols = self.cols.sum(axis=1, dtype=jnp.float32, keepdims=True)
        return jnp.where(cols == 0, 1.0, rows / jnp.where(cols == 0, 1.0, cols))


class History(NamedTuple):
    """Potentials after so many full iterations, from 0 on; -inf for padding."""

    f: Float[Array, "K BN T"]
    g: Float[Array, "K BN S"]


def forward(
    problem: Problem, blocks: Blocks, operands: Operands
) -> tuple[Float[Array, "BN T D"], Float[Array, " BN"] | None, History]:
    """Output in float32, marginal error on request, and the potentials."""
    query, key, value, rows, cols = operands
    share = operands.share
    if blocks.period:
        out, fs, gs, col_sums = solve(
            problem, blocks, query, key, value, rows, cols, share
        )
    else:
        out, fs, gs, col_sums = _launches(problem, blocks, operands)
    error = None
    if col_sums is not None:
        lack = jnp.where(cols, jnp.abs(col_sums - share), 0)
        error = lack.sum(axis=1) / jnp.maximum(rows.sum(axis=1, dtype=jnp.float32), 1)
    return out, error, History(fs, gs)


def _launches(problem, blocks, operands):
    """What `solve` returns, with a launch for every pass."""
    query, key, value, rows, cols = operands
    num_iters, share = problem.options.num_iters, operands.share
    query_t, key_t = (jnp.swapaxes(x, 1, 2) for x in (query, key))

    def row_step(f, sums):
        return jnp.where(rows, f - jnp.log(jnp.where(rows, sums, 1.0)), -jnp.inf)

    def col_step(g, sums):
        log_ratio = jnp.log(share / jnp.where(cols, sums, 1.0))
        return jnp.where(cols, g + log_ratio, -jnp.inf)

    def sweep_of(f, g):
        return sweep(
            problem, blocks, query, key_t, f, g, jnp.ones_like(g), inverts=True
        )

    g = jnp.where(cols, jnp.zeros(cols.shape, jnp.float32), -jnp.inf)
    f = -log_row_sums(problem, blocks, query, key_t, g)
    f = jnp.where(rows, f, -jnp.inf)
    fs, gs = f[None], g[None]
    if num_iters:
        g = jnp.log(share) - log_row_sums(problem, blocks, key, query_t, f)
        g = jnp.where(cols, g, -jnp.inf)

        def iterate(state, _):
            f, g = state
            row_sums, col_sums = sweep_of(f, g)
            following = row_step(f, row_sums), col_step(g, col_sums)
            return following, (following[0], g)

        (f, g), more = jax.lax.scan(iterate, (f, g), None, length=num_iters - 1)
        fs, gs = jnp.concatenate([fs, more[0]]), jnp.concatenate([gs, more[1]])
    out, sums = apply(problem, blocks, query, key_t, value, f, g)
    col_sums = sweep_of(f, g)[1] if problem.return_marginal_error else None
    if num_iters:
        f = row_step(f, sums)
        fs, gs = jnp.concatenate([fs, f[None]]), jnp.concatenate([gs, g[None]])
    return out, fs, gs, col_sums


def log_row_sums(
    problem: Problem,
    blocks: Blocks,
    x: Float[Array, "X I H"],
    y_t: Float[Array, "Y H J"],
    g: Float[Array, "BN J"],
) -> Float[Array, "BN I"]:
    """Logarithms of the row sums of exp(Z + g), Z the scaled products of x and y.

    One of x and y are the queries, the other one the keys. Of a row that is all padding
    -inf.
    """
    heads, tile = g.shape[0], blocks.tile
    h = x.shape[2]
    x_groups, y_groups = heads // x.shape[0], heads // y_t.shape[0]
    length = x.shape[1]

    def body(x_ref, y_ref, g_ref, top_ref, total_ref, *scratch: Ref):
        # x [X, I, H], y [Y, H, J], g [BN, J]; top, total [BN, I]. Shared: x [tile, H],
        # y [2, H, tile], g [2, tile].
        x_tile, y_tile, g_tile, x_barrier, barrier = scratch
        n, i = head_and_strip(length // tile)
        rows = span(i, tile)
        load(x_barrier, [(x_ref.at[shared_head(n, x_groups), rows], x_tile)])
        x = left_operand(x_tile)

        def copies(j):
            cols = span(j, tile)
            y_head = shared_head(n, y_groups)
            return (y_ref.at[y_head, :, cols], y_tile), (g_ref.at[n, cols], g_tile)

        def step(j, slot, carry):
            del j
            products = product(x, y_tile.at[slot])
            return log_sum(carry, products, of_cols(g_tile, slot), problem.scale)

        # The least number, not -inf: less -inf there is no difference.
        least = zeros(tile) + jnp.finfo(jnp.float32).min
        top, total = over_tiles(
            y_t.shape[2] // tile, 2, barrier, copies, step, (least, zeros(tile))
        )
        top_ref[n, rows] = top
        total_ref[n, rows] = total

    top, total = call_kernel(
        body,
        "sinkhorn_attention_log_row_sums",
        heads * (length // tile),
        [vector(heads, length)] * 2,
        [
            operand(tile, h, dtype=problem.dtype),
            operand(2, h, tile, dtype=problem.dtype),
            plgpu.SMEM((2, tile), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        x,
        y_t,
        g,
    )
    return total_log(top, total)


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
    """Sums s = P weights, and P^T s, or P^T (1 / s) if it `inverts`; P of f and g."""
    heads, tile, h = f.shape[0], blocks.tile, query.shape[2]
    groups = heads // key_t.shape[0]
    cluster = blocks.cluster if blocks.is_held else 1

    def body(query_ref, key_ref, f_ref, g_ref, weights_ref, *rest: Ref):
        # query [BN, T, H], key [BK, H, S], f [BN, T], g, weights [BN, S]; sums [BN, T],
        # shares [BN, T / tile, S]. Shared: query [tile, H], key [2, H, tile], f
        # [tile], g, weights [2, tile]; of a strip that is held, the kernel matrix [1, S
        # / tile, tile, tile] and what its rows are multiplied by [1, tile]; where a
        # cluster has a strip, a block's part of the sums of rows [tile], and some
        # columns of the matrix.
        sums_ref, shares_ref, *scratch = rest
        q_tile, f_tile, k_tile, g_tile, w_tile, row_barrier, barrier, *more = scratch
        held = Held(more.pop(0), 0, 1) if blocks.is_held else None
        left_tile: Ref = more.pop(0) if blocks.is_held else None
        part_tile: Ref = more.pop(0) if cluster > 1 else None
        n, i = head_and_strip(blocks.num_row_tiles)
        rows = span(i, tile)
        crew = team(1, None, cluster)
        first, num_tiles = crew.own(blocks.num_col_tiles)
        load(
            row_barrier,
            [(query_ref.at[n, rows], q_tile), (f_ref.at[n, rows], f_tile)],
        )
        q, f = left_operand(q_tile), of_rows(f_tile)

        def copies(j):
            cols = span(first + j, tile)
            return (
                (key_ref.at[shared_head(n, groups), :, cols], k_tile),
                (g_ref.at[n, cols], g_tile),
                (weights_ref.at[n, cols], w_tile),
            )

        def kernel_at(slot):
            products = product(q, k_tile.at[slot])
            return kernel_of(products, f, of_cols(g_tile, slot), problem.scale)

        def add_rows(j, slot, sums):
            kernel = kernel_at(slot)
            if held:
                held.put(jnp.int32(0), j, kernel)
            return sums + row_sums(kernel, of_cols(w_tile, slot))

        sums = over_tiles(num_tiles, 2, barrier, copies, add_rows, zeros(tile))
        if cluster > 1:
            part_tile[...] = sums
            crew.meet_all()
            sums = crew.sums_of_blocks(of_rows, part_tile)

        @crew.when_first
        def _():
            sums_ref[n, rows] = sums

        left = reciprocal(sums) if inverts else sums

        def put_share(j, share):
            shares_ref[n, i, span(first + j, tile)] = share

        if held:
            left_tile[0] = left
            crew.meet()
            do_each(num_tiles, lambda j: put_share(j, held.col_sums(j, left_tile)))
        else:

            def remake_columns(j, slot, carry):
                put_share(j, col_sums(kernel_at(slot), left))
                return carry

            over_tiles(num_tiles, 2, barrier, copies, remake_columns, jnp.int32(0))
        crew.leave()

    scratch = [
        operand(tile, h, dtype=problem.dtype),
        plgpu.SMEM((tile,), jnp.float32),
        operand(2, h, tile, dtype=problem.dtype),
        plgpu.SMEM((2, tile), jnp.float32),
        plgpu.SMEM((2, tile), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=3, num_barriers=2),
    ]
    if blocks.is_held:
        own_tiles = strips_of_block(blocks.num_col_tiles, cluster)
        scratch += [
            operand(1, own_tiles, tile, tile, dtype=jnp.dtype("float32")),
            plgpu.SMEM((1, tile), jnp.float32),
        ]
    if cluster > 1:
        scratch.append(plgpu.SMEM((tile,), jnp.float32))
    sums, shares = call_kernel(
        body,
        "sinkhorn_attention_sweep",
        heads * blocks.num_row_tiles,
        [
            vector(heads, blocks.rows),
            vector(heads, blocks.num_row_tiles, blocks.cols),
        ],
        scratch,
        query,
        key_t,
        f,
        g,
        weights,
        cluster=cluster,
    )
    return sums, shares.sum(axis=1)


def apply(
    problem: Problem,
    blocks: Blocks,
    query: Float[Array, "BN T H"],
    key_t: Float[Array, "BK H S"],
    value: Float[Array, "BK S D"],
    f: Float[Array, "BN T"],
    g: Float[Array, "BN S"],
) -> tuple[Float[Array, "BN T D"], Float[Array, "BN T"]]:
    """P value with the rows of P of f and g made right, and their sums before."""
    heads, tile, h, d = f.shape[0], blocks.tile, query.shape[2], value.shape[2]
    groups = heads // key_t.shape[0]

    def body(query_ref, key_ref, value_ref, f_ref, g_ref, out_ref, sums_ref, *scratch):
        # query [BN, T, H], key [BK, H, S], value [BK, S, D], f [BN, T], g [BN, S]; out
        # [BN, T, D], sums [BN, T]. Shared: query [tile, H], f [tile], key [2, H, tile],
        # value [2, tile, D], g [2, tile].
        q_tile, f_tile, k_tile, v_tile, g_tile, row_barrier, barrier = scratch
        n, i = head_and_strip(blocks.num_row_tiles)
        rows = span(i, tile)
        load(
            row_barrier,
            [(query_ref.at[n, rows], q_tile), (f_ref.at[n, rows], f_tile)],
        )
        q, f = left_operand(q_tile), of_rows(f_tile)

        def copies(j):
            cols, key_head = span(j, tile), shared_head(n, groups)
            return (
                (key_ref.at[key_head, :, cols], k_tile),
                (value_ref.at[key_head, cols], v_tile),
                (g_ref.at[n, cols], g_tile),
            )

        def accumulate(acc_ref):
            def step(j, slot, sums):
                del j
                products = product(q, k_tile.at[slot])
                kernel = kernel_of(products, f, of_cols(g_tile, slot), problem.scale)
                add_product(acc_ref, kernel, v_tile.at[slot])
                return sums + kernel.sum(axis=1)

            sums = over_tiles(
                blocks.num_col_tiles, 2, barrier, copies, step, zeros(tile)
            )
            return acc_ref[...], sums

        out, sums = pl.run_scoped(
            accumulate, plgpu.WGMMAAccumulatorRef((tile, d), jnp.float32)
        )
        out_ref[n, rows] = out * along_rows(reciprocal(sums), out)
        sums_ref[n, rows] = sums

    out, sums = call_kernel(
        body,
        "sinkhorn_attention_apply",
        heads * blocks.num_row_tiles,
        [vector(heads, blocks.rows, d), vector(heads, blocks.rows)],
        [
            operand(tile, h, dtype=problem.dtype),
            plgpu.SMEM((tile,), jnp.float32),
            operand(2, h, tile, dtype=problem.dtype),
            operand(2, tile, d, dtype=problem.dtype),
            plgpu.SMEM((2, tile), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
        ],
        query,
        key_t,
        value,
        f,
        g,
    )
    return out, sums
