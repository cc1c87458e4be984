"""Rank, attention entropy and logits of each layer, for encoders of several seeds."""

import functools
from typing import Final

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from sinkhorn_jax import collapse

from ..data import Examples
from .encoder import Encoder, apply_with_plans
from .step import Params

# A relative residual below this is rounding: one rounding of float32 in each token
# makes 1e-7, and a layer has several.
FLOAT32_FLOOR = 4 * float(np.finfo(np.float32).eps)

# What `measure` returns, for the JSON of a result.
DEFINITIONS: Final = {
    "relative_residual": (
        "Frobenius norm of the tokens less their mean, over that of the tokens, "
        "without padding; median over the measured examples; [seed][layer], 0 the "
        "embedding. Computed in float32: what is below 5e-7 is rounding."
    ),
    "attention_entropy": (
        "Nats; mean over rows, heads and measured examples; [seed][layer]. At most "
        "the mean logarithm of the lengths."
    ),
    "column_defect": (
        "Sum over columns of |column sum - 1|, over the number of tokens; mean over "
        "heads and measured examples; [seed][layer]."
    ),
    "row_defect": (
        "The same of the rows: rounding, unless the last half step is of the columns."
    ),
}


def measure(
    model: Encoder,
    params: Params,
    examples: Examples,
    *,
    has_skip: bool,
) -> dict[str, list[list[float]]]:
    """The measures of `DEFINITIONS` layer by layer, for every seed of `params`.

    `has_skip` says whether there are skip connections.
    """
    observed = jax.device_get(
        _observe(model, has_skip, params, examples.inputs, examples.lengths)
    )
    residual = np.median(observed.pop("relative_residual"), axis=2)
    values = {"relative_residual": residual} | observed
    return {name: each.tolist() for name, each in values.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(model, has_skip, params, inputs, lengths):
    def observe(params):
        _, (hidden_states, plans, where) = apply_with_plans(
            model, params, inputs, lengths, has_skip=has_skip
        )
        rows = where[None, :, None, :]  # The rows of the plans [L, B, N, T, T].
        # Each is [L, B, N], but for the residual, [L + 1, B].
        entropy = collapse.attention_entropy(plans, where=rows)
        column = column_defect(plans, rows)
        row = column_defect(plans.swapaxes(-1, -2), rows)
        return {
            "relative_residual": collapse.residual_over_depth(
                hidden_states, "fro", where
            ),
            "attention_entropy": entropy.mean(axis=(1, 2)),
            "column_defect": column.mean(axis=(1, 2)),
            "row_defect": row.mean(axis=(1, 2)),
        }

    return jax.vmap(observe)(params)


def column_defect(
    plan: Float[Array, "*B T T"], where: Bool[Array, "*#B T"]
) -> Float[Array, " *B"]:
    """Sum of |column sum - 1| over the number of valid tokens, from 0 to 2."""
    defect = jnp.abs(plan.sum(axis=-2) - 1.0)
    count = where.sum(axis=-1).astype(plan.dtype)
    return jnp.where(where, defect, 0.0).sum(axis=-1) / jnp.maximum(count, 1.0)


def attention_logits(
    model: Encoder,
    params: Params,
    inputs: Int[np.ndarray, "B T"] | UInt8[np.ndarray, "B H W C"],
    *,
    has_skip: bool = True,
) -> Float[np.ndarray, "S L B N T T"]:
    """The logits of every layer, example and head of each seed's network, in float64.

    They are made from the hidden states, in float32, of a network with pre-LayerNorm.
    Texts have no padding; T counts a class token too.
    """
    lengths = jnp.full(len(inputs), inputs.shape[1], jnp.int32)

    def apply(params):
        given = lengths if model.patch_size is None else None
        _, found = model.apply({"params": params}, inputs, given, has_skip=has_skip)
        return found.hidden_states

    hidden_states = jax.jit(jax.vmap(apply))(params)  # [S, L + 1, B, T, D]

    def layer(params, x):
        x = nn.LayerNorm(dtype=x.dtype).apply({"params": params["LayerNorm_0"]}, x)
        query, key = (
            jnp.einsum("btd,dnh->bnth", x, params["attention"][name]["kernel"])
            for name in ("query", "key")
        )
        return query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])

    inputs = jax.device_get((params["layers"], hidden_states[:, :-1]))
    # Flax's LayerNorm promotes the dtype of its input with float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), inputs)
        return np.asarray(jax.vmap(jax.vmap(layer))(*inputs))
