"""What the kernels of the iterations of a resident head share.

A head belongs to a thread block, or to a cluster of them. Each thread block keeps all
vectors of the head in shared memory, and of the kernel matrix E the row blocks that it
owns. Its warpgroups share the row blocks for row sums, and the tiles for column sums.
Row blocks of E are query blocks in the forward pass, and key blocks in the reverse
sweep. The left factor of other products is loaded as a row block too: keys, in the
first column step.

**Barriers.** Every wait ends:

* A copy, once started, arrives at its barrier by itself. The warpgroup that starts it
  does so before it waits there. Where other warpgroups wait for it too, consider the
  earliest wait that would not end: the waits before the start of its copy end, so the
  copy is started, and that wait ends as well.
* `warpgroups_barrier` needs each warpgroup, and the barrier of the cluster each thread.
  All reach them equally often and in the same order, also in a thread block that owns
  nothing: they stand outside the loops that divide row blocks or tiles, under
  conditions on the iteration alone.
* No warpgroup misses a phase of a barrier: the next phase needs an arrival, or a copy,
  that follows the wait of every warpgroup.
* Barriers inside one warpgroup (`commit_smem`, reductions) are under conditions that
  all its threads share.
* The hardware runs the thread blocks of a cluster at the same time. `Cluster.leave`
  keeps each until no other one reads its shared memory. Clusters do not wait for each
  other.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from ..._problem import Problem
from ..blocks import TILE, Blocks, WarpgroupConfig
from ..buffers import Buffers
from ..cluster import cluster_of
from ..smem_matrix import SmemMatrix
from ..tiles import key_head_of, left_operand, product, span
from ..types import Ref


class Side(NamedTuple):
    """The queries or the keys of a head, in global memory.

    Attributes:
        xs: A factor of the logits [heads, length, dim], and one of dP if it is needed:
            queries and dO, or keys and values.
        xs_t: Their transposes [heads, dim, length].
        head: Index of the head.
    """

    xs: Sequence[Ref]
    xs_t: Sequence[Ref]
    head: Int[Array, ""]

    @property
    def num_tiles(self) -> int:
        """Number of tiles, and of row blocks."""
        return self.xs[0].shape[1] // TILE

    def row_blocks(self, i: Int[Array, ""]) -> list[Ref]:
        """Row block i [tile, dim] of each factor: the left side of a product."""
        return [x.at[self.head, span(i)] for x in self.xs]

    def tiles(self, j: Int[Array, ""]) -> list[Ref]:
        """Tile j [dim, tile] of each factor: the right side of a product."""
        return [x_t.at[self.head, :, span(j)] for x_t in self.xs_t]


class ResidentKernel:
    """A kernel as one of its warpgroups runs it, for head n.

    `num_row_blocks` is the number of row blocks of E. `launch.call_kernel` gives the
    references to `inputs`, `outputs` and `smem`.
    """

    def __init__(
        self,
        problem: Problem,
        blocks: Blocks,
        config: WarpgroupConfig,
        num_row_blocks: int,
        inputs: SimpleNamespace,
        outputs: SimpleNamespace,
        smem: SimpleNamespace,
    ):
        self.problem, self.blocks = problem, blocks
        self.inputs, self.outputs, self.smem = inputs, outputs, smem
        self.num_rows, self.num_cols = blocks.num_row_tiles, blocks.num_col_tiles
        self.num_iters = problem.options.num_iters
        self.n = jax.lax.axis_index("program")
        groups = inputs.queries[0].shape[0] // inputs.keys[0].shape[0]
        self.queries = Side(inputs.queries, inputs.queries_t, self.n)
        self.keys = Side(inputs.keys, inputs.keys_t, key_head_of(self.n, groups))
        self.cluster = cluster_of(
            config.num_warpgroups, smem.warpgroups_barrier, blocks.cluster
        )
        self.warpgroups = self.cluster.warpgroups
        self.kernel = SmemMatrix(smem.kernel, *self.cluster.owned(num_row_blocks))
        rank = self.warpgroups.rank
        self.buffers = Buffers(
            [smem.row_blocks[0].at[rank]],
            [smem.tiles[0]],
            smem.row_block_barrier.at[rank],
            smem.tile_barrier,
            config.num_stages,
            rank * jnp.int32(config.num_stages),
        )

    def load(self, x, i):
        """Row block i of the queries or keys x, in registers."""
        plgpu.commit_smem()  # All threads have read the last row block.
        self.buffers.load(*x.row_blocks(i)[:1])
        return left_operand(self.buffers.row_block[0])

    def over_products(self, row_block, y, step, carry):
        """The last carry of `step(j, row_block times tile j of y, carry)`."""

        def multiply(j, stage, carry):
            products = product(row_block, self.buffers.tile[0].at[stage])
            return step(j, products, carry)

        def sources(j):
            return y.tiles(j)[:1]

        return self.buffers.over_tiles(y.num_tiles, sources, multiply, carry)
