"""The benchmark table of the README, made from the committed rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from . import _machine, _record, _table

README: Final = _machine.ROOT / "README.md"
BEGIN: Final = "<!-- benchmarks:begin -->"
END: Final = "<!-- benchmarks:end -->"


def block(rows: Sequence[_record.Row]) -> str:
    """What stands between the markers.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError(
            f"There are no rows below {_record.RESULTS}, so there is no table to make. "
            "Record some with python -m benchmarks."
        )
    return f"\n{_table.markdown(rows)}\n"


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
    """Rewrites the block of the file."""
    text = readme.read_text(encoding="utf-8")
    new = with_block(text, block(_record.read(results)))
    readme.write_text(new, encoding="utf-8")


def is_current(readme: Path = README, results: Path = _record.RESULTS) -> bool:
    """Whether the file says what the rows give."""
    text = readme.read_text(encoding="utf-8")
    return text == with_block(text, block(_record.read(results)))
