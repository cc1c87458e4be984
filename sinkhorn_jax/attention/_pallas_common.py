"""What the kernels of every platform have in common."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.gradient import Exact
from ._problem import Problem


def why_not_options(problem: Problem) -> str | None:
    """What of the options no kernel takes, or None."""
    if problem.has_bias or problem.has_mask:
        name = "bias" if problem.has_bias else "mask"
        return f"it takes sequence lengths but no {name}"
    if problem.dropout_rate > 0:
        return f"it takes no dropout, got dropout_rate={problem.dropout_rate}"
    if problem.options.finish != "rows":
        return f"it takes finish='rows', got {problem.options.finish!r}"
    if not isinstance(problem.options.gradient, Exact):
        return f"it takes gradient=Exact(), got {problem.options.gradient}"
    return None


def reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """0 for padding, which is where the sum is 0 and nowhere else."""
    return jnp.where(x == 0, 0.0, 1 / jnp.where(x == 0, 1.0, x))


def to_unit(
    dout: Float[Array, "B T N D"],
) -> tuple[Float[Array, "B T N D"], Float[Array, "B 1 N 1"]]:
    """Cotangents of order 1, and what they were divided by, for every head.

    The pull-back is linear; a large cotangent must not take factors out of range, and a
    small one must not be lost in float16. A power of 2 rounds nothing.
    """
    top = jnp.abs(dout).max(axis=(1, 3), keepdims=True).astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.where((top > 0) & jnp.isfinite(top), top, 1.0))
    exponent = jnp.minimum(exponent, 127)  # Of the largest power of 2 in float32.
    # Two halves: a subnormal cotangent has no finite reciprocal.
    half = exponent // 2
    x = dout.astype(jnp.float32)
    for part in (half, exponent - half):
        x = x * jnp.ldexp(jnp.float32(1), -part)
    return x.astype(dout.dtype), jnp.ldexp(jnp.float32(1), exponent)
