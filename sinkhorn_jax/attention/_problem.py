"""The arguments of an attention implementation, and functions of them for each head."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from .._core.marginals import has_mass
from .._core.options import Options
from .._core.precision import accum_dtype
from .._runtime.collectives import anywhere, gathered, own_part
from .._runtime.shard_map import varying_axes, varying_like
from ._pattern import Segments, Window, may_attend, rows_with_a_key


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
    scale: float  # 1 where the operands have a scale.
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False  # One mask for all batch elements and heads.
    return_marginal_error: bool = False
    has_bias: bool = False
    has_mask: bool = False  # Sequence lengths are not a mask.
    has_marginals: bool = False
    has_tau: bool = False
    has_segments: bool = False
    window: Window | None = None
    # The axis of a `jax.shard_map` that divides the tokens. Queries, and what is of
    # queries, are then this device's, and so are the arrays of keys and values; S, and
    # everything else that is of keys, is of all devices.
    token_axis: str | None = None

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.num_heads // self.num_key_heads


class Dropout(NamedTuple):
    """How entries of the plan are dropped."""

    rate: float = 0.0
    rng: Array | None = None
    is_broadcast: bool = False  # One mask for all batch elements and heads.
    ids: Int[Array, "B N"] | None = None  # Which mask a head has; None: see `head_ids`.


class GivenMarginals(NamedTuple):
    """The sums of the plan, as far as the caller gave them."""

    query: Array | None = None
    key: Array | None = None
    tau: float | Array = 1.0


class GivenPattern(NamedTuple):
    """What the caller says about which keys a query may attend to, besides a mask."""

    query_ids: Array | None = None
    key_ids: Array | None = None
    window: int | tuple[int, int] | None = None


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
    scale: Float[Array, ""] | None = None  # A scale that is no Python number.
    # 0 for padding; both or none. With segments always, since these share no total.
    row_marginal: Float[Array, "B N T"] | None = None
    col_marginal: Float[Array, "B N S"] | None = None
    tau: Float[Array, "B N"] | None = None
    segments: Segments | None = None
    # Which dropout mask a head has: b * N + n, also where a device has a part of them.
    head_ids: Int[Array, "B N"] | None = None

    def masks(self) -> list[Bool[Array, "#B #N #T #S"]]:
        """The masks that are not None, with valid queries and keys as masks too."""
        masks = [self.mask]
        if self.query_valid is not None:
            masks.append(self.query_valid[:, None, :, None])
        if self.key_valid is not None:
            masks.append(self.key_valid[:, None, None, :])
        if self.row_marginal is not None:
            masks.append(has_mass(self.row_marginal)[..., :, None])
        if self.col_marginal is not None:
            masks.append(has_mass(self.col_marginal)[..., None, :])
        if self.segments is not None:
            masks.append((self.segments.query > 0)[:, None, :, None])
            masks.append((self.segments.key > 0)[:, None, None, :])
        return [x for x in masks if x is not None]


_AXES: Final[Mapping[str, Any]] = {
    "query": "b.n.",
    "key": "b.k.",
    "value": "b.k.",
    "bias": "bn",
    "mask": "bn",
    "query_valid": "b",
    "key_valid": "b",
    "dropout_rng": "",
    "scale": "",
    "row_marginal": "bn",
    "col_marginal": "bn",
    "tau": "bn",
    "segments": "b",
    "head_ids": "bn",
}
# The axes that can be divided over devices, as `_runtime.partition` names them.
AXES: Final = Operands(**_AXES)
RESULT_AXES: Final = ("b.n.", "bn")


def part_of(problem: Problem, operands: Operands) -> Problem:
    """The problem of the batch elements and heads that the operands have."""
    batch, _, num_heads, _ = operands.query.shape
    num_key_heads = operands.key.shape[2]
    sizes = {"num_heads": num_heads, "num_key_heads": num_key_heads}
    return dataclasses.replace(problem, batch=batch, **sizes)


# What an implementation returns: the output and, on request, the marginal error.
Attended = tuple[Float[Array, "B T N D"], Float[Array, "B N"] | None]


def vary_alike(operands: Operands) -> Operands:
    """The operands; under a `jax.shard_map` all of them vary over the same axes."""
    arrays = operands._replace(dropout_rng=None)
    return varying_like(arrays, arrays)._replace(dropout_rng=operands.dropout_rng)


def scale_of(problem: Problem, operands: Operands) -> float | Float[Array, ""]:
    """The inverse temperature, in the dtype of the logits if it is an array."""
    if operands.scale is None:
        return problem.scale
    return operands.scale.astype(accum_dtype(problem.dtype))


def excludes(bias: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Where a bias excludes an entry like -inf.

    Padding is often given as the least finite number of a dtype. In a column of them
    alone it would cancel. Half of it leaves room for what else was added.
    """
    return bias <= float(jnp.finfo(bias.dtype).min) / 2


def add_bias_and_masks(
    logits: Float[Array, "*heads T S"],
    bias: Float[Array, "*#heads #T #S"] | None,
    masks: list[Bool[Array, "*#heads #T #S"]],
) -> Float[Array, "*heads T S"]:
    """Logits with bias, -inf where the bias or a mask excludes an entry."""
    if bias is not None:
        biased = logits + bias.astype(logits.dtype)
        logits = jnp.where(excludes(bias), -jnp.inf, biased)
    for mask in masks:
        logits = jnp.where(mask, logits, -jnp.inf)
    return logits


class Valid(NamedTuple):
    """False for padding, per head."""

    rows: Bool[Array, "#B #T #N 1"]
    cols: Bool[Array, "#B #S #N 1"]


def valid_rows_and_cols(problem: Problem, operands: Operands) -> Valid | None:
    """Queries and keys with an allowed entry; None if nothing can exclude one."""
    parts = operands.masks()
    if operands.bias is not None:
        parts.append(~excludes(operands.bias))
    if not parts and problem.window is None:
        return None
    # Parts of rows alone and of columns alone meet without a (T, S) array.
    rows = cols = jnp.ones((1, 1, 1, 1), jnp.bool_)
    both = None
    for part in parts:
        if part.shape[2] == 1:
            cols = cols & part
        elif part.shape[3] == 1:
            rows = rows & part
        else:
            both = part if both is None else both & part
    if both is not None:
        rows = cols = both & rows & cols & pattern(problem, operands)
        rows, cols = rows.any(axis=3, keepdims=True), cols.any(axis=2, keepdims=True)
        cols = anywhere(problem.token_axis, cols)
    elif problem.window is not None or operands.segments is not None:
        rows, cols = _valid_in_pattern(problem, operands, rows, cols)
    else:
        any_row, any_col = (x.any(axis=(2, 3), keepdims=True) for x in (rows, cols))
        rows, cols = rows & any_col, cols & anywhere(problem.token_axis, any_row)
    return Valid(jnp.moveaxis(rows, 1, 2), jnp.transpose(cols, (0, 3, 1, 2)))


def _valid_in_pattern(problem, operands, rows, cols):
    """Valid rows and columns, from rows and columns that something else excludes."""
    segments = operands.segments
    heads = jnp.broadcast_shapes(rows.shape, cols.shape)[:2]
    if segments is not None:
        heads = problem.batch, heads[1]
        segments = segments.of_heads(heads[1])
    rows = jnp.broadcast_to(rows[..., 0], (*heads, problem.t))
    cols = jnp.broadcast_to(cols[..., 0, :], (*heads, problem.s))
    window, axis, seen = problem.window, problem.token_axis, None
    valid_rows = rows_with_a_key(window, segments, rows, cols)
    rows = gathered(axis, rows, -1)
    if segments is not None:
        queries = gathered(axis, segments.query, -1)
        seen = segments._replace(query=queries).reversed
    window = None if window is None else window.reversed
    valid_cols = rows_with_a_key(window, seen, cols, rows)
    return valid_rows[..., :, None], valid_cols[..., None, :]


def pattern(problem: Problem, operands: Operands) -> Bool[Array, "#B 1 T S"]:
    """What window and segments allow, as a mask."""
    segments, window = operands.segments, problem.window
    if segments is None and window is None:
        return jnp.ones((1, 1, 1, 1), jnp.bool_)
    queries, keys = (jnp.arange(x, dtype=jnp.int32) for x in (problem.t, problem.s))
    allowed = may_attend(window, segments, queries, keys)
    return allowed[:, None] if allowed.ndim == 3 else allowed[None, None]


def valid_by_head(
    problem: Problem, operands: Operands
) -> tuple[Bool[Array, "B N T"], Bool[Array, "B N S"]]:
    """Queries and keys of each head with an allowed entry."""
    valid = valid_rows_and_cols(problem, operands)
    if valid is None:
        ones = jnp.ones((1, 1, 1, 1), jnp.bool_)
        valid = Valid(ones, ones)
    lengths = problem.t, problem.s
    rows, cols = (
        jnp.broadcast_to(
            jnp.swapaxes(x[..., 0], 1, 2), (problem.batch, problem.num_heads, length)
        )
        for x, length in zip(valid, lengths, strict=True)
    )
    return rows, cols


def zero_padding(problem: Problem, operands: Operands, valid: Valid | None) -> Operands:
    """The operands with 0 for padding, and no gradient there.

    A weight of 0 would not keep NaN and infinity out of a product. A key or value is
    padding if no head that shares it may attend to it.
    """
    if valid is None:
        return operands
    rows, cols = valid
    num_heads, num_key_heads = operands.query.shape[2], operands.key.shape[2]
    if cols.shape[2] != 1 and num_key_heads != num_heads:
        # Not a reshape: of heads that are divided over more devices than there are key
        # heads, it would make parts that no axis of the mesh has.
        groups = num_heads // num_key_heads
        key_head = jnp.arange(num_heads, dtype=jnp.int32) // groups
        shares = key_head[:, None] == jnp.arange(num_key_heads, dtype=jnp.int32)[None]
        cols = (cols & shares[None, None]).any(axis=2)[..., None]
    if cols.shape[1] != 1:
        cols = own_part(problem.token_axis, cols, 1)
    query, key, value = operands[:3]
    return operands._replace(
        query=jnp.where(rows, query, 0),
        key=jnp.where(cols, key, 0),
        value=jnp.where(cols, value, 0),
    )


def uniform_marginals(
    rows: Bool[Array, "*heads T"],
    cols: Bool[Array, "*heads S"],
    dtype: jnp.dtype,
    num_rows: Num[Array, "*heads"] | None = None,
) -> tuple[Float[Array, "*heads T"], Float[Array, "*heads S"]]:
    """1 for the valid rows, (valid rows) / (valid columns) for the valid columns.

    `num_rows` are the valid rows where they are more than those of `rows`.
    """
    num_cols = cols.sum(axis=-1)
    num_rows = rows.sum(axis=-1) if num_rows is None else num_rows
    col_marginal = num_rows.astype(dtype) / jnp.maximum(num_cols, 1).astype(dtype)
    return rows.astype(dtype), jnp.where(cols, col_marginal[..., None], 0)


def head_ids(query: Float[Array, "B T N H"], other: str = "") -> Int[Array, "B N"]:
    """B * N + n for each head, counted over all parts of a `jax.shard_map`.

    The parts are taken for those of the batch, except over the axis `other`. Were they
    parts of the heads, their numbers would still differ.
    """
    batch, _, num_heads, _ = query.shape
    ids = jnp.arange(batch * num_heads, dtype=jnp.int32)
    axes = tuple(axis for axis in varying_axes(query) if axis != other)
    if axes:
        ids = ids + batch * num_heads * jax.lax.axis_index(axes)
    return ids.reshape(batch, num_heads)


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
