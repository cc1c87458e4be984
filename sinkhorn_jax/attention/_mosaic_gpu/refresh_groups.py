"""Groups of iterations that share one kernel matrix E, that of an iteration `base`.

The plans of their half steps are E, scaled on both sides (docs/architecture.md (8)).
How many iterations may share E follows from how far the potentials move. From
column step 1 on, the rows of a plan sum to 1 / S at least and to T at most before a row
step makes them 1. So a row step moves f up by log S at most and down by log T, and a
column step likewise moves g up by log T and down by log S. After m iterations no entry
of the plan is above (T S)^m E.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from .._problem import Problem


class RefreshGroup(NamedTuple):
    """Iterations `first` to `last`, whose half steps share E of iteration `base`."""

    base: int
    first: int
    last: int


def max_refresh_interval(problem: Problem) -> int:
    """The number of iterations for which E is accurate enough in float32.

    An entry that float32 rounds to 0 stays below 1e-8 of any row or column sum: an
    iteration scales it up by T S at most, sums have T or S terms and are no further
    from 1. The same bound holds for the iterations before `base`.
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    most = math.log(1e-8 / tiny) / math.log(max(2, problem.t * problem.s))
    return max(1, int(most) - 1)


def refresh_groups(problem: Problem) -> list[RefreshGroup]:
    """Groups that cover all iterations of the backward pass, the last ones first.

    The base of the first group is the last iteration, because E of that iteration is
    the plan of the result. The base of each other group is in its middle, at most
    `max_refresh_interval` from either end.
    """
    last, reach = problem.options.num_iters, max_refresh_interval(problem)
    result = [RefreshGroup(last, max(0, last - reach), last)] if last else []
    while result and result[-1].first > 0:
        last = result[-1].first - 1
        first = max(0, last - 2 * reach)
        result.append(RefreshGroup((first + last + 1) // 2, first, last))
    return result


def terms_per_matrix(problem: Problem) -> list[int]:
    """Number of half steps that share each kernel matrix of the correction.

    One number for each refresh group, and at the end 1 for row step 0, which has a
    kernel matrix of its own (`correction`).
    """
    num_iters = problem.options.num_iters
    # Iteration k stands for row step k and, where there is one, column step k + 1.
    return [
        min(last, num_iters - 1) - first + 1 + last - max(first, 1) + 1
        for _, first, last in refresh_groups(problem)
    ] + [1]
