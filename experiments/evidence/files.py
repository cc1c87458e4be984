"""Where and with what a result was obtained, and how it is written."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON with the innermost lists on one line each, whole or not at all.

    Raises:
        ValueError: It holds a NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    pattern = r"\[\s+([^][{}\"]*?)\s+\]"
    text = re.sub(pattern, lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


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
