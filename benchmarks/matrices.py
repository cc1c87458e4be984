"""Times `sinkhorn` on many small matrices, over its table of implementations.

    python -m benchmarks.matrices           # Appends below benchmarks/results/<device>/
    python -m benchmarks.matrices --quick   # Small, and keeps nothing.
    python -m benchmarks.matrices --sizes 4 --bandwidth-gb-s 3350

65,536 matrices of 4 x 4, 8 x 8 and 16 x 16 in float32, 20 iterations: what connections
between residual streams take at each token. Logits are standard normal. All programs of
a size take turns, as in `python -m benchmarks`, and the ratio to `reference` is one of
medians over the same rounds.

Forward gives the plan. Forward and backward are that and the gradient with respect to
the logits of half the sum of its squares, so that the cotangent is the plan itself. A
program makes `calls` of them, each on what the one before gave, and a time is that of
one. With one call it is what a call costs from Python, which on a GPU is mostly its
start; with many it is what the device takes. There the default is 50, on a CPU it is 1.

`num_bytes` is the least that has to move between the device's memory and its cores:
logits and plan forward; logits, plan as cotangent and gradient besides, backward.
Divided by the time it is `gb_per_s`, and that over the bandwidth of the device's
memory, if it is known or given, `fraction_of_bandwidth`. Where all arrays fit a cache
it may be above 1 and says nothing.

Errors are against `reference` in float64, for the first 256 matrices and the first
call. What cannot run is skipped with a reason, which is kept beside the rows.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
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

from .harness import command as _command
from .harness import machine as _machine
from .harness import process_memory as _process
from .harness import program as _program
from .harness import record as _record
from .harness import timing as _turns
from .harness.program import MODES, Mode
from .report import table as _table

REFERENCE: Final = "reference"
CHECKED: Final = 256  # Matrices, from the first on.
# Of logits or plan size, read or written.
ARRAYS: Final[Mapping[str, int]] = {"forward": 2, "forward_backward": 5}
# Of a device's memory, in GB/s, by JAX's name of it: NVIDIA's data sheets of the H100
# SXM (https://www.nvidia.com/en-us/data-center/h100/) and of the H200
# (https://www.nvidia.com/en-us/data-center/h200/).
BANDWIDTH: Final[Mapping[str, float]] = {
    "NVIDIA H100 80GB HBM3": 3350.0,
    "NVIDIA H200": 4800.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    quick: bool = False  # A smoke run: small, and no rows unless `output`.
    platform: str | None = None  # On which it must compute, such as gpu; None is any.
    sizes: tuple[int, ...] = (4, 8, 16)  # Rows and columns.
    num_matrices: int = 65536
    num_iters: int = 20
    dtype: str = "float32"
    # With `reference`, which is always measured.
    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    calls: int = 0  # In a program, one after another; 0 is 1 on a CPU and 50 elsewhere.
    repeats: int = 5  # Timed calls of each program, at least.
    budget_s: float = 4.0  # More calls until so many seconds a size and mode.
    bandwidth_gb_s: float | None = None  # Of memory; None is what is known of it.
    output: Path | None = None  # Rows are appended here; None is the device's folder.

    def __post_init__(self):
        unknown = [x for x in self.implementations if x not in IMPLEMENTATIONS]
        if unknown:
            raise ValueError(
                f"Unknown implementations {unknown}; expected some of "
                f"{list(IMPLEMENTATIONS)}."
            )
        least = {"num_matrices": 1, "num_iters": 0, "calls": 0, "repeats": 1}
        for name, at_least in least.items():
            if (count := getattr(self, name)) < at_least:
                raise ValueError(f"{name} must be at least {at_least}, got {count}.")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes must be some positive numbers, got {self.sizes}.")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures, prints a table, and appends the rows.

    Raises:
        RuntimeError: JAX computes on another platform than that of `config`.
    """
    if config.platform is not None:
        _machine.require(config.platform, "This run")
    if config.quick:
        small = {"sizes": (4,), "num_matrices": 64, "num_iters": 3, "budget_s": 0.0}
        config = dataclasses.replace(config, **small)
    if not config.calls:
        calls = 1 if jax.default_backend() == "cpu" else 50
        config = dataclasses.replace(config, calls=calls)
    now = datetime.datetime.now(datetime.UTC)
    facts = {**_machine.facts(), "date": now.isoformat(timespec="seconds")}
    output = config.output
    if output is None and not config.quick:
        folder = _machine.folder(facts, _record.RESULTS)
        output = folder / "matrices" / f"{now:%Y-%m-%d}.jsonl"
    _process.keep_freed_memory()
    rows = []
    for size in config.sizes:
        for mode in MODES:
            new, skips = _measure(config, size, mode, facts)
            rows += new
            if output is not None:
                _append(output, new)
                _append(_record.skips_path(output), skips)
    print(table(rows))
    print(f"Rows appended to {output}." if output else "No rows kept.")
    return rows


def inputs(config: Config, size: int, dtype: str) -> jax.Array:
    """Standard normal logits, the same numbers in every run."""
    shape = (config.num_matrices, size, size)
    normal = np.random.default_rng(0).standard_normal(shape, np.float32)
    return jnp.asarray(normal, dtype)


def step(logits: jax.Array, num_iters: int, name: str, mode: Mode) -> jax.Array:
    """What a call gives, of the shape of the logits: the plan or the gradient."""
    solve = functools.partial(sinkhorn, num_iters=num_iters, implementation=name)
    if mode == "forward":
        return solve(logits)
    plan, pull_back = jax.vjp(solve, logits)
    return pull_back(plan)[0]


def _measure(config, size, mode, facts):
    """Rows, and lines that say what was skipped and why."""
    fields = {
        "mode": mode,
        "size": size,
        "num_matrices": config.num_matrices,
        "num_iters": config.num_iters,
        "dtype": config.dtype,
    }
    logits = inputs(config, size, config.dtype)
    expected = _expected(config, size, mode)
    executables, compile_ms, errors, skips = {}, {}, {}, []

    def skip(name, reason):
        print(f"Skipped {name}, {size} x {size} {mode}: {reason}")
        line = {"implementation": name, **fields, "reason": str(reason)}
        skips.append(line | facts)

    def check(name, result):
        error = np.asarray(result[0][:CHECKED], np.float64) - expected
        errors[name] = float(abs(error).max())

    for name in dict.fromkeys((*config.implementations, REFERENCE)):
        try:
            executables[name], compile_ms[name] = _build(config, name, mode, logits)
        except NotImplementedError as reason:
            skip(name, reason)
    calls = {
        name: functools.partial(_call, executable, logits)
        for name, executable in executables.items()
    }
    times = _turns.time_in_turns(
        calls, config.repeats, config.budget_s, REFERENCE, check
    )
    for name, reason in times.failures.items():
        skip(name, reason)
    rows = []
    for name, of_program in times.by_name.items():
        of_call = [x / config.calls for x in of_program]
        rows.append(
            {
                "implementation": name,
                **fields,
                "calls": config.calls,
                **_times(of_call, times.by_name.get(REFERENCE), config.calls),
                **_traffic(config, size, mode, facts, of_call),
                "temp_bytes": _program.temp_bytes(executables[name]),
                "compile_ms": compile_ms[name],
                "is_default": _is_default(config, size, name),
                "max_abs_error": errors[name],
                **facts,
            }
        )
    return rows, skips


def _build(config, name, mode, logits):
    reason = _machine.why_not_kernel(name)
    if reason is not None:
        raise NotImplementedError(reason)

    program = _program.repeated(
        lambda x: step(x, config.num_iters, name, mode),
        lambda result, _: (result,),
        config.calls,
    )
    shape = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    return _program.compile_within_limits(program, shape)


def _call(executable, logits):
    return jax.block_until_ready(executable(logits))


def _expected(config, size, mode):
    """The first matrices' results in float64."""
    with jax.enable_x64(True):
        logits = inputs(config, size, config.dtype)[:CHECKED].astype("float64")
        solve = jax.jit(step, static_argnums=(1, 2, 3))
        return np.asarray(solve(logits, config.num_iters, REFERENCE, mode))


def _times(times, of_reference, calls):
    low, high = np.percentile(times, [25, 75])
    ratio = None
    if of_reference:
        rounds = min(len(times), len(of_reference))
        ratio = np.median(times[:rounds]) * calls / np.median(of_reference[:rounds])
    return {
        "median_ms": float(np.median(times)),
        "iqr_ms": float(high - low),
        "repeats": len(times),
        "ratio_to_reference": None if ratio is None else float(ratio),
    }


def _traffic(config, size, mode, facts, times):
    array = config.num_matrices * size**2 * jnp.dtype(config.dtype).itemsize
    num_bytes = ARRAYS[mode] * array
    gb_per_s = num_bytes / 1e9 / (np.median(times) / 1e3)
    bandwidth = config.bandwidth_gb_s or BANDWIDTH.get(facts["device"])
    return {
        "num_bytes": num_bytes,
        "gb_per_s": float(gb_per_s),
        "bandwidth_gb_s": bandwidth,
        "fraction_of_bandwidth": float(gb_per_s / bandwidth) if bandwidth else None,
    }


def _is_default(config, size, name):
    problem = Problem(
        batch=config.num_matrices,
        t=size,
        s=size,
        dtype=jnp.dtype(config.dtype),
        options=Options(config.num_iters),
    )
    return preferred(IMPLEMENTATIONS, problem) == name


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row, in Markdown."""
    header = (
        *("matrices", "mode", "implementation", "ms", "x reference", "GB/s"),
        *("of bandwidth", "error"),
    )
    lines = [
        (
            f"{row['num_matrices']} x {row['size']} x {row['size']}",
            row["mode"],
            f"**`{row['implementation']}`**"
            if row["is_default"]
            else f"`{row['implementation']}`",
            _table.number(row["median_ms"]),
            _table.number(row["ratio_to_reference"]),
            _table.number(row["gb_per_s"]),
            _table.number(row["fraction_of_bandwidth"]),
            f"{row['max_abs_error']:.1e}",
        )
        for row in rows
    ]
    return _table.markdown(header, lines, num_text=3)


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    run(_command.parse(Config, __doc__, args))


if __name__ == "__main__":
    main()
