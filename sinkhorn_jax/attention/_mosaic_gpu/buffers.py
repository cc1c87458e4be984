"""Buffers in shared memory for a row block and for tiles, which arrive in stages."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from .loops import Carry, always, fold, load, start
from .types import Ref


class Buffers(NamedTuple):
    """The targets of a warpgroup's copies, and the barriers at which it waits for them.

    Unless `over_tiles` has an `issuer`, the warpgroup itself starts every copy that it
    waits for, so it never waits for another warpgroup.

    Attributes:
        row_block: Targets for a row block.
        tile: Targets for a tile, with a leading axis of stages.
        row_block_barrier: A barrier with an arrival for each target of a row block.
        tile_barrier: For each stage a barrier with an arrival for each target.
        num_stages: Stages of this warpgroup: 2 to copy the next tile while one is in
            use, or 1.
        first_stage: The first of them, where warpgroups share an axis of stages.
    """

    row_block: Sequence[Ref]
    tile: Sequence[Ref]
    row_block_barrier: Ref
    tile_barrier: Ref
    num_stages: int = 2
    first_stage: Int[Array, ""] | int = 0

    def load(self, *sources: Ref) -> None:
        """Copies a row block, and waits."""
        load(self.row_block_barrier, list(zip(sources, self.row_block, strict=True)))

    def over_tiles(
        self,
        num_tiles: int | Int[Array, ""],
        sources: Callable[[Int[Array, ""]], Sequence[Ref]],
        body: Callable[[Int[Array, ""], Int[Array, ""], Carry], Carry],
        carry: Carry,
        *,
        issuer: Callable[[Callable[[], None]], None] = always,
    ) -> Carry:
        """The last carry of `body(j, stage, carry)` for each tile j, copied to `stage`.

        `sources(j)` are what to copy. `num_tiles` is at least one if it is static.
        `body` must not leave a matrix product of the tile unfinished. Where several
        warpgroups share the tiles, `issuer` calls its argument in the thread that
        issues the copies, and `body` must end with a barrier of these warpgroups.
        """

        def stage_of(j):
            return self.first_stage + jax.lax.rem(j, jnp.int32(self.num_stages))

        def fetch(j):
            stage = stage_of(j)

            def start_copies():
                # The threads have read the last tile in this stage.
                plgpu.commit_smem()
                targets = [target.at[stage] for target in self.tile]
                copies = list(zip(sources(j), targets, strict=True))
                start(self.tile_barrier.at[stage], copies)

            issuer(start_copies)

        def step(j, carry):
            stage = stage_of(j)
            if self.num_stages == 1:
                fetch(j)
            else:
                pl.when(j + jnp.int32(1) < num_tiles)(lambda: fetch(j + jnp.int32(1)))
            plgpu.barrier_wait(self.tile_barrier.at[stage])
            return body(j, stage, carry)

        if self.num_stages > 1:
            if_any = always if isinstance(num_tiles, int) else pl.when(num_tiles > 0)
            if_any(lambda: fetch(jnp.int32(0)))
        return fold(num_tiles, step, carry)


def buffer_types(
    row_block: Sequence[Any], tile: Sequence[Any], num_stages: int = 2
) -> tuple[Any, ...]:
    """Types of the first four fields of `Buffers`, for the scratch of a kernel."""
    return (
        row_block,
        tile,
        plgpu.Barrier(num_arrivals=len(row_block)),
        plgpu.Barrier(num_arrivals=len(tile), num_barriers=num_stages),
    )
