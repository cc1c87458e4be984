"""The page of a device: every number, the figures, and what was not measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..harness import cases, machine
from ..harness.record import Row, Skip
from . import figures, table

METHOD: Final = (
    "Made by `python -m benchmarks` from standard normal inputs; `python -m benchmarks "
    "attention --help` says how it measures and what that does not show. Times are "
    "medians ± half the interquartile range. *x softmax* is the time over that of "
    "`jax.nn.dot_product_attention` in the same rounds, *x reference* the time over "
    "that of `reference`. *peak* is the memory of a call. JAX programs declare "
    "temporary memory, without inputs and results; with \\* it is the growth of the "
    "process's resident set, results included. "
    "*T·S* counts the T x S arrays that one head in flight allocates. These three are "
    "of forward + backward. Errors are against float64: the largest of the output, "
    "and of the gradients relative to their largest entries; `ott_implicit` "
    "differentiates the fixed point and not the iterations. Repeats are of forward / "
    "forward + backward. Bold is what `implementation=None` selects."
)


def folder(row: Row, results: Path) -> Path:
    """Folder with the rows, page and figures of the row's device."""
    return results / machine.directory_name(*row.machine)


def text(rows: Sequence[Row], skips: Sequence[Skip]) -> str:
    """The page in Markdown, from the newest rows and skips of one device."""
    parts = [
        "# Benchmarks",
        table.caption(rows),
        METHOD,
        *(f"![{alt}]({name})" for name, alt in figures.names(rows).items()),
    ]
    in_any = set()
    for sweep, in_sweep in cases.SWEEPS.items():
        in_any.update(in_sweep)
        if some := [row for case in in_sweep for row in rows if row.case == case]:
            title = "GPU" if sweep == cases.GPU else sweep.capitalize()
            parts += [f"## {title}", table.sweep(some)]
    if rest := [row for row in rows if row.case not in in_any]:
        parts += ["## Other cases", table.sweep(rest)]
    if skips:
        parts += ["## Not measured", _not_measured(skips)]
    return "\n\n".join(parts) + "\n"


def _not_measured(skips):
    # A line for each program and reason, with all cases for which it holds.
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
