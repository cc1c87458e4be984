"""Windows and packed sequences: which keys a query may attend to.

They are never written out as a (T, S) mask. A window is a band |i - j| of positions;
packed sequences are segments, each a problem of its own: queries and keys have integers
that must be equal, and are padding where these are not positive.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from .._core.checks import integer
from .._core.marginals import broadcast
from .._runtime.arguments import are_known, known_values


class Window(NamedTuple):
    """Query i may attend to the keys from i - left to i + right."""

    left: int
    right: int

    @property
    def reversed(self) -> "Window":
        """From the keys' point of view."""
        return Window(self.right, self.left)


class Segments(NamedTuple):
    """The segment of each query and key; 0 and below is padding."""

    query: Int[Array, "*B T"]
    key: Int[Array, "*B S"]

    @property
    def reversed(self) -> "Segments":
        """With queries and keys exchanged."""
        return Segments(self.key, self.query)

    def of_heads(self, num_heads: int) -> "Segments":
        """The segments (B, N, T) and (B, N, S) of each head."""
        shape = lambda x: (x.shape[0], num_heads, x.shape[1])
        return Segments(*(jnp.broadcast_to(x[:, None], shape(x)) for x in self))


def check_window(window: Any, t: Any, s: Any) -> Window | None:
    """The window, None if it excludes nothing.

    Raises:
        TypeError: It is no integer and no pair of integers.
        ValueError: It is negative or one-sided.
    """
    if window is None:
        return None
    is_pair = isinstance(window, (tuple, list)) or np.ndim(window) == 1
    try:
        sides: Any = window if is_pair else (window, window)
        left, right = (integer("local_window_size", side) for side in sides)
    except (TypeError, ValueError):
        raise TypeError(
            "local_window_size must be an integer or a pair of them (left, right), "
            f"known at trace time, got {window!r}."
        ) from None
    if min(left, right) < 1:
        raise ValueError(
            f"local_window_size must reach at least 1 to either side, got "
            f"{(left, right)}: a one-sided window leaves the identity as the only "
            "doubly stochastic plan, so every token would attend to itself alone. Use "
            "jax.nn.dot_product_attention for it."
        )
    if not are_known(t, s):
        return Window(left, right)
    if left >= t - 1 and right >= s - 1:
        return None
    # Positions are 32 bits.
    return Window(min(left, t), min(right, s))


def check_segments(
    query_ids: Any, key_ids: Any, batch: Any, t: Any, s: Any
) -> Segments | None:
    """The segments of queries and keys, (B, T) and (B, S).

    Raises:
        TypeError: Ids are not integers.
        ValueError: One comes without the other, or with a wrong shape.
    """
    names = "query_segment_ids", "key_segment_ids"
    given = dict(zip(names, (query_ids, key_ids), strict=True))
    if query_ids is None and key_ids is None:
        return None
    for name, ids in given.items():
        if ids is None:
            other = names[names[0] == name]
            raise ValueError(
                f"{other} comes without {name}: queries attend to keys of their own "
                "segment, so both must be known. In self-attention give the same twice."
            )
    arrays = []
    for (name, ids), length in zip(given.items(), (t, s), strict=True):
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(
                f"{name} must be integer, got {ids.dtype}: 1, 2, ... name the segments "
                "and 0 is padding."
            )
        values = known_values(ids)
        if values is not None and (values != values.astype(np.int32)).any():
            raise ValueError(
                f"{name} must be in the range of int32, got {values.max()} at most: "
                "number the segments of a row from 1."
            )
        ids = jnp.asarray(ids).astype(jnp.int32)
        arrays.append(broadcast(name, ids, (batch, length)))
    return Segments(*arrays)


def may_attend(
    window: Window | None,
    segments: Segments | None,
    queries: Int[Array, " T"],
    keys: Int[Array, " S"],
) -> Bool[Array, "*B T S"]:
    """Whether queries at these positions may attend to keys at these positions.

    The segments are those of these queries and keys.
    """
    allowed = jnp.ones((queries.shape[0], keys.shape[0]), jnp.bool_)
    if window is not None:
        distance = keys[None, :] - queries[:, None]
        allowed = (distance >= -window.left) & (distance <= window.right)
    if segments is not None:
        same = segments.query[..., :, None] == segments.key[..., None, :]
        allowed = same & allowed.reshape((1,) * (same.ndim - 2) + allowed.shape)
    return allowed


def rows_with_a_key(
    window: Window | None,
    segments: Segments | None,
    rows: Bool[Array, "*B T"],
    cols: Bool[Array, "*B S"],
) -> Bool[Array, "*B T"]:
    """The queries of `rows` that may attend to a key of `cols`."""
    batch, t = rows.shape[:-1], rows.shape[-1]

    def one(cols, segments):
        return _count(window, segments, cols, t) > 0

    for _ in batch:
        one = jax.vmap(one, in_axes=(0, None if segments is None else 0))
    return rows & one(cols, segments)


def _count(window, segments, cols, t):
    """The number of the keys `cols` that each of `t` queries may attend to, [t]."""
    s, position = cols.shape[0], jnp.arange(t, dtype=jnp.int32)
    if segments is None:
        first, last = position - window.left, position + window.right + 1
        first, last = jnp.clip(first, 0, s), jnp.clip(last, 0, s)
    else:
        # The keys of a segment, in order of their position, are a range.
        order = jnp.argsort(segments.key, stable=True).astype(jnp.int32)
        cols, ids = cols[order], segments.key[order]
        first, last = _range_of(ids, segments.query)
        if window is not None:
            bounds = position - window.left, position + window.right + 1
            first, last = (
                _bound(order, first, last, bound, jnp.less) for bound in bounds
            )
    before = jnp.cumsum(cols.astype(jnp.int32))
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), before])
    return before[last] - before[first]


def _range_of(in_order, ids):
    """The first place of each id in a sorted array, and the place after its last."""
    # `jnp.searchsorted` takes no symbolic size.
    start, end = jnp.zeros_like(ids), jnp.full_like(ids, in_order.shape[0])
    return tuple(
        _bound(in_order, start, end, ids, is_before)
        for is_before in (jnp.less, jnp.less_equal)
    )


def _bound(values, first, last, bound, is_before):
    """The first place in each range whose value is not `is_before(value, bound)`."""

    def halve(_, place):
        first, last = place
        middle = (first + last) // 2
        value = values[jnp.minimum(middle, values.shape[0] - 1)]
        is_below = is_before(value, bound)
        is_open = first < last
        return (
            jnp.where(is_open & is_below, middle + 1, first),
            jnp.where(is_open & ~is_below, middle, last),
        )

    # A range of 32 bits is empty after 32 halvings.
    return jax.lax.fori_loop(0, 32, halve, (first, last))[0]


def totals_by_segment(
    values: Num[Array, "*B T"], ids: Int[Array, "*B T"], at: Int[Array, "*B S"]
) -> Num[Array, "*B S"]:
    """The total of the values whose id is that at each place of `at`."""

    def one(values, ids, at):
        in_order = jnp.sort(ids)
        place, _ = _range_of(in_order, ids)
        totals = jnp.zeros_like(values).at[place].add(values)
        first, after = _range_of(in_order, at)
        return jnp.where(first < after, totals[first], 0)

    for _ in values.shape[:-1]:
        one = jax.vmap(one)
    return one(values, ids, at)


def uniform_by_segment(
    segments: Segments, valid: Bool[Array, "*B S"], other: Float[Array, "*B T"]
) -> Float[Array, "*B S"]:
    """The marginal of keys that is uniform in each segment, with the queries' total."""
    total = totals_by_segment(other, segments.query, segments.key)
    count = totals_by_segment(
        valid.astype(jnp.int32), segments.key, segments.key
    ).astype(other.dtype)
    return jnp.where(valid, total / jnp.maximum(count, 1), 0)
