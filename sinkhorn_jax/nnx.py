"""Sinkhorn attention for Flax nnx."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jaxtyping import Array, Float, Integer

from ._core.gradient import Exact, Gradient
from ._core.options import Finish
from ._flax import SINGLE_QUERY, PlanOptions, is_learned_tau, tau_logit
from ._flax_mask import LayerMask
from .attention._call import AttentionImplementation
from .attention._problem import Dropout


def attention_fn(
    num_iters: int = 10,
    *,
    scale: float | None = None,
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    implementation: AttentionImplementation | None = None,
    column_tau: float = 1.0,
    tolerance: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> Callable[..., Array]:
    """Make the `attention_fn` of `nnx.MultiHeadAttention` doubly stochastic.

        nnx.MultiHeadAttention(8, 64, attention_fn=attention_fn(10), rngs=rngs)

    The layer keeps the parameters of softmax attention. Inputs may have any number of
    leading batch axes, and fewer key heads than query heads. Masks have any dtype and
    are nonzero where a query may attend. A mask made by
    `nnx.make_attention_mask(valid, valid)` leaves padded queries and keys out of the
    plan. A mask of the keys alone leaves padded queries in, and they pour mass into the
    columns: the function warns if there are as many queries as keys.

    Dropout acts on the plan; with `broadcast_dropout` all batch elements and heads
    share one dropout mask. With `sow_weights` the plan is sown as "attention_weights".
    The product with the values is always accumulated in float32 at least, whatever
    `precision` says.

    Args:
        num_iters: Sinkhorn iterations; 0 is softmax attention.
        scale: Multiplies the products of queries and keys; a Python number, default
            1/sqrt(H).
        finish: As in `sinkhorn_attention`.
        gradient: As in `sinkhorn_attention`.
        implementation: As in `sinkhorn_attention`.
        column_tau: As in `sinkhorn_attention`, a Python number.
        tolerance: As in `sinkhorn_attention`.
        local_window_size: As in `sinkhorn_attention`.

    Returns:
        A function with the arguments of `nnx.dot_product_attention`.

    Raises:
        TypeError: As for `sinkhorn_attention`, here or at the call.
        ValueError: As for `sinkhorn_attention`. At the call also for `is_causal`, a
            causal mask, and a mask with a single query, as in decoding, whose plan is
            uniform whatever the logits. A causal mask is recognised where its values
            are known. One that is made under `jit`, or is an argument of it, passes in
            silence, and later tokens leak into earlier ones; `traced_checks` finds it.
    """
    return _AttentionFn(
        PlanOptions(
            *(num_iters, scale, finish, gradient, implementation),
            *(column_tau, tolerance, local_window_size),
        )
    )


# A dataclass, because two layers are the same to nnx if their attributes are equal, and
# of the module, so that it can be pickled.
@dataclasses.dataclass(frozen=True)
class _AttentionFn:
    plan_options: PlanOptions | None  # None where a layer passes them with the mask.

    def __call__(
        self,
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K D"],
        bias: Float[Array, "..."] | None = None,
        mask: Array | LayerMask | None = None,
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
        rate = 0.0 if deterministic else dropout_rate
        dropout = Dropout(rate, dropout_rng, broadcast_dropout)
        sow_plan = None if module is None else _sow(module, "attention_weights")
        options = mask.plan_options if isinstance(mask, LayerMask) else None
        options = options or self.plan_options
        if options is None:
            raise TypeError(
                "The attention function of a MultiHeadSinkhornAttention takes its "
                "options from that layer. Use sinkhorn_jax.nnx.attention_fn instead."
            )
        return options.attend(
            query, key, value, bias, mask, dropout, sow_plan, is_causal
        )


def _sow(module, name):
    return functools.partial(module.sow, nnx.Intermediate, name)


class MultiHeadSinkhornAttention(nnx.MultiHeadAttention):
    """Multi-head attention whose weights are doubly stochastic.

    It has the arguments, parameters and call of `nnx.MultiHeadAttention`, and arguments
    for Sinkhorn besides. Parameters trained with either layer load into the other:
    `nnx.update(layer, nnx.state(softmax_layer, nnx.Param))`.
    `attention_fn` is no argument, and `decode=True` is refused, because the plan of a
    single query is uniform.

    Padding is best given as sequence lengths, which never become a (T, S) array. In
    self-attention, where `inputs_k` is left out, queries and keys are the same tokens:
    `query_seq_lengths` then stand for both, and a mask of the keys alone (one row, as
    (B, 1, 1, S)) excludes the padded queries as well.

    The options are attributes of the same names: `layer.set_attributes(num_iters=20)`
    changes those of a layer and of all layers in it.
    """

    num_iters: int
    scale: float | None
    finish: Finish
    gradient: Gradient
    implementation: AttentionImplementation | None
    column_tau: float | Literal["learned"]
    tolerance: float | None
    local_window_size: int | tuple[int, int] | None

    def __init__(
        self,
        *args: Any,
        num_iters: int = 10,
        scale: float | None = None,
        finish: Finish = "rows",
        gradient: Gradient = Exact(),  # noqa: B008 - frozen.
        implementation: AttentionImplementation | None = None,
        column_tau: float | Literal["learned"] = 1.0,
        tolerance: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        initial_column_tau: float = 0.5,
        **options: Any,
    ):
        """Make the layer.

        Args:
            *args: The arguments of `nnx.MultiHeadAttention`: `num_heads`, `in_features`
                and so on.
            num_iters: As in `attention_fn`; likewise the four arguments after it.
            scale: The inverse temperature.
            finish: The last half step.
            gradient: The derivative.
            implementation: The implementation.
            column_tau: As in `attention_fn`, or "learned" for one in each head: the
                sigmoid of the `nnx.Param` "column_tau_logit" (N,).
            tolerance: The marginal error to stop at.
            local_window_size: The window of each query.
            initial_column_tau: Where a learned `column_tau` starts, between 0 and 1. At
                either end the sigmoid would not learn.
            **options: The named arguments of `nnx.MultiHeadAttention`: `rngs`, heads,
                features, dtypes, initializers, metadata, dropout and so on.

        Raises:
            TypeError: `attention_fn` is given, or as for `sinkhorn_attention`.
            ValueError: As for `sinkhorn_attention`.
        """
        if "attention_fn" in options:
            raise TypeError(
                "attention_fn is made from num_iters and the options beside it, and "
                "cannot be given. To choose one use nnx.MultiHeadAttention."
            )
        is_learned = is_learned_tau(column_tau)
        plan_options = PlanOptions(
            *(num_iters, scale, finish, gradient, implementation),
            *(1.0 if is_learned else cast(float, column_tau), tolerance),
            local_window_size,
        )
        super().__init__(
            *args, **({"decode": False, "attention_fn": _AttentionFn(None)} | options)
        )
        for field in dataclasses.fields(plan_options):
            setattr(self, field.name, getattr(plan_options, field.name))
        if is_learned:
            self.column_tau = "learned"
            logit = tau_logit(initial_column_tau)
            logits = jnp.full((self.num_heads,), logit, self.param_dtype)
            self.column_tau_logit = nnx.Param(logits)

    def __call__(
        self,
        inputs_q: Float[Array, "*batch T F"],
        inputs_k: Float[Array, "*batch S G"] | None = None,
        inputs_v: Float[Array, "*batch S E"] | None = None,
        *,
        mask: Array | None = None,
        query_seq_lengths: Integer[Array, "..."] | None = None,
        key_value_seq_lengths: Integer[Array, "..."] | None = None,
        query_segment_ids: Integer[Array, "..."] | None = None,
        key_segment_ids: Integer[Array, "..."] | None = None,
        query_marginal: Float[Array, "..."] | None = None,
        key_marginal: Float[Array, "..."] | None = None,
        sow_marginal_error: bool = False,
        decode: bool | None = None,
        **options: Any,
    ) -> Float[Array, "*batch T O"]:
        """Attended values of the inputs, after the output projection.

        Args:
            inputs_q: Tokens that become queries. F features.
            inputs_k: Tokens that become keys; None for `inputs_q`.
            inputs_v: Tokens that become values; None for `inputs_k`.
            mask: Nonzero where a query may attend to a key, of any dtype; broadcasts to
                (*batch, N, T, S). It must not be causal, which is an error where its
                values are known: not under `jit`, unless it is a constant there.
            query_seq_lengths: Valid tokens of `inputs_q`; broadcasts to *batch.
            key_value_seq_lengths: Valid tokens of `inputs_k`. If only this one is
                given, all queries count as valid.
            query_segment_ids: The segment of each token of `inputs_q`; broadcasts to
                (*batch, T). In self-attention those of the keys too.
            key_segment_ids: The segment of each token of `inputs_k`.
            query_marginal: Row sums of the plan; broadcasts to (*batch, N, T).
            key_marginal: Column sums; broadcasts to (*batch, N, S).
            sow_marginal_error: Sow the marginal error (*batch, N), as described in
                `sinkhorn_attention`, as the `nnx.Intermediate` "marginal_error".
            decode: Must not be True.
            **options: The other arguments of `nnx.MultiHeadAttention`'s call:
                `deterministic`, `rngs` and shardings. `is_causal` must be False. With
                `sow_weights` the plan (*batch, N, T, S), made from explicit logits, is
                sown as the `nnx.Intermediate` "attention_weights".

        Returns:
            An array (*batch, T, O). O output features.

        Raises:
            TypeError: As for `sinkhorn_attention`.
            ValueError: As for `attention_fn`, and for decoding.
        """
        if self.decode if decode is None else decode:
            raise ValueError(SINGLE_QUERY.format("decode=True"))
        sow_error = _sow(self, "marginal_error") if sow_marginal_error else None
        names = (field.name for field in dataclasses.fields(PlanOptions))
        # As they are now: `set_attributes` changes them.
        plan_options: dict[str, Any] = {name: getattr(self, name) for name in names}
        tau = None
        if is_learned_tau(self.column_tau):
            plan_options["column_tau"] = 1.0
            if not hasattr(self, "column_tau_logit"):
                raise ValueError(
                    "column_tau='learned' needs the parameter column_tau_logit, which "
                    "a layer has that was made with it. Make the layer so."
                )
            tau = nnx.sigmoid(self.column_tau_logit[...])
        masks = LayerMask(
            *(mask, query_seq_lengths, key_value_seq_lengths, sow_error),
            PlanOptions(**plan_options),
            *(query_marginal, key_marginal, tau),
            *(query_segment_ids, key_segment_ids),
        )
        masks = masks.checked(inputs_q, inputs_k, inputs_v, self.num_heads)
        if inputs_k is None:
            masks = masks.of_self_attention()
        window = self.local_window_size
        inputs = masks.zero_padding(inputs_q, inputs_k, inputs_v, window)
        as_mask: Any = masks  # Flax passes it on to the attention function.
        return super().__call__(*inputs, mask=as_mask, decode=False, **options)
