"""Backward TPU kernel of Sinkhorn attention: the exact gradient, in closed form.

With E_k the kernel matrix of the potentials of iteration k, diag omitted, the plans of
the half steps are

    row step k:       r_k E_k c_k              weight w_k, the cotangent of f_k
    column step k+1:  r_k E_k c'_{k+1}         weight y_{k+1}, that of g_{k+1} over b

where c' is the column step's scaling for the base of E_k. Each adds minus its plan
times its weight to the cotangent of the logits. The first pass seeds y_L; a pass for
each k from L - 1 to 1 finds w_k and y_k; the last one has E_L and two exponentials
more, for row step 0 and column step 1, which are far from the others.

While the base is the same for all k >= 1, r_k E_k is rho_k E_L, so that all other steps
are one correction of rank 2 (L - 1). Otherwise the last pass makes every E_k again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..._runtime.shard_map import kernel_result, varying_like
from .._pallas_common import reciprocal
from .._problem import Problem
from .blocks import LANES, Blocks, correction_rank, strips_in_lanes, vmem_limit
from .forward import grid_of, in_passes
from .head import Head, Ref, col_sums, product, row_sums


def _backward_kernel(
    num_rows_ref,
    num_cols_ref,
    shares_base_ref,
    query_ref,
    key_ref,
    value_ref,
    dout_ref,
    *rest: Ref,
    problem: Problem,
    blocks: Blocks,
):
    # In SMEM: num_rows, num_cols [B], shares_base [BN]. query [1, I or T, H], key
    # [1, H, S], value [1, D, S], dout [1, I or T, D], bases and scalings [1, L, S].
    # Results in float32: dq like query, dk [BN, H, S] and dv [BN, D, S] in HBM, because
    # blocks of results are in VMEM twice. Scratch: dk [H, S], dv [D, S], kernel [I or
    # T, S], dz [I, S], dcols and sums [1, S], left [G, R, LANES] and right [R, S]
    # with R = 2 (L - 1), rounded up, and G as many as all rows take, whole strips in
    # each. I rows of a strip while the grid goes through strips, T padded rows
    # otherwise.
    num_iters = problem.options.num_iters
    # What no pass uses is not there.
    refs: list[Ref] = list(rest)
    bases_ref: Ref
    scalings_ref: Ref
    bases_ref, scalings_ref = (refs.pop(0), refs.pop(0)) if num_iters else (None, None)
    dq_ref, dk_out_ref, dv_out_ref, *refs = refs
    dk_ref, dv_ref, kernel_ref, dz_ref, dcols_ref, sums_ref, *refs = refs
    left_ref: Ref
    right_ref: Ref
    left_ref, right_ref = refs or (None, None)
    b = jax.lax.div(pl.program_id(0), jnp.int32(problem.num_heads))
    head = Head(
        problem,
        blocks,
        num_rows_ref[b],
        num_cols_ref[b],
        query_ref,
        key_ref,
        kernel_ref,
    )
    shares_base = shares_base_ref[pl.program_id(0)] == 1
    # 1 / b.
    inverse_share = head.row_of(head.num_cols) / head.row_of(
        jnp.maximum(head.num_rows, 1)
    )
    half = num_iters - 1  # Steps of each kind in the correction.

    def base_of(k):
        return bases_ref[0, pl.ds(k - 1, 1), :]

    def scaling_of(k):
        return scalings_ref[0, pl.ds(k - 1, 1), :]

    def dplan(i):
        return product(dout_ref[0, head.rows(i), :], value_ref[0], (1, 0))

    def place_in_left(i):
        # Rows of the correction's left factor are on lanes, where they take no padding.
        # A product with `place` [I, LANES] moves a strip's rows there, or back.
        strips = strips_in_lanes(blocks)
        position = jax.lax.broadcasted_iota(jnp.int32, (blocks.rows, LANES), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (blocks.rows, LANES), 1)
        group = jax.lax.div(jnp.int32(i), jnp.int32(strips))
        start = (jnp.int32(i) - group * strips) * blocks.rows
        return group, (lane == position + start).astype(jnp.float32)

    def seed(i):
        @pl.when(i == 0)
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)
            if num_iters > 1:
                left_ref[...] = jnp.zeros_like(left_ref)
                right_ref[...] = jnp.zeros_like(right_ref)

        kernel = head.kernel(i, base_of(num_iters), False) * scaling_of(num_iters)
        plan = kernel * reciprocal(row_sums(kernel))
        moved = plan * dplan(i)
        # What the last row step passes on to the columns comes off at once.
        sums_ref[...] += col_sums(moved - plan * row_sums(moved))

    def end_seed():
        dcols_ref[...] = sums_ref[...]

    def undo(i, j):
        # Column step k + 1 and row step k.
        k = num_iters - j

        @pl.when(i == 0)
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)
            # Where the base took the scaling up in between, c is not the whole step.
            moved = jnp.exp(base_of(k + 1) - base_of(k)) * scaling_of(k + 1)
            right_ref[pl.ds(k - 1, 1), :] = moved * dcols_ref[...] * inverse_share
            right_ref[pl.ds(half + k - 1, 1), :] = scaling_of(k)

        kernel = head.kernel(i, base_of(k), shares_base)
        r = reciprocal(row_sums(kernel * scaling_of(k)))
        w = -r * row_sums(kernel * right_ref[pl.ds(k - 1, 1), :])
        sums_ref[...] += col_sums(kernel * (r * w))
        group, place = place_in_left(i)
        left_ref[group, pl.ds(k - 1, 1), :] += col_sums(place * r)
        left_ref[group, pl.ds(half + k - 1, 1), :] += col_sums(place * (r * w))

    def end_undo(j):
        dcols_ref[...] = -sums_ref[...] * scaling_of(num_iters - j)

    def pull_back(i):
        @pl.when(i == 0)
        def _():
            dk_ref[...] = jnp.zeros_like(dk_ref)
            dv_ref[...] = jnp.zeros_like(dv_ref)

        query, dout = query_ref[0, head.rows(i), :], dout_ref[0, head.rows(i), :]
        z = head.logits(i)
        if num_iters:
            kernel = head.kernel(i, base_of(num_iters), shares_base, z)
            plan = kernel * scaling_of(num_iters)
        else:
            plan = jnp.exp(z)
        plan = plan * reciprocal(row_sums(plan))
        moved = plan * dplan(i)
        dz_ref[...] = moved - plan * row_sums(moved)
        dv_ref[...] += product(dout, plan.astype(dout.dtype), (0, 0))
        if num_iters:
            add_first_steps(z)
        if num_iters > 1:
            pl.when(shares_base)(functools.partial(add_other_steps, i))
            pl.when(jnp.logical_not(shares_base))(
                functools.partial(add_other_steps_in_turn, i)
            )
        dz = (dz_ref[...] * jnp.float32(problem.scale)).astype(query.dtype)
        dq_ref[0, head.rows(i), :] = product(dz, key_ref[0], (1, 1))
        dk_ref[...] += product(query, dz, (0, 0))

    def add_first_steps(z):
        first = jnp.exp(z)
        r = reciprocal(row_sums(first))
        # Of the plan after column step 1, so no entry is above 1 / b.
        second = r * jnp.exp(z + base_of(1)) * (dcols_ref[...] * inverse_share)
        dz_ref[...] -= second - (first * r) * row_sums(second)

    def add_other_steps(i):
        group, place = place_in_left(i)
        left = product(place, left_ref[group], (1, 1))  # [I, R]
        kernel = kernel_ref[head.rows(i), :]
        dz_ref[...] -= kernel * product(left, right_ref[...], (1, 0))

    def add_other_steps_in_turn(i):
        def add(k, carry):
            kernel = head.kernel(i, base_of(k), False)
            right = right_ref[pl.ds(k - 1, 1), :]
            plan = kernel * reciprocal(row_sums(kernel * scaling_of(k)))
            step = plan * right
            dz_ref[...] -= step - plan * scaling_of(k) * row_sums(step)
            return carry

        jax.lax.fori_loop(jnp.int32(1), jnp.int32(num_iters), add, jnp.int32(0))

    def end_pull_back():
        n = pl.program_id(0)
        pltpu.sync_copy(dk_ref, dk_out_ref.at[n])
        pltpu.sync_copy(dv_ref, dv_out_ref.at[n])

    in_passes(
        blocks,
        [
            (0, min(1, num_iters), lambda i, _: seed(i), lambda _: end_seed()),
            (1, num_iters, undo, end_undo),
            (
                num_iters,
                num_iters + 1,
                lambda i, _: pull_back(i),
                lambda _: end_pull_back(),
            ),
        ],
    )


def backward(
    problem: Problem,
    blocks: Blocks,
    num_rows: Int[Array, " B"],
    num_cols: Int[Array, " B"],
    query: Float[Array, "BN T H"],
    key: Float[Array, "BK H S"],
    value: Float[Array, "BK D S"],
    dout: Float[Array, "BN T D"],
    bases: Float[Array, "BN L S"] | None,
    scalings: Float[Array, "BN L S"] | None,
) -> tuple[Float[Array, "BN T H"], Float[Array, "BN H S"], Float[Array, "BN D S"]]:
    """Cotangents of query, key and value in float32, of each query head by itself."""
    heads, t, h = query.shape
    d, s = value.shape[1:]
    num_iters = problem.options.num_iters
    if bases is None or scalings is None:
        shares_base = varying_like(jnp.ones(heads, jnp.int32), query)
        history = ()
    else:
        shares_base = (bases == bases[:, -1:]).all(axis=(1, 2)).astype(jnp.int32)
        history = bases, scalings
    grid, at_head, at_strip = grid_of(blocks, heads, num_iters + 1)
    held = blocks.padded_rows if blocks.is_resident else blocks.rows
    groups = problem.num_heads // problem.num_key_heads
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    in_specs = [
        smem,
        smem,
        smem,
        pl.BlockSpec((1, held, h), at_strip()),
        # Once, not twice: fetching them ahead would hide little of a whole head's time.
        pl.BlockSpec((1, h, s), at_head(groups), pipeline_mode=pl.Buffered(1)),
        pl.BlockSpec((1, d, s), at_head(groups), pipeline_mode=pl.Buffered(1)),
        pl.BlockSpec((1, held, d), at_strip()),
        *[
            pl.BlockSpec((1, num_iters, s), at_head(), pipeline_mode=pl.Buffered(1))
            for _ in history
        ],
    ]
    scratch = [
        pltpu.VMEM((h, s), jnp.float32),
        pltpu.VMEM((d, s), jnp.float32),
        pltpu.VMEM((held, s), jnp.float32),
        pltpu.VMEM((blocks.rows, s), jnp.float32),
        pltpu.VMEM((1, s), jnp.float32),
        pltpu.VMEM((1, s), jnp.float32),
    ]
    rank = correction_rank(num_iters)
    if num_iters > 1:
        strips = strips_in_lanes(blocks)
        scratch += [
            pltpu.VMEM(
                (math.ceil(blocks.num_strips / strips), rank, LANES), jnp.float32
            ),
            pltpu.VMEM((rank, s), jnp.float32),
        ]
    return pl.pallas_call(
        functools.partial(_backward_kernel, problem=problem, blocks=blocks),
        out_shape=[
            kernel_result(query, (heads, t, h), jnp.float32),
            kernel_result(query, (heads, h, s), jnp.float32),
            kernel_result(query, (heads, d, s), jnp.float32),
        ],
        grid=grid,
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, held, h), at_strip(last=num_iters)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            # Heads are independent; passes and strips hand their sums on.
            dimension_semantics=("parallel", "arbitrary", "arbitrary")[: len(grid)],
            vmem_limit_bytes=vmem_limit(problem, blocks, "backward"),
        ),
        cost_estimate=_cost(problem, blocks, heads),
        name="sinkhorn_attention_backward",
    )(num_rows, num_cols, shares_base, query, key, value, dout, *history)


def _cost(problem, blocks, heads):
    entries = heads * blocks.padded_rows * blocks.cols
    num_iters, h, d = problem.options.num_iters, problem.head_dim, problem.value_dim
    has_steps = num_iters > 0
    passes = 1 if blocks.is_resident else num_iters + 1
    # Logits of every pass; dplan, twice with steps; dq, dk, dv. The last pass of the
    # resident regime makes logits again for the first steps.
    logits = passes + (has_steps and blocks.is_resident)
    dims = h * (logits + 2) + d * (2 + has_steps)
    # The correction, whose left factor a product puts in place.
    rank = correction_rank(num_iters)
    moves = 2 * heads * blocks.padded_rows * LANES * rank
    dims += rank
    itemsize = problem.dtype.itemsize
    reads = num_iters + 1 if blocks.moves_strips else 1
    rows = itemsize * reads * (h + d) + 4 * h
    cols = (itemsize + 4) * (h + d) + 8 * num_iters
    return pl.CostEstimate(
        flops=2 * entries * dims + moves,
        transcendentals=entries * (passes + 2 * has_steps),
        bytes_accessed=heads * (blocks.padded_rows * rows + blocks.cols * cols),
    )
