"""Parts of an experiment, each in a file of its own until the whole is written."""

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from . import record


class Cells:
    """A folder of results, which an interrupted experiment finds again."""

    def __init__(self, output: pathlib.Path, setting: Mapping[str, Any]):
        """Makes the folder.

        Args:
            output: Of the experiment.
            setting: What the results depend on beside their names. Those of other
                settings are computed again.
        """
        self._folder = output / "cells"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._setting = json.loads(json.dumps(setting))

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
        if path.exists():
            cell = json.loads(path.read_text())
            if cell["setting"] == self._setting:
                return cell["result"]
        start = time.monotonic()
        result = compute() | {
            "commit": record.environment()["commit"],
            "wall_time_s": round(time.monotonic() - start, 1),
        }
        record.write_json(path, {"setting": self._setting, "result": result})
        return json.loads(path.read_text())["result"]

    def clear(self) -> None:
        """Removes the folder, when all of it is in the experiment's own file."""
        shutil.rmtree(self._folder)
