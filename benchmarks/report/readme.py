"""The benchmarks' part of the README and the pages it links, from committed rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .. import programs as _programs
from ..harness import cases as _cases
from ..harness import machine as _machine
from ..harness import record as _record
from ..harness.cases import Case
from ..harness.program import MODES
from ..harness.record import Row
from . import findings as _findings
from . import pages as _pages
from . import plots as _plots
from . import table as _table

README: Final = _machine.ROOT / "README.md"
BEGIN: Final = "<!-- benchmarks:begin -->"
END: Final = "<!-- benchmarks:end -->"
# Those whose columns say most in little space; the pages have all.
SHOWN: Final = (
    *_cases.SWEEPS["heads"],
    *(Case(2, 8192), Case(2, 16384)),
    *_cases.select(["gpu"], dtypes=["bfloat16"]),
)
LEGEND: Final = (
    "`softmax` is `jax.nn.dot_product_attention` and in ms; the others are multiples "
    "of it. Forward / forward + backward; **bold** is what `implementation=None` takes."
)


def block(rows: Sequence[Row], results: Path = _record.RESULTS) -> str:
    """What stands between the markers.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError(
            f"There are no rows below {results}, so there is no table to make. "
            "Record some with python -m benchmarks."
        )
    parts, plots = [], []
    for of_device in _devices(rows):
        name = _machine.directory_name(*of_device[0].machine)
        link = f"benchmarks/results/{name}"
        for dtype in dict.fromkeys(case.dtype for case in SHOWN):
            cases = [case for case in SHOWN if case.dtype == dtype]
            shown = [row for row in of_device if row.case in cases]
            if shown:
                iterations = f"{shown[0].num_iters} iterations"
                parts += [
                    f"{_table.caption(shown)}, {dtype}, {iterations} "
                    f"([every number, and what was left out]({link}/{_pages.PAGE}))",
                    _ratios(shown),
                    _findings.sentences(shown),
                ]
        if of_device[0].platform == "cpu":
            plots += [
                f"![{alt}]({link}/{file})"
                for file, alt in _plots.names(of_device).items()
            ]
    return "\n" + "\n\n".join(x for x in (*parts, LEGEND, *plots) if x) + "\n"


def with_block(text: str, new: str) -> str:
    """The text with `new` between its markers.

    Raises:
        ValueError: The text does not have each marker once, in order.
    """
    if (
        text.count(BEGIN) != 1
        or text.count(END) != 1
        or text.find(END) < text.find(BEGIN)
    ):
        raise ValueError(
            f"The README must have one line {BEGIN} and after it one line {END}, got "
            f"{text.count(BEGIN)} and {text.count(END)}. The table goes between them."
        )
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{new}{END}{after}"


def update(readme: Path = README, results: Path = _record.RESULTS) -> None:
    """Rewrites the block, and the page and plots of every device."""
    for path, text in _texts(readme, results).items():
        path.write_text(text, encoding="utf-8")
    for rows in _devices(_record.read(results)):
        _plots.draw(rows, _pages.folder(rows[0], results))


def is_current(readme: Path = README, results: Path = _record.RESULTS) -> bool:
    """Whether the files say what the rows give, and the plots are there."""
    plots = [
        _pages.folder(rows[0], results) / name
        for rows in _devices(_record.read(results))
        for name in _plots.names(rows)
    ]
    return all(path.exists() for path in plots) and all(
        path.exists() and path.read_text(encoding="utf-8") == text
        for path, text in _texts(readme, results).items()
    )


def _texts(readme, results):
    rows, skips = _record.read(results), _record.read_skips(results)
    text = readme.read_text(encoding="utf-8")
    texts = {readme: with_block(text, block(rows, results))}
    newest_skips = _record.newest(skips, rows)
    for of_device in _devices(rows):
        machine = of_device[0].machine
        texts[_pages.folder(of_device[0], results) / _pages.PAGE] = _pages.page(
            of_device, [skip for skip in newest_skips if skip.machine == machine]
        )
    return texts


def _devices(rows):
    """The newest rows of each device, CPUs first."""
    by_machine: dict[tuple, list[Row]] = {}
    for row in _record.newest(rows, rows):
        by_machine.setdefault(row.machine, []).append(row)
    return [by_machine[x] for x in sorted(by_machine, key=lambda x: (x[1], x))]


def _ratios(rows):
    by_case: dict[Case, dict[tuple[str, str], Row]] = {}
    for row in rows:
        key = (row.implementation, row.mode)
        by_case.setdefault(row.case, {})[key] = row
    names = _in_order({row.implementation for row in rows})
    lines = [
        (case.name, *(_cell(by_case[case], name) for name in names))
        for case in SHOWN
        if case in by_case
    ]
    return _table.markdown(("heads x tokens", *(f"`{x}`" for x in names)), lines)


def _cell(of_case, name):
    rows = [of_case.get((name, mode)) for mode in MODES]
    if not any(rows):
        return _table.MISSING
    text = " / ".join(
        _table.MISSING
        if row is None
        else _table.number(row.median_ms)
        if name == _programs.SOFTMAX
        else _table.ratio(row)
        for row in rows
    )
    return f"**{text}**" if any(row and row.is_default for row in rows) else text


def _in_order(names):
    known = [_programs.SOFTMAX, *_programs.names()]
    return [x for x in known if x in names] + sorted(names - set(known))
