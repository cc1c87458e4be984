"""The logits cotangent dZ of streamed heads, and dQ, dK and dV from it.

A thread block owns 64 queries for dQ, or 64 keys for dK and dV, and computes dZ of them
tile by tile. So dZ is computed twice.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..._problem import Problem
from .. import tiles
from ..blocks import TILE
from ..buffers import Buffers
from ..correction import logits_cotangent
from ..launch import call_kernel, vector
from ..shared_memory import (
    streamed_logits_cotangent_scratch,
    streamed_logits_cotangent_stages,
)
from ..types import CorrectionTerms, PaddedOperands


def operand_cotangents(
    problem: Problem,
    terms: CorrectionTerms,
    operands: PaddedOperands,
    dout: Float[Array, "BN T D"],
) -> tuple[Float[Array, "BN T H"], Float[Array, "BN S H"], Float[Array, "BN S D"]]:
    """Products dZ K, dZ^T Q and P^T dO, for each query head."""
    query, key, value, *_ = operands
    dq, _ = _side(problem, terms, query, key, dout, value, None)
    dk, dv = _side(problem, terms.transposed(), key, query, value, dout, dout)
    return dq, dk, dv


def _side(problem, terms, x, y, dx, dy, other):
    """Returns the products dZ y and P `other`, the second one None without `other`.

    For dQ, x is the queries, y the keys, dx is dO and dy the values. For dK and dV the
    two sides are exchanged, `terms` is transposed, and `other` is dO. dP is dx dy^T.
    """
    heads, _, length = terms.f.shape
    h, d = x.shape[2], dx.shape[2]
    num_stages = streamed_logits_cotangent_stages(problem)
    has_other = other is not None
    results = call_kernel(
        functools.partial(_kernel, problem, num_stages),
        "sinkhorn_attention_pull_back",
        heads * (length // TILE),
        dict(
            x=x,  # [X, I, H]
            y_t=jnp.swapaxes(y, 1, 2),
            y=y,  # [Y, J, H]
            dx=dx,  # [X, I, D]
            dy_t=jnp.swapaxes(dy, 1, 2),  # [Y, D, J]
            terms=terms,  # I queries and J keys, or the other way round.
            other=other,  # [Y, J, D]
        ),
        dict(
            result=vector(heads, length, h),
            other_result=vector(heads, length, d) if has_other else None,
        ),
        streamed_logits_cotangent_scratch(problem, num_stages, has_other=has_other),
    )
    return results.result, results.other_result


def _kernel(problem, num_stages, inputs, results, smem):
    heads, has_other = inputs.terms.f.shape[0], inputs.other is not None
    targets = [smem.y_t, smem.y, smem.dy_t, smem.g, smem.right]
    buffers = Buffers(
        [smem.x, smem.dx, smem.f, smem.left],
        [*targets, smem.other] if has_other else targets,
        smem.row_block_barrier,
        smem.tile_barrier,
        num_stages,
    )
    n, i = tiles.head_and_row_block(inputs.x.shape[1] // TILE)
    rows, x_head = tiles.span(i), tiles.key_head_of(n, heads // inputs.x.shape[0])
    buffers.load(
        inputs.x.at[x_head, rows],
        inputs.dx.at[x_head, rows],
        inputs.terms.f.at[n, :, rows],
        inputs.terms.left.at[n, :, rows],
    )

    def sources(j):
        cols, y_head = tiles.span(j), tiles.key_head_of(n, heads // inputs.y.shape[0])
        parts = [
            inputs.y_t.at[y_head, :, cols],
            inputs.y.at[y_head, cols],
            inputs.dy_t.at[y_head, :, cols],
            inputs.terms.g.at[n, :, cols],
            inputs.terms.right.at[n, :, cols],
        ]
        return [*parts, inputs.other.at[y_head, cols]] if has_other else parts

    def step(accs, j, stage, nothing):
        del j

        def take_plan(plan):
            if has_other:
                tiles.add_product(accs[1], plan, smem.other.at[stage])

        dz = logits_cotangent(
            problem,
            tiles.product(smem.x, smem.y_t.at[stage]),
            tiles.product(smem.dx, smem.dy_t.at[stage]),
            lambda m: (tiles.of_rows(smem.f, m), tiles.of_cols(smem.g, stage, m)),
            lambda k: (
                tiles.of_rows(smem.left, k),
                tiles.of_cols(smem.right, stage, k),
            ),
            take_plan,
        )
        tiles.add_product(accs[0], dz, smem.y.at[stage])
        return nothing

    def accumulate(*accs):
        num_tiles = inputs.y.shape[1] // TILE
        step_of_block = functools.partial(step, accs)
        buffers.over_tiles(num_tiles, sources, step_of_block, jnp.int32(0))
        return [acc[...] for acc in accs]

    dims = [x.shape[2] for x in ([inputs.x, inputs.dx] if has_other else [inputs.x])]
    totals = pl.run_scoped(
        accumulate,
        *[plgpu.WGMMAAccumulatorRef((TILE, dim), jnp.float32) for dim in dims],
    )
    results.result[n, rows] = totals[0]
    if has_other:
        results.other_result[n, rows] = totals[1]
