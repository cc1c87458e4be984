"""The signed-rank test, its interval, Holm's correction and the verdicts."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from experiments.evidence import contrasts
from experiments.evidence.contrasts import Outcome, Shift, equal, greater, holm, shift


def normal(seed, num, mean=0.4):
    return np.random.default_rng(seed).normal(mean, size=num)


def wilcoxon(x, **options):
    """SciPy's p-value, without ties."""
    found: Any = scipy.stats.wilcoxon(x, method="exact", **options)
    return float(found.pvalue)


def pair_means(x):
    """Sorted means of all pairs, each difference paired with itself too."""
    return sorted((x[i] + x[j]) / 2 for i in range(len(x)) for j in range(i + 1))


@pytest.mark.parametrize("num", [1, 5, 6, 10, 13, 20])
@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_is_scipys(num, seed):
    x = normal(seed, num)
    expected = wilcoxon(x)
    assert shift(x).p_value == pytest.approx(expected, rel=1e-12)
    assert greater(x) == Outcome(shift(x), shift(x).p_value)


@pytest.mark.parametrize("num", [6, 9, 10, 12])
@pytest.mark.parametrize("seed", range(3))
def test_the_interval_holds_the_shifts_that_the_test_does_not_reject(num, seed):
    x = normal(seed, num)
    means = pair_means(x)
    between = [(a + b) / 2 for a, b in itertools.pairwise(means)]
    shifts = [means[0] - 1, *between, means[-1] + 1]
    kept = [k for k, at in enumerate(shifts) if wilcoxon(x - at) > 0.05]
    found = shift(x)
    # Shift k lies between the means k - 1 and k.
    np.testing.assert_allclose(
        (found.low, found.high), (means[kept[0] - 1], means[kept[-1]])
    )
    assert found.estimate == pytest.approx(np.median(means))
    assert (found.num_positive, found.num_seeds) == ((x > 0).sum(), num)


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        # The zero has rank 1, the others 2.5, 2.5 and 4. Of the 8 sums of signed ranks
        # 2 are as far from 0 as 9, 6 as far as 4, and all as far as 1.
        ([0, 1, 1, 2], 2 / 8),
        ([0, -1, 1, 2], 6 / 8),
        ([0, 1, 1, -2], 1.0),
        ([0, 0, 0], 1.0),
    ],
)
def test_zeros_and_ties_by_hand(differences, p_value):
    assert shift(differences).p_value == pytest.approx(p_value)


@pytest.mark.parametrize("seed", range(6))
def test_zeros_and_ties_by_enumeration_of_all_signs(seed):
    x = np.random.default_rng(seed).integers(-2, 5, 9) / 4
    x[:2] = 0
    ranks = scipy.stats.rankdata(np.abs(x))[x != 0]
    sums = [
        abs(np.dot(signs, ranks))
        for signs in itertools.product((-1, 1), repeat=len(ranks))
    ]
    found = abs(np.dot(np.sign(x[x != 0]), ranks))
    expected = np.mean(np.array(sums) >= found - 1e-9)
    assert shift(x.tolist()).p_value == pytest.approx(expected)


def test_the_interval_leaves_zero_out_where_the_test_rejects():
    rejected = []
    for num, seed in itertools.product((6, 8, 10, 11), range(30)):
        found = shift(normal(seed, num, 0.7))
        is_rejected = found.p_value <= 0.05
        assert is_rejected == (not found.low <= 0 <= found.high)
        rejected.append(is_rejected)
    assert 20 < sum(rejected) < 100


@pytest.mark.parametrize("num", [4, 10])
def test_opposite_differences_have_the_opposite_shift(num):
    x = normal(3, num)
    found, opposite = shift(x), shift(-x)
    assert opposite.p_value == found.p_value
    assert opposite.estimate == pytest.approx(-found.estimate)
    assert (opposite.low, opposite.high) == (-found.high, -found.low)
    assert opposite.num_positive == num - found.num_positive
    assert shift(x[::-1]) == found


def test_numbers_of_differences():
    for num in (0, 21):
        with pytest.raises(ValueError, match=f"needs 1 to 20 differences, got {num}"):
            shift([1.0] * num)
    assert shift(list(range(1, 21))).p_value == 2 / 2**20
    # Five seeds reject nothing at 5 %, so the interval has no end.
    five = shift([1, 2, 3, 4, 5])
    assert (five.low, five.high, five.p_value) == (-math.inf, math.inf, 2 / 2**5)
    text = shift([1.0, 2.0, 3.0, 4.0, 5.0, -0.5]).text(1)
    assert text == "2.5 [-0.5, 5.0], positive for 5 of 6 seeds"


def test_holms_correction():
    # 4, 3, 2 and 1 times the p-values in rising order, and never less than before.
    adjusted = holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_array_equal(holm([0.6, 0.7]), 1)
    np.testing.assert_array_equal(holm([0.3]), 0.3)


@pytest.mark.parametrize("seed", range(5))
def test_holms_correction_rejects_what_his_procedure_does(seed):
    p = np.random.default_rng(seed).uniform(size=8) ** 4
    adjusted = holm(p.tolist())
    order = np.argsort(p)
    assert (adjusted >= p).all()
    assert (np.diff(adjusted[order]) >= 0).all()
    np.testing.assert_array_equal(holm(p[order].tolist()), adjusted[order])
    # Step down from the least, until one exceeds its share of the level.
    rejected = set()
    for number, index in enumerate(order):
        if p[index] > 0.05 / (len(p) - number):
            break
        rejected.add(index)
    assert set(np.flatnonzero(adjusted <= 0.05)) == rejected


def test_equality_needs_both_one_sided_tests():
    x = normal(0, 10, 0.0) / 100  # Within the margin, all of them.
    assert equal(x, 0.1).p_value == 1 / 2**10
    assert equal(x, 0.1).shift == shift(x)
    for far in (0.2, -0.2):
        assert equal(x + far, 0.1).p_value == 1.0
    for seed in range(5):
        wide = normal(seed, 10, 0.0)
        sides = [wilcoxon(y, alternative="greater") for y in (wide + 0.5, 0.5 - wide)]
        assert equal(wide, 0.5).p_value == pytest.approx(max(sides))


def test_few_seeds_have_students_test():
    x = [0.3, 0.5, 0.1, 0.4, -0.1]
    mean, error = np.mean(x), np.std(x, ddof=1) / 5**0.5
    found = contrasts.by_t(x)
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(mean / error, 4))
    width = 2.7764 * error  # t of 0.975 for four degrees of freedom.
    ends = (found.shift.estimate, found.shift.low, found.shift.high)
    np.testing.assert_allclose(ends, (mean, mean - width, mean + width), rtol=1e-4)
    assert (found.shift.num_positive, found.shift.num_seeds) == (4, 5)
    # A single seed, or no spread about 0, rejects nothing.
    assert contrasts.by_t([0.3]).p_value == 1
    assert contrasts.by_t([0.0, 0.0]).p_value == 1


@pytest.mark.parametrize(
    ("kind", "estimate", "low", "high", "adjusted", "expected"),
    [
        ("greater", 0.5, 0.3, 0.7, 0.01, "supported"),
        ("greater", 0.5, 0.3, 0.7, 0.05, "undecided"),  # The level is not reached.
        ("greater", -0.5, -0.7, -0.3, 0.01, "not supported"),
        ("greater", -0.5, -0.7, -0.3, 0.3, "undecided"),
        # Significant, but of no practical size.
        ("greater", 0.05, 0.02, 0.08, 0.01, "not supported"),
        ("greater", 0.03, -0.02, 0.08, 0.6, "not supported"),
        ("greater", 0.09, 0.05, 0.12, 0.01, "supported"),
        ("greater", 0.2, -0.1, 0.5, 0.3, "undecided"),
        ("greater", 0.2, -math.inf, math.inf, 0.06, "undecided"),
        ("equal", 0.0, -0.05, 0.05, 0.01, "supported"),
        ("equal", 0.0, -0.05, 0.05, 0.2, "undecided"),
        ("equal", 0.1, 0.05, 0.15, 1.0, "undecided"),
        ("equal", 0.3, 0.2, 0.4, 1.0, "not supported"),
        ("equal", -0.3, -0.4, -0.2, 1.0, "not supported"),
        ("equal", 0.3, -math.inf, math.inf, 1.0, "undecided"),
    ],
)
def test_verdicts(kind, estimate, low, high, adjusted, expected):
    found = Shift(estimate, low, high, p_value=0.5, num_positive=5, num_seeds=10)
    outcome = Outcome(found, p_value=0.5)
    assert contrasts.decide(kind, outcome, adjusted, margin=0.1) == expected
