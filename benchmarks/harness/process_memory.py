"""Memory of this process, for programs that do not declare what they allocate."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

STATUS: Final = Path("/proc/self/status")
CLEAR: Final = Path("/proc/self/clear_refs")
# Parameters of `mallopt` in glibc's malloc.h.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_MAX: Final = -4


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it to the system.

    Otherwise large arrays are mapped anew, and eager programs wait for page faults.
    """
    mallopt = _c_function("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # Never trim.


def give_freed_memory_back() -> None:
    """Returns memory that was freed and kept to the system, once."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def peak_growth(call: Callable[[], Any]) -> int | None:
    """Bytes by which a call raises the peak resident set of the process.

    The result of the call is included. None where the system does not report it.
    """
    # Otherwise malloc reuses freed memory and the resident set does not grow.
    give_freed_memory_back()
    try:
        CLEAR.write_text("5")  # Resets the peak to the present resident set.
        before = _kib("VmRSS")
    except OSError:
        return None
    out = call()
    growth = _kib("VmHWM") - before
    del out
    return 1024 * max(0, growth)


def _c_function(name):
    # Other C libraries lack these functions, and Windows has no library to ask.
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def _kib(field):
    return int(re.search(rf"^{field}:\s*(\d+) kB$", STATUS.read_text(), re.M)[1])
