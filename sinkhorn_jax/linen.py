"""Sinkhorn attention for Flax linen."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.core import Tracer
from jaxtyping import Array, Float

from ._domain import PRECISION, accum_dtype
from ._gradient import Exact, Gradient
from ._iteration import Finish
from ._options import Options
from ._sinkhorn import sinkhorn
from .attention._api import CAUSAL, attend, check_scale


def attention_fn(
    num_iters: int = 10,
    *,
    scale: float | None = None,
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    implementation: str | None = None,
) -> Callable[..., Array]:
    """Make the `attention_fn` of linen's multi-head layers doubly stochastic.

        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn(10))

    The layer's parameters stay those of softmax attention. Any number of leading batch
    axes; masks of any dtype, nonzero where a query may attend. A mask made by
    `nn.make_attention_mask(valid, valid)` leaves padded queries and keys out of the
    plan; a mask of the keys alone leaves padded queries in, and they pour mass into the
    columns. Dropout acts on the plan, one mask for all batch elements and heads with
    `broadcast_dropout`. With `sow_weights` the plan is sown as "attention_weights". The
    product with the values is always accumulated in float32 at least, whatever
    `precision` and `force_fp32_for_softmax` say.

    Args:
        num_iters: Sinkhorn iterations; 0 is softmax attention.
        scale: Of the logits; default 1/sqrt(H).
        finish: As in `sinkhorn_attention`.
        gradient: As in `sinkhorn_attention`.
        implementation: As in `sinkhorn_attention`.

    Returns:
        A function with the arguments of `nn.dot_product_attention`.

    Raises:
        TypeError: As for `sinkhorn_attention`, here or at the call.
        ValueError: As for `sinkhorn_attention`. At the call also for a causal mask, and
            for a masked single query, as in decoding, the plan of which is uniform
            whatever the logits. A causal mask is recognised where its values are known:
            a traced one, under `jit` as an argument, cannot be examined.
    """
    options = Options(num_iters, finish, gradient)
    scale = None if scale is None else check_scale(scale)

    def sinkhorn_attention_fn(
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S N H"],
        value: Float[Array, "*batch S N D"],
        bias: Float[Array, "..."] | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        module: nn.Module | None = None,
    ) -> Float[Array, "*batch T N D"]:
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        if mask is not None:
            mask = jnp.asarray(mask).astype(bool)
            _check_not_causal(mask, query.shape[-3], key.shape[-3])
        if module is not None:
            plan = _plan(query, key, bias, mask, scale, options, implementation)
            module.sow("intermediates", "attention_weights", plan)
        batch = query.shape[:-3]
        out, _ = attend(
            query.reshape(-1, *query.shape[-3:]),
            key.reshape(-1, *key.shape[-3:]),
            value.reshape(-1, *value.shape[-3:]),
            _flatten_batch("bias", bias, batch),
            _flatten_batch("mask", mask, batch),
            options=options,
            scale=scale,
            dropout_rate=0.0 if deterministic else dropout_rate,
            dropout_rng=dropout_rng,
            broadcast_dropout=broadcast_dropout,
            implementation=implementation,
        )
        return out.reshape(*batch, *out.shape[1:])

    return sinkhorn_attention_fn


def _check_not_causal(mask, t, s):
    if t == 1 and s > 1:
        raise ValueError(
            "A single query with a mask, as in decode=True, got T=1 and "
            f"S={s}: its only plan with equal columns is uniform, whatever the logits. "
            "Use nn.dot_product_attention for it."
        )
    if isinstance(mask, Tracer) or t != s or mask.shape[-2:] != (t, s):
        return
    allowed = np.asarray(mask).reshape(-1, t, s).any(axis=0)
    if np.tril(allowed, -1).any() and not np.triu(allowed, 1).any():
        raise ValueError(CAUSAL.format("A causal mask"))


def _flatten_batch(name, x, batch):
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


def _plan(query, key, bias, mask, scale, options, implementation):
    dtype = accum_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = query.astype(dtype) * scale, key.astype(dtype)
    logits = jnp.einsum("...tnh,...snh->...nts", query, key, precision=PRECISION)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    return sinkhorn(
        logits,
        options.num_iters,
        where=mask,
        finish=options.finish,
        gradient=options.gradient,
        implementation=implementation,
    )
