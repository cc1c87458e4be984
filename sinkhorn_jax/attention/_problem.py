"""What an attention implementation is given, and what belongs to each of its heads."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._core.options import Options
from .._core.precision import accum_dtype
from .._runtime.shard_map import varying_like


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Everything static about a call: shapes, dtype and options, never values."""

    batch: int
    t: int  # Query length.
    s: int  # Key length.
    num_heads: int
    num_key_heads: int
    head_dim: int
    value_dim: int
    dtype: jnp.dtype
    options: Options
    scale: float
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False  # One mask for all batch elements and heads.
    return_marginal_error: bool = False
    has_bias: bool = False
    has_mask: bool = False  # Sequence lengths are not a mask.


class Operands(NamedTuple):
    """The arrays of a call; None where the caller gave nothing."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K D"]
    bias: Float[Array, "#B #N #T #S"] | None
    mask: Bool[Array, "#B #N #T #S"] | None
    query_valid: Bool[Array, "B T"] | None
    key_valid: Bool[Array, "B S"] | None
    dropout_rng: Array | None


def vary_alike(operands: Operands) -> Operands:
    """The operands, under a `jax.shard_map` all varying over the same axes."""
    arrays = operands._replace(dropout_rng=None)
    return varying_like(arrays, arrays)._replace(dropout_rng=operands.dropout_rng)


def add_bias_and_mask(
    logits: Float[Array, "*heads T S"],
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    query_valid: Bool[Array, "*#heads T"] | None,
    key_valid: Bool[Array, "*#heads S"] | None,
) -> Float[Array, "*heads T S"]:
    """Logits with -inf where a query may not attend to a key."""
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    for allowed in (
        mask,
        None if query_valid is None else query_valid[..., :, None],
        None if key_valid is None else key_valid[..., None, :],
    ):
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
    return logits


def uniform_marginals(
    rows: Bool[Array, "*heads T"], cols: Bool[Array, "*heads S"], dtype: jnp.dtype
) -> tuple[Float[Array, "*heads T"], Float[Array, "*heads S"]]:
    """1 for each valid row, (valid rows) / (valid columns) for each valid column."""
    num_rows, num_cols = rows.sum(axis=-1), cols.sum(axis=-1)
    share = num_rows.astype(dtype) / jnp.maximum(num_cols, 1).astype(dtype)
    return rows.astype(dtype), jnp.where(cols, share[..., None], 0)


def dropout_keep(
    problem: Problem, rng: Array, head: Array, rows: Int[Array, " I"] | None = None
) -> Float[Array, "I S"]:
    """What a head's plan is multiplied by: 0, or 1 / (1 - rate).

    A function of the key and the entry's position alone, so that every implementation
    can make any part of it.

    Args:
        problem: Gives the rate and the shape.
        rng: The caller's key.
        head: b * N + n for batch element b and head n.
        rows: Positions of the queries; None is all.
    """
    rng = jax.random.fold_in(rng, 0 if problem.broadcast_dropout else head)
    probability = 1 - problem.dropout_rate

    def row(i):
        key = jax.random.fold_in(rng, i)
        return jax.random.bernoulli(key, probability, (problem.s,))

    keep = jax.vmap(row)(jnp.arange(problem.t) if rows is None else rows)
    dtype = accum_dtype(problem.dtype)
    return jnp.where(keep, jnp.asarray(1 / probability, dtype), 0)
