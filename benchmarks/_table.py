"""Rows as a table: aligned for a terminal, Markdown for the README."""

from collections.abc import Iterable, Sequence

from ._record import Row

MISSING = "-"
LEGEND = (
    "± is half the interquartile range; x softmax is time over that of "
    "`jax.nn.dot_product_attention`. Peak temporary memory, T·S arrays that live for "
    "one head in flight, and the ratio to `reference` are of forward + backward. "
    "Errors are against float64: the largest of the output, and of the gradients "
    "relative to their largest entries."
)


def aligned(rows: Sequence[Row]) -> str:
    """One line a row, all numbers."""
    header = (
        *("heads x tokens", "mode", "implementation", "median ms", "iqr ms", "repeats"),
        *("x softmax", "x faster than reference", "tokens/s", "peak MiB"),
        *("one head MiB", "T*S arrays per head", "error", "compile ms"),
    )
    lines = [header]
    for row in rows:
        lines.append(
            (
                _case(row),
                row.mode,
                row.implementation,
                _number(row.median_ms),
                _number(row.iqr_ms),
                str(row.repeats),
                f"{row.ratio_to_softmax:.2f}",
                _number(_faster_than_reference(row, rows)),
                f"{row.tokens_per_second:.3g}",
                _number(row.peak_mib),
                _number(row.one_head_mib),
                _number(row.ts_arrays_per_head),
                f"{row.max_abs_error:.1e}",
                f"{row.compile_ms:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    num_text = 3  # Left-aligned columns.
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Row]) -> str:
    """A section for each device, dtype and number of iterations: its newest run."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        group = (row.platform, row.device, row.num_cpus, row.dtype, row.num_iters)
        groups.setdefault(group, []).append(row)
    sections = []
    for _, group in sorted(groups.items()):
        newest = max(row.date for row in group)
        sections.append(_section([row for row in group if row.date == newest]))
    return "\n\n".join([*sections, LEGEND])


def _section(rows):
    one = rows[0]
    device = (
        f"{one.device}, {one.num_cpus} cores" if one.platform == "cpu" else one.device
    )
    lines = [
        f"**{device}**, {one.dtype}, {one.num_iters} iterations, "
        f"jax {one.jax_version}, commit `{one.commit}`, {one.date[:10]}",
        "",
        _line(
            *("heads x tokens", "implementation", "forward, ms", "x softmax"),
            *("forward + backward, ms", "x softmax", "faster than `reference`"),
            *("peak, MiB", "T·S arrays per head", "error forward", "gradient"),
        ),
        _line(*["---"] * 2, *["---:"] * 9),
    ]
    by_line: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_line.setdefault((_case(row), row.implementation), {})[row.mode] = row
    for (case, implementation), modes in by_line.items():
        forward, both = modes.get("forward"), modes.get("forward_backward")
        lines.append(
            _line(
                case,
                f"`{implementation}`",
                *_time_and_ratio(forward),
                *_time_and_ratio(both),
                _number(both and _faster_than_reference(both, rows)),
                _number(both and both.peak_mib),
                _number(both and both.ts_arrays_per_head),
                *(
                    f"{row.max_abs_error:.1e}" if row else MISSING
                    for row in (forward, both)
                ),
            )
        )
    return "\n".join(lines)


def _time_and_ratio(row):
    if row is None:
        return MISSING, MISSING
    time = f"{_number(row.median_ms)} ± {_number(row.iqr_ms / 2)}"
    return time, f"{row.ratio_to_softmax:.2f}"


def _faster_than_reference(row: Row, rows: Iterable[Row]) -> float | None:
    same = (row.mode, row.shape_btnh, row.date)
    for other in rows:
        is_same = (other.mode, other.shape_btnh, other.date) == same
        if is_same and other.implementation == "reference":
            return other.median_ms / row.median_ms
    return None


def _case(row):
    _, t, n, _ = row.shape_btnh
    return f"{n}x{t}"


def _number(x):
    if x is None:
        return MISSING
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _line(*cells):
    return f"| {' | '.join(cells)} |"
