"""Tables of implementations, the selection from them, and errors in their terms."""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
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
    # The platform that its kernels are compiled for; None for all.
    device: str | None = None

    def load(self) -> Any:
        """The module.

        Raises:
            ModuleNotFoundError: It needs a package that is not installed.
        """
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"The kernels in {self.module} need the package {error.name!r}, which "
                "is not installed and which JAX does not install by itself. Install "
                "it, or name another implementation.",
                name=error.name,
            ) from error


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


def why_not_here(entry: Implementation, problem: Any) -> str | None:
    """Why the implementation cannot run the problem on this machine; None if it can."""
    if (reason := _other_device(entry)) is not None:
        return reason
    try:
        return entry.load().why_not(problem)
    except ModuleNotFoundError as error:
        return str(error)


def _other_device(entry):
    """The sentence that its kernels are for another platform; None if they are not."""
    backend = jax.default_backend()
    if entry.device in (None, backend):
        return None
    device = entry.device.upper()
    return f"its kernels are for a {device}, and JAX computes on a {backend.upper()}"


def check_name(table: Mapping[str, Implementation], name: str | None) -> None:
    """Checks that the table has the name, which may be None.

    Raises:
        ValueError: The table has no such name.
    """
    if name is not None and (not isinstance(name, str) or name not in table):
        raise ValueError(
            f"Unknown implementation {name!r}; expected None or one of {list(table)}."
        )


def select(table: Mapping[str, Implementation], name: str | None, problem: Any) -> Any:
    """The module of the named implementation, or for None of the preferred one.

    Raises:
        ValueError: The table has no such name.
        NotImplementedError: The named implementation cannot run the problem.
    """
    check_name(table, name)
    if name is None:
        return table[preferred(table, problem)].load()
    module = table[name].load()
    reason = module.why_not(problem)
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r} cannot run here: {reason}.")
    return module


@contextlib.contextmanager
def in_terms_of_the_call(
    table: Mapping[str, Implementation], name: str | None
) -> Iterator[None]:
    """Around a call of an implementation: JAX's errors in terms of `implementation`.

    Under a `jit` of the caller, JAX compiles after the call has returned. An error that
    it raises then is its own.

    Raises:
        TypeError: The call is differentiated in forward mode and has none.
        NotImplementedError: Its kernels are for another platform.
    """
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f"implementation={name!r} has no forward-mode derivative (jvp, jacfwd, "
            "linearize): its gradient is a closed form in reverse mode. Use "
            "implementation='reference', which takes every transform."
        ) from error
    except ValueError as error:
        reason = None if name is None else _other_device(table[name])
        if reason is None or "interpret mode" not in str(error):
            raise
        raise NotImplementedError(
            f"implementation={name!r} cannot run here: {reason}. Use "
            "implementation=None, which takes one that can. docs/choosing.md says how "
            "to lower a kernel without its device."
        ) from error
