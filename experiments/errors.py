"""Errors that say what to do end a command with one line."""

import contextlib
import pathlib
import sys
import traceback
from collections.abc import Iterator

_ROOT = pathlib.Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Ends the process with an error's message in place of its traceback.

    Raises:
        Exception: A defect, to which its traceback leads.
    """
    try:
        yield
    except Exception as error:
        if not _is_explained(error):
            raise
        sys.exit(f"error: {error}")


def _is_explained(error):
    # The messages of these packages' own errors, and those of the file system, say
    # what to do.
    *_, last = traceback.extract_tb(error.__traceback__)
    packages = ("experiments", "sinkhorn_jax")
    is_ours = any(
        pathlib.Path(last.filename).is_relative_to(_ROOT / p) for p in packages
    )
    return isinstance(error, OSError) or (is_ours and "raise " in (last.line or ""))
