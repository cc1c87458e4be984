"""The forward pass of resident heads: all iterations in one launch.

The softmax and the first column step are (1) and (2) of docs/architecture.md, with
running maxima of the logits. Then E = exp(Z + f_base + g_base) is computed from the
current potentials, and from then on only multiplied, as in (10). With c = 1 at first,

    r = 1 / (E c)        f_k = f_base + log r          row step k
    c = b / (E^T r)      g_{k+1} = g_base + log c      column step k + 1

with sums in float32, outside the tensor cores, which would round r and c. E is computed
again after `Blocks.refresh_every` iterations, before what it has rounded to 0 could
matter (`refresh_groups`), so no overflow test and no fallback is needed. Each entry
costs two exponentials for the softmax and the first column step, and one for each time
that E is computed.

With `Blocks.kernel_dtype` bfloat16 the entries of E have relative errors up to 2^-8,
like those of the plan that multiplies the values. The row steps make the rows of the
rounded E exact, and the potentials are those of the rounded E.

`shared_memory.resident_forward_scratch` lists what lies in shared memory. A thread
block with W warpgroups has these barriers (`kernel.py` says why every wait ends):

| barrier | number | arrivals | who arrives | who waits |
|---|---|---|---|---|
| `vectors_barrier` | 1 | 3 | copies of f, g and b, once | all warpgroups |
| `row_block_barrier` | W | 1 | a copy that warpgroup w starts | warpgroup w |
| `tile_barrier` | W x stages | 1 | a copy that warpgroup w starts | warpgroup w |
| `warpgroups_barrier` | 1 | W | all warpgroups | all warpgroups |
| of the cluster | 1 | all threads | all threads | all threads of the cluster |
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..._pallas_common import reciprocal
from ..._problem import Problem
from .. import tiles
from ..blocks import TILE, Blocks
from ..heuristics import resident_forward_warpgroups
from ..launch import call_kernel, vector
from ..loops import for_each
from ..shared_memory import resident_forward_scratch
from ..types import ForwardResult, PaddedOperands, PotentialHistory
from .kernel import ResidentKernel


def forward(
    problem: Problem,
    blocks: Blocks,
    operands: PaddedOperands,
    col_marginal: Float[Array, "BN 1"],
) -> ForwardResult:
    """Output, potentials of all iterations and, if they are asked for, column sums."""
    query, key, value, rows, cols = operands
    heads, d, num_rows = len(rows), value.shape[2], blocks.num_row_tiles
    num_potentials = problem.options.num_iters + 1
    config = resident_forward_warpgroups(problem, blocks)

    def padding(valid):
        return jnp.where(valid, jnp.float32(0), -jnp.inf)

    col_sums = vector(heads, blocks.cols)
    results = call_kernel(
        lambda *refs: ForwardKernel(problem, blocks, config, num_rows, *refs).run(),
        "sinkhorn_attention_resident",
        heads,
        inputs=dict(
            queries=[query],  # [BN, T, H]
            keys=[key],  # [BK, S, H]
            queries_t=[jnp.swapaxes(query, 1, 2)],
            keys_t=[jnp.swapaxes(key, 1, 2)],
            value=value,  # [BK, S, D]
            f=tiles.in_tiles(padding(rows)),  # [BN, T / tile, tile]
            g=tiles.in_tiles(padding(cols)),  # [BN, S / tile, tile]
            col_marginal=tiles.in_tiles(jnp.where(cols, col_marginal, 0)),
        ),
        results=dict(
            out=vector(heads, blocks.rows, d),
            f=vector(num_potentials, heads, blocks.rows),
            g=vector(num_potentials, heads, blocks.cols),
            col_sums=col_sums if problem.return_marginal_error else None,
        ),
        scratch=resident_forward_scratch(problem, blocks, config),
        num_warpgroups=config.num_warpgroups,
        cluster=blocks.cluster,
    )
    history = PotentialHistory(results.f, results.g)
    return ForwardResult(results.out, history, results.col_sums)


class ForwardKernel(ResidentKernel):
    """The forward pass. Methods for i compute query block i, for j key tile j."""

    def run(self) -> None:
        """All iterations, and the output."""
        inputs, smem, cluster = self.inputs, self.smem, self.cluster
        self.warpgroups.load(
            smem.vectors_barrier,
            [
                (inputs.f.at[self.n], smem.f),  # 0, and -inf for padding.
                (inputs.g.at[self.n], smem.g),
                (inputs.col_marginal.at[self.n], smem.col_marginal),
            ],
        )
        cluster.for_each_owned(self.num_rows, self.softmax)
        cluster.gather(smem.f)
        cluster.for_each_owned(self.num_cols, self.first_col_step)
        cluster.gather(smem.g)
        for_each(self.num_iters, self.iterate)
        cluster.for_each_owned(self.num_rows, self.apply)
        cluster.leave()

    def softmax(self, i):
        """Computes f_0."""
        # Read first: four threads share a row, and a barrier in `log_sums` separates
        # this read of f from the write in `put_f`.
        valid = tiles.of_rows(self.smem.f, i) == 0
        log_sums = self.log_sums(self.queries, i, self.keys, self.smem.g)
        self.put_f(0, i, -log_sums, valid)

    def first_col_step(self, j):
        """Computes g_1. With keys as rows, no sum crosses warps."""
        self.outputs.g[0, self.n, tiles.span(j)] = tiles.of_rows(self.smem.g, j)
        col_marginal = tiles.of_rows(self.smem.col_marginal, j)
        valid = col_marginal > 0
        log_marginal = jnp.log(jnp.where(valid, col_marginal, 1.0))
        log_sums = self.log_sums(self.keys, j, self.queries, self.smem.f)
        self.put_g(1, j, log_marginal - log_sums, valid)

    def log_sums(self, x, i, y, other):
        """Logarithms of the row sums of exp(Z + other) in row block i of x."""

        def step(j, products, carry):
            g = tiles.of_cols(other, j)
            return tiles.log_sum(carry, products, g, self.problem.scale)

        carry = tiles.zeros(TILE) + jnp.finfo(jnp.float32).min, tiles.zeros(TILE)
        return tiles.total_log(*self.over_products(self.load(x, i), y, step, carry))

    def iterate(self, k):
        """Row step k + 1 and column step k + 2, for k = 0, ..., L - 1.

        Instead of column step L + 1, the last iteration sums the columns of the plan.
        """
        warpgroups, cluster = self.warpgroups, self.cluster

        @pl.when(jax.lax.rem(k, jnp.int32(self.blocks.refresh_every)) == 0)
        def _():
            cluster.for_each_owned(self.num_rows, self.make)
            warpgroups.for_each(self.num_cols, self.rebase)
            warpgroups.barrier()

        def col_steps():
            num_cols = self.num_cols
            if cluster.size > 1:
                warpgroups.for_each(num_cols, lambda j: self.put_partial_sums(k, j))
                cluster.barrier()
            warpgroups.for_each(num_cols, lambda j: self.col_step(k, j))

        cluster.for_each_owned(self.num_rows, lambda i: self.row_step(k, i))
        warpgroups.barrier()
        if self.problem.return_marginal_error:
            col_steps()
        else:
            pl.when(k + jnp.int32(1) < self.num_iters)(col_steps)
        warpgroups.barrier()

    def make(self, i):
        """Computes E from the potentials."""
        f = tiles.of_rows(self.smem.f, i)
        self.smem.base_f[i] = f

        def step(j, products, nothing):
            g = tiles.of_cols(self.smem.g, j)
            self.kernel.put(i, j, tiles.kernel_of(products, f, g, self.problem.scale))
            return nothing

        self.over_products(self.load(self.queries, i), self.keys, step, jnp.int32(0))

    def rebase(self, j):
        """Starts again from c = 1."""
        self.smem.base_g[j] = tiles.of_rows(self.smem.g, j)
        self.smem.c[j] = tiles.zeros(TILE) + 1

    def row_step(self, k, i):
        """Computes r and f_{k+1}."""
        sums = self.kernel.row_sums(i, self.smem.c)
        self.smem.r[i] = reciprocal(sums)
        valid = sums != 0
        f = tiles.of_rows(self.smem.base_f, i) - jnp.log(jnp.where(valid, sums, 1.0))
        self.put_f(k + jnp.int32(1), i, f, valid)

    def put_partial_sums(self, k, j):
        """Computes E^T r over the row blocks of this thread block."""
        sums_ref = self.smem.partial_col_sums
        sums_ref[buffer_of(k), j] = self.kernel.col_sums(j, self.smem.r)

    def col_step(self, k, j):
        """Computes c and g_{k+2}, or at the end c (E^T r)."""
        smem, cluster = self.smem, self.cluster
        if cluster.size > 1:
            parts = smem.partial_col_sums
            sums = cluster.sum_over_blocks(tiles.of_col_sums, parts, buffer_of(k), j)
        else:
            sums = self.kernel.col_sums(j, smem.r)

        @pl.when(k + jnp.int32(1) < self.num_iters)
        def _():
            c = tiles.of_col_sums(smem.col_marginal, j) * reciprocal(sums)
            smem.c[j] = c
            valid = sums != 0
            g = tiles.of_col_sums(smem.base_g, j) + jnp.log(jnp.where(valid, c, 1.0))
            self.put_g(k + jnp.int32(2), j, g, valid)

        if self.problem.return_marginal_error:

            @pl.when(k + jnp.int32(1) == self.num_iters)
            def _():
                total = sums * tiles.of_col_sums(smem.c, j)

                @cluster.if_owner(j, self.num_cols)
                def _():
                    self.outputs.col_sums[self.n, tiles.span(j)] = total

    def put_f(self, k, i, f, valid):
        """Stores f_k of a query block that this thread block owns."""
        f = jnp.where(valid, f, -jnp.inf)
        self.smem.f[i] = f
        self.outputs.f[k, self.n, tiles.span(i)] = f

    def put_g(self, k, j, g, valid):
        """Stores g_k of a tile."""
        g = jnp.where(valid, g, -jnp.inf)
        self.smem.g[j] = g

        @self.cluster.if_owner(j, self.num_cols)
        def _():
            self.outputs.g[k, self.n, tiles.span(j)] = g

    def apply(self, i):
        """Computes diag(r) E diag(c) V."""
        value, value_tile = self.inputs.value, self.smem.value_tile
        value_tile = self.smem.tiles[0] if value_tile is None else value_tile
        r = tiles.of_rows(self.smem.r, i)

        def accumulate(acc_ref):
            def step(j, stage, nothing):
                kernel = self.kernel.at(i, j)
                c = tiles.along_cols(tiles.of_cols(self.smem.c, j), kernel)
                # Exact rows before it is rounded keep float16 in range.
                plan = kernel * tiles.along_rows(r, kernel) * c
                tiles.add_product(acc_ref, plan, value_tile.at[stage])
                return nothing

            self.buffers._replace(tile=[value_tile]).over_tiles(
                self.num_cols,
                lambda j: [value.at[self.keys.head, tiles.span(j)]],
                step,
                jnp.int32(0),
            )
            return acc_ref[...]

        accumulator = plgpu.WGMMAAccumulatorRef((TILE, value.shape[2]), jnp.float32)
        self.outputs.out[self.n, tiles.span(i)] = pl.run_scoped(accumulate, accumulator)


def buffer_of(k):
    """Index of the partial column sums of iteration k.

    Double buffer: another thread block may still read the sums of iteration k - 1.
    Those of k - 2 are free: a barrier of the cluster has passed.
    """
    return jax.lax.rem(k, jnp.int32(2))
