"""Checks of the arguments of the matrix functions, and what they become."""

import math
from typing import Final

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify

from .._core.options import Options
from .._core.precision import accum_dtype, in_range
from .._runtime.arguments import has_traced_checks
from ._problem import Matrices, Problem

# Marginals whose totals differ by more than this, relatively, are an error; a smaller
# difference is rounding. Where the dtype of the marginals is coarser, its eps counts.
TOTALS_RTOL: Final = 1e-3


def validated(
    logits, row_marginal, col_marginal, where, options: Options
) -> tuple[Problem, Matrices]:
    """Returns the problem and its operands, with the defaults of the marginals."""
    given = logits, where, row_marginal, col_marginal
    logits = jnp.asarray(logits)
    problem = _problem(logits, options)
    dtype = accum_dtype(logits.dtype)
    if where is not None:
        where = _broadcast("where", jnp.asarray(where), logits.shape)
    *batch, t, s = logits.shape
    a = _marginal("row_marginal", row_marginal, (*batch, t))
    b = _marginal("col_marginal", col_marginal, (*batch, s))
    _check_values(problem, dtype, *given)
    logits = logits.astype(dtype)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    a, b = (x if x is None else x.astype(dtype) for x in (a, b))
    allowed = _allowed(logits, a, b)
    if a is not None or b is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    rows, cols = allowed.any(axis=-1), allowed.any(axis=-2)
    a, b = (
        x if x is None else jnp.where(valid, x, 0)
        for x, valid in ((a, rows), (b, cols))
    )
    if a is None:
        a = rows.astype(dtype) if b is None else _uniform(rows, b)
    if b is None:
        b = _uniform(cols, a)
    has_marginals = row_marginal is not None or col_marginal is not None
    if has_marginals and has_traced_checks() and 0 not in a.shape:
        _check_traced(a, b, given)
    num, t, s = problem.batch, problem.t, problem.s
    flat = logits.reshape(num, t, s), a.reshape(num, t), b.reshape(num, s)
    return problem, Matrices(*flat)


def _problem(logits, options):
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"logits must be floating, got {logits.dtype}: they are exponentiated. "
            "Cast them first."
        )
    if logits.ndim < 2:
        raise ValueError(
            f"logits must have at least two axes (..., T, S), got shape {logits.shape}."
        )
    *batch, t, s = logits.shape
    if t == 0 or s == 0:
        raise ValueError(
            f"logits must have at least one row and one column, got shape "
            f"{logits.shape}: an empty plan has no marginals."
        )
    return Problem(
        batch=math.prod(batch), t=t, s=s, dtype=logits.dtype, options=options
    )


def _marginal(name, marginal, shape):
    if marginal is None:
        return None
    marginal = jnp.asarray(marginal)
    if not jnp.issubdtype(marginal.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating, got {marginal.dtype}. Cast it first."
        )
    return _broadcast(name, marginal, shape)


def _allowed(logits, a, b):
    """Entries that are not excluded, be it by a row or column without mass.

    A number below the least normal one is no mass: devices take it for 0.
    """
    allowed = logits != -jnp.inf
    # A NaN and a negative number are passed on, for the result to show them.
    if a is not None:
        allowed &= ~(jnp.abs(a) < jnp.finfo(a.dtype).tiny)[..., :, None]
    if b is not None:
        allowed &= ~(jnp.abs(b) < jnp.finfo(b.dtype).tiny)[..., None, :]
    return allowed


def _uniform(valid, other):
    """The uniform marginal with the total of the other one."""
    count = valid.sum(axis=-1).astype(other.dtype)
    count = jnp.where(count == 0, 1, count)
    total = other.sum(axis=-1)
    # A total may overflow where its share does not.
    share = (other / count[..., None]).sum(axis=-1)
    marginal = jnp.where(jnp.isinf(total), share, total / count)
    return jnp.where(valid, marginal[..., None], 0)


def _check_values(problem, dtype, logits, where, a, b):
    """Raises for marginals that are wrong, as far as that is known.

    Also under `jit` and `vmap`: what is a constant there is known. Entries of logits
    that are not known count as allowed.
    """
    t, s, num_batch_axes = problem.t, problem.s, jnp.ndim(logits) - 2
    is_sized = isinstance(t, int) and isinstance(s, int)  # Not a symbol, as in exports.
    if not is_sized or not (_is_known(a) or _is_known(b)):
        return

    def known(x, core):
        if x is None or not _is_known(x):
            return None
        x = jnp.asarray(x)
        x = x.reshape((1,) * (num_batch_axes + len(core) - x.ndim) + x.shape)
        return jnp.broadcast_to(x, x.shape[:num_batch_axes] + core)

    with jax.ensure_compile_time_eval():
        entries, mask = known(logits, (t, s)), known(where, (t, s))
        a, b = known(a, (t,)), known(b, (s,))
        rtol = _totals_rtol(a, b)
        if entries is None:
            entries = jnp.zeros((1,) * num_batch_axes + (t, s), dtype)
        if mask is not None:
            entries = jnp.where(mask, entries, -jnp.inf)
        a, b = (x if x is None else x.astype(dtype) for x in (a, b))
        allowed = _allowed(entries, a, b)
        if a is not None:
            a = _check_signs("row_marginal", a, allowed.any(axis=-1))
        if b is not None:
            b = _check_signs("col_marginal", b, allowed.any(axis=-2))
        # A mask that is not known may exclude what makes the totals differ.
        if a is not None and b is not None and (where is None or mask is not None):
            _check_totals(a, b, rtol)


def _check_traced(a, b, given):
    """The checks of `_check_values` on what is not known."""
    if all(x is None or _is_known(x) for x in given):
        return
    for name, x in (("row_marginal", a), ("col_marginal", b)):
        checkify.check(
            ((x >= 0) & jnp.isfinite(x)).all(),
            f"{name} must be positive and finite, or 0 for a row or column to leave "
            "out, got a minimum of {low} and a maximum of {high}.",
            low=x.min(),
            high=x.max(),
        )
    rtol = _totals_rtol(*given[2:])
    checkify.check(
        ~_excess(a, b, rtol).any(),
        "row_marginal and col_marginal must have the same total: no plan has both. "
        "Rescale one of them.",
    )


def _is_known(x):
    """Whether it is an array or a number with values at the time of tracing."""
    return x is not None and not any(isinstance(y, Tracer) for y in jax.tree.leaves(x))


def _check_signs(name, marginal, valid):
    """The marginal, 0 for padding."""
    marginal = jnp.where(valid, marginal, 0)
    if not ((marginal >= 0) & jnp.isfinite(marginal)).all():
        raise ValueError(
            f"{name} must be positive and finite, or 0 for a row or column to leave "
            f"out, got a minimum of {marginal.min()} and a maximum of "
            f"{marginal.max()}."
        )
    return marginal


def _totals_rtol(*marginals):
    """The relative difference of totals that is rounding."""
    dtypes = [jnp.asarray(x).dtype for x in marginals if x is not None]
    return max(TOTALS_RTOL, *(float(jnp.finfo(dtype).eps) for dtype in dtypes))


def _excess(a, b, rtol):
    """By how much the totals differ where that is more than rounding, else 0."""
    scale = in_range(jnp.maximum(a.max(axis=-1), b.max(axis=-1)))[..., None]
    totals = [(x * scale).sum(axis=-1) for x in (a, b)]
    difference = jnp.abs(totals[0] - totals[1])
    return jnp.where(difference > rtol * jnp.maximum(*totals), difference, 0)


def _check_totals(a, b, rtol):
    excess = _excess(a, b, rtol)
    if excess.any():
        worst = jnp.unravel_index(excess.argmax(), excess.shape)
        a, b = (jnp.broadcast_to(x.sum(axis=-1), excess.shape) for x in (a, b))
        raise ValueError(
            "row_marginal and col_marginal must have the same total, got "
            f"{a[worst]} and {b[worst]}: no plan has both. "
            "Rescale one of them. A row or column that traced logits exclude needs a "
            "marginal of 0, or False in `where`."
        )


def _broadcast(name, x, shape):
    if name == "where" and x.dtype != jnp.bool_:
        raise TypeError(
            f"where must be boolean, got {x.dtype}: True marks allowed entries. Use "
            "`where != 0`, or add a float mask to the logits."
        )
    try:
        fits = jnp.broadcast_shapes(x.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to {tuple(shape)}, the shape that the logits give "
            f"it, got {x.shape}."
        )
    return jnp.broadcast_to(x, shape)
