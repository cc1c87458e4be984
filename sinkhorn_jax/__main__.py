"""`python -m sinkhorn_jax`: versions, devices, and which implementations run here."""

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from . import __version__
from ._core.options import Options
from ._runtime.dispatch import preferred, why_not_here
from .attention._call import IMPLEMENTATIONS, prepare
from .attention._problem import Dropout, Problem


def report(problem: Problem) -> dict[str, Any]:
    """The versions, devices and implementations that a report of a defect should have.

    `implementations` says of each one None if it can run the problem here, else why
    not; `taken` is the one that `implementation=None` takes.
    """
    return {
        "sinkhorn_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "flax": _version("flax"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": [f"{x.platform}: {x.device_kind}" for x in jax.devices()],
        "taken": preferred(IMPLEMENTATIONS, problem),
        "implementations": {
            name: why_not_here(entry, problem)
            for name, entry in IMPLEMENTATIONS.items()
        },
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(args: Sequence[str] | None = None) -> None:
    """Prints the report for self-attention of the size that the arguments give."""
    parser = argparse.ArgumentParser(
        prog="python -m sinkhorn_jax",
        description="Versions, devices, and which implementations of "
        "sinkhorn_attention can run a call of this size here. Memory is not looked at.",
    )
    for name, default in (("tokens", 1024), ("heads", 8), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=_positive, default=default)
    dtypes = ("float32", "bfloat16", "float16", "float64")
    parser.add_argument("--dtype", choices=dtypes, default="float32")
    parser.add_argument("--num-iters", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(args)
    # Without x64 the arrays would be float32.
    wide = jax.enable_x64(True) if given.dtype == "float64" else nullcontext()
    try:
        with wide:
            problem = _problem(given)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    found = report(problem)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    implementations, taken = found.pop("implementations"), found.pop("taken")
    for name, value in found.items():
        values = value if isinstance(value, list) else [value or "not installed"]
        print(f"{name:12}  {', '.join(values)}")
    size = f"{given.heads} heads of {given.tokens} tokens x {given.head_dim}"
    print(f"\nsinkhorn_attention, {size}, {problem.dtype}: takes {taken}")
    for name, reason in implementations.items():
        print(f"{name:12}  {reason or 'can run'}")


def _positive(text):
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least 1, got {text!r}"
        ) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _problem(given):
    shape = (1, given.tokens, given.heads, given.head_dim)
    found = []

    def call(x):
        problem, _ = prepare(
            (x, x, x, None, None),
            (None, None),
            options=Options(given.num_iters),
            dropout=Dropout(),
            scale=None,
            is_causal=False,
            return_marginal_error=False,
        )
        found.append(problem)

    # Traced, because arrays of this size may not fit into the memory.
    jax.eval_shape(call, jax.ShapeDtypeStruct(shape, jnp.dtype(given.dtype)))
    return found[0]


if __name__ == "__main__":
    main()
