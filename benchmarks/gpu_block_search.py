"""Times every way to cut a head that the GPU attention kernels have.

    python -m benchmarks.gpu_block_search   # All of the sweep `gpu`; a GPU only.
    python -m benchmarks.gpu_block_search --cases 128x128 --dtypes bfloat16

For each case of the sweep `gpu` of `python -m benchmarks` and either mode, the blocks
that shared memory has room for take turns, as programs do there: what can differ is in
`CHOICES`. A program makes `calls` calls, each on what the one before gave, so that a
time is what the device takes and not the start from Python. Each result is held against
that of `streaming` on the same numbers in float32. Blocks that do not compile or run,
or are further from it than `RTOL`, are refused, with the reason.

The fastest is appended as one line to benchmarks/results/<device>/blocks/: the blocks,
their times, those of all others, what was refused, device, versions and commit. What
the library takes is in `default_blocks`, and this does not change it.

It is an error where JAX computes on anything but a GPU, and where none of a case's
blocks is right; what was found before is kept.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax.attention._mosaic_gpu import attend as _mosaic_gpu
from sinkhorn_jax.attention._mosaic_gpu.blocks import (
    MAX_CLUSTER,
    SHARED_MEMORY,
    Blocks,
    Crew,
    default_blocks,
    head_dtypes,
    max_period,
    resident_bytes,
    resident_crew,
    reverse_bytes,
    reverse_crew,
    sweep_bytes,
)
from sinkhorn_jax.attention._problem import Operands, Problem

from . import programs as _programs
from .harness import cases as _cases
from .harness import command as _command
from .harness import machine as _machine
from .harness import program as _program
from .harness import record as _record
from .harness import timing as _turns
from .harness.cases import Case
from .harness.program import MODES, Mode
from .report import table as _table

# Values of each field of `Blocks`; its default there is among them. Those that follow
# from the problem have no others.
CHOICES: Final[Mapping[str, Callable[[Problem], Sequence[Any]]]] = {
    "tile": lambda problem: (default_blocks(problem).tile,),
    "num_row_tiles": lambda problem: (default_blocks(problem).num_row_tiles,),
    "num_col_tiles": lambda problem: (default_blocks(problem).num_col_tiles,),
    "is_held": lambda problem: (True, False),
    # A shorter period makes the kernel matrix again without need.
    "period": lambda problem: (
        (0, max_period(problem)) if problem.options.num_iters else (0,)
    ),
    "head_dtype": head_dtypes,
    "cluster": lambda problem: clusters(default_blocks(problem)),
    # More leave a thread too few registers.
    "max_warpgroups": lambda problem: (1, 2, 4),
}

# Largest error of an array, relative to its largest entry: the kernels round the plan
# and its gradient to 8 or 11 bits.
RTOL: Final[Mapping[str, float]] = {"bfloat16": 1e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to search."""

    cases: tuple[str, ...] = ()  # Heads x tokens of the sweep `gpu`; none is all.
    dtypes: tuple[str, ...] = ()  # Likewise.
    calls: int = 10  # In a program, one after another.
    repeats: int = 5  # Timed calls of each program, at least.
    budget_s: float = 2.0  # More calls until so many seconds a case and mode.
    output: Path | None = None  # Lines are appended here; None is the device's folder.

    def __post_init__(self):
        known = _cases.BY_PLATFORM["gpu"]
        for name, of_case in (("cases", "name"), ("dtypes", "dtype")):
            expected = list(dict.fromkeys(getattr(case, of_case) for case in known))
            unknown = [x for x in getattr(self, name) if x not in expected]
            if unknown:
                raise ValueError(
                    f"Unknown {name} {unknown}; expected some of {expected}."
                )
        for name in ("calls", "repeats"):
            if (count := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {count}.")


def run(config: Config) -> list[dict[str, Any]]:
    """Searches, and appends a line for each case and mode.

    Raises:
        RuntimeError: There is no GPU, or no blocks of a case are right.
    """
    _machine.require("gpu", "The search for blocks")
    now = datetime.datetime.now(datetime.UTC)
    facts = {**_machine.facts(), "date": now.isoformat(timespec="seconds")}
    output = config.output
    if output is None:
        folder = _machine.folder(facts, _record.RESULTS)
        output = folder / "blocks" / f"{now:%Y-%m-%d}.jsonl"
    rows = []
    for case in _cases.select(["gpu"], config.cases, config.dtypes):
        for mode in MODES:
            row = search(case, mode, config) | facts
            print(sentence(row), flush=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    print(f"Lines appended to {output}.")
    return rows


def clusters(blocks: Blocks) -> list[int]:
    """Sizes of a cluster; a larger one would have blocks of threads without a strip."""
    sizes = {1, 2, 4, MAX_CLUSTER, blocks.cluster}
    most = max(blocks.num_row_tiles, blocks.num_col_tiles)
    return sorted(size for size in sizes if size <= most)


def candidates(problem: Problem) -> Iterator[Blocks]:
    """All blocks that shared memory has room for.

    Raises:
        ValueError: `Blocks` has a field that `CHOICES` does not know.
    """
    names = [field.name for field in dataclasses.fields(Blocks)]
    unknown = [name for name in names if name not in CHOICES]
    if unknown:
        raise ValueError(
            f"Blocks has fields {unknown} that are not searched: say in CHOICES which "
            "values they may have."
        )
    default = default_blocks(problem)
    for values in product(*(CHOICES[name](problem) for name in names)):
        blocks = Blocks(**dict(zip(names, values, strict=True)))
        # A head that stays has no strips to hold; without one it has no dtype, no
        # warpgroups share it, and no blocks of threads a strip that is not held.
        no_matter: dict[str, Any] = {"is_held": True}
        if not blocks.period:
            no_matter = {
                "head_dtype": "float32",
                "max_warpgroups": default.max_warpgroups,
                "cluster": blocks.cluster if blocks.is_held else 1,
            }
        is_first = dataclasses.replace(blocks, **no_matter) == blocks
        if is_first and fits(problem, blocks) and _is_highest(problem, blocks):
            yield blocks


def _is_highest(problem, blocks):
    """Whether no higher limit leaves a head to the same warpgroups."""

    def crews(limit):
        limited = dataclasses.replace(blocks, max_warpgroups=limit)
        return resident_crew(problem, limited), reverse_crew(problem, limited)

    limits = CHOICES["max_warpgroups"](problem)
    higher = [x for x in limits if x > blocks.max_warpgroups]
    ours = crews(blocks.max_warpgroups)
    return not blocks.period or all(crews(x) != ours for x in higher)


def fits(problem: Problem, blocks: Blocks) -> bool:
    """Whether shared memory has room for a strip, or for a head that stays."""
    if not blocks.period:
        return sweep_bytes(problem, blocks) <= SHARED_MEMORY
    forward = resident_bytes(problem, blocks, Crew(1, 1))
    return max(forward, reverse_bytes(problem, blocks, Crew(1, 1))) <= SHARED_MEMORY


def attend(
    problem: Problem, blocks: Blocks, query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    """Attention by the kernels, cut as the blocks say."""
    nothing = dict.fromkeys(Operands._fields)
    operands = Operands(**nothing | {"query": query, "key": key, "value": value})
    return _mosaic_gpu.attend_in(problem, blocks, operands)[0]


def search(case: Case, mode: Mode, config: Config) -> dict[str, Any]:
    """What a line says, but for the facts of the machine."""
    problem, inputs = _programs.problem(case), _cases.inputs(case)
    by_name = {describe(blocks): blocks for blocks in candidates(problem)}
    default = describe(default_blocks(problem))
    expected = _expected(case, mode, inputs)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, blocks in by_name.items():
        # A compiler and a device may refuse in any way, and the others go on.
        try:
            call = _build(problem, blocks, case, mode, config.calls)
            call = functools.partial(call, *inputs)
            errors[name] = _error(call()[0], expected)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            refused[name] = f"{type(error).__name__}: {lines[0]}"
            continue
        if errors[name] <= RTOL[case.dtype]:
            calls[name] = call
        else:  # Also what is not a number.
            refused[name] = f"it is {errors[name]:.1e} from 'streaming'"
    for name, reason in refused.items():
        print(f"Refused {name}, {case} {mode}: {reason}", flush=True)
    if not calls:
        raise RuntimeError(f"No blocks are right for {case} {mode}: {refused}")
    of_programs = _turns.time_in_turns(
        calls, config.repeats, config.budget_s, default, lambda name, result: None
    ).by_name
    times = {name: np.divide(x, config.calls) for name, x in of_programs.items()}
    medians = {name: float(np.median(x)) for name, x in times.items()}
    if not medians:
        raise RuntimeError(f"No blocks had enough memory for {case} {mode}.")
    best = min(medians, key=medians.__getitem__)
    low, high = np.percentile(times[best], [25, 75])
    return {
        "mode": mode,
        "shape_btnh": case.shape_btnh,
        "dtype": case.dtype,
        "num_iters": case.num_iters,
        "calls": config.calls,
        "blocks": dataclasses.asdict(by_name[best]),
        "is_default": best == default,
        "median_ms": medians[best],
        "iqr_ms": float(high - low),
        "repeats": len(times[best]),
        "ratio_to_default": (
            medians[best] / medians[default] if default in medians else None
        ),
        "max_rel_error": errors[best],
        "all_median_ms": medians,
        "refused": refused,
    }


def describe(blocks: Blocks) -> str:
    """Its fields as text, which names it among the others."""
    fields = dataclasses.asdict(blocks).items()
    return " ".join(f"{name}={value}" for name, value in fields)


def sentence(row: Mapping[str, Any]) -> str:
    """What was found, for a terminal."""
    _, tokens, heads, _ = row["shape_btnh"]
    ratio = _table.number(row["ratio_to_default"])
    return (
        f"{heads}x{tokens} {row['dtype']} {row['mode']}: "
        f"{' '.join(f'{k}={v}' for k, v in row['blocks'].items())}, "
        f"{_table.number(row['median_ms'])} ms, {ratio} of the default's, best of "
        f"{len(row['all_median_ms'])}"
    )


def _build(problem, blocks, case, mode, calls):
    """The compiled program, which returns when its results are there."""

    def following(result, query, key, value, cotangent):
        if mode == "forward":
            return result[0], key, value, cotangent
        out, grads = result
        return *grads, out

    fn = _program.in_mode(functools.partial(attend, problem, blocks), mode)
    fn = _program.repeated(fn, following, calls)
    shapes = [jax.ShapeDtypeStruct(case.shape_btnh, case.dtype)] * 4
    executable, _ = _program.compile_within_limits(fn, *shapes)
    return lambda *args: jax.block_until_ready(executable(*args))


def _expected(case, mode, inputs):
    stream = functools.partial(
        sinkhorn_attention, num_iters=case.num_iters, implementation="streaming"
    )
    wide = [x.astype("float32") for x in inputs]
    return jax.tree.map(np.asarray, jax.jit(_program.in_mode(stream, mode))(*wide))


def _error(got, expected) -> float:
    """The largest of all arrays, each relative to its largest entry."""

    def of_array(x, y):
        return float(abs(np.asarray(x).astype("float32") - y).max() / abs(y).max())

    # Not `max`, which may drop a NaN.
    return float(np.max(jax.tree.leaves(jax.tree.map(of_array, got, expected))))


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    run(_command.parse(Config, __doc__, args))


if __name__ == "__main__":
    main()
