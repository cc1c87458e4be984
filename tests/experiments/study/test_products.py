"""Products of attention matrices along paths."""

import numpy as np
import pytest

from experiments.study import products


def along(logits, normalise, num_paths=3, seed=0):
    rng = np.random.default_rng(seed)
    return products.along_paths(logits, normalise, rng, num_paths)


@pytest.fixture
def logits():
    """Two examples; layer and head are the digits before the point."""
    fraction = np.random.default_rng(1).uniform(0, 0.9, (2, 3, 2, 4, 4))
    layer, head = 10 * np.arange(3), np.arange(2)
    return fraction + layer[:, None, None, None] + head[:, None, None]


def test_permutations_lose_nothing(logits):
    """|C P| is |C| for every permutation."""
    order = np.argsort(logits, axis=-1)[..., 0, :]
    plans = np.eye(4)[order]  # [B, L, N, T, T]
    found = along(plans, lambda x: np.eye(4)[np.argsort(x[..., 0, :], axis=-1)])
    for kind in products.KINDS:
        np.testing.assert_allclose(found[kind], [np.log10(0.75**0.5)] * 3)


def test_nearly_uniform_matrices_lose_a_factor_each(logits):
    # (1 - a) / n + a I: the product of k has a^k in place of a.
    plan = 0.9 / 4 + 0.1 * np.eye(4)
    found = along(logits, lambda x: np.broadcast_to(plan, x.shape))
    power = 0.1 ** np.arange(1, 4)
    expected = np.log10(power * 3**0.5 / np.sqrt(1 + 3 * power**2))
    for kind in products.KINDS:
        np.testing.assert_allclose(found[kind], expected)


def test_examples_and_paths_are_averaged(logits):
    # Heads keep 0.1 and 0.01 of the residual, but for the norm of the mean.
    def normalise(x):
        kept = np.array([0.1, 0.01])[:, None, None]
        return np.broadcast_to((1 - kept) / 4 + kept * np.eye(4), x.shape)

    def log10(kept):
        return np.log10(kept * 3**0.5 / np.sqrt(1 + 3 * kept**2))

    found = along(logits, normalise, num_paths=500)
    one = (log10(0.1) + log10(0.01)) / 2
    two = (log10(1e-2) + 2 * log10(1e-3) + log10(1e-4)) / 4
    # Of 1000 draws; the deviations are 0.5 and 0.7.
    np.testing.assert_allclose(found["sampled"][:2], [one, two], atol=0.1)
    assert found["sampled"] == pytest.approx(found["shuffled"])


def test_equal_generators_draw_equal_paths_for_both_normalisers(logits, monkeypatch):
    seen = []

    def record(product):
        seen.append(product)
        return 0.0

    monkeypatch.setattr(products, "log10_residual", record)
    along(logits, lambda x: x)
    first = seen.copy()
    seen.clear()
    along(logits, lambda x: 2 * x)
    assert len(first) == len(seen) == 2 * 3 * 3 * 3  # Examples, lengths, paths, kinds.
    for one, other in zip(first, seen, strict=True):
        np.testing.assert_array_equal(2 * one, other)


def test_paths_take_one_head_of_each_layer(logits, monkeypatch):
    seen = []
    record = lambda product: seen.append(product) or 0.0
    monkeypatch.setattr(products, "log10_residual", record)
    along(logits, lambda x: x, num_paths=20)
    flat = lambda product: [sorted(plan.ravel()) for plan in product]
    heads, orders = set(), set()
    for sampled, shuffled, independent in zip(*[iter(seen)] * 3, strict=True):
        places = sampled[:, 0, 0].astype(int)
        layers = places // 10
        assert (np.diff(layers) > 0).all()
        heads |= set((places % 10).tolist())
        orders.add(tuple((shuffled[:, 0, 0] // 10).astype(int).tolist()))
        assert sorted(flat(shuffled)) == sorted(flat(sampled))
        # The same logits at other places.
        assert flat(independent) == flat(sampled)
        assert (independent != sampled).any()
    assert heads == {0, 1}
    assert {(0, 1, 2), (2, 1, 0), (2, 0), (1,)} <= orders
