"""Tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ..harness.record import Row

MISSING: Final = "-"
# Marks of how memory was found; see `Row.memory_source`.
MARKS: Final = {"compiled": "", "resident": "\\*"}
HEADER: Final = (
    *("heads x tokens", "dtype", "iterations", "program", "forward, ms", "x softmax"),
    *("forward + backward, ms", "x softmax", "x reference", "peak, MiB", "T·S"),
    *("error forward", "gradient", "repeats"),
)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], num_text=1) -> str:
    """A Markdown table whose first `num_text` columns are left-aligned."""
    rule = ["---"] * num_text + ["---:"] * (len(header) - num_text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def plain(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Some columns of rows as a Markdown table."""
    show = lambda x: number(x) if isinstance(x, float) else str(x)
    lines = [[show(row.get(column, MISSING)) for column in columns] for row in rows]
    return markdown(columns, lines)


def sweep(rows: Sequence[Row]) -> str:
    """The rows as a table: a line for each case and program, both modes in it."""
    return markdown(HEADER, _lines(rows), num_text=4)


def narrow(rows: Sequence[Row]) -> str:
    """A table for each case in plain text: programs, their times and memory alone."""
    tables: dict[tuple, list] = {}
    for line in _lines(rows):
        tables.setdefault(line[:3], []).append(_narrow(line))
    return "\n\n".join(
        f"{size} {dtype}, {num_iters} iterations\n"
        + _aligned([_narrow(HEADER), *lines])
        for (size, dtype, num_iters), lines in tables.items()
    )


def _narrow(line):
    plain = lambda cell: cell.replace("`", "").replace("\\", "")
    return tuple(map(plain, (*line[3:8], line[9])))


def _aligned(lines):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _lines(rows):
    by_line: dict[tuple, dict[str, Row]] = {}
    reference: dict[tuple, float] = {}
    for row in rows:
        by_line.setdefault((row.case, row.implementation), {})[row.mode] = row
        if row.implementation == "reference":
            reference[row.case, row.mode] = row.median_ms
    lines = []
    for (case, name), modes in by_line.items():
        forward, both = modes.get("forward"), modes.get("forward_backward")
        x_reference = None
        if both and (case, both.mode) in reference:
            x_reference = both.median_ms / reference[case, both.mode]
        lines.append(
            (
                *(case.name, case.dtype, str(case.num_iters)),
                f"**`{name}`**" if (forward or both).is_default else f"`{name}`",
                *_time_and_ratio(forward),
                *_time_and_ratio(both),
                number(x_reference),
                number(both and both.peak_mib) + MARKS[(both or forward).memory_source],
                number(both and both.ts_arrays_per_head),
                *(f"{x.max_abs_error:.1e}" if x else MISSING for x in (forward, both)),
                " / ".join(str(x.repeats) if x else MISSING for x in (forward, both)),
            )
        )
    return lines


def caption(rows: Sequence[Row]) -> str:
    """Device, versions, commits and days of the rows, in one line."""
    one = rows[-1]
    cores = f", {one.num_cpus} cores" if one.platform == "cpu" else ""
    parts = [f"jax {row.jax_version}" for row in rows]
    parts += [row.version for row in rows if row.version]
    parts += [f"commit `{row.commit}`" for row in rows]
    parts += [row.date[:10] for row in rows]
    return f"**{one.device}{cores}**, " + ", ".join(dict.fromkeys(parts))


def ratio(x: float | None) -> str:
    """A ratio with two decimals, or one from 10 on."""
    return MISSING if x is None else f"{x:.{2 if x < 10 else 1}f}"


def number(x: float | None) -> str:
    """Three digits, or all digits before the point."""
    if x is None:
        return MISSING
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _time_and_ratio(row):
    if row is None:
        return MISSING, MISSING
    time = f"{number(row.median_ms)} ± {number(row.iqr_ms / 2)}"
    return time, ratio(row.ratio_to_softmax)
