"""Sinkhorn attention for Flax linen."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, cast

from flax import linen as nn
from flax.linen.dtypes import promote_dtype
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
    """Make the `attention_fn` of linen's multi-head layers doubly stochastic.

        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn(10))

    Arguments, masks, dropout, sown weights and errors are those of
    `sinkhorn_jax.nnx.attention_fn`. Products with the values are accumulated in float32
    at least, whatever `precision` and `force_fp32_for_softmax` say.

    Args:
        num_iters: Sinkhorn iterations; 0 is softmax attention.
        scale: Multiplies the products of queries and keys; a Python number, default
            1/sqrt(H).
        finish: As in `sinkhorn_attention`; likewise the arguments after it.
        gradient: The derivative.
        implementation: The implementation.
        column_tau: 1 is doubly stochastic and 0 softmax attention; a Python number.
        tolerance: The marginal error to stop at.
        local_window_size: The window of each query.

    Returns:
        A function with the arguments of `nn.dot_product_attention`.
    """
    return _AttentionFn(
        PlanOptions(
            *(num_iters, scale, finish, gradient, implementation),
            *(column_tau, tolerance, local_window_size),
        )
    )


# A class of the module, so that it can be pickled and compared.
@dataclasses.dataclass(frozen=True)
class _AttentionFn:
    plan_options: PlanOptions

    # Flax passes the arguments that this signature names.
    def __call__(
        self,
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S N H"],
        value: Float[Array, "*batch S N D"],
        bias: Float[Array, "..."] | None = None,
        mask: Array | LayerMask | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        module: nn.Module | None = None,
    ) -> Float[Array, "*batch T N D"]:
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        rate = 0.0 if deterministic else dropout_rate
        dropout = Dropout(rate, dropout_rng, broadcast_dropout)
        sow_plan = None if module is None else _sow(module, "attention_weights")
        options = self.plan_options
        return options.attend(query, key, value, bias, mask, dropout, sow_plan)


def _sow(module, name):
    return functools.partial(module.sow, "intermediates", name)


class MultiHeadSinkhornAttention(nn.MultiHeadDotProductAttention):
    """Multi-head attention whose weights are doubly stochastic.

    It has the attributes, parameters and call of `nn.MultiHeadDotProductAttention`, and
    attributes for Sinkhorn besides. Parameters trained with either layer load into the
    other under the same name. In a network that leaves the names to Flax, the name
    follows the class, so a layer that takes the place of softmax attention must be
    given the old one:

        MultiHeadSinkhornAttention(8, name="MultiHeadDotProductAttention_0")

    Flax's own layer with `attention_fn=attention_fn(10)` keeps its name by itself.

    A causal mask is an error where its values are known. One that is made under `jit`,
    or is an argument of it, passes in silence unless `traced_checks` are on.
    `attention_fn` cannot be set, and `decode=True` is refused at the call, because the
    plan of a single query is uniform. `inputs_kv`, which Flax deprecates, is left out.

    Padding is best given as sequence lengths, which never become a (T, S) array. In
    self-attention, where `inputs_k` is left out, queries and keys are the same tokens:
    `query_seq_lengths` then stand for both, and a mask of the keys alone (one row, as
    (B, 1, 1, S)) excludes the padded queries as well.

    Attributes:
        num_iters: As in `attention_fn`; likewise the six attributes after it.
        scale: The inverse temperature.
        finish: The last half step.
        gradient: The derivative.
        implementation: The implementation.
        tolerance: The marginal error to stop at.
        local_window_size: The window of each query.
        column_tau: As in `attention_fn`, or "learned" for one in each head: the sigmoid
            of the parameter "column_tau_logit" (N,).
        initial_column_tau: Where a learned `column_tau` starts, between 0 and 1. At
            either end the sigmoid would not learn.
    """

    attention_fn: None = dataclasses.field(default=None, init=False, repr=False)
    num_iters: int = 10
    scale: float | None = None
    finish: Finish = "rows"
    gradient: Gradient = Exact()
    implementation: AttentionImplementation | None = None
    tolerance: float | None = None
    local_window_size: int | tuple[int, int] | None = None
    column_tau: float | Literal["learned"] = 1.0
    initial_column_tau: float = 0.5

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
        query_segment_ids: Integer[Array, "..."] | None = None,
        key_segment_ids: Integer[Array, "..."] | None = None,
        query_marginal: Float[Array, "..."] | None = None,
        key_marginal: Float[Array, "..."] | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        sow_marginal_error: bool = False,
    ) -> Float[Array, "*batch T O"]:
        """Attended values of the inputs, after the output projection.

        Shapes, result and errors are those of
        `sinkhorn_jax.nnx.MultiHeadSinkhornAttention`. What is sown goes into the
        collection "intermediates".

        Args:
            inputs_q: Tokens that become queries.
            inputs_k: Tokens that become keys; None for `inputs_q`.
            inputs_v: Tokens that become values; None for `inputs_k`.
            mask: Nonzero where a query may attend to a key; not causal.
            query_seq_lengths: Valid tokens of `inputs_q`.
            key_value_seq_lengths: Valid tokens of `inputs_k`.
            query_segment_ids: The segment of each token of `inputs_q`; broadcasts to
                (*batch, T). In self-attention those of the keys too.
            key_segment_ids: The segment of each token of `inputs_k`.
            query_marginal: Row sums of the plan; broadcasts to (*batch, N, T).
            key_marginal: Column sums; broadcasts to (*batch, N, S).
            deterministic: Whether to leave dropout out.
            dropout_rng: Key to use instead of the module's own "dropout" key.
            sow_weights: Sow the plan as "attention_weights".
            sow_marginal_error: Sow the marginal error as "marginal_error".
        """
        if self.decode:
            raise ValueError(SINGLE_QUERY.format("decode=True"))
        sow_error = _sow(self, "marginal_error") if sow_marginal_error else None
        is_learned = is_learned_tau(self.column_tau)
        tau = None
        if is_learned:
            start = nn.initializers.constant(tau_logit(self.initial_column_tau))
            shape = (self.num_heads,)
            tau = self.param("column_tau_logit", start, shape, self.param_dtype)
            tau = nn.sigmoid(tau)
        masks = LayerMask(
            mask,
            query_seq_lengths,
            key_value_seq_lengths,
            sow_error,
            query_marginal=query_marginal,
            key_marginal=key_marginal,
            column_tau=tau,
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
        )
        layer = nn.MultiHeadDotProductAttention(
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(nn.MultiHeadDotProductAttention)
                if field.name not in ("parent", "name", "attention_fn")
            },
            attention_fn=attention_fn(
                self.num_iters,
                scale=self.scale,
                finish=self.finish,
                gradient=self.gradient,
                implementation=self.implementation,
                column_tau=1.0 if is_learned else cast(float, self.column_tau),
                tolerance=self.tolerance,
                local_window_size=self.local_window_size,
            ),
        )
        nn.share_scope(self, layer)
        masks = masks.checked(inputs_q, inputs_k, inputs_v, self.num_heads)
        if inputs_k is None:
            masks = masks.of_self_attention()
        window = self.local_window_size
        return layer(
            *masks.zero_padding(inputs_q, inputs_k, inputs_v, window),
            mask=masks,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
        )
