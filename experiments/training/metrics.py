"""Metrics as JSON lines. They hold no times, so equal runs write equal files."""

import json
import os
import pathlib
from typing import Final

# The measures that are recorded with each validation, a number for every layer.
BY_LAYER: Final = ("relative_residual", "attention_entropy")


class MetricsLog:
    """A file to which one process appends records; the other processes write none."""

    def __init__(self, path: pathlib.Path, *, resumed_step: int, is_writer: bool):
        """Opens the file and drops what will be written again after `resumed_step`."""
        self._file = None
        if not is_writer:
            return
        records = read_metrics(path) if resumed_step else []
        # A run that was killed after its last checkpoint reads the test split again.
        kept = (
            r for r in records if r["step"] <= resumed_step and r["split"] != "test"
        )
        lines = [json.dumps(r) for r in kept]
        new = path.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        os.replace(new, path)
        self._file = path.open("a")

    def write(self, **record: float | int | str | list[float]) -> None:
        """Appends one line, which is kept even if the process is killed afterwards."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(path: pathlib.Path) -> list[dict]:
    """All complete lines of the file, without one that a killed process cut off."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
