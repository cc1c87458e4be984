"""Memory of this process, for programs that do not declare what they take."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

STATUS: Final = Path("/proc/self/status")
CLEAR: Final = Path("/proc/self/clear_refs")
# Of glibc's malloc.h.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_MAX: Final = -4


def keep_freed_memory() -> None:
    """Has the C library use freed memory again instead of giving it back, if it can.

    glibc maps arrays of 32 MiB and more anew each time. An eager program then spends
    most of its time on page faults: PyTorch's Sinkhorn with gradients over 2 heads of
    2048 tokens was measured 2.7 times slower, and JAX's softmax attention at 8192, with
    2 GiB of temporaries in one block, twice.
    """
    mallopt = _c_function("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # Never.


def give_freed_memory_back() -> None:
    """Once; so the memory that is held stays what the last few programs needed."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def peak_growth(call: Callable[[], Any]) -> int | None:
    """Bytes by which the peak resident set of the process exceeds the set before.

    The result of the call is in it. None where the system does not tell.
    """
    # Else what is freed but held would be used again, and the growth be none.
    give_freed_memory_back()
    try:
        CLEAR.write_text("5")  # The peak starts again from the present.
        before = _kib("VmRSS")
    except OSError:
        return None
    out = call()
    growth = _kib("VmHWM") - before
    del out
    return 1024 * max(0, growth)


def _c_function(name):
    # Absent in other C libraries, and on Windows there is no library to ask.
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def _kib(field):
    return int(re.search(rf"^{field}:\s*(\d+) kB$", STATUS.read_text(), re.M)[1])
