"""Rows as a table: aligned for a terminal, and the cells that all tables share."""

from collections.abc import Iterable, Sequence

from ..harness.record import Row

MISSING = "-"


def aligned(rows: Sequence[Row]) -> str:
    """One line a row, all numbers."""
    header = (
        *("heads x tokens", "dtype", "iterations", "mode", "implementation"),
        *("median ms", "iqr ms", "repeats", "x softmax", "x faster than reference"),
        *("tokens/s", "peak MiB", "one head MiB", "T*S arrays per head"),
        *("error", "compile ms"),
    )
    lines = [header]
    for row in rows:
        lines.append(
            (
                row.case.name,
                row.dtype,
                str(row.num_iters),
                row.mode,
                row.implementation,
                number(row.median_ms),
                number(row.iqr_ms),
                str(row.repeats),
                ratio(row),
                number(faster_than_reference(row, rows)),
                f"{row.tokens_per_second:.3g}",
                number(row.peak_mib),
                number(row.one_head_mib),
                number(row.ts_arrays_per_head),
                f"{row.max_abs_error:.1e}",
                f"{row.compile_ms:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    num_text = 5  # Left-aligned columns.
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], num_text=1) -> str:
    """A Markdown table; the first `num_text` columns are left-aligned."""
    rule = ["---"] * num_text + ["---:"] * (len(header) - num_text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def caption(rows: Sequence[Row]) -> str:
    """Device, versions, commits and days of the rows."""
    one = rows[-1]
    cores = f", {one.num_cpus} cores" if one.platform == "cpu" else ""
    jax_versions = [f"jax {x}" for x in _distinct(row.jax_version for row in rows)]
    commits = [f"commit `{x}`" for x in _distinct(row.commit for row in rows)]
    versions = jax_versions + _distinct(row.version for row in rows if row.version)
    days = _distinct(row.date[:10] for row in rows)
    return f"**{one.device}{cores}**, " + ", ".join([*versions, *commits, *days])


def ratio(row: Row) -> str:
    """Over softmax, of times."""
    if row.ratio_to_softmax is None:
        return MISSING
    return f"{row.ratio_to_softmax:.{2 if row.ratio_to_softmax < 10 else 1}f}"


def faster_than_reference(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times, in the same run; None without a row of `reference`."""
    same = (row.machine, row.mode, row.case, row.date)
    for other in rows:
        is_same = (other.machine, other.mode, other.case, other.date) == same
        if is_same and other.implementation == "reference":
            return other.median_ms / row.median_ms
    return None


def number(x: float | None) -> str:
    """Three digits, or all before the point."""
    if x is None:
        return MISSING
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _distinct(items):
    return list(dict.fromkeys(items))
