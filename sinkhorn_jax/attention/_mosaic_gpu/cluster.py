"""A cluster of thread blocks that share a head, or one query block of a head.

Each thread block owns consecutive row blocks of E and keeps a copy of all vectors. Of
each vector it computes the entries of its own row blocks, and copies the other entries
from the shared memory of their owners. Column sums are added over all thread blocks in
one order, so that each thread block has the same bits.

With a single thread block everything here is trivial: it owns all row blocks, the
barrier is that of its warpgroups, and there is nothing to gather.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from .blocks import per_thread_block
from .loops import always
from .tiles import of_col_sums
from .types import Ref
from .warpgroups import Warpgroups


class Cluster(NamedTuple):
    """The `size` thread blocks of a cluster, as the one with index `rank` sees them."""

    size: int
    rank: Int[Array, ""]
    warpgroups: Warpgroups

    def owned(self, count: int) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
        """First row block (or tile) that this thread block owns, and how many it owns.

        `count` is the number in the whole head. Both are static without a cluster.
        """
        if self.size == 1:
            return 0, count
        most = per_thread_block(count, self.size)
        first = self.rank * jnp.int32(most)
        if count % self.size == 0:
            return first, most
        here = jax.lax.min(jnp.int32(count) - first, jnp.int32(most))
        return first, jax.lax.max(here, jnp.int32(0))

    def for_each_owned(self, count: int, do: Callable[[Int[Array, ""]], None]) -> None:
        """Calls `do(i)` for each owned row block i, shared among the warpgroups."""
        first, here = self.owned(count)
        if isinstance(here, int):
            self.warpgroups.for_each(here, lambda i: do(i + first))
        else:
            most = per_thread_block(count, self.size)
            self.warpgroups.for_each(
                most, lambda i: pl.when(i < here)(lambda: do(i + first))
            )

    def if_owner(
        self, i: Int[Array, ""], count: int
    ) -> Callable[[Callable[[], None]], None]:
        """Returns `pl.when(condition)`: this thread block owns row block `i`."""
        if self.size == 1:
            return always
        return pl.when(self._owner(i, count) == self.rank)

    def in_first(self, do: Callable[[], None]) -> None:
        """Calls `do()` in the first thread block only."""
        if self.size > 1:
            pl.when(self.rank == 0)(do)
        else:
            do()

    def barrier(self) -> None:
        """Waits for all warpgroups of all thread blocks.

        Their earlier writes to shared memory become visible to each other.
        """
        if self.size > 1:
            plgpu.commit_smem()
            barrier_of_cluster()
        else:
            self.warpgroups.barrier()

    def gather(self, ref: Ref) -> None:
        """Fills a vector, of which each thread block has computed what it owns."""
        self.barrier()
        if self.size == 1:
            return
        count = ref.shape[0]

        def fetch(i):
            owner = self._owner(i, count)

            @pl.when(owner != self.rank)
            def _():
                ref[i] = of_col_sums(plgpu.cluster_ref(ref, {"block": owner}), i)

        self.warpgroups.for_each(count, fetch)
        self.warpgroups.barrier()

    def sum_over_blocks(
        self, read: Callable[..., Float[Array, " J"]], ref: Ref, *index: Any
    ) -> Float[Array, " J"]:
        """The sum of `read(ref, *index)` over all thread blocks, after a barrier."""
        parts = [
            read(plgpu.cluster_ref(ref, {"block": jnp.int32(block)}), *index)
            for block in range(self.size)
        ]
        return functools.reduce(jnp.add, parts)

    def leave(self) -> None:
        """Waits until no other thread block reads the shared memory of this one."""
        if self.size > 1:
            self.barrier()

    def _owner(self, i, count):
        return jax.lax.div(i, jnp.int32(per_thread_block(count, self.size)))


def cluster_of(num_warpgroups: int, barrier_ref: Ref, size: int) -> Cluster:
    """The cluster of `size` thread blocks that the calling kernel runs in."""
    rank = jax.lax.axis_index("warpgroup") if num_warpgroups > 1 else jnp.int32(0)
    block = jax.lax.axis_index("block") if size > 1 else jnp.int32(0)
    return Cluster(size, block, Warpgroups(num_warpgroups, rank, barrier_ref))


@plgpu.inline_mgpu()
def barrier_of_cluster(*_: Any) -> None:
    """Waits for all threads of the cluster; their writes become visible.

    The barriers of Pallas promise only that the thread blocks have arrived.
    """
    # jaxlib has no public Python interface to this instruction. The arrival has release
    # semantics and the wait acquire semantics by default.
    from jaxlib.mlir.dialects import nvvm

    nvvm.cluster_arrive()
    nvvm.cluster_wait()
