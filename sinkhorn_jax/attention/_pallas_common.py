"""Shared parts of the attention kernels of all platforms."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.gradient import Exact
from ._problem import Operands, Problem, scale_of


def why_not_options(problem: Problem) -> str | None:
    """The first option of the problem that no kernel takes, as a reason, or None."""
    if problem.has_bias or problem.has_mask:
        name = "bias" if problem.has_bias else "mask"
        return f"it takes sequence lengths but no {name}"
    if problem.window is not None or problem.has_segments:
        name = "local_window_size" if problem.window is not None else "segment ids"
        return f"it takes no {name}"
    if problem.has_marginals:
        return "it takes no query_marginal or key_marginal"
    if problem.has_tau:
        return "it takes no column_tau but the number 1"
    if problem.options.tolerance is not None:
        return f"it takes no tolerance, got {problem.options.tolerance}"
    if problem.dropout_rate > 0:
        return f"it takes no dropout, got dropout_rate={problem.dropout_rate}"
    if problem.options.finish != "rows":
        return f"it takes finish='rows', got {problem.options.finish!r}"
    if not isinstance(problem.options.gradient, Exact):
        return f"it takes gradient=Exact(), got {problem.options.gradient}"
    return None


def scale_queries(problem: Problem, operands: Operands) -> Operands:
    """The operands with a scale that is an array multiplied into the queries.

    A kernel is compiled for one scale. The product is rounded to the queries' dtype.
    """
    if operands.scale is None:
        return operands
    query = operands.query.astype(jnp.float32) * scale_of(problem, operands)
    return operands._replace(query=query.astype(problem.dtype), scale=None)


def reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / x; 0 where x is 0, which a sum is for padding only."""
    return jnp.where(x == 0, 0.0, 1 / jnp.where(x == 0, 1.0, x))


def to_unit_by_head(
    dout: Float[Array, "B T N D"],
) -> tuple[Float[Array, "B T N D"], Float[Array, "B 1 N 1"]]:
    """Cotangents of order 1, and the power of 2 that each head was divided by.

    The backward pass is linear in the cotangent. A large one must not take factors out
    of range, and a small one must not be lost in float16. Powers of 2 round nothing.
    """
    top = jnp.abs(dout).max(axis=(1, 3), keepdims=True).astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.where((top > 0) & jnp.isfinite(top), top, 1.0))
    exponent = jnp.minimum(exponent, 127)  # The largest power of 2 in float32.
    # In two steps, because the reciprocal of a subnormal number is not finite.
    half = exponent // 2
    x = dout.astype(jnp.float32)
    for part in (half, exponent - half):
        x = x * jnp.ldexp(jnp.float32(1), -part)
    return x.astype(dout.dtype), jnp.ldexp(jnp.float32(1), exponent)
