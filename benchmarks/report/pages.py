"""The page of a device: every number, the plots, and what was not measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..harness import cases as _cases
from ..harness import machine as _machine
from ..harness.record import Row, Skip
from . import plots as _plots
from . import table as _table

PAGE: Final = "README.md"
METHOD: Final = (
    "All programs of a case take turns on the same arrays, each after one untimed "
    "call, until its result is ready. ± is half the interquartile range. *x softmax* "
    "is the median over that of `jax.nn.dot_product_attention` in the same rounds. "
    "*faster* is the time of `reference` over this one, and memory is the peak of a "
    "call: both of forward + backward. JAX programs declare temporary memory, without "
    "inputs and results; with \\* it is the growth of the process's resident set, and "
    "with † of PyTorch's allocator, results included. *T·S* counts the T x S arrays "
    "that live for one head in flight. Errors are against float64: the largest of the "
    "output, and of the gradients relative to their largest entries; `ott_implicit` "
    "differentiates the fixed point and not the iterations. Repeats are of forward / "
    "forward + backward. Bold is what `implementation=None` takes.\n\n"
    "Made from standard normal inputs by `python -m benchmarks`, whose `--help` says "
    "more, also what this does not show."
)
MARKS: Final = {"compiled": "", "resident": "\\*", "allocator": "†"}


def folder(row: Row, results: Path) -> Path:
    """Where the rows, page and plots of the row's device are."""
    return results / _machine.directory_name(*row.machine)


def page(rows: Sequence[Row], skips: Sequence[Skip]) -> str:
    """Markdown, from the newest rows and skips of one device."""
    parts = [
        "# Benchmarks",
        _table.caption(rows),
        METHOD,
        *(f"![{alt}]({name})" for name, alt in _plots.names(rows).items()),
    ]
    for sweep, cases in _cases.SWEEPS.items():
        in_sweep = [row for case in cases for row in rows if row.case == case]
        if in_sweep:
            title = sweep.upper() if sweep in _cases.BY_PLATFORM else sweep.capitalize()
            parts += [f"## {title}", _sweep_table(in_sweep)]
    in_any = {case for cases in _cases.SWEEPS.values() for case in cases}
    if rest := [row for row in rows if row.case not in in_any]:
        parts += ["## Other cases", _sweep_table(rest)]
    if skips:
        parts += ["## Not measured", _not_measured(skips)]
    return "\n\n".join(parts) + "\n"


def _sweep_table(rows):
    by_line: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        by_line.setdefault((row.case, row.implementation), {})[row.mode] = row
    lines = []
    for (case, name), modes in by_line.items():
        forward, both = modes.get("forward"), modes.get("forward_backward")
        one = forward or both
        lines.append(
            (
                case.name,
                case.dtype,
                str(case.num_iters),
                f"**`{name}`**" if one.is_default else f"`{name}`",
                *_time_and_ratio(forward),
                *_time_and_ratio(both),
                _table.number(both and _table.faster_than_reference(both, rows)),
                _memory(both),
                _table.number(both and both.ts_arrays_per_head),
                *(
                    f"{row.max_abs_error:.1e}" if row else _table.MISSING
                    for row in (forward, both)
                ),
                " / ".join(
                    str(row.repeats) if row else _table.MISSING
                    for row in (forward, both)
                ),
            )
        )
    header = (
        *("heads x tokens", "dtype", "iterations", "program", "forward, ms"),
        *("x softmax", "forward + backward, ms", "x softmax", "faster", "peak, MiB"),
        *("T·S", "error forward", "gradient", "repeats"),
    )
    return _table.markdown(header, lines, num_text=4)


def _time_and_ratio(row):
    if row is None:
        return _table.MISSING, _table.MISSING
    time = f"{_table.number(row.median_ms)} ± {_table.number(row.iqr_ms / 2)}"
    return time, _table.ratio(row)


def _memory(row):
    if row is None or row.peak_mib is None:
        return _table.MISSING
    return _table.number(row.peak_mib) + MARKS[row.memory_source]


def _not_measured(skips):
    # A line for each program and reason, with all the places where it holds.
    by_reason: dict[tuple[str, str], list[str]] = {}
    for skip in skips:
        mode = skip.mode.replace("_", " + ")
        by_reason.setdefault((skip.implementation, skip.reason), []).append(
            f"{skip.case} {mode}"
        )
    return "\n".join(
        f"* `{name}`: {reason}. ({'; '.join(places)})"
        for (name, reason), places in sorted(by_reason.items())
    )
