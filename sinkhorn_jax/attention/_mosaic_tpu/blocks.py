"""The query blocks of the TPU kernels, and the VMEM that the kernels need."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Final, Literal

from jax.experimental.pallas import tpu as pltpu

from .._problem import Problem

LANES: Final = 128
# Rows of a float32 tile. A tile of a 16-bit dtype has twice as many, and may be half
# full.
SUBLANES: Final = 8

# Bytes of VMEM per core of a v4, the least of the generations from v4 to v6e: JAX's
# pltpu.get_tpu_info_for_chip has 16 MiB for it, 64 for v5p, 128 for v5e and v6e.
SMALLEST_VMEM: Final = 2**24
# The float32 logits of a query block, and the arrays computed from them, pass through
# the registers; the larger they are, the more of them the compiler spills to VMEM.
QUERY_BLOCK_BYTES: Final = 2**18
MIN_ROWS: Final = 32  # Where VMEM has room; fewer leave a matrix unit waiting.
# Spills: arrays of the size of a query block's logits, and bytes for each key. Fitted
# to the compiler's numbers in benchmarks/results/compiled.
SPILLED_BLOCKS: Final = {"forward": 4, "backward": 6}
SPILLED_BYTES: Final = {"forward": 64, "backward": 192}
# The least fraction of this estimate that a kernel compiled near the VMEM limit had.
CERTAIN_SPILLS: Final = {"forward": 0.0, "backward": 0.75}

Direction = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Lengths in a kernel. They change speed, never results beyond rounding.

    Attributes:
        rows: Queries in a query block.
        num_blocks: Query blocks that cover all queries; the last may reach past them.
        cols: Keys, padded.
        is_resident: Whether the kernel matrix of a head stays in VMEM between the
            passes. Otherwise it is streamed: each pass computes it again, one query
            block after another.
    """

    rows: int
    num_blocks: int
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
        return self.rows * self.num_blocks

    @property
    def held_rows(self) -> int:
        """Queries that a kernel holds: all padded ones, or those of a query block."""
        return self.padded_rows if self.is_resident else self.rows


def default_blocks(
    problem: Problem,
    direction: Direction,
    regime: Literal["resident", "streamed"] | None = None,
) -> Blocks:
    """Query blocks of even length that fit VMEM beside keys and values.

    Args:
        problem: The call; its lengths, dimensions and dtype are used.
        direction: The kernel. Only the padded keys must agree between the two.
        regime: Whether the kernel matrix is resident; None keeps it where it fits.

    Returns:
        The largest blocks that fit, within `QUERY_BLOCK_BYTES`. If none fit, the
        smallest: see `check_fits`.
    """
    vmem = vmem_capacity()
    regimes = ("resident", "streamed") if regime is None else (regime,)
    choices = [x for name in regimes for x in _choices(problem, name == "resident")]
    fitting = (x for x in choices if vmem_bytes(problem, x, direction) <= vmem)
    return next(fitting, choices[-1])


def _choices(problem: Problem, is_resident: bool) -> Iterator[Blocks]:
    """Blocks from the most rows down to a single tile."""
    cols = round_up(problem.s, LANES)
    # LANES at most: the rows of a block must fit the correction's left factor.
    most = min(LANES, max(MIN_ROWS, QUERY_BLOCK_BYTES // (4 * cols)))
    while True:
        # Even blocks, so that the last one is not mostly padding.
        even = math.ceil(problem.t / math.ceil(problem.t / most))
        rows = round_up(even, SUBLANES)
        count = math.ceil(problem.t / rows)
        yield Blocks(rows=rows, num_blocks=count, cols=cols, is_resident=is_resident)
        if rows == SUBLANES:
            return
        most = max(SUBLANES, rows // 2)


def check_fits(problem: Problem, blocks: Blocks, direction: Direction) -> None:
    """Raises NotImplementedError if the target TPU certainly has too little VMEM.

    Where it may have too little the compiler decides; where no TPU is known, nothing is
    refused.
    """
    if direction == "forward" and problem.batch * problem.num_heads == 1:
        return  # With a single head no operand is buffered twice.
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
    """Bytes of VMEM per core of the TPU that is traced for.

    The TPU is the device of `jax.sharding.use_abstract_mesh`, which can name one that
    is absent, or else JAX's default device. If that is no TPU, this is the least of all
    generations, so that the program fits each.
    """
    if not pltpu.is_tpu_device():
        return SMALLEST_VMEM
    return pltpu.get_tpu_info().vmem_capacity_bytes


def vmem_bytes(problem: Problem, blocks: Blocks, direction: Direction) -> int:
    """Bytes of VMEM that a kernel needs at most; small ones need up to 100 kB more.

    In VMEM last axes are padded to `LANES`, and the axes before them to whole tiles.
    """
    num_iters, h, d = problem.options.num_iters, problem.head_dim, problem.value_dim
    rank, itemsize = correction_rank(num_iters), problem.dtype.itemsize
    cols, held = blocks.cols, blocks.held_rows
    tile = 4 * SUBLANES // itemsize  # Rows of a tile.
    keys_and_values = itemsize * cols * (round_up(h, tile) + round_up(d, tile))
    h_lanes, d_lanes = round_up(h, LANES), round_up(d, LANES)
    rows = itemsize * round_up(held, tile) * (h_lanes + d_lanes)
    history = 2 * 4 * cols * round_up(num_iters, SUBLANES)
    vectors = 2 * 4 * SUBLANES * cols
    once = 4 * held * cols + vectors + _spills(blocks, direction)
    # Operands and results are buffered twice, except those that the backward kernel
    # buffers once.
    if direction == "forward":
        return once + 2 * (rows + keys_and_values + history)
    once += keys_and_values + history + 4 * blocks.rows * cols
    once += 4 * cols * (round_up(h, SUBLANES) + round_up(d, SUBLANES) + rank)
    once += 4 * LANES * rank * groups_in_lanes(blocks)
    return once + 2 * (rows + 4 * held * h_lanes)


def _spills(blocks: Blocks, direction: Direction) -> int:
    block = 4 * blocks.rows * blocks.cols
    return SPILLED_BLOCKS[direction] * block + SPILLED_BYTES[direction] * blocks.cols


def vmem_limit(problem: Problem, blocks: Blocks, direction: Direction) -> int:
    """Bytes that the compiler may use: the estimate, with a quarter and 1 MiB to spare.

    A limit above the VMEM of a generation is lowered to that by the compiler.
    """
    return vmem_bytes(problem, blocks, direction) * 5 // 4 + 2**20


def correction_rank(num_iters: int) -> int:
    """Rank of the correction whose factors the backward kernel keeps, padded."""
    return round_up(2 * max(0, num_iters - 1), SUBLANES)


def groups_in_lanes(blocks: Blocks) -> int:
    """The number of groups of LANES // rows query blocks, side by side on the lanes."""
    return math.ceil(blocks.num_blocks / (LANES // blocks.rows))


def round_up(x: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below x."""
    return -(-x // multiple) * multiple
