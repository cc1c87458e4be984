"""Backward GPU kernels of Sinkhorn attention: the exact gradient, in closed form.

Each half step adds minus its plan times its weight to the cotangent of the logits, row
step k the plan of f_k and g_k times the cotangent of f_k, column step k that of f_{k-1}
and g_k times the cotangent of g_k over b. A pass over the plan of the result seeds the
cotangent of g_L; one pass for each k from L down to 1 finds the others, with one
exponential an entry, because row step k - 1 and column step k have f_{k-1} in common.
The last pass meets the plans of all steps once more for dq, and once more for dk and
dv, which are sums over the other side of a tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ._mosaic_gpu_blocks import Blocks, pull_back_slots
from ._mosaic_gpu_forward import History, Operands, sweep
from ._mosaic_gpu_strips import (
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
    weighted,
)
from ._problem import Problem


class Steps(NamedTuple):
    """Half steps: plans exp(Z + f + g), what they weigh in rows and in columns.

    The last one has the plan of the result.
    """

    f: Float[Array, "BN K T"]
    g: Float[Array, "BN K S"]
    row_weight: Float[Array, "BN K T"]
    col_weight: Float[Array, "BN K S"]

    def transposed(self) -> "Steps":
        """With keys for rows and queries for columns."""
        return Steps(self.g, self.f, self.col_weight, self.row_weight)


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
    # Rounding of `out` would be a cotangent of f_L that no row sum cancels.
    df = (dout.astype(jnp.float32) * out).sum(axis=2)
    steps = _steps(problem, blocks, operands, history, dout, df)
    (dq,) = _pull_back(problem, steps, query, key, dout, value, None)
    dk, dv = _pull_back(problem, steps.transposed(), key, query, value, dout, dout)
    scale = jnp.float32(problem.scale)
    return dq * scale, dk * scale, dv


def _steps(problem, blocks, operands, history, dout, df):
    num_iters = problem.options.num_iters
    f, g = history
    if num_iters == 0:
        steps = Steps(f, g, df[None], jnp.zeros_like(g))
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps)
    key_t, value_t = (jnp.swapaxes(x, 1, 2) for x in (operands.key, operands.value))
    cols, share = operands.cols, operands.share
    dg = _seed(problem, blocks, operands.query, key_t, dout, value_t, f[-1], g[-1], df)

    def sweep_of(f, g, weights):
        return sweep(
            problem, blocks, operands.query, key_t, f, g, weights, inverts=False
        )

    def undo(dg, potentials):
        # Column step k + 1 and row step k, from the cotangent of g_{k+1}.
        f, g, next_g = potentials
        moved = jnp.where(cols, jnp.exp(jnp.where(cols, next_g - g, 0)), 0)
        weight = moved * dg / share
        minus_df, dg = sweep_of(f, g, weight)
        return dg, (-minus_df, weight)

    # Of the softmax only the row step is left, and its columns' potential is a
    # constant. Column step 1 may be far from it: it has a plan of its own.
    dg, (row_weight, col_weight) = jax.lax.scan(
        undo, dg, (f[1:-1], g[1:-1], g[2:]), reverse=True
    )
    first = jnp.where(cols, dg / share, 0)
    minus_df, _ = sweep_of(f[0], g[1], first)
    no_rows, no_cols = jnp.zeros_like(df)[None], jnp.zeros_like(dg)[None]
    steps = Steps(
        jnp.concatenate([f[:1], f]),
        jnp.concatenate([g[:2], g[1:]]),
        jnp.concatenate([-minus_df[None], no_rows, row_weight, df[None]]),
        jnp.concatenate([no_cols, first[None], col_weight, no_cols]),
    )
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps)


def _seed(problem, blocks, query, key_t, dout, value_t, f, g, df):
    """Column sums of P * (dout value^T - df): the cotangent of g_L."""
    heads, tile, h, d = f.shape[0], blocks.tile, query.shape[2], dout.shape[2]
    groups = heads // key_t.shape[0]

    def body(query_ref, key_ref, dout_ref, value_ref, f_ref, df_ref, g_ref, *rest: Ref):
        # query [BN, T, H], key [BK, H, S], dout [BN, T, D], value [BK, D, S], f, df
        # [BN, T], g [BN, S]; shares [BN, T / tile, S]. Shared: query [tile, H], dout
        # [tile, D], f, df [tile], key [2, H, tile], value [2, D, tile], g [2, tile].
        shares_ref, q_tile, do_tile, f_tile, df_tile, *scratch = rest
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

        def step(j, slot, carry):
            products = product(q_tile, k_tile.at[slot])
            plan = kernel_of(products, f, of_cols(g_tile, slot), problem.scale)
            dplan = product(do_tile, v_tile.at[slot])
            moved = plan * (dplan - along_rows(df, plan))
            shares_ref[n, i, span(j, tile)] = moved.sum(axis=0)
            return carry

        over_tiles(blocks.num_col_tiles, 2, barrier, copies, step, jnp.int32(0))

    (shares,) = call_kernel(
        body,
        "sinkhorn_attention_seed",
        heads * blocks.num_row_tiles,
        [vector(heads, blocks.num_row_tiles, blocks.cols)],
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
    return shares.sum(axis=1)


def _pull_back(problem, steps, x, y, dx, dy, other):
    """Products dZ y, and P other if there is one, where dx dy^T is P's cotangent.

    x are the queries and dx the output's cotangent, y the keys and dy the values; or
    the other way round.
    """
    heads, num_steps, length = steps.f.shape
    num_cols = steps.g.shape[2]
    tile, h, d = 64, x.shape[2], dx.shape[2]
    x_groups, y_groups = heads // x.shape[0], heads // y.shape[0]
    num_slots = pull_back_slots(problem, tile)
    operands = [x, jnp.swapaxes(y, 1, 2), y, dx, jnp.swapaxes(dy, 1, 2), *steps]
    if other is not None:
        operands.append(other)

    def body(*refs: Ref):
        # x [X, I, H], y_t [Y, H, J], y [Y, J, H], dx [X, I, D], dy_t [Y, D, J], f,
        # row_weight [BN, K, I], g, col_weight [BN, K, J], other [Y, J, D] or none;
        # results [BN, I, H] and [BN, I, D] or one. Shared: the like in tiles, those
        # with J of them after an axis of slots; dz, and plan with `other`.
        rest: list[Ref] = list(refs)
        x_ref, y_t_ref, y_ref, dx_ref, dy_t_ref, *rest = rest
        f_ref, g_ref, left_ref, right_ref, *rest = rest
        other_ref: Ref = rest.pop(0) if other is not None else None
        result_ref, *rest = rest
        other_result_ref: Ref = rest.pop(0) if other is not None else None
        x_tile, dx_tile, f_tile, left_tile, *rest = rest
        y_t_tile, y_tile, dy_t_tile, g_tile, right_tile, dz_tile, *rest = rest
        row_barrier, barrier, *rest = rest
        other_tile: Ref
        plan_tile: Ref
        other_tile, plan_tile = rest or (None, None)
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

                def plan_of(k):
                    f, g = of_rows(f_tile, k), of_cols(g_tile, slot, k)
                    return kernel_of(products, f, g, problem.scale)

                def shares_of(k, plan):
                    left = of_rows(left_tile, k)
                    return weighted(plan, left, of_cols(right_tile, slot, k))

                last = num_steps - 1
                plan = plan_of(last)
                if other is not None:
                    add_product(other_acc_ref, plan, plan_tile, other_tile.at[slot])
                dz = plan * dplan - shares_of(last, plan)
                dz = jax.lax.fori_loop(
                    jnp.int32(0),
                    jnp.int32(last),
                    lambda k, dz: dz - shares_of(k, plan_of(k)),
                    dz,
                )
                add_product(acc_ref, dz, dz_tile, y_tile.at[slot])
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
    vectors = plgpu.SMEM((num_steps, tile), jnp.float32)
    slots_of_vectors = plgpu.SMEM((num_slots, num_steps, tile), jnp.float32)
    scratch = [
        operand(tile, h, dtype=dtype),
        operand(tile, d, dtype=dtype),
        vectors,
        vectors,
        operand(num_slots, h, tile, dtype=dtype),
        operand(num_slots, tile, h, dtype=dtype),
        operand(num_slots, d, tile, dtype=dtype),
        slots_of_vectors,
        slots_of_vectors,
        operand(tile, tile, dtype=dtype),
        plgpu.Barrier(num_arrivals=4),
        plgpu.Barrier(num_arrivals=5 if other is None else 6, num_barriers=num_slots),
    ]
    if other is not None:
        out_type.append(jax.ShapeDtypeStruct((heads, length, d), jnp.float32))
        scratch += [
            operand(num_slots, tile, d, dtype=dtype),
            operand(tile, tile, dtype=dtype),
        ]
    return call_kernel(
        body,
        "sinkhorn_attention_pull_back",
        heads * (length // tile),
        out_type,
        scratch,
        *operands,
    )
