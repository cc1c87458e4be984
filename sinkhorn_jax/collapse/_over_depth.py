"""Measures of all layers of a network in one call."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._runtime.arguments import as_array
from ._measures import Norm, attention_entropy, relative_residual, token_measures


class Measures(NamedTuple):
    """All measures of all layers, with the layers on the first axis. A pytree.

    Attributes:
        relative_residual: By the name of the norm.
        stable_rank: As `stable_rank` of each layer.
        effective_rank: As `effective_rank` of each layer.
        attention_entropy: As `attention_entropy` of each plan; None without plans.
    """

    relative_residual: dict[Norm, Float[Array, " L *B"]]
    stable_rank: Float[Array, " L *B"]
    effective_rank: Float[Array, " L *B"]
    attention_entropy: Float[Array, " K *P"] | None


@functools.partial(jax.jit, static_argnames=("dtype",))
def measures_over_depth(
    hidden_states: Float[Array, "L *B T D"] | Sequence[Float[Array, "*B T D"]],
    plans: Float[Array, "K *P T S"] | Sequence[Float[Array, "*P T S"]] | None = None,
    where: Bool[Array, "*#B T"] | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Measures:
    """All measures of all layers, with two SVDs for each matrix.

    The functions of the same names give the same results, but each computes an SVD of
    its own. Batch axes are vectorised, and one compiled loop goes through the layers:
    the temporary memory is that of one layer, whatever the depth.

    Args:
        hidden_states: Tokens after each of L layers: stacked, or a sequence of arrays
            of one shape, which are stacked here.
        plans: Attention weights of K layers, likewise; K may differ from L, for
            instance where the first hidden state is the embedding. Batch axes that the
            hidden states do not have, such as heads, come right before the last two
            axes.
        where: True where a token counts, in all layers alike, and where the row of a
            plan counts, in all heads alike.
        dtype: Dtype of the computation and the results; None is as in the single
            functions. Layers are converted one by one, so that float64, which needs
            `jax.enable_x64`, does not need a wider copy of all layers.

    Returns:
        The measures; `relative_residual` in each norm.

    Raises:
        TypeError, ValueError: As in the single functions, or the depth axis is missing,
            or the arrays of a sequence differ in shape, or `dtype` is not float32 or
            float64, or is float64 without x64.
    """
    hidden_states = as_layers("hidden_states", hidden_states)
    where = None if where is None else as_array("where", where)
    plans = None if plans is None else as_layers("plans", plans)
    check_depth("hidden_states", hidden_states, "Use x[None] for a single layer.")
    cast = _cast_to(dtype)
    tokens = lax.map(lambda x: token_measures(cast(x), where), hidden_states)
    if plans is None:
        return Measures(*tokens, attention_entropy=None)
    check_depth("plans", plans, "Use plan[None] for a single layer.")
    num_heads_axes = plans.ndim - hidden_states.ndim
    if num_heads_axes < 0:
        raise ValueError(
            f"plans must have the batch axes of the hidden states, got {plans.shape} "
            f"with {hidden_states.shape}: `where` holds for both. Give the plans axes "
            "of length 1 where they have none."
        )
    rows = where
    if where is not None and where.ndim > 1:
        new_axes = tuple(range(-1 - num_heads_axes, -1))
        rows = jnp.expand_dims(where, new_axes)
    entropy = lax.map(lambda p: attention_entropy(cast(p), rows), plans)
    return Measures(*tokens, attention_entropy=entropy)


@functools.partial(jax.jit, static_argnames=("norm",))
def residual_over_depth(
    hidden_states: Float[Array, "L *B T D"] | Sequence[Float[Array, "*B T D"]],
    norm: Norm = "fro",
    where: Bool[Array, "*#B T"] | None = None,
) -> Float[Array, " L *B"]:
    """The relative residual of every layer: the curve of rank collapse over depth.

    Args:
        hidden_states: Tokens after each of L layers, stacked or a sequence.
        norm: As in `relative_residual`.
        where: True where a token counts, in all layers alike.

    Returns:
        The ratios, with the layers on the first axis.
    """
    hidden_states = as_layers("hidden_states", hidden_states)
    check_depth("hidden_states", hidden_states, "For one layer use relative_residual.")
    return jax.vmap(lambda x: relative_residual(x, norm, where))(hidden_states)


def as_layers(name: str, layers: Array | Sequence[Array]) -> Array:
    """The layers of a sequence stacked on a first axis, or as they are."""
    if not isinstance(layers, Sequence):
        return as_array(name, layers)
    arrays = [as_array(f"{name}[{i}]", x) for i, x in enumerate(layers)]
    kinds = {(x.shape, x.dtype) for x in arrays}
    if len(kinds) != 1:
        found = ", ".join(sorted({f"{x.dtype}{list(x.shape)}" for x in arrays}))
        raise ValueError(
            f"{name} must have at least one layer, and one shape and dtype for all, "
            f"got {found or 'no layer'}: all are measured in one compiled loop. "
            "Measure layers of other shapes in a call of their own."
        )
    return jnp.stack(arrays)


def check_depth(name: str, x: Array, instead: str) -> None:
    """Raises for an array without an axis of layers; the error ends with `instead`."""
    if x.ndim < 3:
        raise ValueError(
            f"{name} must be (depth, ..., rows, columns), got {x.shape}: its first "
            f"axis counts layers. {instead}"
        )


def _cast_to(dtype):
    if dtype is None:
        return lambda x: x
    try:
        dtype = jnp.dtype(dtype)
        is_known = dtype in (jnp.float32, jnp.float64)
    except TypeError:  # NumPy has no such dtype.
        is_known, dtype = False, repr(dtype)
    if not is_known:
        raise ValueError(
            f"dtype must be float32 or float64, got {dtype}: singular values are not "
            "computed in others. None takes the narrowest that holds the input."
        )
    if dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise ValueError(
            "dtype=float64 was asked for, but JAX has no float64 now: it would give "
            "float32. Call within `with jax.enable_x64(True):`."
        )
    return lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
