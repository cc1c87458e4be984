"""How the TPU kernels go through the passes over a head: the grid, and the loops in it.

With a resident kernel matrix the grid is the heads, and a kernel loops over passes and
query blocks. Otherwise both are axes of the grid, which a TPU core runs in order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._problem import Problem
from .blocks import Blocks, Direction, vmem_limit


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of a kernel, and how it visits operands and results."""

    blocks: Blocks
    num_heads: int  # Of all batch elements.
    num_passes: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """(heads,) with a resident kernel matrix, or (heads, passes, query blocks)."""
        if self.blocks.is_resident:
            return (self.num_heads,)
        return self.num_heads, self.num_passes, self.blocks.num_blocks

    def head_spec(
        self, *shape: int, groups: int = 1, buffers: int | None = None
    ) -> pl.BlockSpec:
        """An array [.., *shape] with one part for each `groups` heads."""
        mode = None if buffers is None else pl.Buffered(buffers)
        # Not `//`: it lowers to a sign, for which Pallas asks which TPU there is.
        part = lambda n, *_: (jax.lax.div(n, jnp.int32(groups)), 0, 0)
        return pl.BlockSpec((1, *shape), part, pipeline_mode=mode)

    def rows_spec(self, width: int, is_result: bool = False) -> pl.BlockSpec:
        """An array [BN, T, width], in query blocks if the kernel matrix is streamed.

        Only the last pass writes a result: its blocks must not be visited again.
        """
        rows, last = self.blocks.held_rows, self.num_passes - 1
        if self.blocks.is_resident:
            return self.head_spec(rows, width)
        if is_result:
            part = lambda n, k, i: (n, jnp.where(k == last, i, 0), 0)
        else:
            part = lambda n, k, i: (n, i, 0)
        return pl.BlockSpec((1, rows, width), part)

    def compiler_params(self, problem: Problem, direction: Direction) -> Any:
        """Order of the grid, and the VMEM limit."""
        # Heads are independent; passes and query blocks hand their sums on.
        order = ("parallel", "arbitrary", "arbitrary")
        return pltpu.CompilerParams(
            dimension_semantics=order[: len(self.sizes)],
            vmem_limit_bytes=vmem_limit(problem, self.blocks, direction),
        )


class Phase(NamedTuple):
    """Consecutive passes that do the same."""

    start: int
    stop: int
    each: Callable[[Any, Any], None]  # Called with each query block and the pass.
    end: Callable[[Any], None]  # Called with the pass after its last query block.


def run(blocks: Blocks, *phases: Phase) -> None:
    """Runs all phases in a kernel: by loops, or this step of the grid."""
    phases = tuple(x for x in phases if x.start < x.stop)
    if not blocks.is_resident:
        k, i = pl.program_id(1), pl.program_id(2)
        for start, stop, each, end in phases:
            is_now = (k >= start) & (k < stop)
            pl.when(is_now)(functools.partial(each, i, k))
            is_end = is_now & (i == blocks.num_blocks - 1)
            pl.when(is_end)(functools.partial(end, k))
        return
    # With x64 Python's integers would become 64-bit counters, which a TPU lacks.
    zero = jnp.int32(0)
    for phase in phases:

        def one_pass(k, carry, phase=phase):
            def one_block(i, carry):
                phase.each(i, k)
                return carry

            jax.lax.fori_loop(zero, jnp.int32(blocks.num_blocks), one_block, carry)
            phase.end(k)
            return carry

        start, stop = jnp.int32(phase.start), jnp.int32(phase.stop)
        jax.lax.fori_loop(start, stop, one_pass, zero)
