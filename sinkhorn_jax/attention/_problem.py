"""The arguments of an attention implementation, and functions of them for each head."""

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

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.num_heads // self.num_key_heads


class Dropout(NamedTuple):
    """How entries of the plan are dropped."""

    rate: float = 0.0
    rng: Array | None = None
    is_broadcast: bool = False  # One mask for all batch elements and heads.


class Operands(NamedTuple):
    """The arrays of a call; None where the caller gave nothing."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K D"]
    bias: Float[Array, "#B #N #T #S"] | None = None
    mask: Bool[Array, "#B #N #T #S"] | None = None
    query_valid: Bool[Array, "B T"] | None = None
    key_valid: Bool[Array, "B S"] | None = None
    dropout_rng: Array | None = None

    def masks(self) -> list[Bool[Array, "#B #N #T #S"]]:
        """The masks that are not None, with valid queries and keys as masks too."""
        rows, cols = self.query_valid, self.key_valid
        rows = None if rows is None else rows[:, None, :, None]
        cols = None if cols is None else cols[:, None, None, :]
        return [x for x in (self.mask, rows, cols) if x is not None]


# What an implementation returns: the output and, on request, the marginal error.
Attended = tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]


def vary_alike(operands: Operands) -> Operands:
    """The operands; under a `jax.shard_map` all of them vary over the same axes."""
    arrays = operands._replace(dropout_rng=None)
    return varying_like(arrays, arrays)._replace(dropout_rng=operands.dropout_rng)


def add_bias_and_masks(
    logits: Float[Array, "*heads T S"],
    bias: Float[Array, "*#heads #T #S"] | None,
    masks: list[Bool[Array, "*#heads #T #S"]],
) -> Float[Array, "*heads T S"]:
    """Logits with bias, -inf where a mask is False."""
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    for mask in masks:
        logits = jnp.where(mask, logits, -jnp.inf)
    return logits


def uniform_marginals(
    rows: Bool[Array, "*heads T"], cols: Bool[Array, "*heads S"], dtype: jnp.dtype
) -> tuple[Float[Array, "*heads T"], Float[Array, "*heads S"]]:
    """1 for the valid rows, (valid rows) / (valid columns) for the valid columns."""
    num_rows, num_cols = rows.sum(axis=-1), cols.sum(axis=-1)
    col_marginal = num_rows.astype(dtype) / jnp.maximum(num_cols, 1).astype(dtype)
    return rows.astype(dtype), jnp.where(cols, col_marginal[..., None], 0)


def dropout_keep(
    problem: Problem, rng: Array, head: Array, rows: Int[Array, " I"] | None = None
) -> Float[Array, "I S"]:
    """The dropout factors of a head's plan: 0, or 1 / (1 - rate).

    Each is a function of the key and the entry's position alone, so every
    implementation can compute any part of them.

    Args:
        problem: The call; its rate and key length are used.
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
