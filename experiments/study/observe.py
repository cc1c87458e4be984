"""What is measured in the networks of a cell, before, during and after training."""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sinkhorn_jax import collapse

from ..data import Examples
from ..networks import measures
from ..networks.encoder import Encoder, apply_with_plans
from ..networks.step import Params

# What a cell's JSON holds. S seeds, K observations in training, L layers.
DEFINITIONS: Final = {
    "num_parameters": "Of one network.",
    "max_entropy": "Entropy of uniform attention in nats, mean over measured examples.",
    "updates": "[K]; updates made before each observation, the first 0, the last all.",
    "relative_residual": (
        "[S][K][L + 1], 0 the embedding; Frobenius norm of the tokens less their mean "
        "over that of the tokens, the class token among them, without padding; median "
        "over the measured examples; float32: below 5e-7 is rounding."
    ),
    "words_residual": (
        "[S][K][L + 1]; the same without the class token, where there is one."
    ),
    "content_residual": (
        "[S][K][L + 1], images alone; the same of tokens less, at each place, their "
        "mean over the measured examples: what all images have there does not count."
    ),
    "entropy": (
        "[S][K][L]; entropy of the rows of the attention over the logarithm of the "
        "number of tokens; mean over rows, heads and measured examples; 1 is uniform."
    ),
    "column_defect": (
        "[S][K][L]; sum over columns of |column sum - 1| over the number of tokens; "
        "mean over heads and measured examples."
    ),
    "attention_gradient": (
        "[S][K][L]; Frobenius norm of the gradient of the mean cross-entropy on the "
        "measured examples, for the parameters of a layer's attention."
    ),
    "gradient": "[S][K][L]; the same for all parameters of the layer.",
    "train_loss": "[S][K - 1]; mean cross-entropy of the updates between observations.",
    "validation_accuracy": "[S]; after the last update.",
    "uniform_accuracy": (
        "[S]; the same parameters, every attention matrix replaced by the uniform one."
    ),
    "paths": (
        "[S] of each kind: [length - 1], log10 of |C P| / |P|, Frobenius norms, P the "
        "product of attention matrices of the trained network, C the centring matrix; "
        "mean over paths and the first measured examples without padding. The logits "
        "of the network are given to both normalisers. `sampled`: layers in order, one "
        "head each; `shuffled`: the same matrices in a random order; `independent`: "
        "made from the logits with their entries permuted at random."
    ),
}


def observe(
    model: Encoder, params: Params, examples: Examples, *, has_skip: bool
) -> dict[str, np.ndarray]:
    """The measures of every seed's parameters that are made in training, [S, ...]."""
    arrays = (examples.inputs, examples.lengths, examples.labels)
    found = []
    for i in range(len(jax.tree.leaves(params)[0])):
        one = jax.tree.map(lambda x, i=i: x[i], params)
        found.append(jax.device_get(_observe(model, has_skip, one, *arrays)))
    return {name: np.stack([f[name] for f in found]) for name in found[0]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(model, has_skip, params, inputs, lengths, labels):
    _, (hidden_states, plans, where) = apply_with_plans(
        model, params, inputs, lengths, has_skip=has_skip
    )
    rows = where[None, :, None, :]  # The rows of the plans [L, B, N, T, T].
    # A single token has the entropy 0 of whatever attention.
    count = jnp.maximum(where.sum(axis=-1), 2).astype(jnp.float32)
    most = jnp.log(count)[None, :, None]
    entropy = collapse.attention_entropy(plans, where=rows) / most
    has_class_token = model.pooling == "class_token"
    is_word = where.at[:, 0].set(False) if has_class_token else where
    residual = lambda tokens, where: jnp.median(
        collapse.residual_over_depth(tokens, "fro", where), axis=1
    )

    def loss_of(params):
        logits, _ = model.apply(
            {"params": params}, inputs, lengths, has_skip=jnp.asarray(has_skip)
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    layers = jax.grad(loss_of)(params)["layers"]
    square = lambda tree: sum(
        jnp.square(x).reshape(len(x), -1).sum(axis=1) for x in jax.tree.leaves(tree)
    )
    residuals = {
        "relative_residual": residual(hidden_states, where),
        "words_residual": residual(hidden_states, is_word),
    }
    if lengths is None:
        content = hidden_states - hidden_states.mean(axis=1, keepdims=True)
        residuals["content_residual"] = residual(content, where)
    return residuals | {
        "entropy": entropy.mean(axis=(1, 2)),
        "column_defect": measures.column_defect(plans, rows).mean(axis=(1, 2)),
        "attention_gradient": jnp.sqrt(square(layers["attention"])),
        "gradient": jnp.sqrt(square(layers)),
    }


def as_lists(observed: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Observations of `observe` as [S][K][...], for JSON."""
    return {
        name: significant(np.stack([o[name] for o in observed], axis=1))
        for name in observed[0]
    }


def significant(values: np.ndarray, digits: int = 5) -> Any:
    """An array as nested lists, with so many significant digits, for JSON.

    What is not finite, as in a network that diverged, is None.
    """
    if values.ndim == 0:
        is_number = np.isfinite(values)
        return float(f"{float(values):.{digits}g}") if is_number else None
    return [significant(each, digits) for each in values]
