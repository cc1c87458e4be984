"""Training of several seeds at once: the seed is the leading axis of every array."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from ..data import Batch, Examples, eval_batches
from . import step
from .encoder import Encoder
from .options import Training
from .step import Optimization, Params, Skips

# The examples of a batch that a CPU computes at once. With 8 texts of 96 tokens the
# arrays of a layer of 64 features stay in its cache.
_CACHED: Final = 8


def init(model: Encoder, seeds: Sequence[int], examples: Examples) -> Params:
    """Initial parameters of every seed, equal for all normalisers and examples."""
    first = examples.take(slice(1))
    return _init(model, _keys(seeds), first.inputs, first.lengths)


def _keys(seeds):
    return jnp.stack([jax.random.key(seed) for seed in seeds])


@functools.partial(jax.jit, static_argnums=0)
def _init(model, keys, inputs, lengths):
    return jax.vmap(lambda key: step.init_params(model, key, inputs, lengths))(keys)


def train(
    model: Encoder,
    params: Params,
    examples: Examples,
    training: Training,
    *,
    learning_rate: float,
    has_skip: bool = True,
    observe: Callable[[int, Params], object] = lambda step, params: None,
    observe_every: int = 1,
) -> tuple[Params, Float[np.ndarray, "S K"]]:
    """Trains every seed with its own order of the examples.

    Args:
        model: The encoder.
        params: Parameters of every seed, as from `init`. They stay as they are.
        examples: The training split.
        training: Seeds, updates and batch size. Equal seeds see equal batches.
        learning_rate: The peak, reached after a tenth of the updates. Then the rate
            falls to zero along a cosine.
        has_skip: Whether there are skip connections.
        observe: Called with the number of updates made and the parameters, before the
            first update and after every `observe_every`. It must not keep the
            parameters, whose buffers the next update reuses.
        observe_every: Updates from one observation to the next.

    Returns:
        The trained parameters, and the loss of each of K updates.
    """
    optimization = Optimization(
        num_steps=training.num_steps, learning_rate=learning_rate
    )
    one = functools.partial(
        _update, model, optimization, Skips(has_skip, has_skip), _keys(training.seeds)
    )
    state = _init_state(optimization, params)
    losses = []
    observe(0, params)
    batches = _batches(examples, training)
    for number in tqdm(range(1, training.num_steps + 1), leave=False, unit="step"):
        state, loss = one(state, next(batches))
        losses.append(loss)
        if number % 8 == 0:
            loss.block_until_ready()  # So that progress is the device's.
        if number % observe_every == 0:
            observe(number, state.params)
    losses = np.array(jax.device_get(losses), np.float32)
    return state.params, losses.reshape(-1, len(training.seeds)).T


@functools.partial(jax.jit, static_argnums=0)
def _init_state(optimization, params):
    return jax.vmap(functools.partial(step.init_state, optimization))(params)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _update(model, optimization, skips, keys, state, batch):
    size = batch.labels.shape[1]
    num_parts = size // math.gcd(size, _CACHED) if _is_cpu() else 1

    def one(key, state, batch):
        fixed = (model, optimization, None, skips)
        return step.update(*fixed, key, state, batch, num_parts=num_parts)

    return _map(one)(keys, state, batch)


def _map(function):
    """Returns the function mapped over seeds: at once, or on a CPU one by one."""
    if not _is_cpu():
        return jax.vmap(function)
    return lambda *args: jax.lax.map(lambda each: function(*each), args)


def _is_cpu():
    return jax.default_backend() == "cpu"


def _batches(examples, training):
    """Yields batches [S, B]; each seed sees all examples before it repeats any."""
    num, size = training.num_steps, training.batch_size
    num_epochs = -(-num * size // len(examples))
    order = []
    for seed in training.seeds:
        rng = np.random.default_rng(seed)
        epochs = [rng.permutation(len(examples)) for _ in range(num_epochs)]
        order.append(np.concatenate(epochs)[: num * size].reshape(num, size))
    for index in np.stack(order, axis=1):  # [K, S, B]
        part = examples.take(index)
        weights = np.ones(index.shape, np.float32)
        yield Batch(part.inputs, part.lengths, part.labels, weights)


def last_loss(losses: Float[np.ndarray, "S K"]) -> list[float]:
    """The mean loss of the last tenth of the updates, [seed]."""
    return losses[:, -max(1, losses.shape[1] // 10) :].mean(axis=1).tolist()


def require_finite(losses: Float[np.ndarray, "S K"], learning_rate: float) -> None:
    """Raises FloatingPointError if the training diverged to an infinite or NaN loss."""
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"The loss at learning_rate={learning_rate} became infinite or NaN. Lower "
            "it."
        )


def accuracy(
    model: Encoder, params: Params, examples: Examples, *, has_skip: bool = True
) -> Float[np.ndarray, " S"]:
    """The fraction of examples that each seed's parameters classify correctly."""
    batches = eval_batches(examples, batch_size=min(128, len(examples)))
    skips = Skips(has_skip, has_skip)
    return step.mean_score(_score(model, skips, params, b) for b in batches)[0]


@functools.partial(jax.jit, static_argnums=0)
def _score(model, skips, params, batch):
    one = lambda params: step.score(model, None, skips, params, batch)
    return jax.vmap(one)(params)
