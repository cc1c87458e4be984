"""The state of training, one update of it, and evaluation."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..data import Batch
from ..networks.encoder import Encoder
from .devices import Devices

Params = Any  # A pytree of arrays.


@flax.struct.dataclass
class State:
    """What a checkpoint holds of the network."""

    step: Int[Array, ""]  # Updates made.
    params: Params
    opt_state: optax.OptState
    best_params: Params  # Of the best evaluation so far.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW with clipped gradients and a rate that rises, then falls along a cosine."""

    num_steps: int
    learning_rate: float  # At its peak.
    warmup_fraction: float = 0.1  # Of the steps.
    weight_decay: float = 0.0  # Of matrices, not of vectors.
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


def init_state(
    model: Encoder,
    optimization: Optimization,
    batch: Batch,
    seed: int,
    devices: Devices,
) -> State:
    """Parameters that depend on the seed and on shapes, not on the normaliser."""
    # Of one example, which cannot be divided over devices.
    model = model.clone(mesh=None, num_iters=0)

    @functools.partial(jax.jit, out_shardings=devices.replicated)
    def init(key, inputs, lengths):
        params = model.init(key, inputs, lengths)["params"]
        opt_state = optimization.transformation.init(params)
        copy = jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, opt_state, copy)

    lengths = None if batch.lengths is None else batch.lengths[:1]
    return init(jax.random.key(seed), batch.inputs[:1], lengths)


class Skips(NamedTuple):
    """Which skip connections there are."""

    attention: bool = True
    mlp: bool = True


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def train_step(
    model: Encoder,
    optimization: Optimization,
    skips: Skips,
    key: Array,
    state: State,
    batch: Batch,
) -> tuple[State, Float[Array, ""]]:
    """One update, and the mean cross-entropy of the batch before it.

    Args:
        model: With the mesh over which `batch` is divided.
        optimization: Of all steps.
        skips: Handed to the model.
        key: For dropout, the same at every step.
        state: Its buffers are reused.
        batch: Of weights 1.
    """

    def loss_of(params):
        logits, _ = model.apply(
            {"params": params},
            batch.inputs,
            batch.lengths,
            has_skip=skips.attention,
            has_mlp_skip=skips.mlp,
            is_training=True,
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        return _cross_entropy(logits, batch.labels).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    # Adam's bias correction raises a float to an integer.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimization.transformation.update(
            grads, state.opt_state, state.params
        )
    params = optax.apply_updates(state.params, updates)
    step = state.step + jnp.ones((), jnp.int32)
    return state.replace(step=step, params=params, opt_state=opt_state), loss


@jax.jit
def keep_best(state: State) -> State:
    """The state with its parameters as the best so far."""
    return state.replace(best_params=jax.tree.map(jnp.copy, state.params))


def accuracy_and_loss(
    model: Encoder,
    skips: Skips,
    params: Params,
    batches: Iterable[Batch],
    devices: Devices,
) -> tuple[float, float]:
    """Fraction of examples classified rightly, and their mean cross-entropy."""
    sums = [
        _evaluate(model, skips, params, devices.place_whole(batch)) for batch in batches
    ]
    correct, loss, weight = map(sum, zip(*jax.device_get(sums), strict=True))
    return float(correct / weight), float(loss / weight)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(model, skips, params, batch):
    logits, _ = model.apply(
        {"params": params},
        batch.inputs,
        batch.lengths,
        has_skip=skips.attention,
        has_mlp_skip=skips.mlp,
    )
    is_correct = logits.argmax(axis=-1).astype(batch.labels.dtype) == batch.labels
    losses = _cross_entropy(logits, batch.labels)
    return (
        (is_correct.astype(jnp.float32) * batch.weights).sum(),
        (losses * batch.weights).sum(),
        batch.weights.sum(),
    )


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
