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
from . import pure_attention
from .encoder import Encoder, apply_with_plans
from .step import Params

# A relative residual below this is rounding: one rounding of float32 in each token
# makes 1e-7, and a layer has several.
FLOAT32_FLOOR = 4 * float(np.finfo(np.float32).eps)

# The norms of `collapse.relative_residual`. The first is always measured.
NORMS: Final = ("fro", "spectral", "1inf")

# What `measure` returns, for the JSON of a result.
DEFINITIONS: Final = {
    "relative_residual": (
        "Frobenius norm of the tokens less their mean, over that of the tokens, "
        "without padding; median over the measured examples; [seed][layer], 0 the "
        "embedding. Computed in float32: what is below 5e-7 is rounding."
    ),
    "relative_residual_spectral": (
        "The same in the spectral norm, the largest singular value."
    ),
    "relative_residual_1inf": (
        "The same in the norm sqrt(|X|_1 |X|_inf) of the largest absolute column and "
        "row sums, that of Dong et al. 2021."
    ),
    "log10_relative_residual": (
        "relative_residual as decimal logarithms, from the log-scaled recursion in "
        "float64 on the network's own weights; for pure attention only."
    ),
    "attention_entropy": (
        "Nats; mean over rows, heads and measured examples; [seed][layer]. At most "
        "data.max_entropy, the mean logarithm of the lengths."
    ),
    "column_defect": (
        "Sum over columns of |column sum - 1|, over the number of tokens; mean over "
        "heads and measured examples; [seed][layer]."
    ),
    "row_defect": (
        "The same of the rows: rounding, unless the last half step is of the columns."
    ),
    "train_loss": "Cross-entropy of each update's batch before it; [seed][step].",
}


def measure(
    model: Encoder,
    params: Params,
    examples: Examples,
    *,
    has_skip: bool,
    norms: tuple[collapse.Norm, ...] = NORMS[:1],
) -> dict[str, list[list[float]]]:
    """The measures of `DEFINITIONS` layer by layer, for every seed of `params`.

    `has_skip` says whether there are skip connections; `norms` are those of the
    relative residual.
    """
    residuals, entropy, column, row, embedding = jax.device_get(
        _observe(model, norms, has_skip, params, examples.inputs, examples.lengths)
    )
    result = {}
    for norm, residual in residuals.items():
        name = "relative_residual" + ("" if norm == "fro" else f"_{norm}")
        result[name] = np.median(residual, axis=2).tolist()
    defects = {"column_defect": column.tolist(), "row_defect": row.tolist()}
    result |= {"attention_entropy": entropy.tolist(), **defects}
    is_pure = not has_skip and not model.has_mlp and model.layer_norm == "none"
    if is_pure and (model.finish, model.logit_scale) == ("rows", 1.0):
        logs = _recursion(model, params, embedding, examples.lengths)
        result["log10_relative_residual"] = np.median(logs, axis=1).tolist()
    return result


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(model, norms, has_skip, params, inputs, lengths):
    def observe(params):
        _, (hidden_states, plans, where) = apply_with_plans(
            model, params, inputs, lengths, has_skip=has_skip
        )
        rows = where[None, :, None, :]  # The rows of the plans [L, B, N, T, T].
        return (
            {
                norm: collapse.residual_over_depth(hidden_states, norm, where)
                for norm in norms
            },  # Each [L + 1, B].
            collapse.attention_entropy(plans, where=rows).mean(axis=(1, 2)),  # [L]
            column_defect(plans, rows).mean(axis=(1, 2)),
            column_defect(plans.swapaxes(-1, -2), rows).mean(axis=(1, 2)),
            hidden_states[0],
        )

    return jax.vmap(observe)(params)


def _recursion(model, params, embedding, lengths):
    """Decimal logarithms of the residuals of pure attention, [S, B, L + 1]."""
    params, result = jax.device_get(params), []
    if lengths is None:
        lengths = np.full(embedding.shape[1], embedding.shape[2])
    for seed, x in enumerate(embedding):
        weights = pure_attention.Weights.of(params, seed)
        texts = (tokens[:length] for tokens, length in zip(x, lengths, strict=True))
        follow = pure_attention.log10_relative_residual
        result.append([follow(text, weights, model.num_iters) for text in texts])
    return np.array(result)


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
