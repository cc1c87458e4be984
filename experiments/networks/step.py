"""One update of a network, and how well a network classifies.

`training` runs one network on all devices, `ensemble` several seeds on one device. Both
train by `update` and are scored by `score` and `mean_score`.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from ..data import Batch
from .encoder import Encoder

Params = PyTree[Array]

# The axis of a mesh of devices over which a batch is divided.
BATCH_AXIS: Final = "batch"


class State(NamedTuple):
    """The state of training: parameters and optimiser."""

    step: Int[Array, ""]  # Updates made.
    params: Params
    opt_state: optax.OptState


class Skips(NamedTuple):
    """Whether a network has skip connections around the attention and the MLPs."""

    attention: bool = True
    mlp: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW with clipped gradients and a rate that rises, then falls along a cosine."""

    num_steps: int
    learning_rate: float  # The peak.
    warmup_fraction: float = 0.1  # The part of the steps in which the rate rises.
    weight_decay: float = 0.0  # For matrices, not for vectors.
    max_grad_norm: float = 1.0

    @property
    def schedule(self) -> optax.Schedule:
        """Learning rate by step."""
        warmup = max(1, round(self.warmup_fraction * self.num_steps))
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(warmup + 1, self.num_steps)
        )

    @property
    def transformation(self) -> optax.GradientTransformation:
        """The optimiser."""
        is_matrix = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm),
            optax.adamw(self.schedule, weight_decay=self.weight_decay, mask=is_matrix),
        )


def init_params(model: Encoder, key: Array, inputs: Array, lengths: Any) -> Params:
    """Initial parameters, which depend on the key and on shapes alone.

    Encoders that differ in their normaliser get equal parameters. `inputs` and
    `lengths` are those of any example, with a batch axis of 1.
    """
    softmax = model.clone(num_iters=0, finish="rows")
    return softmax.init(key, inputs, lengths)["params"]


def init_state(optimization: Optimization, params: Params) -> State:
    """The state before the first update. It holds copies of the parameters."""
    params = jax.tree.map(jnp.copy, params)
    opt_state = optimization.transformation.init(params)
    return State(jnp.zeros((), jnp.int32), params, opt_state)


def update(
    model: Encoder,
    optimization: Optimization,
    mesh: Mesh | None,
    skips: Skips,
    key: Array,
    state: State,
    batch: Batch,
    *,
    num_parts: int = 1,
) -> tuple[State, Float[Array, ""]]:
    """The state after one update, and the mean cross-entropy of the batch before it.

    The batch is divided over the devices of `mesh`, and its examples have weight 1. The
    key is for dropout, the same at every step. The batch is computed in `num_parts`
    equal parts, one after the other: the arrays of a small part stay in a processor's
    cache.
    """

    def loss_of(params, part, key):
        logits = _logits(model, mesh, skips, params, part, key)
        return _cross_entropy(logits, part.labels).mean()

    def add(total, part_and_number):
        part, number = part_and_number
        part_key = jax.random.fold_in(step_key, number)
        found = jax.value_and_grad(loss_of)(state.params, part, part_key)
        return jax.tree.map(jnp.add, total, found), None

    step_key = jax.random.fold_in(key, state.step)
    if num_parts == 1:
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch, step_key)
    else:
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
        divide = lambda x: x.reshape(num_parts, -1, *x.shape[1:])
        parts = jax.tree.map(divide, batch), jnp.arange(num_parts)
        total, _ = jax.lax.scan(add, zero, parts)
        loss, grads = jax.tree.map(lambda x: x / np.float32(num_parts), total)
    # Adam's bias correction raises a float to an integer.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimization.transformation.update(
            grads, state.opt_state, state.params
        )
    params = optax.apply_updates(state.params, updates)
    return State(state.step + np.int32(1), params, opt_state), loss


def score(
    model: Encoder, mesh: Mesh | None, skips: Skips, params: Params, batch: Batch
) -> tuple[Array, Array, Array]:
    """Sums over a batch: examples classified correctly, cross-entropy, examples."""
    logits = _logits(model, mesh, skips, params, batch)
    is_correct = logits.argmax(axis=-1).astype(batch.labels.dtype) == batch.labels
    losses = _cross_entropy(logits, batch.labels)
    weights = batch.weights
    correct = (is_correct.astype(jnp.float32) * weights).sum()
    return correct, (losses * weights).sum(), weights.sum()


def mean_score(
    scores: Iterable[tuple[Array, Array, Array]],
) -> tuple[np.ndarray, np.ndarray]:
    """The fraction of examples classified correctly, and the mean cross-entropy."""
    scores = jax.device_get(list(scores))
    correct, loss, count = (
        np.sum(x, axis=0, dtype=np.float64) for x in zip(*scores, strict=True)
    )
    return correct / count, loss / count


def _logits(model, mesh, skips, params, batch, dropout_key=None):
    def apply(params, inputs, lengths, skips, key):
        if mesh is not None and key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(BATCH_AXIS))
        logits, _ = model.apply(
            {"params": params},
            inputs,
            lengths,
            has_skip=skips.attention,
            has_mlp_skip=skips.mlp,
            is_training=key is not None,
            rngs=None if key is None else {"dropout": key},
        )
        return logits

    if mesh is not None:
        # Each device computes its own part of the batch. Left to the compiler, the loop
        # over batch and heads in the attention would gather the divided axis.
        whole, divided = PartitionSpec(), PartitionSpec(BATCH_AXIS)
        apply = jax.shard_map(
            apply,
            mesh=mesh,
            in_specs=(whole, divided, divided, whole, whole),
            out_specs=divided,
        )
    skips = Skips(*map(jnp.asarray, skips))
    return apply(params, batch.inputs, batch.lengths, skips, dropout_key)


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
