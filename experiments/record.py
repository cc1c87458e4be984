"""Where and with what a result was obtained."""

import importlib.metadata
import pathlib
import platform
import subprocess

import jax


def environment() -> dict[str, object]:
    """Versions, device and commit, for the JSON of a result."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "sinkhorn_jax")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": f"{len(devices)} x {devices[0].platform} {devices[0].device_kind}",
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Short hash, "-dirty" if the tree was; None outside a repository."""
    root = pathlib.Path(__file__).parent
    git = lambda *args: subprocess.run(
        ("git", "-C", str(root), *args), capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
