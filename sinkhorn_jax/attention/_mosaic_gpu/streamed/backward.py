"""Backward GPU kernels of Sinkhorn attention: the exact gradient, in closed form.

A pass over the plan of the result seeds the cotangents of f_L and g_L; one pass for
each k from L - 1 down to 0 undoes column step k + 1 and row step k, with one
exponential an entry, because they have f_k in common. The last pass takes off the
cotangent of the logits what all steps add to it, for dq, and once more for dk and dv,
which are sums over the other side of a tile. Steps share kernel matrices there
(`_mosaic_gpu_correction`). Heads that shared memory holds have other passes
(`_mosaic_gpu_resident_backward`, `_mosaic_gpu_resident_pull_back`).

The output is of a plan that was rounded for the tensor cores, and so is df = rowsum(dO
* O). A row of the cotangent of the logits would not sum to 0 then. What the seeds find
left in the rows is added to df.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..._problem import Problem
from ..blocks import Blocks, pull_back_slots, whole_slots
from ..correction import Cotangents, correction, dlogits, moved
from ..resident.logits_cotangent import pull_back_whole
from ..resident.reverse import reverse
from ..tiles import (
    Ref,
    add_product,
    along_rows,
    call_kernel,
    head_and_strip,
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
from .forward import History, Operands, sweep


def backward(
    problem: Problem,
    blocks: Blocks,
    operands: Operands,
    history: History,
    out: Float[Array, "BN T D"],
    dout: Float[Array, "BN T D"],
) -> tuple[Float[Array, "BN T H"], Float[Array, "BN S H"], Float[Array, "BN S D"]]:
    """Cotangents of query, key and value in float32, of each query head by itself."""
    query, key, value, *_ = operands
    df = (dout.astype(jnp.float32) * out).sum(axis=2)
    if blocks.period:
        cotangents = reverse(problem, blocks, operands, history, dout, df)
    else:
        cotangents = _cotangents(problem, blocks, operands, history, dout, df)
    terms = correction(problem, operands, history, cotangents)
    if whole_slots(problem, blocks):
        dq, dk, dv = pull_back_whole(problem, blocks, terms, query, key, value, dout)
    else:
        (dq,) = _pull_back(problem, terms, query, key, dout, value, None)
        dk, dv = _pull_back(problem, terms.transposed(), key, query, value, dout, dout)
    scale = jnp.float32(problem.scale)
    return dq * scale, dk * scale, dv


def _cotangents(problem, blocks, operands, history, dout, df):
    """Of all potentials that a step made, with a launch for every pass."""
    f, g = history
    if problem.options.num_iters == 0:
        return Cotangents(df[None], g[:0])
    key_t, value_t = (jnp.swapaxes(x, 1, 2) for x in (operands.key, operands.value))
    cols, share = operands.cols, operands.share
    rest, sums = _seed(
        problem, blocks, operands.query, key_t, dout, value_t, f[-1], g[-1], df
    )

    def undo(sums, potentials):
        # Column step k + 1 and row step k, from column sums under the g before.
        f, g, before = potentials
        weight = moved(g, before, cols) * sums / share
        minus_df, sums = sweep(
            problem, blocks, operands.query, key_t, f, g, weight, inverts=False
        )
        return sums, (-minus_df, weight)

    before = jnp.concatenate([g[2:], g[-1:]])
    _, (dfs, dgs) = jax.lax.scan(undo, sums, (f[:-1], g[1:], before), reverse=True)
    return Cotangents(jnp.concatenate([dfs, (df + rest)[None]]), dgs)


def _seed(problem, blocks, query, key_t, dout, value_t, f, g, df):
    """Row and column sums of P * (dout value^T - df).

    The rows have the cotangent of f_L that is not in df, the columns have that of g_L.
    """
    heads, tile, h, d = f.shape[0], blocks.tile, query.shape[2], dout.shape[2]
    groups = heads // key_t.shape[0]

    def body(query_ref, key_ref, dout_ref, value_ref, f_ref, df_ref, g_ref, *rest: Ref):
        # query [BN, T, H], key [BK, H, S], dout [BN, T, D], value [BK, D, S], f, df
        # [BN, T], g [BN, S]; sums [BN, T], shares [BN, T / tile, S]. Shared: query
        # [tile, H], dout [tile, D], f, df [tile], key [2, H, tile], value [2, D, tile],
        # g [2, tile].
        sums_ref, shares_ref, q_tile, do_tile, f_tile, df_tile, *scratch = rest
        k_tile, v_tile, g_tile, row_barrier, barrier = scratch
        n, i = head_and_strip(blocks.num_row_tiles)
        rows = span(i, tile)
        load(
            row_barrier,
            [
                (query_ref.at[n, rows], q_tile),
                (dout_ref.at[n, rows], do_tile),
                (f_ref.at[n, rows], f_tile),
                (df_ref.at[n, rows], df_tile),
            ],
        )
        f, df = of_rows(f_tile), of_rows(df_tile)

        def copies(j):
            cols, key_head = span(j, tile), shared_head(n, groups)
            return (
                (key_ref.at[key_head, :, cols], k_tile),
                (value_ref.at[key_head, :, cols], v_tile),
                (g_ref.at[n, cols], g_tile),
            )

        def step(j, slot, sums):
            products = product(q_tile, k_tile.at[slot])
            plan = kernel_of(products, f, of_cols(g_tile, slot), problem.scale)
            dplan = product(do_tile, v_tile.at[slot])
            moved = plan * (dplan - along_rows(df, plan))
            shares_ref[n, i, span(j, tile)] = moved.sum(axis=0)
            return sums + moved.sum(axis=1)

        sums_ref[n, rows] = over_tiles(
            blocks.num_col_tiles, 2, barrier, copies, step, zeros(tile)
        )

    sums, shares = call_kernel(
        body,
        "sinkhorn_attention_seed",
        heads * blocks.num_row_tiles,
        [
            vector(heads, blocks.rows),
            vector(heads, blocks.num_row_tiles, blocks.cols),
        ],
        [
            operand(tile, h, dtype=problem.dtype),
            operand(tile, d, dtype=problem.dtype),
            plgpu.SMEM((tile,), jnp.float32),
            plgpu.SMEM((tile,), jnp.float32),
            operand(2, h, tile, dtype=problem.dtype),
            operand(2, d, tile, dtype=problem.dtype),
            plgpu.SMEM((2, tile), jnp.float32),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
        ],
        query,
        key_t,
        dout,
        value_t,
        f,
        df,
        g,
    )
    return sums, shares.sum(axis=1)


def _pull_back(problem, terms, x, y, dx, dy, other):
    """Products dZ y, and P other if there is one, where dx dy^T is P's cotangent.

    x are the queries and dx the output's cotangent, y the keys and dy the values; or
    the other way round.
    """
    heads, num_matrices, length = terms.f.shape
    rank, num_cols = terms.right.shape[1:]
    tile, h, d = 64, x.shape[2], dx.shape[2]
    x_groups, y_groups = heads // x.shape[0], heads // y.shape[0]
    num_slots = pull_back_slots(problem, tile)
    operands = [x, jnp.swapaxes(y, 1, 2), y, dx, jnp.swapaxes(dy, 1, 2), *terms]
    if other is not None:
        operands.append(other)

    def body(*refs: Ref):
        # x [X, I, H], y_t [Y, H, J], y [Y, J, H], dx [X, I, D], dy_t [Y, D, J], f
        # [BN, M, I], g [BN, M, J], left [BN, R, I], right [BN, R, J], other [Y, J, D]
        # or none; results [BN, I, H] and [BN, I, D] or one. Shared: the like in tiles,
        # those with J of them after an axis of slots.
        rest: list[Ref] = list(refs)
        x_ref, y_t_ref, y_ref, dx_ref, dy_t_ref, *rest = rest
        f_ref, g_ref, left_ref, right_ref, *rest = rest
        other_ref: Ref = rest.pop(0) if other is not None else None
        result_ref, *rest = rest
        other_result_ref: Ref = rest.pop(0) if other is not None else None
        x_tile, dx_tile, f_tile, left_tile, *rest = rest
        y_t_tile, y_tile, dy_t_tile, g_tile, right_tile, *rest = rest
        row_barrier, barrier, *rest = rest
        other_tile: Ref = rest.pop(0) if other is not None else None
        n, i = head_and_strip(length // tile)
        rows, x_head = span(i, tile), shared_head(n, x_groups)
        load(
            row_barrier,
            [
                (x_ref.at[x_head, rows], x_tile),
                (dx_ref.at[x_head, rows], dx_tile),
                (f_ref.at[n, :, rows], f_tile),
                (left_ref.at[n, :, rows], left_tile),
            ],
        )

        def copies(j):
            cols, y_head = span(j, tile), shared_head(n, y_groups)
            pairs = [
                (y_t_ref.at[y_head, :, cols], y_t_tile),
                (y_ref.at[y_head, cols], y_tile),
                (dy_t_ref.at[y_head, :, cols], dy_t_tile),
                (g_ref.at[n, :, cols], g_tile),
                (right_ref.at[n, :, cols], right_tile),
            ]
            if other is not None:
                pairs.append((other_ref.at[y_head, cols], other_tile))
            return pairs

        def accumulate(acc_ref, other_acc_ref=None):
            def step(j, slot, carry):
                del j
                products = product(x_tile, y_t_tile.at[slot])
                dplan = product(dx_tile, dy_t_tile.at[slot])

                def take_plan(plan):
                    if other is not None:
                        add_product(other_acc_ref, plan, other_tile.at[slot])

                dz = dlogits(
                    problem,
                    products,
                    dplan,
                    lambda m: (of_rows(f_tile, m), of_cols(g_tile, slot, m)),
                    lambda k: (of_rows(left_tile, k), of_cols(right_tile, slot, k)),
                    take_plan,
                )
                add_product(acc_ref, dz, y_tile.at[slot])
                return carry

            over_tiles(num_cols // tile, num_slots, barrier, copies, step, jnp.int32(0))
            accs = [acc_ref] if other is None else [acc_ref, other_acc_ref]
            return [acc[...] for acc in accs]

        dims = [h] if other is None else [h, d]
        results = pl.run_scoped(
            accumulate,
            *[plgpu.WGMMAAccumulatorRef((tile, dim), jnp.float32) for dim in dims],
        )
        result_ref[n, rows] = results[0]
        if other is not None:
            other_result_ref[n, rows] = results[1]

    dtype = problem.dtype
    out_type = [jax.ShapeDtypeStruct((heads, length, h), jnp.float32)]

    def vectors(*shape):
        return plgpu.SMEM((*shape, tile), jnp.float32)

    scratch = [
        operand(tile, h, dtype=dtype),
        operand(tile, d, dtype=dtype),
        vectors(num_matrices),
        vectors(rank),
        operand(num_slots, h, tile, dtype=dtype),
        operand(num_slots, tile, h, dtype=dtype),
        operand(num_slots, d, tile, dtype=dtype),
        vectors(num_slots, num_matrices),
        vectors(num_slots, rank),
        plgpu.Barrier(num_arrivals=4),
        plgpu.Barrier(num_arrivals=5 if other is None else 6, num_barriers=num_slots),
    ]
    if other is not None:
        out_type.append(jax.ShapeDtypeStruct((heads, length, d), jnp.float32))
        scratch.append(operand(num_slots, tile, d, dtype=dtype))
    return call_kernel(
        body,
        "sinkhorn_attention_pull_back",
        heads * (length // tile),
        out_type,
        scratch,
        *operands,
    )
