"""Limits on the memory of a program and on the time of one call."""

import os
from typing import Final

import jax

# A program that needs more of the device's memory is skipped. The other half is for
# inputs and results of the other programs and for the results in float64.
MEMORY_FRACTION: Final = 0.5
# A timed call is preceded by an untimed one if the program's last call was faster. For
# longer calls the content of the caches does not matter.
WARM_CALL_S: Final = 0.25
# A program whose first timed call takes longer gets `FEWEST_REPEATS` timed calls.
SLOW_CALL_S: Final = 2.0
FEWEST_REPEATS: Final = 3
# If the warm-up call takes longer, it is recorded as the only measurement.
CALL_LIMIT_S: Final = 20.0
# A program is skipped if a call would take longer, judging by fewer tokens.
LONGEST_CALL_S: Final = 300.0

# Error texts of XLA and PyTorch when memory ran out.
OUT_OF_MEMORY: Final = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


def memory_bytes() -> int | None:
    """Memory of the device (for a CPU: of the machine), or None if it is unknown."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    if not hasattr(os, "sysconf"):  # Windows.
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(num_bytes: float) -> None:
    """Raises NotImplementedError, with a reason, if a program needs too much memory.

    The bytes include inputs and results.
    """
    total = memory_bytes()
    if total is not None and num_bytes > MEMORY_FRACTION * total:
        gib, limit = num_bytes / 2**30, MEMORY_FRACTION * total / 2**30
        raise NotImplementedError(f"it needs about {gib:.1f} GiB, limit {limit:.1f}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory ran out."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in OUT_OF_MEMORY
    )
