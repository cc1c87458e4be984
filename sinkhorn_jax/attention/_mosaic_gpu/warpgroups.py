"""The warpgroups of one thread block, which share its row blocks and its vectors."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from .loops import for_each, start
from .types import Ref


class Warpgroups(NamedTuple):
    """The `count` warpgroups of a thread block, as the one with index `rank` sees them.

    `barrier_ref` has `count` arrivals, and may be None if there is one warpgroup.
    """

    count: int
    rank: Int[Array, ""]
    barrier_ref: Ref

    def barrier(self) -> None:
        """Waits for all warpgroups.

        Their writes to shared memory become visible, also to copies and tensor cores.
        """
        plgpu.commit_smem()
        if self.count > 1:
            plgpu.barrier_arrive(self.barrier_ref)
            plgpu.barrier_wait(self.barrier_ref)

    def for_each(self, count: int, do: Callable[[Int[Array, ""]], None]) -> None:
        """Calls `do(i)` for each i below `count`, in warpgroup i mod `self.count`."""

        def step(turn):
            i = turn * jnp.int32(self.count) + self.rank
            if count % self.count:
                pl.when(i < count)(lambda: do(i))
            else:
                do(i)

        for_each(-(-count // self.count), step)

    def in_first(self, do: Callable[[], None]) -> None:
        """Calls `do()` in the first warpgroup only."""
        if self.count > 1:
            pl.when(self.rank == 0)(do)
        else:
            do()

    def load(self, barrier_ref: Ref, copies: Sequence[tuple[Ref, Ref]]) -> None:
        """Copies to shared memory once; all warpgroups wait for the copies."""
        self.in_first(lambda: start(barrier_ref, copies))
        plgpu.barrier_wait(barrier_ref)
