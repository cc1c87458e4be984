"""What the README says about the peers, in sentences made from the rows."""

from collections.abc import Mapping, Sequence
from typing import Final

from .. import programs as _programs
from ..harness.record import Row
from . import table as _table

# Softmax attention that JAX does not take when called plainly, and whose it is.
FUSED: Final[Mapping[str, str]] = {
    "cudnn_softmax": "cuDNN's",
    "torch_softmax": "PyTorch's fused",
}


def sentences(rows: Sequence[Row]) -> str:
    """Where another library is the faster one, if it is; empty without peers."""
    at = {(row.case, row.mode, row.implementation): row for row in rows}
    found = (_sinkhorn(rows, at), *(_softmax(at, name) for name in FUSED))
    return " ".join(sentence for sentence in found if sentence)


def _sinkhorn(rows, at):
    defaults = {(row.case, row.mode): row for row in rows if row.is_default}
    peers = [
        row
        for row in rows
        if row.version  # Only peers' rows have one.
        and _programs.is_sinkhorn(row.implementation)
        and (row.case, row.mode) in defaults
    ]
    if not peers:
        return ""
    wins = []
    for row in peers:
        default = defaults[row.case, row.mode]
        if row.median_ms < default.median_ms:
            mode = row.mode.replace("_", " + ")
            wins.append(
                f"`{row.implementation}` at {row.case.name} {mode}, "
                f"{_table.number(row.median_ms)} against "
                f"{_table.number(default.median_ms)} ms"
            )
    if not wins:
        return "No other library's Sinkhorn is faster than the default in this table."
    return f"Another library's Sinkhorn is faster than the default: {'; '.join(wins)}."


def _softmax(at, fused):
    ratios = [
        softmax.median_ms / at[case, mode, fused].median_ms
        for (case, mode, name), softmax in at.items()
        if name == _programs.SOFTMAX and (case, mode, fused) in at
    ]
    num_faster = sum(x > 1 for x in ratios)
    if not num_faster:
        return ""
    return (
        f"{FUSED[fused]} softmax attention is faster than JAX's in "
        f"{num_faster} of {len(ratios)} entries, by up to {max(ratios):.1f} times, "
        "so the same times are larger multiples of it."
    )
