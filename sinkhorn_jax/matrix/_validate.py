"""Checks of the arguments of the matrix functions, and what they become."""

from typing import Any, Final

import jax
import jax.numpy as jnp

from .._core.marginals import (
    Names,
    broadcast,
    check_signs,
    check_totals,
    check_traced,
    checked_tau,
    complete,
    floating_marginal,
    has_mass,
    is_known,
    totals_rtol,
)
from .._core.options import Options
from .._core.precision import accum_dtype
from .._runtime.explicit_axes import like
from ._problem import Matrices, Problem

NAMES: Final = Names("row_marginal", "col_marginal")
WHOLE: Final = (
    "The rows or columns of the logits or marginals are divided over mesh axis {!r}, "
    "and every entry of a plan depends on all of them. Divide leading axes instead, or "
    "reshard first: jax.sharding.reshard(x, jax.P())."
)
EXCLUDED: Final = (
    "A row or column that traced logits exclude needs a marginal of 0, or False in "
    "`where`."
)


def validated(
    logits: Any,
    row_marginal: Any,
    col_marginal: Any,
    where: Any,
    tau: Any,
    options: Options,
) -> tuple[Problem, Matrices]:
    """Returns the problem and its operands, with the defaults of the marginals."""
    given = logits, where, row_marginal, col_marginal
    logits = jnp.asarray(logits)
    *batch, t, s = _shape(logits)
    dtype = accum_dtype(logits.dtype)
    if where is not None:
        where = _mask(jnp.asarray(where), logits.shape)
    a = floating_marginal(NAMES.rows, row_marginal, (*batch, t))
    b = floating_marginal(NAMES.cols, col_marginal, (*batch, s))
    tau = checked_tau(tau, tuple(batch), dtype)
    problem = Problem(
        batch=tuple(batch),
        t=t,
        s=s,
        dtype=logits.dtype,
        options=options,
        has_marginals=a is not None or b is not None,
        has_tau=tau is not None,
    )
    _check_values(problem, dtype, *given, tau)
    batch_axes = tuple(range(len(batch)))
    row_axes, col_axes = (*batch_axes, len(batch)), (*batch_axes, len(batch) + 1)
    where, a, b, tau = (
        x if x is None else like(x, logits, axes)
        for x, axes in (
            (where, None),
            (a, row_axes),
            (b, col_axes),
            (tau, batch_axes),
        )
    )
    logits = logits.astype(dtype)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    a, b = (x if x is None else x.astype(dtype) for x in (a, b))
    allowed = _allowed(logits, a, b)
    if a is not None or b is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    rows, cols = allowed.any(axis=-1), allowed.any(axis=-2)
    a, b = complete(a, b, rows, cols, dtype)
    if problem.has_marginals and not all(x is None or is_known(x) for x in given):
        rtol = totals_rtol(row_marginal, col_marginal)
        check_traced(NAMES, a, b, (a, b, tau), rtol)
    return problem, Matrices(logits, a, b, tau)


def _shape(logits):
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"logits must be floating, got {logits.dtype}: they are exponentiated. "
            "Cast them first."
        )
    if logits.ndim < 2:
        raise ValueError(
            f"logits must have at least two axes (..., T, S), got shape {logits.shape}."
        )
    if 0 in logits.shape[-2:]:
        raise ValueError(
            f"logits must have at least one row and one column, got shape "
            f"{logits.shape}: an empty plan has no marginals."
        )
    return logits.shape


def _allowed(logits, a, b):
    """Entries that are not excluded, be it by a row or column without mass."""
    allowed = logits != -jnp.inf
    if a is not None:
        allowed &= has_mass(a)[..., :, None]
    if b is not None:
        allowed &= has_mass(b)[..., None, :]
    return allowed


def _check_values(problem, dtype, logits, where, a, b, tau):
    """Raises for marginals that are wrong, as far as that is known.

    Also under `jit` and `vmap`: what is a constant there is known. Entries of logits
    that are not known count as allowed.
    """
    t, s, num_batch_axes = problem.t, problem.s, len(problem.batch)
    is_sized = isinstance(t, int) and isinstance(s, int)  # Not a symbol, as in exports.
    if not is_sized or not (is_known(a) or is_known(b)):
        return

    def known(x, core):
        if x is None or not is_known(x):
            return None
        x = jnp.asarray(x)
        x = x.reshape((1,) * (num_batch_axes + len(core) - x.ndim) + x.shape)
        return jnp.broadcast_to(x, x.shape[:num_batch_axes] + core)

    with jax.ensure_compile_time_eval():
        entries, mask = known(logits, (t, s)), known(where, (t, s))
        a, b = known(a, (t,)), known(b, (s,))
        rtol = totals_rtol(a, b)
        if entries is None:
            entries = jnp.zeros((1,) * num_batch_axes + (t, s), dtype)
        if mask is not None:
            entries = jnp.where(mask, entries, -jnp.inf)
        a, b = (x if x is None else x.astype(dtype) for x in (a, b))
        allowed = _allowed(entries, a, b)
        if a is not None:
            a = check_signs(NAMES.rows, a, allowed.any(axis=-1))
        if b is not None:
            b = check_signs(NAMES.cols, b, allowed.any(axis=-2))
        # A mask that is not known may exclude what makes the totals differ, and a
        # column_tau that is not known may allow it.
        is_decided = (where is None or mask is not None) and (
            tau is None or is_known(tau)
        )
        if a is not None and b is not None and is_decided:
            check_totals(NAMES, a, b, tau, rtol, EXCLUDED)


def _mask(where, shape):
    if where.dtype != jnp.bool_:
        raise TypeError(
            f"where must be boolean, got {where.dtype}: True marks allowed entries. "
            "Use `where != 0`, or add a float mask to the logits."
        )
    return broadcast("where", where, shape)
