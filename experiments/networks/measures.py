"""Rank and entropy collapse of a stack of encoders, layer by layer."""

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sinkhorn_jax import collapse

from ..data import Examples
from . import pure_attention
from .encoder import Encoder
from .ensemble import Params

# Relative residuals below it are roundings: one of float32 in each token is 1e-7, and
# a layer has several.
FLOAT32_FLOOR = 4 * float(np.finfo(np.float32).eps)

# Those of `collapse.relative_residual`, the first the one that is always measured.
NORMS: Final = ("fro", "spectral", "1inf")


# What `measure` returns, for the JSON of a result.
DEFINITIONS = {
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

    Args:
        model: The encoder.
        params: Of every seed.
        examples: On which it is measured.
        has_skip: Handed to the model.
        norms: Of the relative residual.
    """
    residuals, entropy, column, row, embedding = jax.device_get(
        _observe(model, norms, has_skip, params, examples.inputs, examples.lengths)
    )
    result = {
        **{
            "relative_residual" + ("" if norm == "fro" else f"_{norm}"): np.median(
                residual, axis=2
            ).tolist()
            for norm, residual in residuals.items()
        },
        "attention_entropy": entropy.tolist(),
        "column_defect": column.tolist(),
        "row_defect": row.tolist(),
    }
    is_pure = not has_skip and not model.has_mlp and model.layer_norm == "none"
    if is_pure and (model.finish, model.logit_scale) == ("rows", 1.0):
        logs = _recursion(model, params, embedding, examples.lengths)
        result["log10_relative_residual"] = np.median(logs, axis=1).tolist()
    return result


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(model, norms, has_skip, params, inputs, lengths):
    def observe(params):
        _, (hidden_states, plans, where) = model.apply(
            {"params": params}, inputs, lengths, has_skip=has_skip, with_plans=True
        )
        rows = where[None, :, None, :]  # Of the plans [L, B, N, T, T].
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
    """The residuals of pure attention, [S, B, L + 1], as decimal logarithms."""
    kernels = jax.device_get(params["layers"]["attention"])
    result = []
    if lengths is None:
        lengths = np.full(embedding.shape[1], embedding.shape[2])
    for seed, x in enumerate(embedding):
        weights = pure_attention.Weights(
            *(kernels[name]["kernel"][seed] for name in pure_attention.Weights._fields)
        )
        result.append(
            [
                pure_attention.log10_relative_residual(
                    tokens[:length], weights, model.num_iters
                )
                for tokens, length in zip(x, lengths, strict=True)
            ]
        )
    return np.array(result)


def column_defect(
    plan: Float[Array, "*B T T"], where: Bool[Array, "*#B T"]
) -> Float[Array, " *B"]:
    """How far the columns are from summing to 1, over valid tokens; at most 2."""
    defect = jnp.abs(plan.sum(axis=-2) - 1.0)
    count = where.sum(axis=-1).astype(plan.dtype)
    return jnp.where(where, defect, 0.0).sum(axis=-1) / jnp.maximum(count, 1.0)
