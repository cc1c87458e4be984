"""Attention as Flax's layers call it: batch axes, marginals, and the plan itself.

This module handles arrays only and does not import Flax.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._core.checks import number
from ._core.gradient import Gradient
from ._core.marginals import static_tau
from ._core.options import Finish, Options
from ._flax_mask import LayerMask, broadcasts
from ._runtime.arguments import as_array
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
from .attention._pattern import check_window
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
    if not broadcasts(lead, batch):
        axes = "(*batch, heads, T, S)" if num_axes == 3 else "(*batch, heads, tokens)"
        raise ValueError(
            f"{name} must broadcast to {axes} with batch axes {batch}, got shape "
            f"{x.shape}."
        )
    return jnp.broadcast_to(x, (*batch, *rest)).reshape(math.prod(batch), *rest)
