"""Training of several seeds at once: the seed is the leading axis of every array."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from ..data import Examples

Params = Any  # A pytree; S seeds lead each leaf.


def init(model: nn.Module, seeds: Sequence[int], seq_len: int) -> Params:
    """Parameters for texts. They depend on shapes alone, not on the normaliser."""
    tokens = jnp.zeros((1, seq_len), jnp.int32)
    lengths = jnp.full((1,), seq_len, jnp.int32)
    return _init(model, _keys(seeds), tokens, lengths)


def init_images(
    model: nn.Module, seeds: Sequence[int], shape: tuple[int, int, int]
) -> Params:
    """The same for images, of the shape (H, W, C)."""
    return _init(model, _keys(seeds), jnp.zeros((1, *shape), jnp.uint8), None)


def _keys(seeds):
    return jnp.stack([jax.random.key(seed) for seed in seeds])


@functools.partial(jax.jit, static_argnums=0)
def _init(model, keys, inputs, lengths):
    return jax.vmap(lambda key: model.init(key, inputs, lengths)["params"])(keys)


def train(
    model: nn.Module,
    params: Params,
    examples: Examples,
    *,
    has_skip: bool,
    seeds: Sequence[int],
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    on_step: Callable[[], object] = lambda: None,
    observe: Callable[[int, Params], object] = lambda step, params: None,
    observe_every: int = 1,
) -> tuple[Params, Float[np.ndarray, "S K"]]:
    """Adam on the cross-entropy, each seed with its own order of the examples.

    Args:
        model: Maps inputs and lengths to class logits and intermediates.
        params: From `init` or `init_images`.
        examples: The training split.
        has_skip: Handed to the model.
        seeds: Decide the order of the examples, so equal seeds see equal batches.
        num_steps: Updates. The learning rate rises over the first tenth and then falls
            to zero along a cosine.
        batch_size: Reviews of one update and seed.
        learning_rate: At its peak.
        on_step: Called after each update, for a progress bar.
        observe: Called with the number of updates made and the parameters, before the
            first update and after every `observe_every`.
        observe_every: Updates.

    Returns:
        The trained parameters, and the loss of each of K updates.
    """
    optimizer = _optimizer(num_steps, learning_rate)
    state = jax.vmap(optimizer.init)(params)
    order = np.stack(
        [_batches(len(examples), num_steps, batch_size, seed) for seed in seeds], axis=1
    )  # [K, S, batch]
    losses = []
    observe(0, params)
    for index in order:
        batch = examples.take(index)
        params, state, loss = _step(
            model,
            optimizer,
            has_skip,
            params,
            state,
            batch.inputs,
            batch.lengths,
            batch.labels,
        )
        losses.append(loss)
        if len(losses) % 8 == 0:
            loss.block_until_ready()  # So that progress is that of the device.
        on_step()
        if len(losses) % observe_every == 0:
            observe(len(losses), params)
    if not losses:
        return params, np.zeros((len(seeds), 0), np.float32)
    return params, np.stack(losses, axis=1)


@functools.cache  # Equal arguments must give the same object, or jit compiles again.
def _optimizer(num_steps, learning_rate):
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, num_steps // 10), max(2, num_steps)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def _batches(num_examples, num_steps, batch_size, seed):
    """Indices [K, batch] that pass through all examples before any repeats."""
    rng = np.random.default_rng(seed)
    num_epochs = -(-num_steps * batch_size // num_examples)
    order = [rng.permutation(num_examples) for _ in range(num_epochs)]
    order = np.concatenate([*order, np.zeros(0, np.int64)])
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _step(model, optimizer, has_skip, params, state, inputs, lengths, labels):
    def loss_of(params, inputs, lengths, labels):
        logits, _ = model.apply({"params": params}, inputs, lengths, has_skip=has_skip)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def update(params, state, *batch):
        loss, grads = jax.value_and_grad(loss_of)(params, *batch)
        # Adam's bias correction raises a float to an integer.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.vmap(update)(params, state, inputs, lengths, labels)


def accuracy(
    model: nn.Module,
    params: Params,
    examples: Examples,
    *,
    has_skip: bool,
    batch_size: int = 128,
) -> Float[np.ndarray, " S"]:
    """Fraction of examples that each seed's parameters classify rightly."""
    correct = []
    for start in range(0, len(examples), batch_size):
        # The last batch overlaps the one before it, so that one shape is compiled.
        end = min(start + batch_size, len(examples))
        batch = examples.take(slice(max(0, end - batch_size), end))
        is_correct = _correct(
            model, has_skip, params, batch.inputs, batch.lengths, batch.labels
        )
        correct.append(is_correct[:, start - end :])
    return np.concatenate(correct, axis=1).mean(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _correct(model, has_skip, params, inputs, lengths, labels) -> Bool[Array, "S B"]:
    logits, _ = jax.vmap(
        lambda p: model.apply({"params": p}, inputs, lengths, has_skip=has_skip)
    )(params)
    return logits.argmax(axis=-1).astype(labels.dtype) == labels[None, :]
