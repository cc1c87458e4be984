"""What a run may take: of memory, and of time for one call."""

import os
from typing import Final

import jax

# A program that needs more of the device's memory is not run. Half leaves room for the
# other programs' inputs and results, for the float64 computation and for estimates that
# are too low.
MEMORY_FRACTION: Final = 0.5
# A turn of a program begins with an untimed call if its last call took less. For longer
# calls it does not matter what is left in the caches.
WARM_CALL_S: Final = 0.25
# A program whose first timed call takes longer has `FEWEST_REPEATS` turns instead of
# `repeats`; noise is small against calls that long.
SLOW_CALL_S: Final = 2.0
FEWEST_REPEATS: Final = 3
# A call before that, untimed else, that takes longer is the measurement, the only one.
CALL_LIMIT_S: Final = 20.0
# A program is not run at all if a call would take longer, by what fewer tokens took.
LONGEST_CALL_S: Final = 300.0

GIB: Final = 2**30
# How XLA and PyTorch say that memory ran out.
OUT_OF_MEMORY: Final = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


def memory_bytes() -> int | None:
    """Memory of the device; of a CPU, the machine's. None if it is not known."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    if not hasattr(os, "sysconf"):  # Windows.
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(num_bytes: float, free: float | None = None) -> None:
    """Refuses a program that needs too much.

    Args:
        num_bytes: What it needs, inputs and results with it.
        free: What its own allocator can get, where that is known and may be less.

    Raises:
        NotImplementedError: With the reason for skipping it.
    """
    total = memory_bytes()
    limits = [x for x in (total and MEMORY_FRACTION * total, free) if x is not None]
    if limits and num_bytes > min(limits):
        raise NotImplementedError(
            f"it needs about {num_bytes / GIB:.1f} GiB, limit {min(limits) / GIB:.1f}"
        )


def check_time(seconds: float, tokens: int, earlier_tokens: int) -> None:
    """Refuses a program of quadratic cost that would take too long.

    Args:
        seconds: What a call took.
        tokens: What a call is wanted for.
        earlier_tokens: What that call was for.

    Raises:
        NotImplementedError: With the reason for skipping it.
    """
    expected = seconds * (tokens / earlier_tokens) ** 2
    if expected > LONGEST_CALL_S:
        raise NotImplementedError(
            f"a call would take about {expected:.0f} s, limit {LONGEST_CALL_S:.0f}: it "
            f"took {seconds:.3g} s for {earlier_tokens} tokens"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out in spite of the limit."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in OUT_OF_MEMORY
    )
