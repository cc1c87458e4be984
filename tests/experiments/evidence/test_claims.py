"""Intervals, verdicts and findings."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments.evidence import claims
from experiments.evidence.claims import Interval, difference, interval, verdict


def test_an_interval_is_students():
    # t of 0.975 for two degrees of freedom is 4.303.
    assert interval([0.9, 0.92, 0.94]).text() == "0.920 ± 0.050"
    np.testing.assert_allclose(interval([1, 2, 3]), (2.0, 4.302653 / 3**0.5), rtol=1e-6)
    single = interval([0.5])
    assert (single.text(), single.half_width) == ("0.500", math.inf)


def test_a_difference_is_welchs():
    rng = np.random.default_rng(0)
    first, second = rng.normal(1, 1, 5), rng.normal(0, 3, 8)
    parts = [x.var(ddof=1) / len(x) for x in (first, second)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 7)
    width = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    actual = difference(first, second)
    np.testing.assert_allclose(actual, (first.mean() - second.mean(), width))
    assert math.isinf(difference([1.0], [0.5, 0.6]).half_width)


def test_a_difference_of_samples_without_spread():
    assert difference([1.0, 1.0], [0.5, 0.5]) == Interval(0.5, 0.0)
    equal = difference([1.0, 1.0, 1.0], [0.5, 0.6, 0.7])
    np.testing.assert_allclose(equal, (0.4, interval([0.5, 0.6, 0.7]).half_width))


@pytest.mark.parametrize(
    ("mean", "half_width", "expected"),
    [
        (1.0, 0.5, "supported"),
        (-1.0, 0.5, "not supported"),
        (0.2, 0.5, "undecided"),
        (5.0, math.inf, "undecided"),
        (0.0, 0.0, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(mean, half_width, expected):
    assert verdict(Interval(mean, half_width)) == expected
    assert verdict(Interval(mean + 3, half_width), low=3.0) == expected
    upside_down = Interval(-mean, half_width)
    assert verdict(upside_down, low=-math.inf, high=0.0) == expected


def test_a_mean_is_within_two_numbers_or_not():
    values = [1.0, 2.0, 3.0]
    within = lambda **limits: claims.within("claim", "it", values, **limits)
    assert within(low=-1)["verdict"] == "supported"
    assert within(low=1)["verdict"] == "undecided"
    assert within(low=5)["verdict"] == "not supported"
    assert within(high=-1)["verdict"] == "not supported"
    assert within(low=-1)["text"] == "it: 2 ± 2.5 (95 % over 3 seeds)."
    single = claims.within("claim", "it", [1.0], low=0.0)
    assert (single["verdict"], single["half_width"]) == ("undecided", None)
    assert single["text"] == "it: 1 (one seed)."


def test_seeds_are_compared_in_pairs():
    # Far apart from seed to seed, but always 0.1 more.
    first, second = [0.1, 1.1, 2.1], [0.0, 1.0, 2.0]
    found = claims.by_seed("claim", "it", first, second, ("here", "there"))
    assert found["verdict"] == "supported"
    assert "1.100 ± 2.484 here, 1.000 ± 2.484 there" in found["text"]
    assert "a difference by seed of 0.100 ± 0.000" in found["text"]
