"""Checks of the arguments of attention, and the texts of their errors."""

import math
import warnings
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float

from .._core.checks import number
from .._runtime.arguments import (
    are_known,
    as_array,
    has_traced_checks,
    known_values,
    refuse_no_number,
)

CAUSAL: Final = (
    "{} leaves the identity as the only doubly stochastic plan, so every "
    "token would attend to itself alone. For causal attention use "
    "jax.nn.dot_product_attention."
)
WHY_WHOLE: Final = (
    "The tokens or the features of an operand are divided over mesh axis {!r}, and "
    "every entry of a plan depends on all of them. Divide the batch or the heads "
    "instead, or reshard first: jax.sharding.reshard(x, jax.P())."
)
# How a warning about a mask or a bias of the keys alone goes on.
PADDED_QUERIES: Final = (
    "leaves padded queries in the plan, and they pour mass into the columns. If "
    "queries are padded too, give the lengths of both, or use "
    "nn.make_attention_mask(valid, valid)."
)
# A bias of this or less is meant to exclude, unless the logits are as large.
LOW_BIAS: Final = -1e4


def check_scale(scale: Any) -> float | Float[Array, ""]:
    """The scale as a finite Python float, or as a scalar of JAX if it is one."""
    refuse_no_number("scale", scale)
    if not isinstance(scale, jax.Array):
        return static_scale(scale)
    if scale.ndim > 0 or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(
            "scale must be a number or a floating scalar array, got shape "
            f"{scale.shape} and dtype {scale.dtype}. For a temperature of each head or "
            "token multiply the query instead."
        )
    if (value := known_values(scale)) is not None:
        _check_finite(float(value))
    return scale


def static_scale(scale: Any) -> float:
    """The scale as a finite Python float."""
    refuse_no_number("scale", scale)
    hint = (
        "Of arrays, sinkhorn_attention takes a scalar; for a temperature of each head "
        "or token, and in a layer, multiply the query instead."
    )
    return _check_finite(number("scale", scale, hint))


def _check_finite(scale):
    if not math.isfinite(scale):
        raise ValueError(
            f"scale must be finite, got {scale}: it multiplies the logits."
        )
    return scale


def check_dropout(rate: float, rng: Array | None) -> float:
    """The dropout rate as a Python float."""
    refuse_no_number("dropout_rate", rate)
    rate = number("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(
            f"dropout_rate must be in [0, 1), got {rate}: it is the probability to "
            "drop an entry, and what remains is divided by 1 - rate."
        )
    if rate > 0 and rng is None:
        raise ValueError(
            f"dropout_rate={rate} needs dropout_rng, got None: the mask is "
            "drawn from it. Pass a jax.random.key, or dropout_rate=0."
        )
    if rng is not None:
        _check_key(rng)
    return rate


def _check_key(rng):
    if not isinstance(rng, (jax.Array, np.ndarray)):
        raise TypeError(
            f"dropout_rng must be a jax.random.key, got {rng!r} of type "
            f"{type(rng).__name__}. Use jax.random.key(seed)."
        )
    is_typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if rng.ndim != (0 if is_typed else 1):
        raise ValueError(
            "dropout_rng must be one key for the whole call, got keys of shape "
            f"{rng.shape}. Pass one of them, or use jax.vmap for one in each element."
        )
    if not (is_typed or rng.dtype == jnp.uint32):
        raise TypeError(
            f"dropout_rng must be a jax.random.key, got an array of {rng.dtype}."
        )


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
    x = as_array(name, x)
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
    lengths = as_array(name, lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integer, got {lengths.dtype}: it counts tokens. For a "
            "boolean array of valid tokens pass a mask, or its sum over the tokens."
        )
    if lengths.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} must be one length for all, or have shape ({batch},) with one for "
            f"each batch element, got shape {lengths.shape}."
        )
    values = known_values(lengths)
    if values is not None and are_known(length):
        wrong = values[(values < 0) | (values > length)]
        if wrong.size:
            raise ValueError(
                f"{name} must be between 0 and the {length} tokens that there are, "
                f"got {wrong[0]}. Crop the lengths, or check what they belong to."
            )
    # The lengths' own dtype may be too narrow for the positions.
    if lengths.dtype.itemsize < 4:
        lengths = lengths.astype(jnp.int32)
    is_unknown = values is None and lengths.size > 0 and are_known(length)
    if is_unknown and has_traced_checks():
        checkify.check(
            ((lengths >= 0) & (lengths <= length)).all(),
            f"{name} must be between 0 and the {length} tokens that there are, got a "
            "minimum of {low} and a maximum of {high}.",
            low=lengths.min(),
            high=lengths.max(),
        )
    lengths = jnp.broadcast_to(lengths.astype(jnp.int32), (batch,))
    position = jnp.arange(length, dtype=jnp.int32)
    return position[None, :] < lengths[:, None]


def checked_tolerance(tolerance: float | None) -> float | None:
    """The tolerance, unless it is text or a truth value."""
    refuse_no_number("tolerance", tolerance)
    return tolerance


def check_pattern(
    query: Array, key: Array, bias: Any, mask: Any, *, has_query_lengths: bool
) -> None:
    """Refuses causal masks, and warns of a bias that is meant to exclude keys alone.

    Values that are not known, as those of an argument of `jit` or of a mask that was
    made under it, are examined where `traced_checks` asks for it. It takes bias and
    mask as the caller gave them, because under `jit` the result of any conversion is
    not known. The mask has any dtype, and is nonzero where a query may attend.
    """
    if query.ndim < 3 or key.ndim < 3:
        return  # `check_arrays` says what is wrong.
    t, s = query.shape[-3], key.shape[-3]
    if not are_known(t, s):
        return
    allows = {"mask": lambda x: x.astype(bool)}
    if bias is not None and jnp.issubdtype(jnp.result_type(bias), jnp.floating):
        allows["bias"] = _is_allowed_by_bias
    given = {"mask": mask, "bias": bias}
    for name, allowed in allows.items():
        if isinstance(given[name], Tracer) and has_traced_checks():
            _check_traced_not_causal(name, given[name], allowed, t, s)
        elif (values := known_values(given[name])) is not None:
            _check_not_causal(name, values, allowed, t, s)
            if name == "bias" and t > 1:
                _warn_of_keys_alone(values, t == s and not has_query_lengths)


def _check_not_causal(name, x, allows, t, s):
    if t == 1 or t != s or x.shape[-2:] != (t, s):
        return
    # Most masks show in two of their rows that they are neither triangle.
    if allows(x[..., 0, 1:]).any() and allows(x[..., -1, :-1]).any():
        return
    lower, upper = _triangles(allows(x), t, np)
    if lower != upper:
        kind = "causal" if lower else "reversed causal"
        raise ValueError(CAUSAL.format(f"A {kind} {name}"))


def _check_traced_not_causal(name, x, allows, t, s):
    if t == 1 or t != s or x.shape[-2:] != (t, s):
        return
    lower, upper = _triangles(allows(x), t, jnp)
    checkify.check(lower == upper, CAUSAL.format(f"A causal or reversed causal {name}"))


def _triangles(allowed, t, numpy):
    """Whether any entry is allowed below the diagonal, and any above it.

    Heads and elements in which only padding is excluded are left out: padding may leave
    one triangle. Where no token may attend to itself, the diagonal is that of the
    tokens that are left without padding: the second half of a sequence may attend to
    the first.
    """
    allowed = allowed.reshape(-1, t, t)
    rows, cols = allowed.any(axis=2), allowed.any(axis=1)
    is_padding = (allowed == rows[:, :, None] & cols[:, None, :]).all(axis=(1, 2))
    allowed = allowed & ~is_padding[:, None, None]
    has_diagonal = numpy.diagonal(allowed, axis1=1, axis2=2).any()
    places = [x.cumsum(axis=1) for x in (rows, cols)]
    position = numpy.arange(t, dtype=places[0].dtype)[None]
    row_places, col_places = (numpy.where(has_diagonal, position, x) for x in places)
    distance = row_places[:, :, None] - col_places[:, None, :]
    is_square = has_diagonal | (rows.sum(axis=1) == cols.sum(axis=1))
    is_neither = (allowed & ~is_square[:, None, None]).any()
    below, above = (allowed & (distance > 0)).any(), (allowed & (distance < 0)).any()
    return below | is_neither, above | is_neither


def _is_allowed_by_bias(x):
    """False where a bias is meant to exclude, in any dtype; True for NaN."""
    limit = max(LOW_BIAS, float(jnp.finfo(x.dtype).min) / 2)
    numpy: Any = np if isinstance(x, np.ndarray) else jnp
    return ~(x <= numpy.asarray(limit, x.dtype))


def _warn_of_keys_alone(bias, may_have_padded_queries):
    first = bias if bias.ndim < 2 else bias[..., :1, :]
    low = first <= LOW_BIAS
    if not low.any() or not (bias == first).all():
        return
    excluded = first <= float(jnp.finfo(bias.dtype).min) / 2
    if (low & ~excluded).any():
        value = first[low & ~excluded].max()
        warnings.warn(
            f"A bias of {value:g} for a key and all queries does not exclude the key: "
            "it cancels in the column, which gets its full mass. Use a mask, -inf, or "
            f"jnp.finfo(jnp.{bias.dtype}).min, and exclude padded queries too.",
            stacklevel=4,
        )
    elif may_have_padded_queries:
        warnings.warn(
            f"A bias of keys alone, got shape {bias.shape}, {PADDED_QUERIES}",
            stacklevel=4,
        )
