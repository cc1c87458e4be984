"""Parts of an experiment, each in a file of its own until the whole is written."""

import fcntl
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from . import files as record


class Cells:
    """A folder of results, which an interrupted experiment finds again.

    A context: when its block ends without an error, all of it is in the experiment's
    own files, and the folder is removed. Within it no other run may use the folder.
    """

    def __init__(self, output: pathlib.Path, setting: Mapping[str, Any]):
        """Nothing is there yet: entering makes the folder.

        Args:
            output: Of the experiment.
            setting: What the results depend on beside their names. Those of other
                settings are computed again.
        """
        self._output = output
        self._folder = output / "cells"
        self._setting = json.loads(json.dumps(setting))

    def __enter__(self) -> "Cells":
        """Makes the folder, for this run alone.

        Raises:
            BlockingIOError: Another run uses it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # The lock goes with the process, also where that is killed.
        self._lock = os.open(self._output, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise BlockingIOError(
                f"Another run writes to {self._output}. Wait until it ends, or give "
                "another output."
            ) from None
        return self

    def __exit__(self, kind, error, traceback):
        """Removes the folder, where there is no error."""
        if kind is None:
            shutil.rmtree(self._folder)
        os.close(self._lock)

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of that name, computed and written if it is not there.

        Args:
            name: Of the file.
            compute: Returns what JSON can hold.

        Returns:
            What the file holds: the result, with the commit that it is from and the
            seconds that it took.
        """
        path = self._folder / f"{name}.json"
        cell = _read(path)
        if cell is not None and cell["setting"] == self._setting:
            return cell["result"]
        start = time.monotonic()
        result = compute() | {
            "commit": record.environment()["commit"],
            "wall_time_s": round(time.monotonic() - start, 1),
        }
        record.write_json(path, {"setting": self._setting, "result": result})
        return json.loads(path.read_text())["result"]


def _read(path):
    # A file is replaced as a whole, but a power cut may leave it empty.
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
