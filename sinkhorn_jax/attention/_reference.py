"""Sinkhorn attention as written: all logits, their plan, the product with the values.

A `lax.scan` of log-space half steps and plain autodiff, so every transform works.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.precision import PRECISION, accum_dtype
from ..matrix import _reference as matrix
from ..matrix._problem import Matrices
from ..matrix._problem import Problem as MatrixProblem
from . import _problem
from ._problem import Attended, Operands, Problem, vary_alike


@functools.partial(jax.jit, static_argnums=0)
def attend(problem: Problem, operands: Operands) -> Attended:
    """Output and, on request, marginal error."""
    b, t, s, n = problem.batch, problem.t, problem.s, problem.num_heads
    dtype, operands = accum_dtype(problem.dtype), vary_alike(operands)
    logits = explicit_logits(problem, operands)
    a, c = operands.row_marginal, operands.col_marginal
    if a is None or c is None:  # Both or none.
        allowed = logits != -jnp.inf
        rows, cols = allowed.any(axis=-1), allowed.any(axis=-2)
        a, c = _problem.uniform_marginals(rows, cols, dtype)
    all_heads = MatrixProblem(
        batch=(b, n), t=t, s=s, dtype=dtype, options=problem.options
    )
    plan, potentials = matrix.solve(all_heads, Matrices(logits, a, c, operands.tau))
    if operands.dropout_rng is not None:
        keep = functools.partial(_problem.dropout_keep, problem, operands.dropout_rng)
        ids: Any = operands.head_ids
        plan = plan * jax.vmap(jax.vmap(keep))(ids)
    value = jnp.repeat(operands.value.astype(dtype), problem.groups, axis=2)
    out = jnp.einsum("bnts,bsnd->btnd", plan, value, precision=PRECISION)
    error = potentials.marginal_error if problem.return_marginal_error else None
    return out.astype(problem.dtype), error


def explicit_logits(problem: Problem, operands: Operands) -> Float[Array, "B N T S"]:
    """The logits of all heads, -inf where a query may not attend to a key."""
    dtype = accum_dtype(problem.dtype)
    query = operands.query.astype(dtype) * _problem.scale_of(problem, operands)
    key = jnp.repeat(operands.key.astype(dtype), problem.groups, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision=PRECISION)
    masks = operands.masks()
    if problem.window is not None or operands.segments is not None:
        masks.append(_problem.pattern(problem, operands))
    return _problem.add_bias_and_masks(logits, operands.bias, masks)


def why_not(_: Problem) -> None:
    """None: this implementation takes every problem."""


def prefer(_: Problem) -> bool:
    """True: this implementation is the last of the table."""
    return True
