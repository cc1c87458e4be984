"""Intervals and verdicts."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments.evidence.claims import Interval, difference, interval, verdict


def test_an_interval_is_students():
    # t of 0.975 for two degrees of freedom is 4.303.
    assert interval([0.9, 0.92, 0.94]).text() == "0.920 ± 0.050"
    single = interval([0.5])
    assert (single.text(), single.half_width) == ("0.500", math.inf)


def test_a_difference_is_welchs():
    rng = np.random.default_rng(0)
    first, second = rng.normal(1, 1, 5), rng.normal(0, 3, 8)
    expected = scipy.stats.ttest_ind(first, second, equal_var=False)
    expected = expected.confidence_interval(0.95)
    actual = difference(first, second)
    np.testing.assert_allclose([actual.low, actual.high], expected)
    assert difference([1.0, 1.0], [0.5, 0.5]) == Interval(0.5, 0.0)
    assert math.isinf(difference([1.0], [0.5, 0.6]).half_width)


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
    assert verdict(Interval(mean + 3, half_width), threshold=3.0) == expected
