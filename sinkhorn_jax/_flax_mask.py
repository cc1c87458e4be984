"""The mask of Flax's layers, and what it says about padding.

This module handles arrays only and does not import Flax.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ._core.marginals import floating_marginal, has_mass
from ._runtime.arguments import are_known, as_array, known_values
from .attention._pattern import Segments, check_window, may_attend, rows_with_a_key


class LayerMask(NamedTuple):
    """The arguments that a multi-head layer hands to its `attention_fn` as the mask."""

    mask: Array | None
    query_seq_lengths: Integer[Array, "..."] | None = None  # Broadcast to *batch.
    key_value_seq_lengths: Integer[Array, "..."] | None = None
    sow_error: Callable[[Array], Any] | None = None
    plan_options: Any = None  # Instead of those of the function.
    query_marginal: Float[Array, "..."] | None = None  # Broadcast to (*batch, N, T).
    key_marginal: Float[Array, "..."] | None = None
    column_tau: Float[Array, " N"] | None = None  # Instead of that of the options.
    query_segment_ids: Integer[Array, "..."] | None = None  # Broadcast to (*batch, T).
    key_segment_ids: Integer[Array, "..."] | None = None

    def checked(
        self,
        inputs_q: Array,
        inputs_k: Array | None,
        inputs_v: Array | None,
        num_heads: int,
    ) -> "LayerMask":
        """The layer's mask with arrays in place of lists, whose shapes fit the inputs.

        Raises:
            TypeError: JAX makes no array of one.
            ValueError: An input has no tokens, or shapes do not fit.
        """
        *batch, t, _ = _check_tokens("inputs_q", inputs_q)
        s = t
        if inputs_k is not None:
            *others, s, _ = _check_tokens("inputs_k", inputs_k)
            if others != batch:
                raise ValueError(
                    "inputs_q and inputs_k must have the same batch axes, got shapes "
                    f"{inputs_q.shape} and {inputs_k.shape}: each element attends to "
                    "its own keys. Broadcast the smaller one."
                )
        if inputs_v is not None:
            _check_tokens("inputs_v", inputs_v)
        arrays = {}
        for name, axes, sizes in (
            ("mask", ("num_heads", "T", "S"), (num_heads, t, s)),
            ("query_seq_lengths", (), ()),
            ("key_value_seq_lengths", (), ()),
            ("query_marginal", ("num_heads", "T"), (num_heads, t)),
            ("key_marginal", ("num_heads", "S"), (num_heads, s)),
            ("query_segment_ids", ("T",), (t,)),
            ("key_segment_ids", ("S",), (s,)),
        ):
            if (x := getattr(self, name)) is None:
                continue
            # NumPy stays, so that values are known under `jit`.
            x = x if isinstance(x, np.ndarray) else as_array(name, x)
            shape, wanted = x.shape, (*batch, *sizes)
            if name == "mask":  # It may have more axes in front.
                while len(shape) > len(wanted) and shape[0] == 1:
                    shape = shape[1:]
            if not broadcasts(shape, wanted):
                axes = ", ".join(("*batch", *axes))
                raise ValueError(
                    f"{name} must broadcast to ({axes}) = {wanted}, got shape "
                    f"{x.shape}. T and S are the tokens of queries and keys; give an "
                    "axis that is the same for all the size 1."
                )
            arrays[name] = x
        return self._replace(**arrays)

    def of_self_attention(self) -> "LayerMask":
        """Mask and lengths for self-attention: queries and keys are the same tokens.

        Lengths of the keys that are not given are those of the queries, and a mask of
        the keys alone excludes the queries of the same tokens too.
        """
        mask, lengths = self.mask, self.key_value_seq_lengths
        if lengths is None:
            lengths = self.query_seq_lengths
        if mask is not None:
            values = known_values(mask)
            # With NumPy where possible: values stay known, to be examined, under `jit`.
            numpy: Any = jnp if values is None else np
            mask = as_array("mask", mask) if values is None else values
            mask = numpy.atleast_2d(mask.astype(bool))
            if mask.shape[-2] == 1:
                mask = mask & numpy.swapaxes(mask, -1, -2)
        ids = self.key_segment_ids
        if ids is None:
            ids = self.query_segment_ids
        return self._replace(
            mask=mask, key_value_seq_lengths=lengths, key_segment_ids=ids
        )

    def zero_padding(
        self,
        inputs_q: Array,
        inputs_k: Array | None,
        inputs_v: Array | None,
        local_window_size: int | tuple[int, int] | None,
    ) -> tuple[Array, Array | None, Array | None]:
        """The inputs of a layer with 0 for tokens that are padding.

        NaN there would reach the gradients of the projections, as 0 times NaN.
        """
        *batch, t, _ = inputs_q.shape
        s = t if inputs_k is None else inputs_k.shape[-2]
        window = check_window(local_window_size, t, s)
        queries, keys = self._used(tuple(batch), t, s, window)
        if inputs_k is None:
            # The same tokens are queries and keys.
            queries = None if queries is None or keys is None else queries | keys
            return _keep(inputs_q, queries), None, _keep(inputs_v, queries)
        inputs_v = inputs_k if inputs_v is None else inputs_v
        return _keep(inputs_q, queries), _keep(inputs_k, keys), _keep(inputs_v, keys)

    def _used(self, batch, t, s, window):
        """Queries (*batch, T) and keys (*batch, S) that are no padding; None is all."""
        queries = _within(self.query_seq_lengths, (*batch, t))
        keys = _within(self.key_value_seq_lengths, (*batch, s))
        a, b = self.query_marginal, self.key_marginal
        ids = self.query_segment_ids, self.key_segment_ids
        has_segments = ids[0] is not None and ids[1] is not None
        is_alone = all(x is None for x in (queries, keys, a, b, self.mask))
        if not has_segments and is_alone and _sees_all(window, t, s):
            return None, None
        if has_segments or window is not None:
            rows = _of_heads(queries, ids[0], "query_marginal", a, (*batch, t))
            cols = _of_heads(keys, ids[1], "key_marginal", b, (*batch, s))
            return _in_pattern(
                window, ids if has_segments else None, self.mask, rows, cols
            )
        queries = _with_mass("query_marginal", a, (*batch, t), queries)
        keys = _with_mass("key_marginal", b, (*batch, s), keys)
        if self.mask is not None:
            return _allowed(self.mask, queries, keys, batch, t, s)
        return _beside(queries, keys, (*batch, t)), _beside(keys, queries, (*batch, s))


def _check_tokens(name, x):
    """The shape of an input."""
    if x.ndim < 2:
        raise ValueError(
            f"{name} must be (*batch, tokens, features), got shape {x.shape}: "
            "attention is between tokens. Give it an axis for them."
        )
    if x.shape[-2] == 0:
        raise ValueError(
            f"{name} must not be empty, got shape {x.shape}: a plan without rows or "
            "columns has no marginals."
        )
    return x.shape


def broadcasts(shape: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether an array of a shape broadcasts to the wanted one."""
    pairs = zip(shape[::-1], wanted[::-1], strict=False)
    return len(shape) <= len(wanted) and all(n in (1, m) for n, m in pairs)


def _within(lengths, shape):
    """Tokens (*batch, L) within the lengths; None means all."""
    if lengths is None:
        return None
    lengths = jnp.broadcast_to(jnp.asarray(lengths), shape[:-1]).astype(jnp.int32)
    position = jnp.arange(shape[-1], dtype=jnp.int32)
    return jnp.broadcast_to(position, shape) < lengths[..., None]


def _sees_all(window, t, s):
    """Whether a window alone leaves a key to every query and a query to every key."""
    if window is None or not are_known(t, s):
        return window is None
    return t <= s + window.left and s <= t + window.right


def _of_heads(tokens, ids, name, marginal, shape):
    """The tokens (*batch, H, L) of `tokens` with a segment and mass; H may be 1."""
    valid = jnp.ones(shape, bool) if tokens is None else tokens
    if ids is not None:
        valid = valid & jnp.broadcast_to(jnp.asarray(ids) > 0, shape)
    valid = valid[..., None, :]
    if marginal is None:
        return valid
    floating: Any = floating_marginal(name, marginal, jnp.shape(marginal))
    return valid & has_mass(floating)


def _in_pattern(window, ids, mask, rows, cols):
    """Queries (*batch, T) and keys (*batch, S) that meet in a head.

    They meet in window and segments, where the mask allows it, if both are valid: a
    query is in `rows` (*batch, H, T) and a key in `cols` (*batch, H, S).
    """
    both = None
    if mask is not None:
        mask = _with_axes(mask, rows.ndim + 1)
        if mask.shape[-2] == 1:
            cols = cols & mask[..., 0, :]
        elif mask.shape[-1] == 1:
            rows = rows & mask[..., 0]
        else:
            both = mask & rows[..., :, None] & cols[..., None, :]
    heads = jnp.broadcast_shapes(rows.shape[:-1], cols.shape[:-1])
    rows = jnp.broadcast_to(rows, (*heads, rows.shape[-1]))
    cols = jnp.broadcast_to(cols, (*heads, cols.shape[-1]))
    segments = None
    if ids is not None:
        query, key = (
            jnp.broadcast_to(jnp.asarray(x)[..., None, :], valid.shape)
            for x, valid in zip(ids, (rows, cols), strict=True)
        )
        segments = Segments(query, key)
    if both is not None:
        positions = (jnp.arange(x.shape[-1], dtype=jnp.int32) for x in (rows, cols))
        both = both & may_attend(window, segments, *positions)
        return both.any(axis=(-1, -3)), both.any(axis=(-2, -3))
    queries = rows_with_a_key(window, segments, rows, cols)
    window = None if window is None else window.reversed
    segments = None if segments is None else segments.reversed
    keys = rows_with_a_key(window, segments, cols, rows)
    return queries.any(axis=-2), keys.any(axis=-2)


def _with_mass(name, marginal, shape, tokens):
    """The tokens (*batch, L) that have mass in a head too; None means all."""
    if marginal is None:
        return tokens
    floating: Any = floating_marginal(name, marginal, jnp.shape(marginal))
    has_any = has_mass(floating)
    if has_any.ndim > 1:
        has_any = has_any.any(axis=-2)
    has_any = jnp.broadcast_to(has_any, shape)
    return has_any if tokens is None else has_any & tokens


def _beside(tokens, others, shape):
    """The valid tokens (*batch, L), none in an element whose other side has none.

    None is all.
    """
    if others is None:
        return tokens
    has_others = jnp.broadcast_to(others.any(axis=-1, keepdims=True), shape)
    return has_others if tokens is None else has_others & tokens


def _with_axes(mask, num_axes):
    """The mask as a boolean with this many axes; those before have the size 1."""
    mask = jnp.asarray(mask).astype(bool)
    lead = max(mask.ndim - num_axes, 0)
    return mask.reshape((1,) * (num_axes - mask.ndim) + mask.shape[lead:])


def _allowed(mask, queries, keys, batch, t, s):
    """Queries and keys that the mask allows for one that is within its lengths."""
    mask = _with_axes(mask, len(batch) + 3)  # With an axis for the heads.
    of_keys = mask if keys is None else mask & keys[..., None, None, :]
    of_queries = mask if queries is None else mask & queries[..., None, :, None]
    rows = jnp.broadcast_to(of_keys.any(axis=(-1, -3)), (*batch, t))
    cols = jnp.broadcast_to(of_queries.any(axis=(-2, -3)), (*batch, s))
    rows = rows if queries is None else rows & queries
    return rows, cols if keys is None else cols & keys


def _keep(x, used):
    return x if x is None or used is None else jnp.where(used[..., None], x, 0)
