"""The choices of how to differentiate the iteration."""

import dataclasses
import math

from .._runtime.arguments import refuse_no_number
from .checks import integer, number


@dataclasses.dataclass(frozen=True)
class Exact:
    """Differentiates all iterations: the gradient of exactly what was computed.

    This is the only choice that is right for any number of iterations, converged or
    not. It costs one reverse sweep, about as long as the iteration, and keeps the
    potentials of every iteration: (T + S) numbers each.
    """


@dataclasses.dataclass(frozen=True)
class Truncated:
    """Differentiates the last iterations only; what came before them is a constant.

    The sweep stops after `num_iters` full iterations and the row step before them. If
    the iteration ran no more than those, the gradient is that of `Exact`. 0
    differentiates the last row step alone, as if the column potential were given.

    The error shrinks like s^(2 num_iters), where s is the second singular value of the
    plan with unit marginals. The gradient is close for flat plans, and wrong by its own
    size for sharp ones, whether they converged or not.

    Attributes:
        num_iters: Full iterations to differentiate, not negative.

    Raises:
        TypeError: `num_iters` is not an integer.
        ValueError: `num_iters` is negative.
    """

    num_iters: int

    def __post_init__(self):
        object.__setattr__(self, "num_iters", integer("num_iters", self.num_iters))
        if self.num_iters < 0:
            raise ValueError(
                f"Truncated.num_iters must not be negative, got {self.num_iters}: it "
                "counts the iterations to differentiate."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implicit:
    """Differentiates the fixed point, by the implicit function theorem.

    Solves one linear system with the plan by conjugate gradients, without the direction
    (f + t, g - t), which does not change the plan. Keeps no history.

    The returned plan is taken for the converged one. If the iteration stopped early,
    the error of the gradient is of the order of the marginal error. If the plan falls
    into blocks that hardly exchange mass, or is nearly a permutation, the system is
    nearly singular and the gradient inaccurate, in float32 even NaN.

    Attributes:
        tolerance: Relative residual at which the solver stops, positive. In float32
            the residual does not fall much below the default.
        max_iters: Steps of the solver at most, at least 1.

    Raises:
        TypeError: `max_iters` is not an integer or `tolerance` not a number.
        ValueError: `tolerance` is not positive and finite, or `max_iters` is below 1.
    """

    tolerance: float = 1e-6
    max_iters: int = 1000

    def __post_init__(self):
        refuse_no_number("Implicit.tolerance", self.tolerance)
        tolerance = number("Implicit.tolerance", self.tolerance)
        object.__setattr__(self, "tolerance", tolerance)
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(
                "Implicit.tolerance must be positive and finite, got "
                f"{self.tolerance}: it is the relative residual to stop at."
            )
        object.__setattr__(self, "max_iters", integer("max_iters", self.max_iters))
        if self.max_iters < 1:
            raise ValueError(
                f"Implicit.max_iters must be at least 1, got {self.max_iters}."
            )


Gradient = Exact | Truncated | Implicit


def kept_iterations(gradient: Gradient, num_iters: int) -> int:
    """The number of full iterations whose potentials the backward pass needs."""
    match gradient:
        case Exact():
            return num_iters
        case Truncated(num_iters=depth):
            return min(depth, num_iters)
        case Implicit():
            # A result that ends on columns is made of two successive states.
            return min(1, num_iters)
