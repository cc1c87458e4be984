"""Times the ways in which the GPU attention kernels can divide a head, on a GPU.

For each case of the sweep "gpu" and either mode, all candidate blocks take turns, as
programs do in the benchmark of attention. A program makes `CALLS` calls, each on the
result of the last one, so that a time hardly includes the start from Python. A row is
appended for each candidate, with its time or the reason why it was refused: it does not
compile or run, or its error is above `MOST_ERROR`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from sinkhorn_jax.attention._mosaic_gpu.attend import attend_in
from sinkhorn_jax.attention._mosaic_gpu.blocks import Blocks, kernel_dtypes
from sinkhorn_jax.attention._mosaic_gpu.heuristics import default_blocks
from sinkhorn_jax.attention._mosaic_gpu.refresh_groups import max_refresh_interval
from sinkhorn_jax.attention._problem import Operands, Problem

from . import programs
from .harness import accuracy, cases, machine, record, timing
from .harness.cases import Case
from .harness.program import MODES, Mode, compile_within_limits, in_mode, repeated
from .report import table

CLUSTERS: Final = (1, 2, 4, 8)
CALLS: Final = 10  # Calls in a program.
REPEATS: Final = 5  # Timed calls of each program, at least.
BUDGET_S: Final = 2.0  # Calls go on until a case and mode has taken these seconds.
# The kernels round the plan and its gradient to 8 or 11 bits.
MOST_ERROR: Final[Mapping[str, float]] = {"bfloat16": 1e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Cases to search."""

    cases: tuple[str, ...] = ()  # Heads x tokens of the sweep "gpu"; empty means all.
    dtypes: tuple[str, ...] = ()  # Empty means all.
    output: Path | None = None  # Rows are appended here; None: the device's folder.

    def __post_init__(self):
        cases.select([cases.GPU], self.cases, self.dtypes)


def run(config: Config) -> None:
    """Searches, appends a row for each candidate and prints those that ran.

    Raises:
        RuntimeError: JAX does not compute on a GPU.
    """
    machine.require("gpu", "The search for blocks")
    facts = machine.facts()
    output = config.output or record.path(facts, "blocks")
    for case in cases.select([cases.GPU], config.cases, config.dtypes):
        for mode in MODES:
            rows = search(case, mode)
            record.append(output, [row | facts for row in rows])
            timed = [row for row in rows if "median_ms" in row]
            timed.sort(key=lambda row: row["median_ms"])
            print(f"{case} {mode}, {len(timed)} of {len(rows)} candidates, by time:")
            print(table.plain(timed, ("median_ms", "ratio_to_default", "blocks")))
    print(f"Rows appended to {output}.")


def candidates(problem: Problem) -> Iterator[Blocks]:
    """Blocks to try, the default first. Not all of them fit into shared memory."""
    default = default_blocks(problem)
    yield default
    most = max(default.num_row_tiles, default.num_col_tiles)
    clusters = [size for size in CLUSTERS if size <= most]
    streamed = Blocks(
        num_row_tiles=default.num_row_tiles,
        num_col_tiles=default.num_col_tiles,
        regime="streamed",
    )
    found = [dataclasses.replace(streamed, cluster=size) for size in clusters]
    found.append(dataclasses.replace(streamed, keeps_query_block=False))
    if problem.options.num_iters:
        found += [
            dataclasses.replace(
                streamed,
                regime="resident",
                refresh_every=max_refresh_interval(problem),
                kernel_dtype=dtype,
                cluster=size,
                max_warpgroups=warpgroups,
            )
            for dtype, size, warpgroups in product(
                kernel_dtypes(problem), clusters, (1, 2, 4)
            )
        ]
    yield from (blocks for blocks in found if blocks != default)


def search(case: Case, mode: Mode) -> list[dict[str, Any]]:
    """A row for each candidate, without the facts of the machine."""
    inputs = cases.inputs(case)
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    want = accuracy.expected(case)
    for blocks in candidates(programs.problem(case)):
        name = str(blocks)
        rows[name] = row = {
            "mode": mode,
            **case.fields,
            "calls": CALLS,
            "blocks": dataclasses.asdict(blocks),
            "is_default": not rows,
            "refused": None,
        }
        # A compiler or a device may refuse in any way; the search goes on.
        try:
            call = functools.partial(build(blocks, case, mode), *inputs)
            outputs = jax.tree.map(np.asarray, call()[0])
            row["max_abs_error"] = accuracy.error(case, mode, outputs, want)
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            row["refused"] = f"{type(error).__name__}: {first_line}"
            continue
        if row["max_abs_error"] <= MOST_ERROR[case.dtype]:
            calls[name] = call
        else:  # Also a NaN.
            row["refused"] = f"its error is {row['max_abs_error']:.1e}"
    default = next(iter(rows))
    times = timing.time_in_turns(
        calls, REPEATS, BUDGET_S, default, lambda name, result: None
    )
    for name, reason in times.failures.items():
        rows[name]["refused"] = reason
    for name, milliseconds in times.by_name.items():
        rows[name] |= {
            **timing.summary(np.divide(milliseconds, CALLS)),
            "ratio_to_default": timing.ratio(milliseconds, times.by_name.get(default)),
        }
    return list(rows.values())


def build(blocks: Blocks, case: Case, mode: Mode) -> Any:
    """The compiled program of several calls, a function of `Inputs`."""
    problem = programs.problem(case)

    def attend(query, key, value):
        operands = dict.fromkeys(Operands._fields)
        operands |= {"query": query, "key": key, "value": value}
        return attend_in(problem, blocks, Operands(**operands))[0]

    def following(result, query, key, value, cotangent):
        if mode == "forward":
            return result[0], key, value, cotangent
        out, grads = result
        return *grads, out

    fn = repeated(in_mode(attend, mode), following, CALLS)
    shapes = [jax.ShapeDtypeStruct(case.shape_btnh, case.dtype)] * 4
    executable, _ = compile_within_limits(fn, *shapes)
    return lambda *args: jax.block_until_ready(executable(*args))
