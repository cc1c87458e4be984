"""Sinkhorn attention for Flax nnx."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
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
    """Make the `attention_fn` of `nnx.MultiHeadAttention` doubly stochastic.

        nnx.MultiHeadAttention(8, 64, attention_fn=attention_fn(10), rngs=rngs)

    The layer's parameters stay those of softmax attention. Any number of leading batch
    axes, fewer key heads than query heads; masks of any dtype, nonzero where a query
    may attend. A mask made by `nnx.make_attention_mask(valid, valid)` leaves padded
    queries and keys out of the plan; a mask of the keys alone leaves padded queries in,
    and they pour mass into the columns: where queries are as many as keys, that warns.
    Dropout acts on the plan, one mask for all batch elements and heads with
    `broadcast_dropout`. With `sow_weights` the plan is sown as "attention_weights". The
    product with the values is always accumulated in float32 at least, whatever
    `precision` says.

    Args:
        num_iters: Sinkhorn iterations; 0 is softmax attention.
        scale: Of the logits; default 1/sqrt(H).
        finish: As in `sinkhorn_attention`.
        gradient: As in `sinkhorn_attention`.
        implementation: As in `sinkhorn_attention`.

    Returns:
        A function with the arguments of `nnx.dot_product_attention`.

    Raises:
        TypeError: As for `sinkhorn_attention`, here or at the call.
        ValueError: As for `sinkhorn_attention`. At the call also for `is_causal`, a
            causal mask, and a masked single query, as in decoding, the plan of which is
            uniform whatever the logits. A causal mask is recognised where its values
            are known: a traced one, under `jit` as an argument, cannot be examined.
    """
    how = normaliser(num_iters, scale, finish, gradient, implementation)

    def sinkhorn_attention_fn(
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K D"],
        bias: Float[Array, "..."] | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: nnx.Module | None = None,
        promote_dtype: Any = flax_promote_dtype,
        is_causal: bool = False,
    ) -> Float[Array, "*batch T N D"]:
        del precision
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        mask = None if mask is None else jnp.asarray(mask).astype(bool)
        operands = Operands(query, key, bias, mask)
        rate = 0.0 if deterministic else dropout_rate
        out, _ = apply_plan(
            how,
            operands,
            value,
            dropout=Dropout(rate, dropout_rng, broadcast_dropout),
            is_causal=is_causal,
        )
        if module is not None:
            weights = make_plan(how, operands)
            module.sow(nnx.Intermediate, "attention_weights", weights)
        return out

    return sinkhorn_attention_fn


class MultiHeadSinkhornAttention(nnx.MultiHeadAttention):
    """Multi-head attention whose weights are doubly stochastic.

    Its arguments, parameters and call are those of `nnx.MultiHeadAttention`, so that
    parameters trained with either load into the other, with what Sinkhorn adds.
    `attention_fn` is no argument, and `decode=True` is refused: the plan of a single
    query is uniform.

    Padding is best given as sequence lengths, which never become a (T, S) array. In
    self-attention, where `inputs_k` is left out, queries and keys are the same tokens:
    `query_seq_lengths` then stand for both, and a mask of the keys alone (one row, as
    (B, 1, 1, S)) excludes the padded queries as well.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        num_iters: int = 10,
        scale: float | None = None,
        finish: Finish = "rows",
        gradient: Gradient = Exact(),  # noqa: B008 - frozen.
        implementation: AttentionImplementation | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Make the layer.

        Args:
            num_heads: As in `nnx.MultiHeadAttention`, like the five after it.
            in_features: Of the queries' tokens.
            qkv_features: Of all heads together.
            out_features: Of the output.
            num_kv_heads: Fewer than `num_heads` for grouped queries.
            in_kv_features: Of the keys' tokens.
            num_iters: Sinkhorn iterations; 0 is softmax attention.
            scale: Of the logits; default 1/sqrt(H).
            finish: As in `sinkhorn_attention`.
            gradient: As in `sinkhorn_attention`.
            implementation: As in `sinkhorn_attention`.
            rngs: Of parameters and dropout.
            **options: All others of `nnx.MultiHeadAttention`: dtypes, initializers,
                metadata, dropout and so on.
        """
        if "attention_fn" in options:
            raise TypeError(
                "attention_fn is made from num_iters and the options beside it, got "
                "another. To choose one use nnx.MultiHeadAttention."
            )
        options.setdefault("decode", False)
        super().__init__(
            num_heads,
            in_features,
            qkv_features,
            out_features,
            num_kv_heads,
            in_kv_features,
            rngs=rngs,
            **options,
        )
        self.how = normaliser(num_iters, scale, finish, gradient, implementation)

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
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        sow_marginal_error: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
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
            deterministic: Whether to leave dropout out; None for the constructor's.
            rngs: Whose "dropout" key is used; None for the constructor's.
            sow_weights: Sow the plan (*batch, N, T, S) as the `nnx.Intermediate`
                "attention_weights". It is made from explicit logits.
            sow_marginal_error: Likewise the marginal error (*batch, N), as
                "marginal_error"; see `sinkhorn_attention`.
            decode: Must not be True.
            is_causal: Must be False.
            out_sharding: Of the output, for explicit sharding.
            qkv_sharding: Of query, key and value, likewise.

        Returns:
            The attended values after the output projection. O output features.

        Raises:
            TypeError: As for `sinkhorn_attention`.
            ValueError: As for `attention_fn`, and for decoding.
        """
        if self.decode if decode is None else decode:
            raise ValueError(SINGLE_QUERY.format("decode=True"))
        mask = None if mask is None else jnp.asarray(mask).astype(bool)
        if inputs_k is None:
            if inputs_v is not None:
                raise ValueError(
                    "inputs_v came without inputs_k, which would be inputs_q. Pass "
                    "inputs_k too, or leave both out."
                )
            inputs_k = inputs_q
            mask = None if mask is None else for_both_sides(mask)
            if key_value_seq_lengths is None:
                key_value_seq_lengths = query_seq_lengths
        if inputs_v is None:
            inputs_v = inputs_k
        query, key, value = (
            project(x, out_sharding=qkv_sharding)
            for project, x in (
                (self.query, inputs_q),
                (self.key, inputs_k),
                (self.value, inputs_v),
            )
        )
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        operands = Operands(
            query, key, None, mask, query_seq_lengths, key_value_seq_lengths
        )
        out, error = apply_plan(
            self.how,
            operands,
            value,
            dropout=self._dropout(deterministic, rngs),
            is_causal=is_causal,
            return_marginal_error=sow_marginal_error,
        )
        if sow_weights:
            weights = make_plan(self.how, operands)
            self.sow(nnx.Intermediate, "attention_weights", weights)
        if sow_marginal_error:
            self.sow(nnx.Intermediate, "marginal_error", error)
        return self.out(out, out_sharding=out_sharding)

    def _dropout(self, deterministic, rngs):
        if self.dropout_rate == 0.0:
            return Dropout()
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} needs deterministic, got None at "
                "the call and in the constructor: whether to drop is not guessed. Call "
                "model.train() or model.eval(), or pass it."
            )
        if deterministic:
            return Dropout()
        rngs = self.rngs if rngs is None else rngs
        if rngs is None:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} needs rngs, got none at the call, "
                "and the constructor's were not kept. Pass nnx.Rngs(dropout=0)."
            )
        rng = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs()
        return Dropout(self.dropout_rate, rng, self.broadcast_dropout)
