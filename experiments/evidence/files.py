"""The files of a result: where they go, what they hold, how they are written."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import jax
import matplotlib.pyplot as plt
import numpy as np

from .claims import Finding

# The committed results. A run writes there only where --output says so.
RESULTS: Final = pathlib.Path("experiments") / "results"
# The results of a user's runs, which git ignores.
RUNS: Final = pathlib.Path("runs")


def write_result(
    name: str,
    config: Any,
    measured: dict[str, Any],
    findings: Callable[[dict[str, Any]], Sequence[Finding]],
    draw: Callable[[dict[str, Any]], plt.Figure],
    start: float,
    *,
    question: str | None = None,
    others: Mapping[str, Callable[[dict[str, Any]], plt.Figure]] = MappingProxyType({}),
    say: Callable[[dict[str, Any]], Iterable[str]] = lambda result: (),
) -> dict[str, Any]:
    """Writes a question's result as JSON and its figure, and prints the findings.

    Args:
        name: The stem of both files, in the folder `config.output`.
        config: The question's configuration.
        measured: What was measured.
        findings: Returns what the result, as the JSON holds it, says of the claims.
        draw: Returns the figure of the same result.
        start: `time.monotonic()` at the start of the run.
        question: The question, where `name` is another.
        others: Further figures; each is in a file of the name, "_" and its key.
        say: Returns sentences that are printed after the findings.

    Returns:
        The result.

    Raises:
        ValueError: A measurement is NaN or infinite.
    """
    result = {
        "question": question or name,
        "config": as_json(config),
        "environment": environment(),
        **measured,
        "wall_time_s": round(time.monotonic() - start, 1),
    }
    # Findings and figure see what the JSON holds, so that they can be made from it.
    result = json.loads(json.dumps(result))
    result["findings"] = list(findings(result))
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{name}.json"
    write_json(path, result)
    figures = {name: draw} | {f"{name}_{key}": each for key, each in others.items()}
    for stem, each in figures.items():
        figure = each(result)
        figure.savefig(path.with_name(f"{stem}.png"))
        plt.close(figure)
    for found in result["findings"]:
        print(f"{found['verdict']}: {found['claim']}\n    {found['text']}")
    for sentence in say(result):
        print(sentence)
    took = f"\nTook {result['wall_time_s']:.0f} s."
    print(took, f"Wrote {path} and {path.with_suffix('.png')}.")
    return result


def as_json(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON holds them, paths as strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON with the innermost lists on one line each, whole or not at all.

    Raises:
        ValueError: The value holds a NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    pattern = r"\[\s+([^][{}\"]*?)\s+\]"
    text = re.sub(pattern, lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"
    with replacing(path) as new:
        new.write(text.encode())


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when it is whole."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            yield file
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def by_key(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dicts with equal keys as one dict of lists."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def or_null(values: Any, is_known: Any) -> list[Any]:
    """An array as nested lists, with None, JSON's null, where a value is not known."""
    return np.where(is_known, np.asarray(values).astype(object), None).tolist()


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
    """The short hash, with "-dirty" if files changed; None outside a repository."""
    command = ("git", "describe", "--always", "--dirty", "--exclude=*")
    options = {"cwd": pathlib.Path(__file__).parent, "text": True, "check": True}
    try:
        return subprocess.run(command, capture_output=True, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
