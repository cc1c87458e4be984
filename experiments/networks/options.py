"""The options that many configurations share, and checks of options.

A check gets the names of the fields that it is about, and raises ValueError.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The sizes of networks, and the seeds of everything random in them."""

    depth: int = 6  # Layers.
    width: int = 32  # Features of a token.
    num_heads: int = 2  # Attention heads, a divisor of the width.
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # One network is made for each.

    def __post_init__(self):
        require_at_least(self, 1, "depth", "width", "num_heads")
        require_at_least(self, 0, "seeds")
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads, got {self.width} and "
                f"{self.num_heads}: heads share it evenly."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Network):
    """The sizes of networks and of their training."""

    num_steps: int = 150  # Updates; 0 leaves the networks as initialised.
    batch_size: int = 32  # Examples of one update and seed.
    data_seed: int = 0  # Split of the data.

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 0, "num_steps", "data_seed")
        require_at_least(self, 1, "batch_size")


def require_distinct(config: Any, *names: str) -> None:
    """Refuses tuples that are empty or repeat an entry."""
    for name in names:
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be distinct, at least one, got {values}.")


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Refuses values that are too small, alone or in a tuple of distinct values."""
    for name in names:
        if min(_values(config, name)) < least:
            value = getattr(config, name)
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def require_positive(config: Any, *names: str) -> None:
    """Refuses numbers that are not positive and finite, alone or in such a tuple."""
    for name in names:
        if not all(0 < value < math.inf for value in _values(config, name)):
            value = getattr(config, name)
            raise ValueError(f"{name} must be positive and finite, got {value}.")


def require_increasing(config: Any, *names: str, start: float | None = None) -> None:
    """Refuses tuples that do not increase.

    With `start`, the value of softmax, they must begin with it and have another value.
    """
    for name in names:
        values = getattr(config, name)
        is_increasing = bool(values) and tuple(sorted(set(values))) == values
        if start is None and not is_increasing:
            raise ValueError(f"{name} must be increasing, got {values}.")
        if start is not None and not (
            is_increasing and values[0] == start < values[-1]
        ):
            raise ValueError(
                f"{name} must increase from {start}, softmax, to compare with, got "
                f"{values}."
            )


def _values(config, name):
    """The values of a tuple, which must be distinct, or the one value in a tuple."""
    value = getattr(config, name)
    if not isinstance(value, tuple):
        return (value,)
    require_distinct(config, name)
    return value
