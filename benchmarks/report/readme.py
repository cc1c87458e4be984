"""The README's speed section and the pages of all devices, from committed rows."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from .. import programs
from ..harness import machine, record
from ..harness.cases import Case
from ..harness.program import MODES
from ..harness.record import Row
from . import figures, page, table

BEGIN: Final = "<!-- benchmarks:begin -->"
END: Final = "<!-- benchmarks:end -->"
SHOWN: Final = (Case(96, 197), Case(16, 1024), Case(2, 4096), Case(2, 16384))
OTHER: Final = "best other Sinkhorn"
# A column shows the fastest program of which its function is true.
COLUMNS: Final[Mapping[str, Callable[[Row], bool]]] = MappingProxyType(
    {
        "softmax, ms": lambda row: row.implementation == programs.SOFTMAX,
        "default": lambda row: row.is_default,
        "`reference`": lambda row: row.implementation == "reference",
        "PyTorch softmax": lambda row: row.implementation == "torch_softmax",
        # Only peers have a version.
        OTHER: lambda row: (
            bool(row.version) and programs.is_sinkhorn(row.implementation)
        ),
    }
)
LEGEND: Final = (
    "Forward / forward + backward, float32, 10 iterations. Softmax is "
    "`jax.nn.dot_product_attention`; the other columns are multiples of its time."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Files to write."""

    readme: Path = machine.ROOT / "README.md"
    results: Path = record.RESULTS


def run(config: Config) -> None:
    """Rewrites the README's section, and the page and figures of every device."""
    for path, text in texts(config).items():
        path.write_text(text, encoding="utf-8")
    for rows in _devices(record.read(config.results)):
        figures.draw(rows, page.folder(rows[0], config.results))


def texts(config: Config) -> dict[Path, str]:
    """Content of the README and of the page of every device, by path.

    Raises:
        ValueError: There are no rows, or the README lacks the markers.
    """
    rows = record.read(config.results)
    if not rows:
        raise ValueError(
            f"There are no rows below {config.results}, so there is no table to make. "
            "Record some with python -m benchmarks."
        )
    skips = record.newest(record.read_skips(config.results), rows)
    text = config.readme.read_text(encoding="utf-8")
    found = {config.readme: with_section(text, section(rows))}
    for some in _devices(rows):
        path = page.folder(some[0], config.results) / "README.md"
        found[path] = page.text(
            some, [x for x in skips if x.machine == some[0].machine]
        )
    return found


def section(rows: Sequence[Row]) -> str:
    """The text between the README's markers: a small table for each device."""
    parts = []
    for some in _devices(rows):
        link = f"benchmarks/results/{machine.directory_name(*some[0].machine)}"
        shown = [row for row in some if row.case in SHOWN]
        caption = table.caption([row for row in shown or some if not row.version])
        parts += [f"{caption} ([every number]({link}/README.md))."]
        if shown:
            parts += [_small_table(shown)]
    return "\n" + "\n\n".join([*parts, LEGEND]) + "\n"


def with_section(
    text: str, new: str, begin: str = BEGIN, end: str = END, name: str = "The README"
) -> str:
    """The text of a page with `new` between two of its markers.

    Raises:
        ValueError: The text does not contain each marker once, in order.
    """
    pattern = re.compile(f"(?<={begin}).*?(?={end})", re.S)
    if (text.count(begin), text.count(end), len(pattern.findall(text))) != (1, 1, 1):
        raise ValueError(
            f"{name} must have one line {begin} and after it one line {end}: the "
            "table goes between them."
        )
    return pattern.sub(lambda _: new, text)


def _devices(rows):
    """The newest rows of each device, CPUs first."""
    by_machine: dict[tuple, list[Row]] = {}
    for row in record.newest(rows, rows):
        by_machine.setdefault(row.machine, []).append(row)
    return [by_machine[x] for x in sorted(by_machine, key=lambda x: (x[1], x))]


def _small_table(rows):
    lines = []
    for case in SHOWN:
        cells = [case.name]
        for column, is_in_column in COLUMNS.items():
            some = [row for row in rows if row.case == case and is_in_column(row)]
            fastest = [
                min(
                    (row for row in some if row.mode == mode),
                    key=lambda row: row.median_ms,
                    default=None,
                )
                for mode in MODES
            ]
            cell = " / ".join(_number(row) for row in fastest)
            names = dict.fromkeys(f"`{row.implementation}`" for row in fastest if row)
            if names and column == OTHER:
                cell += f" ({', '.join(names)})"
            cells.append(cell)
        lines.append(cells)
    return table.markdown(("heads x tokens", *COLUMNS), lines)


def _number(row):
    if row is None:
        return table.MISSING
    if row.implementation == programs.SOFTMAX:
        return table.number(row.median_ms)
    return table.ratio(row.ratio_to_softmax)
