"""Command lines, read by tyro."""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import Any

import tyro


def parse(config: Any, args: Sequence[str] | None, **fields: Any) -> Any:
    """The instance of `config` (a dataclass, or subcommands) that the arguments give.

    An unknown option ends the process with one line that names the nearest option.
    The other arguments are those of `tyro.cli`.
    """
    found, unknown = tyro.cli(config, args=args, return_unknown_args=True, **fields)
    if unknown:
        names = (x.name.replace("_", "-") for x in dataclasses.fields(found))
        options = [f"--{name}" for name in names]
        (nearest,) = difflib.get_close_matches(unknown[0], options, n=1, cutoff=0)
        sys.exit(f"error: no option {unknown[0]}; the nearest is {nearest}")
    return found
