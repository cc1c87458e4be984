"""Several seeds trained at once: what they learn, what they share and what differs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.encoders import text_encoder

from experiments.data import Batch, Examples
from experiments.networks import ensemble, step
from experiments.networks.options import Training


def problem():
    """Texts of one word that tells the class, and a small encoder."""
    labels = np.arange(60, dtype=np.int32) % 2
    data = Examples(
        inputs=np.repeat(labels[:, None] + 2, 3, axis=1),
        lengths=np.full(60, 3, np.int32),
        labels=labels,
    )
    return text_encoder(depth=1, seq_len=3, num_iters=1), data


def budget(num_steps, seeds=(0, 1)):
    return Training(seeds=seeds, num_steps=num_steps, batch_size=8)


def test_training_learns_and_seeds_differ():
    model, data = problem()
    params = ensemble.init(model, (0, 1), data)
    before = jax.device_get(params)
    options = dict(learning_rate=0.01)
    trained, losses = ensemble.train(model, params, data, budget(30), **options)
    assert losses.shape == (2, 30)
    assert (losses[0] != losses[1]).any()
    assert losses[:, -1].max() < losses[:, 0].min()
    accuracy = ensemble.accuracy(model, trained, data)
    assert accuracy.shape == (2,)
    np.testing.assert_array_equal(accuracy, 1)
    # The initial parameters are as they were, and train to the same.
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params))
    _, again = ensemble.train(model, params, data, budget(30), **options)
    np.testing.assert_array_equal(losses, again)
    mean = losses[:, -3:].mean(axis=1)
    np.testing.assert_array_equal(ensemble.last_loss(losses), mean)


def test_each_seed_is_trained_as_if_alone():
    model, data = problem()
    both = ensemble.init(model, (0, 1), data)
    _, losses = ensemble.train(model, both, data, budget(5), learning_rate=0.01)
    params = ensemble.init(model, (1,), data)
    alone = budget(5, seeds=(1,))
    _, one = ensemble.train(model, params, data, alone, learning_rate=0.01)
    np.testing.assert_allclose(losses[1], one[0], atol=1e-6)


def test_observations():
    model, data = problem()
    params = ensemble.init(model, (0, 1), data)
    observed = []
    ensemble.train(
        model,
        params,
        data,
        budget(5),
        learning_rate=0.01,
        observe=lambda step, params: observed.append(step),
        observe_every=2,
    )
    assert observed == [0, 2, 4]
    _, none = ensemble.train(model, params, data, budget(0), learning_rate=0.01)
    assert none.shape == (2, 0)


def test_accuracy_is_that_of_the_single_predictions():
    model, data = problem()
    rng = np.random.default_rng(0)
    data = Examples(
        inputs=rng.integers(0, 11, (130, 3)).astype(np.int32),  # Beyond one batch.
        lengths=np.full(130, 3, np.int32),
        labels=rng.integers(0, 2, 130).astype(np.int32),
    )
    params = ensemble.init(model, (0, 1), data)
    predict = lambda p, *inputs: model.apply({"params": p}, *inputs)[0]
    predict = jax.jit(jax.vmap(predict, in_axes=(0, None, None)))
    logits = np.asarray(predict(params, data.inputs, data.lengths))
    expected = (logits.argmax(axis=-1) == data.labels).mean(axis=1)
    np.testing.assert_allclose(ensemble.accuracy(model, params, data), expected)


def test_a_training_that_diverged_is_refused():
    ensemble.require_finite(np.ones((2, 3)), 0.1)
    with pytest.raises(FloatingPointError, match=r"learning_rate=0.1 .* Lower it"):
        ensemble.require_finite(np.array([[1.0, np.nan]]), 0.1)


@pytest.mark.few(1)
@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_gives_the_update_of_the_whole_batch(num_parts):
    model, data = problem()
    optimization = step.Optimization(num_steps=1, learning_rate=0.1, warmup_fraction=0)
    params = jax.tree.map(lambda x: x[0], ensemble.init(model, (0,), data))
    state = step.init_state(optimization, params)
    few = data.take(slice(8))
    # The last class is rare: a part differs from the whole.
    labels = (np.arange(8) == 7).astype(np.int32)
    batch = Batch(few.inputs, few.lengths, labels, np.ones(8, np.float32))
    batch = jax.tree.map(jnp.asarray, batch)

    def update(num_parts):
        fixed = (model, optimization, None, step.Skips(), jax.random.key(0))
        run = functools.partial(step.update, *fixed, num_parts=num_parts)
        return jax.jit(run)(state, batch)

    (whole, loss), (parts, loss_of_parts) = update(1), update(num_parts)
    np.testing.assert_allclose(loss_of_parts, loss, rtol=1e-6)
    assert parts.step == whole.step == 1
    # The optimiser keeps the mean of the gradients, which is compared: Adam divides by
    # its size, which leaves of a gradient of 0 the sign of a rounding.
    gradient = lambda state: jax.tree.leaves(state.opt_state[1][0].mu)
    for one, other in zip(gradient(parts), gradient(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
    assert max(np.abs(g).max() for g in gradient(whole)) > 1e-3


def test_training_in_parts_and_seed_by_seed_is_training_at_once(monkeypatch):
    """A CPU trains one seed after the other, and computes a batch in parts."""
    model, data = problem()
    training = Training(seeds=(0, 1), num_steps=6, batch_size=16)
    params = ensemble.init(model, training.seeds, data)
    results = []
    update: Any = ensemble._update
    try:
        for is_cpu in (True, False):
            monkeypatch.setattr(ensemble, "_is_cpu", lambda is_cpu=is_cpu: is_cpu)
            update.clear_cache()
            results.append(
                ensemble.train(model, params, data, training, learning_rate=0.01)
            )
    finally:
        update.clear_cache()
    (one_by_one, losses), (at_once, expected) = results
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[0, -1] < losses[0, 0] - 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), one_by_one, at_once
    )
