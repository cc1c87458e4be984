"""Measures of a layer against NumPy, on small networks with large weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import study_double

from experiments.data import Examples
from experiments.networks import ensemble
from experiments.networks.encoder import apply_with_plans
from experiments.study.observe import as_lists, observe, significant

# Some hundred float32 roundings through a few layers.
RTOL = 1e-4
LENGTHS = np.array([6, 3, 5, 1], np.int32)


def problem(num_iters=2):
    """A network, parameters of two seeds far from uniform attention, and texts."""
    model = study_double.encoder(study_double.cell(num_iters=num_iters, depth=3))
    rng = np.random.default_rng(0)
    words = rng.integers(2, 20, (4, 6)).astype(np.int32)
    words *= np.arange(6) < LENGTHS[:, None]
    examples = Examples(
        inputs=words, lengths=LENGTHS, labels=np.array([0, 1, 1, 0], np.int32)
    )
    params = ensemble.init(model, (0, 1), examples)
    # So that attention is far from uniform.
    larger = lambda x: x * np.float32(50)
    for name in ("Embed_0", "position", "class_token"):
        params = params | {name: jax.tree.map(larger, params[name])}
    return model, params, examples


def inside(model, params, examples, has_skip):
    """Hidden states, plans and valid tokens of a seed, in float64."""
    run = jax.jit(functools.partial(apply_with_plans, model, has_skip=has_skip))
    _, (hidden, plans, where) = run(params, examples.inputs, examples.lengths)
    return (np.asarray(x, np.float64) for x in (hidden, plans, where))


def residual(x):
    return np.linalg.norm(x - x.mean(axis=0)) / np.linalg.norm(x)


@pytest.mark.few(1)
@pytest.mark.parametrize(("num_iters", "has_skip"), [(2, True), (0, False)])
def test_measures_by_hand(num_iters, has_skip):
    model, params, examples = problem(num_iters)
    found = observe(model, params, examples, has_skip=has_skip)
    for seed in range(2):
        one = jax.tree.map(lambda x, seed=seed: x[seed], params)
        hidden, plans, where = inside(model, one, examples, has_skip)
        counts = where.sum(axis=1).astype(int)
        np.testing.assert_array_equal(counts, LENGTHS + 1)
        texts = range(len(counts))
        expected = {
            "relative_residual": [
                np.median([residual(x[b, : counts[b]]) for b in texts]) for x in hidden
            ],
            "words_residual": [
                np.median([residual(x[b, 1 : counts[b]]) for b in texts])
                for x in hidden
            ],
            "entropy": [],
            "column_defect": [],
        }
        for layer in plans:
            cut = [layer[b][:, : counts[b], : counts[b]] for b in texts]
            rows = [-(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1) for p in cut]
            ratios = [r.mean() / np.log(n) for r, n in zip(rows, counts, strict=True)]
            expected["entropy"].append(np.mean(ratios))
            defects = [
                np.abs(p.sum(axis=1) - 1).sum(axis=-1).mean() / len(p[0]) for p in cut
            ]
            expected["column_defect"].append(np.mean(defects))
        for name, values in expected.items():
            np.testing.assert_allclose(
                found[name][seed], values, rtol=RTOL, atol=1e-6, err_msg=name
            )
    # The attention is not uniform, and the class token matters.
    assert found["entropy"].min() < 0.97
    assert not np.allclose(found["words_residual"], found["relative_residual"])


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("has_skip", [True, False])
def test_gradients_are_those_of_the_mean_loss(has_skip):
    model, params, examples = problem()
    found = observe(model, params, examples, has_skip=has_skip)
    lengths = jnp.asarray(examples.lengths)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits, _ = model.apply(
            {"params": params}, examples.inputs, lengths, has_skip=has_skip
        )
        picked = jax.nn.log_softmax(logits)[jnp.arange(4), examples.labels]
        return -picked.mean()

    def norm(tree):
        return np.linalg.norm(
            np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
        )

    for seed in range(2):
        one = jax.tree.map(lambda x, seed=seed: x[seed], params)
        layers = gradient(one)["layers"]
        for layer in range(3):
            tree = jax.tree.map(lambda x, layer=layer: x[layer], layers)
            norms = {
                "attention_gradient": norm(tree["attention"]),
                "gradient": norm(tree),
            }
            for name, expected in norms.items():
                assert expected > 0
                actual = found[name][seed, layer]
                np.testing.assert_allclose(actual, expected, rtol=1e-3)


def test_padding_is_ignored():
    model, params, examples = problem()
    is_padding = np.arange(6) >= LENGTHS[:, None]
    other = np.where(is_padding, 7, examples.inputs).astype(np.int32)
    changed = Examples(inputs=other, lengths=LENGTHS, labels=examples.labels)
    first, second = (
        observe(model, params, each, has_skip=True) for each in (examples, changed)
    )
    assert (other != examples.inputs).any()
    for name, values in first.items():
        np.testing.assert_allclose(second[name], values, rtol=RTOL, err_msg=name)


def test_observations_become_lists_by_seed():
    observed = [
        {"a": np.full((2, 3), k) + np.arange(2)[:, None], "b": np.array([k, 1 / 3])}
        for k in (10.0, 20.0, 30.0, 40.0)
    ]
    found = as_lists(observed)
    assert found["a"][1] == [[11.0] * 3, [21.0] * 3, [31.0] * 3, [41.0] * 3]
    assert found["b"] == [[10.0, 20.0, 30.0, 40.0], [0.33333] * 4]


def test_significant_digits():
    values = np.array([[1.2345678, 1234567.8], [-0.00012345678, 0.0]])
    assert significant(values) == [[1.2346, 1234600.0], [-0.00012346, 0.0]]
    assert significant(np.array(2 / 3), digits=2) == 0.67
