"""Facts about a run: device, versions, commit, and the folder of its results."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax

ROOT: Final = Path(__file__).parents[2]
# Changes here cannot change a measurement, and a run itself writes the first.
NOT_MEASURED: Final = (":!benchmarks/results", ":!README.md")


def facts() -> dict[str, Any]:
    """The fields that all rows of a run share."""
    device = jax.devices()[0]
    now = datetime.datetime.now(datetime.UTC)
    return {
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "num_cpus": num_cpus(),
        "jax_version": jax.__version__,
        "jaxlib_version": importlib.metadata.version("jaxlib"),
        "python_version": platform.python_version(),
        "commit": commit(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": now.isoformat(timespec="seconds"),
    }


def directory_name(device: str, platform: str, num_cpus: int) -> str:
    """Name of the folder for a device's results, such as "nvidia-h100-80gb-hbm3"."""
    if platform == "cpu":
        device = f"cpu-{device}-{num_cpus}cores"
    device = re.sub(r"\((r|tm)\)", " ", device.lower())
    return re.sub(r"[^a-z0-9.]+", "-", device).strip("-.")


def folder(facts: Mapping[str, Any], results: Path) -> Path:
    """Folder for the results of the machine with these `facts`."""
    machine = (facts[name] for name in ("device", "platform", "num_cpus"))
    return results / directory_name(*machine)


def require(platform: str, what: str) -> None:
    """Raises RuntimeError if JAX computes on another platform."""
    found = jax.default_backend()
    if found != platform:
        name = platform.upper()
        raise RuntimeError(
            f"{what} needs a {name}, and JAX computes on a {found.upper()} here. "
            "It also needs a jax for it, such as jax[cuda13]."
        )


def require_kernel(name: str) -> None:
    """Raises NotImplementedError if an implementation's kernels cannot run here."""
    kernels, _, platform = name.partition("_")
    found = jax.default_backend()
    if kernels == "mosaic" and platform != found:
        raise NotImplementedError(
            f"its kernels are for a {platform.upper()}, and JAX computes on a "
            f"{found.upper()} here"
        )


def num_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Not on macOS and Windows.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """Short hash; "-dirty" if anything that can change a measurement differs."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", *NOT_MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # No git, a copy without its history, or no commit yet.
    return head + ("-dirty" if changes else "")


def _cpu_model():
    cpuinfo = Path("/proc/cpuinfo")  # `platform.processor()` is empty on Linux.
    if cpuinfo.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments):
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
