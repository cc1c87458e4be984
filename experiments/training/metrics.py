"""Metrics as JSON lines: no times, so that equal runs write equal files."""

import json
import os
import pathlib


class MetricsLog:
    """Appends records; on one process only, the others keep silent."""

    def __init__(self, path: pathlib.Path, *, resumed_step: int, is_writer: bool):
        """Opens the file, without what will be written again after `resumed_step`."""
        self._file = None
        if not is_writer:
            return
        records = read_metrics(path) if resumed_step else []
        # The test split is read after the last step, of which there is a checkpoint.
        kept = (
            r for r in records if r["step"] <= resumed_step and r["split"] != "test"
        )
        lines = [json.dumps(r) for r in kept]
        new = path.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        os.replace(new, path)
        self._file = path.open("a")

    def write(self, **record: float | int | str) -> None:
        """One line, on disk when this returns even if the process then dies."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(path: pathlib.Path) -> list[dict]:
    """All whole lines of the file; what a killed process left of one is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
