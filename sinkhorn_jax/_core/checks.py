"""Checks of arguments that must be Python numbers."""

import operator

import jax


def integer(name: str, value: int) -> int:
    """Returns `value` as a Python integer; a bool is refused."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer known at trace time, got {value!r} of type "
            f"{type(value).__name__}. Mark it static under jit."
        ) from None


def number(name: str, value: float, hint: str = "Mark it static under jit.") -> float:
    """Returns `value` as a Python float; the error ends with the hint."""
    try:
        return float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise TypeError(
            f"{name} must be a number known at trace time, got {value!r} of type "
            f"{type(value).__name__}. {hint}"
        ) from None
