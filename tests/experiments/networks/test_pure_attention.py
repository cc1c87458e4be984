"""The recursion of pure attention against 400 digits and the laws that it follows."""

import decimal
import math

import numpy as np
import pytest

from experiments.networks import pure_attention
from experiments.networks.pure_attention import Weights, log10_relative_residual


def stack(seed=0, depth=5, width=4, heads=2, size=3, scale=0.3, tokens=5):
    rng = np.random.default_rng(seed)
    shapes = [(depth, width, heads, size)] * 3 + [(depth, heads, size, width)]
    weights = Weights(*(rng.normal(size=shape) * 0.7 for shape in shapes))
    return rng.normal(size=(tokens, width)) * scale, weights


def in_decimals(x, weights, num_iters):
    """The relative residuals with 400 digits, by the definition of attention."""
    exact = np.vectorize(lambda v: decimal.Decimal(float(v)), otypes=[object])
    exp = np.vectorize(lambda v: v.exp(), otypes=[object])

    def log10_ratio(x):
        residual = x - x.sum(axis=0) / decimal.Decimal(len(x))
        return float(((residual**2).sum() / (x**2).sum()).sqrt().log10())

    with decimal.localcontext(prec=400):
        x = exact(x)
        ratios = [log10_ratio(x)]
        for layer in zip(*weights, strict=True):
            by_head = [np.moveaxis(w, -2, 0) for w in layer[:3]]
            heads = zip(*by_head, layer[3], strict=True)
            y = 0
            for query, key, value, out in (map(exact, head) for head in heads):
                root = decimal.Decimal(query.shape[1]).sqrt()
                plan = exp((x @ query) @ (x @ key).T / root)
                plan = plan / plan.sum(axis=1, keepdims=True)
                for _ in range(num_iters):
                    plan = plan / plan.sum(axis=0, keepdims=True)
                    plan = plan / plan.sum(axis=1, keepdims=True)
                y = y + plan @ (x @ value) @ out
            x = y
            ratios.append(log10_ratio(x))
    return np.array(ratios)


@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_recursion_agrees_with_400_digits(num_iters, scale):
    x, weights = stack(scale=scale)
    actual = log10_relative_residual(x, weights, num_iters)
    expected = in_decimals(x, weights, num_iters)
    np.testing.assert_allclose(10 ** (actual - expected), 1, rtol=1e-9)
    if scale < 1:
        assert expected[-1] < -70  # Where float64 would have nothing left.


@pytest.mark.parametrize("num_iters", [0, 1, 10])
def test_recursion_is_smooth_where_its_two_ways_meet(num_iters, monkeypatch):
    x, weights = stack(depth=3, tokens=8, scale=1.0)
    results = []
    for bound in (0.0, 1.0, np.inf):
        monkeypatch.setattr(pure_attention, "SMALL", bound)
        results.append(log10_relative_residual(x, weights, num_iters))
    np.testing.assert_allclose(10 ** (results[0] - results[1]), 1, rtol=1e-6)
    np.testing.assert_allclose(10 ** (results[2] - results[1]), 1, rtol=1e-6)


@pytest.mark.parametrize("num_iters", [0, 1, 10])
def test_small_residuals_follow_the_cubic_law(num_iters):
    x, weights = stack(depth=1, heads=1, scale=1e-4)
    query, key, value, out = (w[0] for w in weights)
    res = x - x.mean(axis=0)
    m = (res @ query[:, 0]) @ (res @ key[:, 0]).T / math.sqrt(3)
    m = m - m.mean(axis=0)
    cubed = m @ res @ value[:, 0] @ out[0] / len(x)
    mean = x.mean(axis=0) @ value[:, 0] @ out[0]
    expected = np.linalg.norm(cubed) / np.linalg.norm(mean) / math.sqrt(len(x))
    actual = log10_relative_residual(x, weights, num_iters)[-1]
    np.testing.assert_allclose(10**actual, expected, rtol=1e-3)


@pytest.mark.parametrize("num_iters", [0, 10])
def test_exponents_grow_threefold_far_below_float64(num_iters):
    x, weights = stack(depth=9, tokens=16, scale=0.1)
    logs = log10_relative_residual(x, weights, num_iters)
    assert logs[-1] < -5000
    np.testing.assert_allclose(logs[-3:] / logs[-4:-1], 3, rtol=5e-3)


def test_equal_tokens_have_no_residual_to_follow():
    x, weights = stack()
    with pytest.raises(ValueError, match="All 5 tokens are equal"):
        log10_relative_residual(np.ones_like(x), weights, 0)
    without_queries = weights._replace(query=np.zeros_like(weights.query))
    logs = log10_relative_residual(x, without_queries, 3)
    assert np.isfinite(logs[0])
    assert np.isneginf(logs[1:]).all()


def test_plans_are_normalised():
    logits = np.random.default_rng(0).normal(size=(2, 5, 5))
    for num_iters, atol in ((0, None), (100, 1e-12)):
        plan = pure_attention.normalise(logits, num_iters)
        np.testing.assert_allclose(plan.sum(axis=-1), 1)
        if atol:
            np.testing.assert_allclose(plan.sum(axis=-2), 1, atol=atol)
