"""The marginals of attention, from what the caller gave."""

import functools
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.marginals import (
    Names,
    check_signs,
    check_totals,
    check_traced,
    complete,
    floating_marginal,
    is_known,
    near_one,
    totals_rtol,
)
from .._core.precision import accum_dtype
from .._runtime.arguments import are_known, has_traced_checks
from .._runtime.collectives import gathered, own_part
from ._pattern import totals_by_segment, uniform_by_segment
from ._problem import GivenMarginals, Operands, Problem, valid_by_head

NAMES: Final = Names("query_marginal", "key_marginal")


def with_given_marginals(
    problem: Problem, operands: Operands, given: GivenMarginals
) -> Operands:
    """The operands with the marginals that were given, checked."""
    if not problem.has_marginals:
        return operands
    a, b = _marginals(problem, given)
    rtol = totals_rtol(given.query, given.key)
    with jax.ensure_compile_time_eval():
        _check_known(problem, operands, given, rtol)
    operands = operands._replace(row_marginal=a, col_marginal=b)
    if has_traced_checks():
        a, b = _completed(problem, operands)
        check_traced(NAMES, a, b, _totals(operands, a, b, b != 0), rtol)
    return operands


def complete_marginals(problem: Problem, operands: Operands) -> Operands:
    """The operands with both marginals, uniform where not given, 0 for padding.

    Without given marginals and segments they have none: those of each head are uniform.
    """
    if not problem.has_marginals and operands.segments is None:
        return operands
    a, b = _completed(problem, operands)
    return operands._replace(row_marginal=a, col_marginal=b)


@functools.partial(jax.jit, static_argnums=0)
def _completed(problem, operands):
    """Both marginals (B, N, T) and (B, N, S), from those that were given."""
    a, b, segments = operands.row_marginal, operands.col_marginal, operands.segments
    rows, cols = valid_by_head(problem, operands)
    axis, uniform = problem.token_axis, None
    # What depends on all queries is computed by every device.
    rows, a = gathered(axis, rows, -1), a if a is None else gathered(axis, a, -1)
    if segments is not None:
        segments = segments._replace(query=gathered(axis, segments.query, -1))
        segments = segments.of_heads(problem.num_heads)
        both = segments.reversed, segments
        uniform = tuple(functools.partial(uniform_by_segment, each) for each in both)
    a, b = complete(a, b, rows, cols, accum_dtype(problem.dtype), uniform)
    return own_part(axis, a, -1), b


def _marginals(problem, given):
    """The given marginals (B, N, T) and (B, N, S), in the dtype of the potentials."""
    heads, dtype = (problem.batch, problem.num_heads), accum_dtype(problem.dtype)
    a = floating_marginal(NAMES.rows, given.query, (*heads, problem.t))
    b = floating_marginal(NAMES.cols, given.key, (*heads, problem.s))
    return tuple(x if x is None else x.astype(dtype) for x in (a, b))


def _check_known(problem, operands, given, rtol):
    """Raises for marginals that are wrong, as far as values are known.

    Also under `jit`: what is a constant there is known. Entries that something
    excludes that is not known count as allowed.
    """
    sizes = problem.batch, problem.num_heads, problem.t, problem.s
    query, key = (x if is_known(x) else None for x in (given.query, given.key))
    if not are_known(*sizes) or (query is None and key is None):
        return
    a, b = _marginals(problem, given._replace(query=query, key=key))
    excludes = "bias", "mask", "query_valid", "key_valid", "segments"
    given_excludes = {name: getattr(operands, name) for name in excludes}
    known = {n: x if is_known(x) else None for n, x in given_excludes.items()}
    operands = operands._replace(**known, row_marginal=a, col_marginal=b)
    rows, cols = valid_by_head(problem, operands)
    a = a if a is None else check_signs(NAMES.rows, a, rows)
    b = b if b is None else check_signs(NAMES.cols, b, cols)
    tau = operands.tau
    # What is not known may exclude what makes the totals differ, or allow it.
    all_known = all(known[name] is x for name, x in given_excludes.items())
    is_decided = all_known and (tau is None or is_known(tau))
    if a is None or b is None or not is_decided:
        return
    hint = "" if operands.segments is None else "Each segment has totals of its own."
    check_totals(NAMES, *_totals(operands, a, b, cols), rtol, hint)


def _totals(
    operands: Operands, a: Array, b: Array, cols: Array
) -> tuple[Array, Array, Array | None]:
    """Marginals, or their totals by segment, whose totals must agree; then the tau."""
    if operands.segments is None:
        return a, b, operands.tau
    tau = operands.tau
    tau = None if tau is None else jnp.broadcast_to(tau[..., None], b.shape)
    query, key = operands.segments.of_heads(b.shape[1])
    of_rows, of_cols = totals_by_segment(a, query, key), totals_by_segment(b, key, key)
    of_rows, of_cols = (jnp.where(cols, x, 0)[..., None] for x in (of_rows, of_cols))
    return of_rows, of_cols, tau


def to_unit_marginals(
    problem: Problem, operands: Operands
) -> tuple[Operands, Float[Array, "B N 1"] | None]:
    """The operands with marginals near 1, and what the output must be multiplied by."""
    a, b = operands.row_marginal, operands.col_marginal
    if a is None or b is None:
        return operands, None
    a, b, unit = near_one(a, b, problem.token_axis)
    return operands._replace(row_marginal=a, col_marginal=b), unit
