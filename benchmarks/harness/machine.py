"""What a measurement was taken on: device, versions, commit."""

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


def require(platform: str, what: str) -> None:
    """Refuses what is measured on one platform alone.

    Raises:
        RuntimeError: JAX computes on another.
    """
    found = jax.default_backend()
    if found != platform:
        name = platform.upper()
        raise RuntimeError(
            f"{what} needs a {name}, and JAX computes on a {found.upper()} here. Run "
            f"it where there is a {name} and a jax for it, such as jax[cuda13]."
        )


def why_not_kernel(name: str) -> str | None:
    """A reason if an implementation's kernels are for another platform than JAX's."""
    kernels, _, platform = name.partition("_")
    found = jax.default_backend()
    if kernels != "mosaic" or platform == found:
        return None
    return (
        f"its kernels are for a {platform.upper()}, and JAX computes on a "
        f"{found.upper()} here"
    )


def folder(facts: Mapping[str, Any], results: Path) -> Path:
    """Where the results of the machine with these `facts` go."""
    machine = (facts[name] for name in ("device", "platform", "num_cpus"))
    return results / directory_name(*machine)


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
