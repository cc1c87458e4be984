"""How the TPU kernels cut a head: strips of rows, and what VMEM they take."""

import dataclasses
import math
from typing import Final, Literal

from ._problem import Problem

LANES: Final = 128
# Of a 16-bit dtype; a tile of float32 is half as high, and lengths fit both.
SUBLANES: Final = 16

# Bytes. That of a v4, the smallest of the generations from v4 to v6e.
SMALLEST_VMEM: Final = 2**24
# A strip of logits, in float32, and what is made of it pass through the registers; the
# compiler spills the more of them to VMEM the larger they are.
STRIP_BYTES: Final = 2**18
STRIPS_AT_ONCE: Final = 12  # Arrays as large as a strip, spills among them, at most.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Lengths in a kernel. They change speed, never results beyond rounding.

    Attributes:
        rows: Queries in a strip.
        num_strips: Strips that cover all queries; the last may reach past them.
        cols: Keys, padded.
        is_resident: Whether the kernel matrix of a head stays in VMEM between the
            passes. Otherwise each pass makes it anew, strip by strip.
    """

    rows: int
    num_strips: int
    cols: int
    is_resident: bool

    def __post_init__(self):
        for name, tile in (("rows", SUBLANES), ("cols", LANES)):
            if (size := getattr(self, name)) % tile or size <= 0:
                raise ValueError(
                    f"Blocks.{name} must be a positive multiple of {tile}, got {size}: "
                    "a TPU register tile has that many."
                )

    @property
    def padded_rows(self) -> int:
        """Queries, padded."""
        return self.rows * self.num_strips


def default_blocks(
    problem: Problem, regime: Literal["resident", "strip"] | None = None
) -> Blocks:
    """Strips of even length that the smallest VMEM holds beside keys and values.

    Args:
        problem: Gives the lengths.
        regime: None keeps the kernel matrix where it fits the smallest VMEM too.
    """
    cols = round_up(problem.s, LANES)
    most = max(SUBLANES, STRIP_BYTES // (4 * cols) // SUBLANES * SUBLANES)
    num_strips = math.ceil(problem.t / most)
    # Evenly cut, so that the last strip is not mostly padding.
    rows = round_up(math.ceil(problem.t / num_strips), SUBLANES)
    num_strips = math.ceil(problem.t / rows)

    def blocks(is_resident):
        return Blocks(
            rows=rows, num_strips=num_strips, cols=cols, is_resident=is_resident
        )

    if regime is None:
        fits = vmem_bytes(problem, blocks(True), "backward") <= SMALLEST_VMEM
        regime = "resident" if fits else "strip"
    return blocks(regime == "resident")


def vmem_bytes(
    problem: Problem, blocks: Blocks, direction: Literal["forward", "backward"]
) -> int:
    """The most that a kernel needs of VMEM."""
    num_iters, h, d = problem.options.num_iters, problem.head_dim, problem.value_dim
    h, d = round_up(h, LANES), round_up(d, LANES)
    strip = 4 * blocks.rows * blocks.cols
    held = blocks.padded_rows if blocks.is_resident else blocks.rows
    # Operands and results are there twice: one in use, one on its way.
    twice = problem.dtype.itemsize * held * (h + d)
    twice += 8 * round_up(num_iters, 8) * blocks.cols
    once = 4 * held * blocks.cols + STRIPS_AT_ONCE * strip + 128 * blocks.cols
    keys_and_values = problem.dtype.itemsize * blocks.cols * (h + d)
    if direction == "forward":
        twice += keys_and_values
    else:
        rank = correction_rank(num_iters)
        twice += 4 * held * h
        once += keys_and_values + 4 * blocks.cols * (h + d) + strip
        once += 4 * blocks.padded_rows * round_up(rank, LANES) * (rank > 0)
        once += 4 * rank * blocks.cols
    return 2 * twice + once


def correction_rank(num_iters: int) -> int:
    """Of the correction that the backward kernel keeps the factors of, padded."""
    return round_up(2 * max(0, num_iters - 1), SUBLANES)


def round_up(x: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-x // multiple) * multiple
