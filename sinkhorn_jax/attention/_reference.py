"""Sinkhorn attention as written: all logits, their plan, the product with the values.

Log-space `lax.scan` and plain autodiff, so any transform works: forward mode, Hessians.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.precision import PRECISION, accum_dtype
from ..matrix import _problem as matrix_problem
from ..matrix import _reference as matrix
from ._problem import (
    Operands,
    Problem,
    add_bias_and_mask,
    dropout_keep,
    uniform_marginals,
)


@functools.partial(jax.jit, static_argnums=0)
def attend(
    problem: Problem, operands: Operands
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]:
    """Output and, on request, marginal error."""
    b, t, s, n = problem.batch, problem.t, problem.s, problem.num_heads
    dtype = accum_dtype(problem.dtype)
    query, key, value, bias, mask, query_valid, key_valid, rng = operands
    groups = n // problem.num_key_heads
    key, value = (jnp.repeat(x.astype(dtype), groups, axis=2) for x in (key, value))
    query = query.astype(dtype) * problem.scale
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision=PRECISION)
    logits = add_bias_and_mask(
        logits,
        bias,
        mask,
        None if query_valid is None else query_valid[:, None],
        None if key_valid is None else key_valid[:, None],
    )
    rows, cols = (logits != -jnp.inf).any(axis=-1), (logits != -jnp.inf).any(axis=-2)
    a, c = uniform_marginals(rows, cols, dtype)
    flat = matrix_problem.Problem(
        batch=b * n, t=t, s=s, dtype=dtype, options=problem.options
    )
    f, g, error, _ = matrix.potentials(
        flat, logits.reshape(-1, t, s), a.reshape(-1, t), c.reshape(-1, s)
    )
    plan = jnp.exp(logits + f.reshape(b, n, t, 1) + g.reshape(b, n, 1, s))
    if rng is not None:
        keep = jax.vmap(functools.partial(dropout_keep, problem, rng))(
            jnp.arange(b * n)
        )
        plan = plan * jnp.reshape(keep, plan.shape)
    out = jnp.einsum("bnts,bsnd->btnd", plan, value, precision=PRECISION)
    error = error.reshape(b, n) if problem.return_marginal_error else None
    return out.astype(problem.dtype), error


def why_not(problem: Problem) -> str | None:
    """It takes every problem."""
    del problem
    return None


def prefer(problem: Problem) -> bool:
    """Whatever nothing before it takes."""
    del problem
    return True
