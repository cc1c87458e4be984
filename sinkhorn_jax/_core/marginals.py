"""The sums that a plan should have: defaults, and checks of given values."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float

from .._runtime.arguments import (
    as_array,
    has_traced_checks,
    known_values,
    refuse_no_number,
)
from .._runtime.collectives import largest
from .checks import number
from .precision import in_range

# Marginals whose totals differ by more than this, relatively, are an error; a smaller
# difference is rounding. Where the dtype of the marginals is coarser, its eps counts.
TOTALS_RTOL: Final = 1e-3
TAU_RANGE: Final = (
    "column_tau must be between 0 (softmax) and 1 (doubly stochastic), got "
)


class Marginals(NamedTuple):
    """Row and column sums of one plan, 0 for padding; or cotangents of them."""

    a: Float[Array, " T"]
    b: Float[Array, " S"]
    # A column step goes this part of the way to b; None for all of it.
    tau: Float[Array, ""] | None = None


class Names(NamedTuple):
    """The caller's names of the marginals, for errors."""

    rows: str
    cols: str


def has_mass(marginal: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """False for padding: a number below the least normal one, which devices take for 0.

    A NaN and a negative number are passed on, for the result to show them.
    """
    return ~(jnp.abs(marginal) < jnp.finfo(marginal.dtype).tiny)


def near_one(
    a: Float[Array, "*batch T"], b: Float[Array, "*batch S"], axis: str | None = None
) -> tuple[
    Float[Array, "*batch T"], Float[Array, "*batch S"], Float[Array, "*batch 1"]
]:
    """Both marginals over a power of 2 near the largest entry of `a`, and that power.

    A plan is proportional to its marginals, and products of scalings with very large or
    small ones would leave the range of the dtype. A power of 2 changes no digit. The
    devices of a `jax.shard_map` axis have parts of `a`.
    """
    top = largest(axis, jax.lax.stop_gradient(a).max(axis=-1, keepdims=True))
    is_usable = (top > 0) & jnp.isfinite(top)
    _, exponent = jnp.frexp(jnp.where(is_usable, top, 1))
    unit = jnp.ldexp(jnp.ones_like(top), exponent - 1)
    return a / unit, b / unit, unit


def complete(
    a: Float[Array, "*batch T"] | None,
    b: Float[Array, "*batch S"] | None,
    rows: Bool[Array, "*batch T"],
    cols: Bool[Array, "*batch S"],
    dtype: jnp.dtype,
    uniform: tuple[Callable[..., Array], ...] | None = None,
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch S"]]:
    """Both marginals, uniform where not given, and 0 for padding.

    `uniform` are the functions like `uniform_marginal` for rows and for columns.
    """
    of_rows, of_cols = uniform or (uniform_marginal, uniform_marginal)
    a, b = (
        x if x is None else jnp.where(valid, x, 0)
        for x, valid in ((a, rows), (b, cols))
    )
    if a is None:
        a = rows.astype(dtype) if b is None else of_rows(rows, b)
    return a, of_cols(cols, a) if b is None else b


def uniform_marginal(
    valid: Bool[Array, "*batch S"], other: Float[Array, "*batch T"]
) -> Float[Array, "*batch S"]:
    """The uniform marginal that has the total of another one."""
    count = valid.sum(axis=-1).astype(other.dtype)
    count = jnp.where(count == 0, 1, count)
    total = other.sum(axis=-1)
    # A total may overflow where its share does not.
    share = (other / count[..., None]).sum(axis=-1)
    marginal = jnp.where(jnp.isinf(total), share, total / count)
    return jnp.where(valid, marginal[..., None], 0)


def is_known(x: Any) -> bool:
    """Whether it is an array or a number with values at the time of tracing."""
    return x is not None and not any(isinstance(y, Tracer) for y in jax.tree.leaves(x))


def floating_marginal(
    name: str, marginal: Any, shape: tuple[int, ...]
) -> Float[Array, "..."] | None:
    """The marginal, broadcast to a shape; None stays None."""
    if marginal is None:
        return None
    marginal = as_array(name, marginal)
    if not jnp.issubdtype(marginal.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating, got {marginal.dtype}. Cast it first."
        )
    return broadcast(name, marginal, shape)


def broadcast(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """The argument `x`, broadcast to the shape that the other arguments require."""
    try:
        fits = jnp.broadcast_shapes(x.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to {tuple(shape)}, the shape that the other "
            f"arguments give it, got {x.shape}."
        )
    return jnp.broadcast_to(x, shape)


def totals_rtol(*marginals: Any) -> float:
    """The relative difference of totals that is rounding."""
    dtypes = [jnp.asarray(x).dtype for x in marginals if x is not None]
    return max([TOTALS_RTOL, *(float(jnp.finfo(dtype).eps) for dtype in dtypes)])


def check_signs(name: str, marginal: Array, valid: Bool[Array, "..."]) -> Array:
    """The marginal, 0 for padding; raises where one is negative or not finite."""
    marginal = jnp.where(valid, marginal, 0)
    if not ((marginal >= 0) & jnp.isfinite(marginal)).all():
        raise ValueError(
            f"{name} must be positive and finite, or 0 for a row or column to leave "
            f"out, got a minimum of {marginal.min()} and a maximum of "
            f"{marginal.max()}."
        )
    return marginal


def check_totals(
    names: Names,
    a: Float[Array, "*batch T"],
    b: Float[Array, "*batch S"],
    tau: Float[Array, "*batch"] | None,
    rtol: float,
    hint: str,
) -> None:
    """Raises where the totals differ and the columns should have theirs."""
    excess = _excess(a, b, tau, rtol)
    if excess.any():
        worst = jnp.unravel_index(excess.argmax(), excess.shape)
        a, b = (jnp.broadcast_to(x.sum(axis=-1), excess.shape) for x in (a, b))
        raise ValueError(
            f"{names.rows} and {names.cols} must have the same total, got "
            f"{a[worst]} and {b[worst]}: no plan has both. Rescale one of them, or "
            f"give a column_tau below 1. {hint}"
        )


def check_traced(
    names: Names,
    a: Float[Array, "*batch T"],
    b: Float[Array, "*batch S"],
    totals: tuple[Array, Array, Array | None],
    rtol: float,
) -> None:
    """The checks of signs and totals for values that are not known, if asked for.

    `totals` are the marginals and tau that `check_totals` takes.
    """
    if not has_traced_checks() or 0 in a.shape:
        return
    for name, x in ((names.rows, a), (names.cols, b)):
        checkify.check(
            ((x >= 0) & jnp.isfinite(x)).all(),
            f"{name} must be positive and finite, or 0 for a row or column to leave "
            "out, got a minimum of {low} and a maximum of {high}.",
            low=x.min(),
            high=x.max(),
        )
    checkify.check(
        ~_excess(*totals, rtol).any(),
        f"{names.rows} and {names.cols} must have the same total: no plan has both. "
        "Rescale one of them, or give a column_tau below 1.",
    )


def _excess(a, b, tau, rtol):
    """By how much the totals differ where that is more than rounding, else 0."""
    scale = in_range(jnp.maximum(a.max(axis=-1), b.max(axis=-1)))[..., None]
    totals = [(x * scale).sum(axis=-1) for x in (a, b)]
    difference = jnp.abs(totals[0] - totals[1])
    excess = jnp.where(difference > rtol * jnp.maximum(*totals), difference, 0)
    return excess if tau is None else jnp.where(tau < 1, 0, excess)


def checked_tau(
    tau: Any, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "*shape"] | None:
    """`column_tau` for every matrix, in a dtype; None where it is the number 1.

    Raises:
        TypeError: It is neither a number nor a floating array.
        ValueError: It is outside [0, 1], where that is known, or has a wrong shape.
    """
    refuse_no_number("column_tau", tau)
    if not isinstance(tau, (jax.Array, np.ndarray, list, tuple)):
        tau = static_tau(tau)
        if tau == 1:
            return None
        tau = jnp.asarray(tau, dtype)
    values = known_values(tau)
    tau = as_array("column_tau", tau)
    if not jnp.issubdtype(tau.dtype, jnp.floating):
        raise TypeError(
            f"column_tau must be a number or a floating array, got {tau.dtype}."
        )
    tau = broadcast("column_tau", tau, shape)
    if values is not None:
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(
                f"{TAU_RANGE}a minimum of {values.min()} and a maximum of "
                f"{values.max()}."
            )
    elif has_traced_checks():
        checkify.check(
            ((tau >= 0) & (tau <= 1)).all(),
            TAU_RANGE + "a minimum of {low} and a maximum of {high}.",
            low=tau.min(),
            high=tau.max(),
        )
    return tau.astype(dtype)


def static_tau(tau: Any) -> float:
    """`column_tau` as a Python float in [0, 1]."""
    refuse_no_number("column_tau", tau)
    tau = number(
        "column_tau", tau, "An array is an argument of sinkhorn_attention and sinkhorn."
    )
    if not 0 <= tau <= 1:
        raise ValueError(f"{TAU_RANGE}{tau}.")
    return tau
