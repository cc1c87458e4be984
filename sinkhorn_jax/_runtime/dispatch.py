"""Tables of implementations, and the selection from them."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class Implementation(NamedTuple):
    """One line of a table: a module, which is imported when it is chosen.

    The module defines the functions that compute, and `why_not(problem)`: the reason
    why it cannot run the problem, or None. Where it may be taken unasked, it also
    defines `prefer(problem)`: whether it should be.
    """

    module: str
    # The platforms on which it may be taken unasked; None for all. Elsewhere it is not
    # even imported: Pallas' GPU module needs more than JAX installs.
    platforms: tuple[str, ...] | None = None

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


def preferred(
    table: Mapping[str, Implementation], problem: Any, platform: str | None = None
) -> str:
    """The first name in the table whose module can and should run the problem.

    Args:
        table: In order of preference; the last entry takes every problem.
        problem: Shapes, dtypes and static options.
        platform: "cpu", "gpu" or "tpu"; None for the one that JAX computes on.
    """
    platform = platform or jax.default_backend()
    modules = (
        (name, entry.load())
        for name, entry in table.items()
        if entry.platforms is None or platform in entry.platforms
    )
    return next(
        name
        for name, module in modules
        if module.why_not(problem) is None and module.prefer(problem)
    )


def select(table: Mapping[str, Implementation], name: str | None, problem: Any) -> Any:
    """The module of the named implementation, or for None of the preferred one.

    Raises:
        ValueError: The table has no such name.
        NotImplementedError: The named implementation cannot run the problem.
    """
    if name is None:
        return table[preferred(table, problem)].load()
    if not isinstance(name, str) or name not in table:
        raise ValueError(
            f"Unknown implementation {name!r}; expected None or one of {list(table)}."
        )
    module = table[name].load()
    reason = module.why_not(problem)
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r} cannot run here: {reason}.")
    return module
