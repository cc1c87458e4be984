"""The reverse sweep of resident heads: all iterations in one launch.

The equations are (4) to (6) of docs/architecture.md, with the plans as in (8). For each
refresh group, shared memory holds the transpose of E = exp(Z + f_base + g_base), with
keys as rows. With r_k = exp(f_k - f_base), c_k = exp(g_k - g_base) and a = 1,

    lambda_k = -r_k * E (c_{k+1} mu_{k+1} / b)      undo column step k + 1
    mu_k = -c_k * E^T (r_k lambda_k)                undo row step k

for k = L - 1, ..., 0. The seeds are sums of P * (dO V^T - lambda_L),
where the plan P is E of the first refresh group. The row sums are added to the given
lambda_L (`passes.backward`); the column sums, with that new lambda_L, are mu_L after
row step L is undone. An entry costs one exponential for each refresh group, and one for
the row sums of the seeds.

`shared_memory.resident_reverse_scratch` lists what lies in shared memory. A thread
block with W warpgroups has these barriers (`kernel.py` says why no wait is for ever):

| barrier | number | arrivals | who arrives | who waits |
|---|---|---|---|---|
| `df_barrier` | 1 | 1 | a copy, once | all warpgroups |
| `base_barrier` | 1 | 2 | copies of f and g, for each group | all warpgroups |
| `row_block_barrier` | W | 1 | a copy that warpgroup w starts | warpgroup w |
| `tile_barrier` | W stages | 1 | a copy that warpgroup w starts | warpgroup w |
| `seed_...` of both | as many | 2 | copies that warpgroup w starts | warpgroup w |
| `scalings_barrier` | 2 | 3 | copies that warpgroup 0 starts | all warpgroups |
| `warpgroups_barrier` | 1 | W | all warpgroups | all warpgroups |
| of the cluster | 1 | all threads | all threads | all threads of the cluster |
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..._problem import Problem
from .. import tiles
from ..blocks import TILE, Blocks
from ..buffers import Buffers
from ..correction import base_potentials, potential_ratio
from ..heuristics import resident_reverse_warpgroups
from ..launch import call_kernel, vector
from ..refresh_groups import refresh_groups
from ..shared_memory import resident_reverse_scratch
from ..types import PaddedOperands, PotentialCotangents, PotentialHistory
from .kernel import ResidentKernel


def reverse_sweep(
    problem: Problem,
    blocks: Blocks,
    operands: PaddedOperands,
    history: PotentialHistory,
    dout: Float[Array, "BN T D"],
    df: Float[Array, "BN T"],
) -> PotentialCotangents:
    """Cotangents of all potentials; `df` = rowsum(dO * O) is a first seed of f_L."""
    query, key, value, *_ = operands
    heads, num_iters = len(df), problem.options.num_iters
    config = resident_reverse_warpgroups(problem, blocks)
    base_f, base_g, r, next_c, c = _potentials(problem, operands, history)

    cotangents = call_kernel(
        lambda *refs: ReverseKernel(
            problem, blocks, config, blocks.num_col_tiles, *refs
        ).run(),
        "sinkhorn_attention_resident_reverse",
        heads,
        inputs=dict(
            queries=[query, dout],  # [BN, T, H], [BN, T, D]
            keys=[key, value],  # [BK, S, H], [BK, S, D]
            queries_t=[jnp.swapaxes(x, 1, 2) for x in (query, dout)],
            keys_t=[jnp.swapaxes(x, 1, 2) for x in (key, value)],
            df=tiles.in_tiles(df),  # [BN, T / tile, tile]
            f=tiles.in_tiles(base_f),  # [groups, BN, T / tile, tile]
            g=tiles.in_tiles(base_g),  # [groups, BN, S / tile, tile]
            r=tiles.in_tiles(r),  # [L, BN, T / tile, tile]
            next_c=tiles.in_tiles(next_c),  # [L, BN, S / tile, tile]
            c=tiles.in_tiles(c),
        ),
        results=dict(
            df=vector(num_iters + 1, heads, blocks.rows),
            dg=vector(num_iters, heads, blocks.cols),
        ),
        scratch=resident_reverse_scratch(problem, blocks, config),
        num_warpgroups=config.num_warpgroups,
        cluster=blocks.cluster,
    )
    dg = cotangents.dg / operands.col_marginal[None]
    return PotentialCotangents(cotangents.df, dg)


def _potentials(problem, operands, history):
    """Potentials of each refresh group's E, and r_k, c_{k+1} / b and c_k for all k."""
    f, g = history
    rows, cols = operands.rows[None], operands.cols[None]
    bases, r, next_c, c = [], [], [], []
    # In the order of k.
    for base, first, last in reversed(refresh_groups(problem)):
        base_f, base_g = base_potentials(history, base)
        bases.insert(0, (base_f, base_g))
        last = min(last, problem.options.num_iters - 1)
        r.append(potential_ratio(f[first : last + 1], base_f[None], rows))
        next_c.append(potential_ratio(g[first + 1 : last + 2], base_g[None], cols))
        # g_0 is a constant and has no cotangent.
        c.append(potential_ratio(g[max(first, 1) : last + 1], base_g[None], cols))
    base_f, base_g = (jnp.stack(x) for x in zip(*bases, strict=True))
    r, next_c = jnp.concatenate(r), jnp.concatenate(next_c)
    c = jnp.concatenate([jnp.zeros_like(next_c[:1]), *c])
    return base_f, base_g, r, next_c / operands.col_marginal[None], c


class ReverseKernel(ResidentKernel):
    """The reverse sweep. Methods for i compute query tile i, for j key block j."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        smem, rank = self.smem, self.warpgroups.rank
        self.seed_buffers = self.buffers._replace(
            row_block=[x.at[rank] for x in smem.row_blocks],
            tile=smem.tiles,
            row_block_barrier=smem.seed_row_block_barrier.at[rank],
            tile_barrier=smem.seed_tile_barrier,
        )

    def run(self) -> None:
        """The seeds, and all iterations."""
        smem, cluster = self.smem, self.cluster
        self.warpgroups.load(smem.df_barrier, [(self.inputs.df.at[self.n], smem.df)])
        self.load_base(0)
        cluster.for_each_owned(self.num_rows, self.seed_row)
        cluster.gather(smem.df)
        cluster.for_each_owned(self.num_cols, self.make_and_seed)
        self.warpgroups.barrier()
        scalings = [smem.r, smem.next_c, smem.c]
        Buffers([], scalings, None, smem.scalings_barrier).over_tiles(
            self.num_iters,
            self.scalings,
            self.undo,
            jnp.int32(0),
            issuer=self.warpgroups.in_first,
        )
        cluster.leave()

    def load_base(self, group):
        """Loads the potentials of a refresh group's E.

        All warpgroups have passed a barrier since they read those of the last group.
        """
        inputs, smem, n = self.inputs, self.smem, self.n
        copies = [(inputs.f.at[group, n], smem.f), (inputs.g.at[group, n], smem.g)]
        self.warpgroups.load(smem.base_barrier, copies)

    def seed_row(self, i):
        """Completes lambda_L. Here query block i is the left factor."""
        f, df = tiles.of_rows(self.smem.f, i), tiles.of_rows(self.smem.df, i)

        def step(j, products, dplan, rest):
            g = tiles.of_cols(self.smem.g, j)
            plan = tiles.kernel_of(products, f, g, self.problem.scale)
            return rest + (plan * (dplan - tiles.along_rows(df, plan))).sum(axis=1)

        df = df + self.over_dplan(self.queries, i, self.keys, step, tiles.zeros(TILE))
        self.smem.df[i] = df
        self.outputs.df[self.num_iters, self.n, tiles.span(i)] = df

    def make_and_seed(self, j):
        """Computes E of the first refresh group, and mu_L."""
        g = tiles.of_rows(self.smem.g, j)

        def step(i, products, dplan, dg):
            f = tiles.of_cols(self.smem.f, i)
            plan = tiles.kernel_of(products, g, f, self.problem.scale)
            self.kernel.put(j, i, plan)
            df = tiles.of_cols(self.smem.df, i)
            more = plan * (dplan - tiles.along_cols(df, plan))
            return dg + more.sum(axis=1)

        dg = self.over_dplan(self.keys, j, self.queries, step, tiles.zeros(TILE))
        self.smem.dg[j] = dg
        self.outputs.dg[self.num_iters - 1, self.n, tiles.span(j)] = dg

    def over_dplan(self, x, i, y, step, carry):
        """The last carry of `step(j, tile of the products, tile of dP, carry)`."""
        buffers = self.seed_buffers
        plgpu.commit_smem()  # All threads have read the last row block.
        buffers.load(*x.row_blocks(i))

        def multiply(j, stage, carry):
            pairs = zip(buffers.row_block, buffers.tile, strict=True)
            products, dplan = (
                tiles.product(left, right.at[stage]) for left, right in pairs
            )
            return step(j, products, dplan, carry)

        return buffers.over_tiles(y.num_tiles, y.tiles, multiply, carry)

    def scalings(self, step):
        """The scalings for iteration k = L - 1 - step."""
        k, inputs = jnp.int32(self.num_iters - 1) - step, self.inputs
        return [x.at[k, self.n] for x in (inputs.r, inputs.next_c, inputs.c)]

    def undo(self, step, stage, nothing):
        """Undoes column step k + 1 and row step k, for k = L - 1 - step."""
        warpgroups, cluster = self.warpgroups, self.cluster
        k = jnp.int32(self.num_iters - 1) - step
        self.refresh(k)
        cluster.for_each_owned(self.num_cols, lambda j: self.put_right(stage, j))
        warpgroups.barrier()
        if cluster.size > 1:
            warpgroups.for_each(
                self.num_rows, lambda i: self.put_partial_sums(stage, i)
            )
            cluster.barrier()
        warpgroups.for_each(self.num_rows, lambda i: self.undo_col_step(k, stage, i))
        warpgroups.barrier()

        @pl.when(k > 0)
        def _():
            cluster.for_each_owned(
                self.num_cols, lambda j: self.undo_row_step(k, stage, j)
            )

        warpgroups.barrier()
        return nothing

    def refresh(self, k):
        """Computes E of the refresh group that iteration k is the last of, if any."""
        # All groups but the first and the last are equally long.
        last, *others = refresh_groups(self.problem)
        if not others:
            return
        length = jnp.int32(others[0].last - others[0].first + 1)
        since = jnp.int32(last.first - 1) - k

        @pl.when((since >= 0) & (jax.lax.rem(since, length) == 0))
        def _():
            self.load_base(jax.lax.div(since, length) + jnp.int32(1))
            self.cluster.for_each_owned(self.num_cols, self.make)
            self.warpgroups.barrier()

    def make(self, j):
        """Computes E from the potentials."""
        key_block = self.load(self.keys, j)
        g = tiles.of_rows(self.smem.g, j)

        def step(i, products, nothing):
            f = tiles.of_cols(self.smem.f, i)
            self.kernel.put(j, i, tiles.kernel_of(products, g, f, self.problem.scale))
            return nothing

        self.over_products(key_block, self.queries, step, jnp.int32(0))

    def put_right(self, stage, j):
        """Computes c_{k+1} mu_{k+1} / b."""
        next_c = tiles.of_cols(self.smem.next_c, stage, j)
        self.smem.right[j] = next_c * tiles.of_cols(self.smem.dg, j)

    def put_partial_sums(self, stage, i):
        """Computes E c_{k+1} mu_{k+1} / b over the key blocks of this thread block."""
        # Double buffer: another thread block may still read the other half. This half
        # is free, because a barrier of the cluster has passed since it was read.
        sums = self.kernel.col_sums(i, self.smem.right)
        self.smem.partial_sums[stage, i] = sums

    def undo_col_step(self, k, stage, i):
        """Computes lambda_k."""
        smem, cluster = self.smem, self.cluster
        r = tiles.of_col_sums(smem.r, stage, i)
        if cluster.size > 1:
            parts = smem.partial_sums
            sums = cluster.sum_over_blocks(tiles.of_col_sums, parts, stage, i)
        else:
            sums = self.kernel.col_sums(i, smem.right)
        minus_df = r * sums
        smem.left[i] = r * minus_df

        @cluster.if_owner(i, self.num_rows)
        def _():
            self.outputs.df[k, self.n, tiles.span(i)] = -minus_df

    def undo_row_step(self, k, stage, j):
        """Computes mu_k."""
        c = tiles.of_rows(self.smem.c, stage, j)
        dg = c * self.kernel.row_sums(j, self.smem.left)
        self.smem.dg[j] = dg
        self.outputs.dg[k - jnp.int32(1), self.n, tiles.span(j)] = dg
