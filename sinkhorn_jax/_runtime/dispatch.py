"""Tables of implementations, and the selection from them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Implementation(NamedTuple):
    """One line of a table."""

    run: Any  # The function, or a tuple of functions, that computes.
    why_not: Callable[[Any], str | None]  # A reason, or None if it can run the problem.
    prefer: Callable[[Any, str], bool]  # Take it unasked on this platform?


def select(table: Mapping[str, Implementation], name: str | None, problem: Any) -> Any:
    """`run` of the named entry, or of the first that can run and is preferred."""
    if name is None:
        platform = jax.default_backend()
        return next(
            entry.run
            for entry in table.values()
            if entry.why_not(problem) is None and entry.prefer(problem, platform)
        )
    if not isinstance(name, str) or name not in table:
        raise ValueError(
            f"Unknown implementation {name!r}; expected None or one of {list(table)}."
        )
    reason = table[name].why_not(problem)
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r} cannot run here: {reason}.")
    return table[name].run
