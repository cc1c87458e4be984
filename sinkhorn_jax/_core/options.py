"""The options of the matrix functions and of attention, checked once."""

import dataclasses
import math
from typing import Literal, get_args

from .checks import integer, number
from .gradient import Exact, Gradient

Finish = Literal["rows", "columns"]


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How far to iterate and how to differentiate the result: Python values only."""

    num_iters: int
    finish: Finish = "rows"
    gradient: Gradient = Exact()  # noqa: RUF009 - frozen.
    tolerance: float | None = None

    def __post_init__(self):
        num_iters = integer("num_iters", self.num_iters)
        object.__setattr__(self, "num_iters", num_iters)
        if num_iters < 0:
            raise ValueError(
                f"num_iters must not be negative, got {num_iters}: it counts column-"
                "then-row normalisations after the softmax. 0 is the softmax itself."
            )
        if self.finish not in get_args(Finish):
            raise ValueError(
                f"finish must be one of {list(get_args(Finish))}, got {self.finish!r}."
            )
        if self.finish == "columns" and num_iters == 0:
            raise ValueError(
                "finish='columns' needs num_iters of at least 1, got 0: the softmax "
                "has no column step to end on. Use finish='rows'."
            )
        if not isinstance(self.gradient, Gradient):
            raise TypeError(
                "gradient must be an instance of Exact, Truncated or Implicit, got "
                f"{self.gradient!r}. Write Exact(), not Exact."
            )
        if self.finish == "columns" and getattr(self.gradient, "num_iters", 1) == 0:
            raise ValueError(
                "Truncated(0) differentiates the last row step alone, and finish="
                "'columns' has none. Use Truncated(1) or finish='rows'."
            )
        if self.tolerance is None:
            return
        tolerance = number("tolerance", self.tolerance)
        object.__setattr__(self, "tolerance", tolerance)
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(
                f"tolerance must be a finite number, not negative, got {tolerance}: it "
                "is the marginal error to stop at. None runs all iterations."
            )
