"""Checks of the arguments of the matrix functions, and what they become."""

import math
from typing import Final

import jax.numpy as jnp
from jax.core import Tracer

from .._core.options import Options
from .._core.precision import accum_dtype
from ._problem import Matrices, Problem

# Marginals whose totals differ by more than this, relatively, are an error; a smaller
# difference is rounding.
TOTALS_RTOL: Final = 1e-3


def validated(
    logits, row_marginal, col_marginal, where, options: Options
) -> tuple[Problem, Matrices]:
    """Returns the problem and its operands, with the defaults of the marginals."""
    logits = jnp.asarray(logits)
    problem = _problem(logits, options)
    dtype = accum_dtype(logits.dtype)
    logits = logits.astype(dtype)
    if where is not None:
        where = _broadcast("where", jnp.asarray(where), logits.shape)
        logits = jnp.where(where, logits, -jnp.inf)
    rows, cols = (logits != -jnp.inf).any(axis=-1), (logits != -jnp.inf).any(axis=-2)
    a = _marginal("row_marginal", row_marginal, rows, dtype)
    b = _marginal("col_marginal", col_marginal, cols, dtype)
    if a is not None and b is not None:
        _check_totals(a, b)
    if a is None:
        a = rows.astype(dtype) if b is None else _uniform(rows, b.sum(axis=-1))
    if b is None:
        b = _uniform(cols, a.sum(axis=-1))
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


def _marginal(name, marginal, valid, dtype):
    if marginal is None:
        return None
    marginal = jnp.asarray(marginal)
    if not jnp.issubdtype(marginal.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating, got {marginal.dtype}. Cast it first."
        )
    marginal = _broadcast(name, marginal, valid.shape).astype(dtype)
    marginal = jnp.where(valid, marginal, 0)
    if _is_concrete(marginal):
        ok = ~valid | ((marginal > 0) & jnp.isfinite(marginal))
        if not ok.all():
            raise ValueError(
                f"{name} must be positive, normal and finite, got a minimum of "
                f"{jnp.where(valid, marginal, jnp.inf).min()}: a row or column without "
                "mass has no potential. Exclude it through `where` instead."
            )
    return marginal


def _uniform(valid, total):
    count = valid.sum(axis=-1).astype(total.dtype)
    marginal = total / jnp.where(count == 0, 1, count)
    return jnp.where(valid, marginal[..., None], 0)


def _check_totals(a, b):
    if not (_is_concrete(a) and _is_concrete(b)):
        return
    a, b = a.sum(axis=-1), b.sum(axis=-1)
    if (jnp.abs(a - b) > TOTALS_RTOL * jnp.maximum(a, b)).any():
        worst = jnp.unravel_index(jnp.abs(a - b).argmax(), a.shape)
        raise ValueError(
            f"row_marginal and col_marginal must have the same total, got {a[worst]} "
            f"and {b[worst]}: no plan has both. Rescale one of them."
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


def _is_concrete(x):
    return not isinstance(x, Tracer)
