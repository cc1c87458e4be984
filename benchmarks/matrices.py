"""Times `sinkhorn` on many small matrices, over its table of implementations.

The matrices are what connections between residual streams take at each token: 4 x 4, 8
x 8 and 16 x 16 standard normal logits in float32. All programs of a size take turns, as
in the benchmark of attention, and the ratio to `reference` is over the same rounds.

Forward gives the plan. Forward and backward gives the gradient of half the sum of its
squares with respect to the logits, so that the cotangent is the plan itself. A program
makes `calls` calls, each on the result of the last one, and a time is that of one call.
With a single call it includes the start from Python, which on a GPU is most of it.

Errors are against `reference` in float64, for the first 256 matrices of the first call.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from sinkhorn_jax import sinkhorn
from sinkhorn_jax._core.options import Options
from sinkhorn_jax._runtime.dispatch import preferred
from sinkhorn_jax.matrix import IMPLEMENTATIONS
from sinkhorn_jax.matrix._problem import Problem

from .harness import machine, record, timing
from .harness.program import MODES, Mode, compile_within_limits, repeated
from .report import table

REFERENCE: Final = "reference"
CHECKED: Final = 256  # Matrices whose error is measured.
COLUMNS: Final = (
    *("size", "mode", "implementation", "is_default", "median_ms"),
    *("ratio_to_reference", "max_abs_error"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Matrices to measure."""

    # 64 matrices of 4 x 4; rows are kept only if `output` is given.
    quick: bool = False
    platform: str | None = None  # An error if JAX computes on another; None allows any.
    sizes: tuple[int, ...] = (4, 8, 16)  # Rows and columns.
    num_matrices: int = 65536
    num_iters: int = 20
    calls: int | None = None  # Calls in a program; None means 1 on a CPU, else 50.
    repeats: int = 5  # Timed calls of each program, at least.
    budget_s: float = 4.0  # Calls go on until a size and mode has taken these seconds.
    output: Path | None = None  # Rows are appended here; None: the device's folder.

    def __post_init__(self):
        for name in ("sizes", "num_matrices", "repeats"):
            if np.min(getattr(self, name), initial=1) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures every size in both modes, appends the rows and prints a table.

    Raises:
        RuntimeError: JAX computes on another platform than that of `config`.
    """
    if config.platform is not None:
        machine.require(config.platform, "This run")
    facts = machine.facts()
    output = config.output or (None if config.quick else record.path(facts, "matrices"))
    if config.quick:
        small = {"sizes": (4,), "num_matrices": 64, "num_iters": 3, "budget_s": 0.0}
        config = dataclasses.replace(config, **small)
    if config.calls is None:
        calls = 1 if jax.default_backend() == "cpu" else 50
        config = dataclasses.replace(config, calls=calls)
    rows = []
    for size in config.sizes:
        for mode in MODES:
            new = [row | facts for row in measure(config, size, mode)]
            rows += new
            if output is not None:
                record.append(output, new)
    print(table.plain(rows, COLUMNS))
    print(f"Rows appended to {output}." if output else "No rows kept.")
    return rows


def step(logits: jax.Array, num_iters: int, name: str, mode: Mode) -> jax.Array:
    """The plan, or the gradient of half the sum of its squares."""
    solve = functools.partial(sinkhorn, num_iters=num_iters, implementation=name)
    if mode == "forward":
        return solve(logits)
    plan, pull_back = jax.vjp(solve, logits)
    return pull_back(plan)[0]


def measure(config: Config, size: int, mode: Mode) -> list[dict[str, Any]]:
    """Rows of one size and mode; prints the reasons why programs were skipped."""
    shape = (config.num_matrices, size, size)
    normal = np.random.default_rng(0).standard_normal(shape, np.float32)
    want = expected(normal[:CHECKED], config.num_iters, mode)
    logits = jnp.asarray(normal)
    calls, errors = {}, {}
    for name in IMPLEMENTATIONS:
        try:
            machine.require_kernel(name)
            one_call = lambda x, name=name: step(x, config.num_iters, name, mode)
            program = repeated(one_call, lambda result, _: (result,), config.calls)
            executable, _ = compile_within_limits(program, logits)
            calls[name] = lambda f=executable: jax.block_until_ready(f(logits))
        except NotImplementedError as reason:
            print(f"Skipped {name}, {size} x {size} {mode}: {reason}")

    def check(name, result):
        error = np.asarray(result[0][:CHECKED], np.float64) - want
        errors[name] = float(abs(error).max())

    times = timing.time_in_turns(
        calls, config.repeats, config.budget_s, REFERENCE, check
    )
    problem = Problem(
        batch=(config.num_matrices,),
        t=size,
        s=size,
        dtype=logits.dtype,
        options=Options(config.num_iters),
    )
    default = preferred(IMPLEMENTATIONS, problem)
    rows = []
    for name, milliseconds in times.by_name.items():
        row = {
            "implementation": name,
            "mode": mode,
            "size": size,
            "num_matrices": config.num_matrices,
            "num_iters": config.num_iters,
            "dtype": "float32",
            "calls": config.calls,
            **timing.summary(np.divide(milliseconds, config.calls)),
            "ratio_to_reference": timing.ratio(
                milliseconds, times.by_name.get(REFERENCE)
            ),
            "is_default": name == default,
            "max_abs_error": errors[name],
        }
        rows.append(row)
    return rows


def expected(logits: np.ndarray, num_iters: int, mode: Mode) -> np.ndarray:
    """The results of `step` in float64."""
    with jax.enable_x64(True):
        solve = jax.jit(step, static_argnums=(1, 2, 3))
        wide = logits.astype(np.float64)
        return np.asarray(solve(wide, num_iters, REFERENCE, mode))
