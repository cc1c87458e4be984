"""What a measurement was taken on: device, versions, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import jax

ROOT: Final = Path(__file__).parent.parent
# Neither can change a measurement, and a run writes the first.
NOT_MEASURED: Final = (":!benchmarks/results", ":!README.md")


def facts() -> dict[str, Any]:
    """The fields of a row that are the same in the whole run, but for the date."""
    device = jax.devices()[0]
    return {
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "num_cpus": num_cpus(),
        "jax_version": jax.__version__,
        "jaxlib_version": importlib.metadata.version("jaxlib"),
        "python_version": platform.python_version(),
        "commit": commit(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def directory_name(device: str, platform: str, num_cpus: int) -> str:
    """A folder for the results of a device, such as "nvidia-h100-80gb-hbm3"."""
    if platform == "cpu":
        device = f"cpu-{device}-{num_cpus}cores"
    device = re.sub(r"\((r|tm)\)", " ", device.lower())
    return re.sub(r"[^a-z0-9.]+", "-", device).strip("-.")


def num_cpus() -> int:
    """CPUs that this process may use, which may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # Not on macOS and Windows.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """The short hash, "-dirty" if anything that can change a measurement differs."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", *NOT_MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # No git, a copy without its history, or no commit yet.
    return head + ("-dirty" if changes else "")


def _cpu_model():
    cpuinfo = Path("/proc/cpuinfo")  # Linux; `platform.processor()` is empty there.
    if cpuinfo.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments):
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
