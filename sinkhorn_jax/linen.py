"""Sinkhorn attention for Flax linen."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Integer

from ._core.gradient import Exact, Gradient
from ._core.iteration import Finish
from ._flax import (
    SINGLE_QUERY,
    Dropout,
    Operands,
    apply_plan,
    for_both_sides,
    make_plan,
    normaliser,
)
from .attention._api import AttentionImplementation


def attention_fn(
    num_iters: int = 10,
    *,
    scale: float | None = None,
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    implementation: AttentionImplementation | None = None,
) -> Callable[..., Array]:
    """Make the `attention_fn` of linen's multi-head layers doubly stochastic.

        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn(10))

    The layer's parameters stay those of softmax attention. Any number of leading batch
    axes; masks of any dtype, nonzero where a query may attend. A mask made by
    `nn.make_attention_mask(valid, valid)` leaves padded queries and keys out of the
    plan; a mask of the keys alone leaves padded queries in, and they pour mass into the
    columns: where queries are as many as keys, that warns. Dropout acts on the plan,
    one mask for all batch elements and heads with `broadcast_dropout`. With
    `sow_weights` the plan is sown as "attention_weights". The product with the values
    is always accumulated in float32 at least, whatever `precision` and
    `force_fp32_for_softmax` say.

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
    return _attention_fn(normaliser(num_iters, scale, finish, gradient, implementation))


def _attention_fn(
    how, query_seq_lengths=None, key_value_seq_lengths=None, sow_error=None
):
    # Flax passes the arguments that this signature names.
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
        operands = Operands(
            query, key, bias, mask, query_seq_lengths, key_value_seq_lengths
        )
        rate = 0.0 if deterministic else dropout_rate
        out, error = apply_plan(
            how,
            operands,
            value,
            dropout=Dropout(rate, dropout_rng, broadcast_dropout),
            return_marginal_error=sow_error is not None,
        )
        if module is not None:
            module.sow("intermediates", "attention_weights", make_plan(how, operands))
        if sow_error is not None:
            sow_error(error)
        return out

    return sinkhorn_attention_fn


class MultiHeadSinkhornAttention(nn.MultiHeadDotProductAttention):
    """Multi-head attention whose weights are doubly stochastic.

    Its attributes, parameters and call are those of `nn.MultiHeadDotProductAttention`,
    so that parameters trained with either load into the other, with what Sinkhorn adds.
    `attention_fn` is no attribute to set, and `decode=True` is refused at the call: the
    plan of a single query is uniform. `inputs_kv`, which Flax deprecates, is left out.

    Padding is best given as sequence lengths, which never become a (T, S) array. In
    self-attention, where `inputs_k` is left out, queries and keys are the same tokens:
    `query_seq_lengths` then stand for both, and a mask of the keys alone (one row, as
    (B, 1, 1, S)) excludes the padded queries as well.

    Attributes:
        num_iters: Sinkhorn iterations; 0 is softmax attention.
        scale: Of the logits; default 1/sqrt(H).
        finish: As in `sinkhorn_attention`.
        gradient: As in `sinkhorn_attention`.
        implementation: As in `sinkhorn_attention`.
    """

    attention_fn: None = dataclasses.field(default=None, init=False, repr=False)
    num_iters: int = 10
    scale: float | None = None
    finish: Finish = "rows"
    gradient: Gradient = Exact()
    implementation: AttentionImplementation | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*batch T F"],
        inputs_k: Float[Array, "*batch S G"] | None = None,
        inputs_v: Float[Array, "*batch S E"] | None = None,
        *,
        mask: Array | None = None,
        query_seq_lengths: Integer[Array, "..."] | None = None,
        key_value_seq_lengths: Integer[Array, "..."] | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        sow_marginal_error: bool = False,
    ) -> Float[Array, "*batch T O"]:
        """Attend.

        Args:
            inputs_q: Tokens that ask. F features.
            inputs_k: Tokens that are attended to; None for `inputs_q`.
            inputs_v: What they hand over; None for `inputs_k`.
            mask: Of any dtype, nonzero where a query may attend to a key; broadcasts to
                (*batch, N, T, S).
            query_seq_lengths: Valid tokens of `inputs_q`; broadcasts to *batch.
            key_value_seq_lengths: Valid tokens of `inputs_k`. Given without the other,
                all queries count as valid.
            deterministic: Whether to leave dropout out.
            dropout_rng: Instead of the module's own "dropout" key.
            sow_weights: Sow the plan (*batch, N, T, S) as "attention_weights" into
                "intermediates". It is made from explicit logits.
            sow_marginal_error: Likewise the marginal error (*batch, N), as
                "marginal_error"; see `sinkhorn_attention`.

        Returns:
            The attended values after the output projection. O output features.

        Raises:
            TypeError: As for `sinkhorn_attention`.
            ValueError: As for `attention_fn`, and for `decode=True`.
        """
        if self.decode:
            raise ValueError(SINGLE_QUERY.format("decode=True"))
        how = normaliser(
            self.num_iters, self.scale, self.finish, self.gradient, self.implementation
        )
        if inputs_k is None:
            mask = (
                None if mask is None else for_both_sides(jnp.asarray(mask).astype(bool))
            )
            if key_value_seq_lengths is None:
                key_value_seq_lengths = query_seq_lengths

        def sow_error(error):
            self.sow("intermediates", "marginal_error", error)

        layer = nn.MultiHeadDotProductAttention(
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(nn.MultiHeadDotProductAttention)
                if field.name not in ("parent", "name", "attention_fn")
            },
            attention_fn=_attention_fn(
                how,
                query_seq_lengths,
                key_value_seq_lengths,
                sow_error if sow_marginal_error else None,
            ),
        )
        nn.share_scope(self, layer)
        return layer(
            inputs_q,
            inputs_k,
            inputs_v,
            mask=mask,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
        )
