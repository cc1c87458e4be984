"""How the TPU kernels cut a head: strips of rows, and what VMEM they take."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Final, Literal

from jax.experimental.pallas import tpu as pltpu

from .._problem import Problem

LANES: Final = 128
# Of a float32 tile. One of a 16-bit dtype is twice as high and may be half full.
SUBLANES: Final = 8

# Bytes of a core. That of a v4, the least of the generations from v4 to v6e: JAX's
# pltpu.get_tpu_info_for_chip has 16 MiB for it, 64 for v5p, 128 for v5e and v6e.
SMALLEST_VMEM: Final = 2**24
# A strip of logits, in float32, and what is made of it pass through the registers; the
# compiler spills the more of them to VMEM the larger they are.
STRIP_BYTES: Final = 2**18
MIN_STRIP_ROWS: Final = 32  # Where VMEM has room; fewer leave a matrix unit waiting.
# Spills as arrays as large as a strip, and bytes for each key beside those. Fitted to
# what the compiler took, which benchmarks/results/compiled keeps.
SPILLED_STRIPS: Final = {"forward": 4, "backward": 6}
SPILLED_BYTES: Final = {"forward": 64, "backward": 192}
# Of the spills, what a kernel that nearly fills VMEM was never compiled without.
CERTAIN_SPILLS: Final = {"forward": 0.0, "backward": 0.75}

Direction = Literal["forward", "backward"]


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

    @property
    def moves_strips(self) -> bool:
        """Whether each pass fetches the rows of its operands anew."""
        return not self.is_resident and self.num_strips > 1


def default_blocks(
    problem: Problem,
    direction: Direction,
    regime: Literal["resident", "strip"] | None = None,
) -> Blocks:
    """Strips of even length that VMEM holds beside keys and values.

    Args:
        problem: Gives the lengths.
        direction: Of which kernel. Both pad the keys alike, and nothing else of the
            blocks has to agree.
        regime: None keeps the kernel matrix where it fits.

    Returns:
        The largest strips that fit, up to what `STRIP_BYTES` says. If none do, the
        smallest: see `check_fits`.
    """
    vmem = vmem_capacity()
    regimes = ("resident", "strip") if regime is None else (regime,)
    choices = [x for name in regimes for x in _choices(problem, name == "resident")]
    fitting = (x for x in choices if vmem_bytes(problem, x, direction) <= vmem)
    return next(fitting, choices[-1])


def _choices(problem: Problem, is_resident: bool) -> Iterator[Blocks]:
    """From the largest strips down to a single tile."""
    cols = round_up(problem.s, LANES)
    # More than LANES rows would be more than a row of the correction's left factor.
    most = min(LANES, max(MIN_STRIP_ROWS, STRIP_BYTES // (4 * cols)))
    while True:
        num_strips = math.ceil(problem.t / most)
        # Evenly cut, so that the last strip is not mostly padding.
        rows = round_up(math.ceil(problem.t / num_strips), SUBLANES)
        yield Blocks(
            rows=rows,
            num_strips=math.ceil(problem.t / rows),
            cols=cols,
            is_resident=is_resident,
        )
        if rows == SUBLANES:
            return
        most = max(SUBLANES, rows // 2)


def check_fits(problem: Problem, blocks: Blocks, direction: Direction) -> None:
    """Refuse what a TPU that is known has too little VMEM for.

    That is where a kernel needs more at least. Where it may need more, at most, the
    compiler decides; and where no TPU is known, nothing is refused.

    Raises:
        NotImplementedError: It has too little.
    """
    if direction == "forward" and problem.batch * problem.num_heads == 1:
        return  # Of a single head nothing is there twice.
    spare = (1 - CERTAIN_SPILLS[direction]) * _spills(blocks, direction)
    least = vmem_bytes(problem, blocks, direction) - spare
    if not pltpu.is_tpu_device() or least <= vmem_capacity():
        return
    raise NotImplementedError(
        "implementation='mosaic_tpu' cannot run here: its "
        f"{direction} kernel holds all keys and values of a head in VMEM, of which "
        f"this TPU has {vmem_capacity() / 2**20:.0f} MiB, and needs at least "
        f"{least / 2**20:.1f} MiB for {problem.s} keys of dimension "
        f"{problem.head_dim} and values of dimension {problem.value_dim} in "
        f"{problem.dtype} with num_iters={problem.options.num_iters}. Make one of "
        "these smaller, or use implementation='streaming'."
    )


def vmem_capacity() -> int:
    """Bytes of a core of the TPU that is traced for.

    That is the device of `jax.sharding.use_abstract_mesh`, which ahead-of-time
    compilation for a TPU that is not there can set, or else JAX's default device. If it
    is no TPU, the smallest of all generations, so that a program fits each.
    """
    if not pltpu.is_tpu_device():
        return SMALLEST_VMEM
    return pltpu.get_tpu_info().vmem_capacity_bytes


def vmem_bytes(problem: Problem, blocks: Blocks, direction: Direction) -> int:
    """What a kernel needs of VMEM at most, but for some 100 kB of a small one.

    A last axis is padded to whole `LANES` and the one before it to whole tiles.
    """
    num_iters, h, d = problem.options.num_iters, problem.head_dim, problem.value_dim
    rank, cols, itemsize = (
        correction_rank(num_iters),
        blocks.cols,
        problem.dtype.itemsize,
    )
    held = blocks.padded_rows if blocks.is_resident else blocks.rows
    tile = 4 * SUBLANES // itemsize  # Rows of it.
    keys_and_values = itemsize * cols * (round_up(h, tile) + round_up(d, tile))
    h_lanes, d_lanes = round_up(h, LANES), round_up(d, LANES)
    rows = itemsize * round_up(held, tile) * (h_lanes + d_lanes)
    history = 2 * 4 * cols * round_up(num_iters, SUBLANES)
    strip = 4 * blocks.rows * cols
    vectors = 2 * 4 * SUBLANES * cols
    once = 4 * held * cols + vectors
    once += _spills(blocks, direction)
    # Operands and results are there twice, one in use and one on its way, but for those
    # that the backward kernel keeps once.
    if direction == "forward":
        return once + 2 * (rows + keys_and_values + history)
    once += keys_and_values + history + strip
    once += 4 * cols * (round_up(h, SUBLANES) + round_up(d, SUBLANES) + rank)
    if rank:
        once += (
            4 * rank * LANES * math.ceil(blocks.num_strips / strips_in_lanes(blocks))
        )
    return once + 2 * (rows + 4 * held * h_lanes)


def _spills(blocks: Blocks, direction: Direction) -> int:
    strip = 4 * blocks.rows * blocks.cols
    return SPILLED_STRIPS[direction] * strip + SPILLED_BYTES[direction] * blocks.cols


def vmem_limit(problem: Problem, blocks: Blocks, direction: Direction) -> int:
    """What the compiler may take: the estimate, with a quarter and 1 MiB to spare.

    A limit above what a generation has is cut down to that.
    """
    return vmem_bytes(problem, blocks, direction) * 5 // 4 + 2**20


def correction_rank(num_iters: int) -> int:
    """Of the correction that the backward kernel keeps the factors of, padded."""
    return round_up(2 * max(0, num_iters - 1), SUBLANES)


def strips_in_lanes(blocks: Blocks) -> int:
    """Strips whose rows go side by side into one row of lanes."""
    return LANES // blocks.rows


def round_up(x: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-x // multiple) * multiple
