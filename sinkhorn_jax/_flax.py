"""Attention as Flax's layers call it: batch axes, masks, padding, and the plan itself.

This module handles arrays only and does not import Flax.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ._core.checks import number
from ._core.gradient import Gradient
from ._core.marginals import floating_marginal, has_mass, static_tau
from ._core.options import Finish, Options
from ._runtime.arguments import are_known, as_array, known_values
from ._runtime.dispatch import check_name
from ._runtime.explicit_axes import merge_axes
from .attention._call import (
    IMPLEMENTATIONS,
    AttentionImplementation,
    attend,
    prepare,
    without_padding,
)
from .attention._marginals import complete_marginals
from .attention._pattern import Segments, check_window, may_attend, rows_with_a_key
from .attention._problem import Dropout, GivenMarginals, GivenPattern
from .attention._reference import explicit_logits
from .attention._validate import (
    PADDED_QUERIES,
    check_pattern,
    checked_tolerance,
    static_scale,
)
from .matrix import sinkhorn

SINGLE_QUERY: Final = (
    "{} makes a plan of a single row, and the only one with equal columns is uniform, "
    "whatever the logits. Use Flax's own dot_product_attention for decoding."
)


class LayerMask(NamedTuple):
    """What a multi-head layer passes to its `attention_fn` in place of the mask."""

    mask: Array | None
    query_seq_lengths: Integer[Array, "..."] | None = None  # Broadcast to *batch.
    key_value_seq_lengths: Integer[Array, "..."] | None = None
    sow_error: Callable[[Array], Any] | None = None
    plan_options: "PlanOptions | None" = None  # Instead of those of the function.
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
        """The same with arrays in place of lists, whose shapes fit the inputs.

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
            if not _broadcasts(shape, wanted):
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
            queries, keys = _allowed(self.mask, queries, keys, batch, t, s)
        return queries, keys


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """How logits become a plan; checked where a layer is made, before any tracing."""

    num_iters: int
    scale: float | None
    finish: Finish
    gradient: Gradient
    implementation: AttentionImplementation | None
    column_tau: float = 1.0
    tolerance: float | None = None
    local_window_size: int | tuple[int, int] | None = None

    def __post_init__(self):
        _ = self.iteration  # Made for its checks.
        object.__setattr__(self, "column_tau", static_tau(self.column_tau))
        check_window(self.local_window_size, 2, 2)
        if self.scale is not None:
            object.__setattr__(self, "scale", static_scale(self.scale))
        check_name(IMPLEMENTATIONS, self.implementation)

    @property
    def iteration(self) -> Options:
        """The options of the iteration."""
        tolerance = checked_tolerance(self.tolerance)
        return Options(self.num_iters, self.finish, self.gradient, tolerance)

    def attend(
        self,
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K D"],
        bias: Float[Array, "..."] | None,
        mask: Array | LayerMask | None,
        dropout: Dropout,
        sow_plan: Callable[[Array], Any] | None,
        is_causal: bool = False,
    ) -> Float[Array, "*batch T N D"]:
        """The plan times the values. *batch is any number of axes.

        Bias and mask broadcast to (*batch, N, T, S). `sow_plan` is called with the plan
        of that shape, without dropout, made from explicit logits.
        """
        masks = mask if isinstance(mask, LayerMask) else LayerMask(mask)
        mask, sow_error = masks.mask, masks.sow_error
        lengths = masks.query_seq_lengths, masks.key_value_seq_lengths
        if mask is not None and not hasattr(mask, "shape"):
            mask = as_array("mask", mask)
        has_query_lengths = lengths[0] is not None
        if mask is not None:
            _check_mask(mask, query.shape[-3], key.shape[-3], has_query_lengths)
        check_pattern(query, key, bias, mask, has_query_lengths=has_query_lengths)
        if mask is not None:
            mask = jnp.asarray(mask).astype(bool)
        batch = query.shape[:-3]
        query, key, value = (merge_axes(x, len(batch)) for x in (query, key, value))
        bias = _with_one_batch_axis("bias", bias, batch)
        mask = _with_one_batch_axis("mask", mask, batch)
        query_seq_lengths, key_value_seq_lengths = (
            None if x is None else jnp.broadcast_to(x, batch).reshape(-1)
            for x in lengths
        )
        problem, operands = prepare(
            (query, key, value, bias, mask),
            (query_seq_lengths, key_value_seq_lengths),
            options=self.iteration,
            marginals=self._marginals(masks, batch),
            pattern=self._pattern(masks, batch, query.shape[1], key.shape[1]),
            dropout=dropout,
            scale=self.scale,
            is_causal=is_causal,
            return_marginal_error=sow_error is not None,
        )
        out, error = attend(problem, operands, self.implementation)
        if sow_plan is not None:
            operands = complete_marginals(problem, operands)
            operands, _ = without_padding(problem, operands)
            plan = self._plan(explicit_logits(problem, operands), operands)
            sow_plan(plan.reshape(*batch, *plan.shape[1:]))
        if sow_error is not None and error is not None:
            sow_error(error.reshape(*batch, error.shape[-1]))
        return out.reshape(*batch, *out.shape[1:])

    def _pattern(self, masks, batch, t, s):
        ids = (masks.query_segment_ids, t), (masks.key_segment_ids, s)
        query, key = (
            None
            if x is None
            else merge_axes(jnp.broadcast_to(x, (*batch, length)), len(batch))
            for x, length in ids
        )
        return GivenPattern(query, key, self.local_window_size)

    def _marginals(self, masks, batch):
        tau = self.column_tau if masks.column_tau is None else masks.column_tau
        query, key = (
            None if x is None else _with_one_batch_axis(name, x, batch, num_axes=2)
            for name, x in (
                ("query_marginal", masks.query_marginal),
                ("key_marginal", masks.key_marginal),
            )
        )
        return GivenMarginals(query, key, tau)

    def _plan(self, logits, operands):
        # `sinkhorn` has no "streaming", and its kernels take small matrices only.
        # Forward mode needs "reference".
        name = "reference" if self.implementation == "reference" else None
        return sinkhorn(
            logits,
            self.num_iters,
            row_marginal=operands.row_marginal,
            col_marginal=operands.col_marginal,
            column_tau=1.0 if operands.tau is None else operands.tau,
            finish=self.finish,
            gradient=self.gradient,
            tolerance=self.tolerance,
            implementation=name,
        )


def is_learned_tau(column_tau: Any) -> bool:
    """Whether a layer learns its `column_tau`; raises for any other text."""
    if isinstance(column_tau, str) and column_tau != "learned":
        raise ValueError(
            f"column_tau must be a number or 'learned', got {column_tau!r}."
        )
    return isinstance(column_tau, str)


def tau_logit(initial: float) -> float:
    """The logit of a learned `column_tau` at the start."""
    initial = number("initial_column_tau", initial)
    if not 0 < initial < 1:
        raise ValueError(
            f"initial_column_tau must be between 0 and 1, got {initial}: the sigmoid "
            "of a finite parameter is, and near either end it does not learn."
        )
    return math.log(initial / (1 - initial))


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


def _broadcasts(shape, wanted):
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


def _check_mask(mask, t, s, has_query_lengths):
    if t == 1 and s > 1:
        raise ValueError(SINGLE_QUERY.format(f"A mask with one query for {s} keys"))
    shape = (1,) * (2 - mask.ndim) + mask.shape
    if t == s and shape[-2:] == (1, s) and not has_query_lengths:
        warnings.warn(
            f"A mask of keys alone, got shape {mask.shape}, {PADDED_QUERIES}",
            stacklevel=3,
        )


def _with_one_batch_axis(name, x, batch, num_axes=3):
    """(*batch, N, T, S) with broadcast axes as (B or 1, N, T, S).

    `num_axes` of them are no batch axes: 3, or 2 for (*batch, N, T).
    """
    if x is None or jnp.ndim(x) <= num_axes:
        return x
    lead, rest = x.shape[:-num_axes], x.shape[-num_axes:]
    if all(n == 1 for n in lead):
        return x.reshape(1, *rest)
    if not _broadcasts(lead, batch):
        axes = "(*batch, heads, T, S)" if num_axes == 3 else "(*batch, heads, tokens)"
        raise ValueError(
            f"{name} must broadcast to {axes} with batch axes {batch}, got shape "
            f"{x.shape}."
        )
    return jnp.broadcast_to(x, (*batch, *rest)).reshape(math.prod(batch), *rest)
