"""What a Flax layer's attention needs beyond the op; arrays only, no Flax.

That is any number of batch axes, refusal of causal masks, padding known by lengths, and
on request the plan itself.
"""

import dataclasses
import warnings
from typing import Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from ._core.gradient import Gradient
from ._core.iteration import Finish
from ._core.options import Options
from ._core.precision import PRECISION, accum_dtype
from .attention._api import CAUSAL, AttentionImplementation, attend, check_scale
from .matrix import sinkhorn

SINGLE_QUERY: Final = (
    "{} makes a plan of a single row, and the only one with equal columns is uniform, "
    "whatever the logits. Use Flax's own dot_product_attention for decoding."
)


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """How logits become a plan."""

    options: Options
    scale: float | None
    implementation: AttentionImplementation | None


def normaliser(
    num_iters: int,
    scale: float | None,
    finish: Finish,
    gradient: Gradient,
    implementation: AttentionImplementation | None,
) -> Normaliser:
    """Checks what it can where a layer is made, before anything is traced."""
    scale = None if scale is None else check_scale(scale)
    return Normaliser(Options(num_iters, finish, gradient), scale, implementation)


class Operands(NamedTuple):
    """What the plan is made of. *batch is any number of axes."""

    query: Float[Array, "*batch T N H"]
    key: Float[Array, "*batch S K H"]
    bias: Float[Array, "..."] | None = None  # These two broadcast to *batch N T S.
    mask: Bool[Array, "..."] | None = None
    query_seq_lengths: Integer[Array, "..."] | None = None  # Broadcast to *batch.
    key_value_seq_lengths: Integer[Array, "..."] | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes' sizes."""
        return self.query.shape[:-3]


class Dropout(NamedTuple):
    """Of the plan's entries."""

    rate: float = 0.0
    rng: Array | None = None
    is_broadcast: bool = False  # The same for all batch elements and heads.


def apply_plan(
    how: Normaliser,
    operands: Operands,
    value: Float[Array, "*batch S K D"],
    *,
    dropout: Dropout = Dropout(),  # noqa: B008 - immutable.
    is_causal: bool = False,
    return_marginal_error: bool = False,
) -> tuple[Float[Array, "*batch T N D"], Float[Array, "*batch N"] | None]:
    """Output and, on request, marginal error, by the op."""
    query, key, bias, mask, query_seq_lengths, key_value_seq_lengths = operands
    batch = operands.batch
    if mask is not None:
        _check_mask(mask, query.shape[-3], key.shape[-3])
    out, error = attend(
        query.reshape(-1, *query.shape[-3:]),
        key.reshape(-1, *key.shape[-3:]),
        value.reshape(-1, *value.shape[-3:]),
        _flat("bias", bias, batch),
        _flat("mask", mask, batch),
        options=how.options,
        scale=how.scale,
        is_causal=is_causal,
        query_seq_lengths=_flat_lengths(query_seq_lengths, batch),
        key_value_seq_lengths=_flat_lengths(key_value_seq_lengths, batch),
        dropout_rate=dropout.rate,
        dropout_rng=dropout.rng,
        broadcast_dropout=dropout.is_broadcast,
        implementation=how.implementation,
        return_marginal_error=return_marginal_error,
    )
    if error is not None:
        error = error.reshape(*batch, error.shape[-1])
    return out.reshape(*batch, *out.shape[1:]), error


def make_plan(how: Normaliser, operands: Operands) -> Float[Array, "*batch N T S"]:
    """What `apply_plan` applies to the values before dropout, from explicit logits."""
    query, key, bias, mask, *lengths = operands
    dtype = accum_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if how.scale is None else how.scale
    query, key = query.astype(dtype) * scale, key.astype(dtype)
    key = jnp.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    logits = jnp.einsum("...tnh,...snh->...nts", query, key, precision=PRECISION)
    if bias is not None:
        logits = logits + _with_axes(bias.astype(dtype), logits.ndim)
    where = jnp.ones((1,) * logits.ndim, bool)
    if mask is not None:
        where = where & _with_axes(mask, logits.ndim)
    for valid_until, axis in zip(lengths, (-2, -1), strict=True):
        if valid_until is not None:
            position = jnp.arange(logits.shape[axis], dtype=jnp.int32)
            position = jnp.expand_dims(position, -3 - axis)  # [T, 1] or [S].
            last = jnp.broadcast_to(valid_until, operands.batch).astype(jnp.int32)
            where = where & (
                _with_axes(position, logits.ndim) < last[..., None, None, None]
            )
    return sinkhorn(
        logits,
        how.options.num_iters,
        where=where,
        finish=how.options.finish,
        gradient=how.options.gradient,
        # Explicit logits exist whatever attends; forward mode needs "reference".
        implementation="reference" if how.implementation == "reference" else None,
    )


def for_both_sides(mask: Bool[Array, "... S"]) -> Bool[Array, "... S S"]:
    """The mask; one of the keys alone excludes the queries of the same tokens too.

    For self-attention, where queries and keys are the same tokens.
    """
    is_of_keys = mask.ndim < 2 or mask.shape[-2] == 1
    if not is_of_keys:
        return mask
    mask = _with_axes(mask, max(2, mask.ndim))
    return mask & jnp.swapaxes(mask, -1, -2)


def _check_mask(mask, t, s):
    if t == 1 and s > 1:
        raise ValueError(SINGLE_QUERY.format(f"A mask with one query for {s} keys"))
    shape = (1,) * (2 - mask.ndim) + mask.shape
    if t == s and shape[-2:] == (1, s):
        warnings.warn(
            f"A mask of keys alone, got shape {mask.shape}, leaves padded queries in "
            "the plan, and they pour mass into the columns. If queries are padded too, "
            "use nn.make_attention_mask(valid, valid).",
            stacklevel=3,
        )
    if isinstance(mask, Tracer) or t != s or mask.shape[-2:] != (t, s):
        return
    allowed = np.asarray(mask).reshape(-1, t, s).any(axis=0)
    if np.tril(allowed, -1).any() and not np.triu(allowed, 1).any():
        raise ValueError(CAUSAL.format("A causal mask"))


def _flat(name, x, batch):
    """(*batch, N, T, S) with broadcast axes to (B or 1, N, T, S)."""
    if x is None or x.ndim <= 3:
        return x
    lead, rest = x.shape[:-3], x.shape[-3:]
    if all(n == 1 for n in lead):
        return x.reshape(1, *rest)
    if len(lead) > len(batch):
        raise ValueError(
            f"{name} must broadcast to (*batch, heads, T, S) with batch axes {batch}, "
            f"got shape {x.shape}."
        )
    return jnp.broadcast_to(x, (*batch, *rest)).reshape(-1, *rest)


def _flat_lengths(lengths, batch):
    return None if lengths is None else jnp.broadcast_to(lengths, batch).reshape(-1)


def _with_axes(x, ndim):
    """With leading axes, which strict rank promotion does not add by itself."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
