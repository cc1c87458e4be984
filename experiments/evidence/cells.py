"""Parts of an experiment, each in a file of its own until the whole is written."""

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import filelock

from . import files


class Cells:
    """A folder of partial results, in which an interrupted experiment continues.

    A context manager: when its block ends without an error, the experiment has written
    its own files, and the folder is removed. No other run may use the folder meanwhile.
    """

    def __init__(self, output: pathlib.Path, setting: Mapping[str, Any]):
        """Names the folder, inside that of the experiment's results.

        The partial results depend on `setting` and their names alone; those of another
        setting are computed again.
        """
        self._output = output
        self._folder = output / "cells"
        self._lock = filelock.FileLock(self._folder / ".lock", blocking=False)
        self._setting = json.loads(json.dumps(setting, default=str))

    def __enter__(self) -> "Cells":
        """Makes the folder and locks it for this run.

        Raises:
            BlockingIOError: Another run uses it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise BlockingIOError(
                f"Another run writes to {self._output}. Wait until it ends, or give "
                "another output."
            ) from None
        return self

    def __exit__(self, kind, error, traceback):
        """Removes the folder if there is no error, and unlocks it."""
        if kind is None:
            shutil.rmtree(self._folder)
        self._lock.release()

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The partial result of a name, the stem of its file, which is computed once.

        `compute` returns what JSON can hold. The commit at which it was computed and
        the seconds that it took are added.
        """
        path = self._folder / f"{name}.json"
        cell = _read(path)
        if cell is not None and cell["setting"] == self._setting:
            return cell["result"]
        start = time.monotonic()
        result = compute() | {
            "commit": files.environment()["commit"],
            "wall_time_s": round(time.monotonic() - start, 1),
        }
        files.write_json(path, {"setting": self._setting, "result": result})
        return json.loads(path.read_text())["result"]


def _read(path):
    # A file is replaced as a whole, but a power cut may leave it empty.
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
