"""Solving one matrix in the linear domain, or in log space where that would be wrong.

The backward pass stays in the domain that the forward pass decided on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._runtime.collectives import gathered
from .._runtime.vmap import with_fallback
from .domain import Domain, Linear, Log, Shift
from .gradient import kept_iterations
from .iteration import ScalingHistory, is_representable, iterate
from .marginals import Marginals
from .options import Options

# Computes the logits. Each domain calls it, instead of both reading one result, so that
# the linear domain can overwrite the logits with the kernel matrix.
Logits = Callable[[], Float[Array, "T S"]]


class Solution(NamedTuple):
    """What the backward pass of one matrix needs besides its logits."""

    history: ScalingHistory
    is_linear: Bool[Array, ""]  # The domain of the history; False for log space.
    shift: Shift


def solve(
    logits: Logits,
    marginals: Callable[[Domain], Marginals],
    output: Callable[[Domain, ScalingHistory, Marginals], Any],
    options: Options,
) -> tuple[Any, Solution]:
    """Iterates, and returns `output(domain, history, marginals)` with the solution."""

    def in_domain(domain):
        of_domain = marginals(domain)
        history = iterate(domain, of_domain, options)
        return output(domain, history, of_domain), history

    linear = Linear.of(logits())
    result = in_domain(linear)
    is_linear = is_representable(linear, result[1], marginals(linear))
    out, history = with_fallback(result, is_linear, lambda: in_domain(Log.of(logits())))
    kept = history.tail(kept_iterations(options.gradient, options.num_iters))
    return out, Solution(kept, is_linear, linear.shift)


def solve_backward(
    logits: Logits, solution: Solution, cotangents: Callable[[Domain], Any]
) -> Any:
    """Returns `cotangents(domain)` for the domain of the solution."""
    return with_fallback(
        cotangents(Linear.shifted_by(solution.shift, logits())),
        solution.is_linear,
        lambda: cotangents(Log.of(logits())),
    )


def to_unit(cotangent: Any, axis: str | None = None) -> tuple[Any, Float[Array, ""]]:
    """A pytree over its largest magnitude, and that magnitude.

    The backward pass is linear in the cotangent, and a large one could take factors out
    of range. A zero or non-finite one is returned as it is, with magnitude 1. The
    devices of a `jax.shard_map` axis have parts of one cotangent.
    """
    size = jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(cotangent)]).max()
    size = gathered(axis, size[None], 0).max()
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    size = jax.lax.stop_gradient(size)
    return jax.tree.map(lambda x: x / size, cotangent), size
