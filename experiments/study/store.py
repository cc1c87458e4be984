"""The cells of the study on disk. Several processes may compute them together."""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import filelock

from ..evidence import files
from .cell import Cell


class Store:
    """A folder with one JSON for each cell."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell; None if it was not computed with this setting."""
        try:
            found = json.loads((self._folder / f"{cell.name}.json").read_text())
        except (
            FileNotFoundError,
            json.JSONDecodeError,
        ):  # A power cut leaves it empty.
            return None
        setting = json.loads(json.dumps(cell.setting))
        return found["result"] if found["setting"] == setting else None

    def compute(
        self, cells: Sequence[Cell], compute: Callable[[Cell], dict[str, Any]]
    ) -> list[Cell]:
        """Computes what is missing, and returns the cells that other processes compute.

        Run the same command once for each core: a process leaves alone what another one
        has begun.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        busy = []
        for number, cell in enumerate(cells, start=1):
            if self.get(cell) is not None:
                continue
            path = self._folder / f".{cell.name}.lock"
            lock = filelock.FileLock(path, blocking=False)
            try:
                lock.acquire()
            except filelock.Timeout:
                busy.append(cell)
                continue
            try:
                if self.get(cell) is None:
                    print(f"[{number}/{len(cells)}] {cell.name}", file=sys.stderr)
                    self._write(cell, compute)
            finally:
                lock.release()
            path.unlink(missing_ok=True)
        return [cell for cell in busy if self.get(cell) is None]

    def _write(self, cell, compute):
        start = time.monotonic()
        result = compute(cell) | {
            "environment": files.environment(),
            "wall_time_s": round(time.monotonic() - start, 1),
        }
        content = {"setting": cell.setting, "result": result}
        files.write_json(self._folder / f"{cell.name}.json", content)
