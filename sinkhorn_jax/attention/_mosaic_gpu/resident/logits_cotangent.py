"""The logits cotangent dZ of resident heads, and dQ, dK and dV from it, in one launch.

The equations are (6), (7) and (9) of docs/architecture.md, without the scale of (9). A
thread block has a head, and one warpgroup. It goes through the keys tile by tile, and
for each tile through all queries. A tile of dZ is computed once for all three results.
dK and dV are sums over the queries, in registers; dQ accumulates in shared memory. dK
and dV are computed transposed, which needs no transposed tile of dZ or P.

`shared_memory.resident_logits_cotangent_scratch` lists what lies in shared memory.
`key_barrier` has 5 arrivals, the copies of a key tile, and each of the `query_barrier`
has 6, those of a query tile into its stage. The warpgroup starts all copies before it
waits for them, and nobody else waits. So no wait is for ever.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..._problem import Problem
from .. import tiles
from ..blocks import TILE, Blocks
from ..buffers import Buffers
from ..correction import logits_cotangent
from ..launch import call_kernel, vector
from ..loops import for_each
from ..shared_memory import (
    resident_logits_cotangent_scratch,
    resident_logits_cotangent_stages,
)
from ..types import CorrectionTerms, PaddedOperands


def operand_cotangents(
    problem: Problem,
    blocks: Blocks,
    terms: CorrectionTerms,
    operands: PaddedOperands,
    dout: Float[Array, "BN T D"],
) -> tuple[Float[Array, "BN T H"], Float[Array, "BN S H"], Float[Array, "BN S D"]]:
    """Products dZ K, dZ^T Q and P^T dO, for each query head."""
    query, key, value, *_ = operands
    heads, h, d = len(query), query.shape[2], dout.shape[2]
    num_stages = resident_logits_cotangent_stages(problem, blocks)
    results = call_kernel(
        functools.partial(_kernel, problem, num_stages),
        "sinkhorn_attention_resident_pull_back",
        heads,
        inputs=dict(
            query=query,  # [BN, T, H]
            query_t=jnp.swapaxes(query, 1, 2),
            dout=dout,  # [BN, T, D]
            dout_t=jnp.swapaxes(dout, 1, 2),
            key=key,  # [BK, S, H]
            key_t=jnp.swapaxes(key, 1, 2),
            value_t=jnp.swapaxes(value, 1, 2),  # [BK, D, S]
            terms=terms,
        ),
        results=dict(
            dq=vector(heads, blocks.rows, h),
            dk_t=vector(heads, h, blocks.cols),
            dv_t=vector(heads, d, blocks.cols),
        ),
        scratch=resident_logits_cotangent_scratch(problem, blocks, num_stages),
    )
    dk, dv = jnp.swapaxes(results.dk_t, 1, 2), jnp.swapaxes(results.dv_t, 1, 2)
    return results.dq, dk, dv


def _kernel(problem, num_stages, inputs, results, smem):
    num_rows, num_cols = inputs.query.shape[1] // TILE, inputs.key.shape[1] // TILE
    buffers = Buffers(
        [smem.key, smem.key_t, smem.value_t, smem.g, smem.right],
        [smem.query, smem.query_t, smem.dout, smem.dout_t, smem.f, smem.left],
        smem.key_barrier,
        smem.query_barrier,
        num_stages,
    )
    n = jax.lax.axis_index("program")
    key_head = tiles.key_head_of(n, inputs.query.shape[0] // inputs.key.shape[0])

    def query_tile(i):
        rows = tiles.span(i)
        return (
            inputs.query.at[n, rows],
            inputs.query_t.at[n, :, rows],
            inputs.dout.at[n, rows],
            inputs.dout_t.at[n, :, rows],
            inputs.terms.f.at[n, :, rows],
            inputs.terms.left.at[n, :, rows],
        )

    def start_dq(i):
        zeros = jnp.zeros(smem.dq.shape[1:], jnp.float32)
        smem.dq[i] = plgpu.layout_cast(zeros, tiles.TILE_LAYOUT)

    def step(accs, i, stage, nothing):
        def put_plan(plan):
            smem.plan[...] = plan.astype(problem.dtype)

        smem.dz[...] = logits_cotangent(
            problem,
            tiles.product(smem.query.at[stage], smem.key_t),
            tiles.product(smem.dout.at[stage], smem.value_t),
            lambda m: (tiles.of_rows(smem.f, stage, m), tiles.of_cols(smem.g, m)),
            lambda k: (
                tiles.of_rows(smem.left, stage, k),
                tiles.of_cols(smem.right, k),
            ),
            put_plan,
        ).astype(problem.dtype)
        # The tensor cores see what the threads have written.
        plgpu.commit_smem()
        dk_acc_ref, dv_acc_ref = accs
        plgpu.wgmma(dv_acc_ref, smem.dout_t.at[stage], smem.plan)
        plgpu.wgmma(dk_acc_ref, smem.query_t.at[stage], smem.dz)
        plgpu.wgmma_wait(0)
        more = tiles.product(smem.dz, smem.key)
        # Each thread reads back what it has written itself.
        smem.dq[i] = plgpu.layout_cast(smem.dq[i], tiles.TILE_LAYOUT) + more
        # All warps have read dz and the plan.
        plgpu.commit_smem()
        return nothing

    def over_queries(j):
        cols = tiles.span(j)
        plgpu.commit_smem()  # All threads have read the last key tile.
        buffers.load(
            inputs.key.at[key_head, cols],
            inputs.key_t.at[key_head, :, cols],
            inputs.value_t.at[key_head, :, cols],
            inputs.terms.g.at[n, :, cols],
            inputs.terms.right.at[n, :, cols],
        )

        def accumulate(*accs):
            step_of_key_tile = functools.partial(step, accs)
            buffers.over_tiles(num_rows, query_tile, step_of_key_tile, jnp.int32(0))
            return [acc[...] for acc in accs]

        results.dk_t[n, :, cols], results.dv_t[n, :, cols] = pl.run_scoped(
            accumulate,
            plgpu.WGMMAAccumulatorRef((inputs.query.shape[2], TILE), jnp.float32),
            plgpu.WGMMAAccumulatorRef((inputs.dout.shape[2], TILE), jnp.float32),
        )

    def end_dq(i):
        results.dq[n, tiles.span(i)] = plgpu.layout_cast(smem.dq[i], tiles.TILE_LAYOUT)

    for_each(num_rows, start_dq)
    for_each(num_cols, over_queries)
    for_each(num_rows, end_dq)
