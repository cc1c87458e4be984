"""Checks of the arguments of attention, and the texts of their errors."""

import math
from typing import Final

import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._core.checks import number

CAUSAL: Final = (
    "{} leaves the identity as the only doubly stochastic plan, so every "
    "token would attend to itself alone. For causal attention use "
    "jax.nn.dot_product_attention."
)


def check_scale(scale: float) -> float:
    """The scale as a finite Python float."""
    hint = "For a traced or per-head temperature multiply the query instead."
    if not math.isfinite(scale := number("scale", scale, hint)):
        raise ValueError(f"scale must be finite, got {scale}.")
    return scale


def check_dropout(rate: float, rng: Array | None) -> float:
    """The dropout rate as a Python float."""
    rate = number("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}.")
    if rate > 0 and rng is None:
        raise ValueError(
            f"dropout_rate={rate} needs dropout_rng, got None: the mask is "
            "drawn from it. Pass a jax.random.key, or dropout_rate=0."
        )
    return rate


def check_arrays(query: Array, key: Array, value: Array) -> None:
    """Checks that dtypes and shapes of query, key and value fit together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}. Cast it first.")
        if x.dtype != query.dtype:
            raise TypeError(
                "query, key and value must have one dtype, got "
                f"{query.dtype}, {key.dtype} and {value.dtype}. Cast them to one."
            )
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(
                "query, key and value must all be (batch, length, heads, dimension) or "
                f"all (length, heads, dimension), got shapes {query.shape}, "
                f"{key.shape} and {value.shape}."
            )
        if 0 in x.shape[-3:]:
            raise ValueError(
                f"{name} must not be empty, got shape {x.shape}: a plan without rows "
                "or columns has no marginals."
            )
    for what, ok in {
        "batch sizes B": query.shape[:-3] == key.shape[:-3] == value.shape[:-3],
        "head dimensions H of query and key": query.shape[-1] == key.shape[-1],
        "key lengths S of key and value": key.shape[-3] == value.shape[-3],
        "key heads K of key and value": key.shape[-2] == value.shape[-2],
    }.items():
        if not ok:
            raise ValueError(
                f"The {what} differ: got query {query.shape}, key {key.shape} and "
                f"value {value.shape}; expected query (B, T, N, H), key (B, S, K, H) "
                "and value (B, S, K, D)."
            )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"The {query.shape[-2]} query heads cannot share {key.shape[-2]} key heads "
            f"evenly: got query {query.shape} and key {key.shape}. The number of key "
            "heads must divide the number of query heads."
        )


def broadcastable(
    name: str, x: Array | None, logits_shape: tuple[int, ...]
) -> Array | None:
    """The bias or mask, by name, with four axes that are 1 or as in the logits."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean, got {x.dtype}: True marks what a query may attend "
            "to. Use `mask != 0`, or pass an additive mask as bias."
        )
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"bias must be floating, got {x.dtype}: it is added to the logits. Pass a "
            "boolean mask as mask."
        )
    padded = (1,) * (4 - x.ndim) + x.shape
    if len(padded) > 4 or any(
        got not in (1, n) for got, n in zip(padded, logits_shape, strict=True)
    ):
        raise ValueError(
            f"{name} must broadcast to (batch, query heads, query length, key length) "
            f"= {logits_shape}, got shape {x.shape}."
        )
    return x.reshape(padded)


def valid_tokens(
    name: str, lengths: Array | None, batch: int, length: int
) -> Bool[Array, "B L"] | None:
    """True for the first `lengths` tokens of each batch element."""
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must be integer, got {lengths.dtype}.")
    if lengths.shape != (batch,):
        raise ValueError(
            f"{name} must have shape ({batch},), one length for each batch element, "
            f"got shape {lengths.shape}."
        )
    # In int32, because the lengths' own dtype may be too narrow for the positions.
    position = jnp.arange(length, dtype=jnp.int32)
    return position[None, :] < lengths.astype(jnp.int32)[:, None]
