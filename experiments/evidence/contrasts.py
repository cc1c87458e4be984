"""Two kinds of networks compared seed by seed, without assuming normal values."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from .claims import Verdict, interval

# Probability of at least one false verdict among the primary contrasts.
ERROR_RATE = 0.05


class Shift(NamedTuple):
    """The centre of a distribution of differences, one for each seed, and its test.

    The p-value is exact whatever the distribution, if the sign of a difference is a
    coin toss where there is no effect. Estimate and interval assume, beside, that the
    differences are symmetric about their centre. So do the tests of equality.
    """

    estimate: float  # Hodges and Lehmann's: the median of the means of all pairs.
    low: float  # The interval of 95 %.
    high: float
    p_value: float  # Two-sided, of the signed-rank test.
    num_positive: int
    num_seeds: int

    def text(self, digits: int = 3) -> str:
        """The estimate with its interval, and how many seeds agree."""
        return (
            f"{self.interval_text(digits)}, positive for "
            f"{self.num_positive} of {self.num_seeds} seeds"
        )

    def interval_text(self, digits: int = 3) -> str:
        """The estimate with its interval."""
        low, high = (f"{x:.{digits}f}" for x in (self.low, self.high))
        return f"{self.estimate:.{digits}f} [{low}, {high}]"


def shift(differences: Sequence[float]) -> Shift:
    """The signed-rank test of differences, one for each seed, and its estimate.

    Zeros are ranked and belong to neither side, after Pratt. The distribution is
    enumerated over all signs, so ties are exact too. Of at most 20 seeds.

    Raises:
        ValueError: There are none, too many to enumerate, or one is not finite.

    Reference:
        Hollander, Wolfe, Chicken, Nonparametric Statistical Methods, 2014, chapter 3.
    """
    x = np.asarray(differences, np.float64)
    if not 1 <= len(x) <= 20:
        raise ValueError(f"shift needs 1 to 20 differences, got {len(x)}.")
    if not np.isfinite(x).all():
        raise ValueError(f"shift needs finite differences, got {x}.")
    ranks = _ranks(x)
    null = _sums(ranks)
    found, centre = ranks[x > 0].sum(), ranks.sum() / 2
    far = np.abs(null - centre) >= abs(found - centre) - 1e-9
    pairs = itertools.combinations_with_replacement(x, 2)
    means = np.sort([(a + b) / 2 for a, b in pairs])
    # The interval leaves out, on each side, as many means as the largest sum of ranks
    # whose probability is at most 2.5 %.
    without_ties = np.sort(_sums(np.arange(1.0, len(x) + 1)))
    cumulative = np.searchsorted(without_ties, np.arange(len(means)), side="right")
    out = int((cumulative <= 0.025 * len(without_ties)).sum())
    is_bounded = out > 0
    return Shift(
        estimate=float(np.median(means)),
        low=float(means[out - 1]) if is_bounded else -np.inf,
        high=float(means[-out]) if is_bounded else np.inf,
        p_value=float(far.mean()),
        num_positive=int((x > 0).sum()),
        num_seeds=len(x),
    )


def _ranks(x):
    """The ranks of magnitudes, 0 for zeros, which count in the ranking of the rest."""
    return np.where(x == 0, 0.0, scipy.stats.rankdata(np.abs(x)))


def _sums(ranks: Float[np.ndarray, " S"]) -> Float[np.ndarray, " 2**S"]:
    """The sums of all subsets of the ranks."""
    sums = np.zeros(1)
    for rank in ranks:
        sums = np.concatenate([sums, sums + rank])
    return sums


def holm(p_values: Sequence[float]) -> Float[np.ndarray, " P"]:
    """p-values adjusted so that the chance of any false rejection keeps its level.

    Reference:
        Holm, 1979. https://www.jstor.org/stable/4615733
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


class Outcome(NamedTuple):
    """The test of a contrast's claim, and the shift that it found."""

    shift: Shift
    p_value: float  # Before the correction for the number of contrasts.


def greater(values: Sequence[float]) -> Outcome:
    """The outcome for the claim that values exceed 0, by a test of two sides."""
    found = shift(values)
    return Outcome(found, found.p_value)


def equal(values: Sequence[float], margin: float) -> Outcome:
    """The outcome for the claim that values are 0 within a margin, by two tests."""
    x = np.asarray(values, np.float64)
    p_value = max(_one_sided(x + margin), _one_sided(margin - x))
    return Outcome(shift(x), p_value)


def by_t(values: Sequence[float]) -> Outcome:
    """The outcome for the claim that values exceed 0, by Student's t: for few seeds."""
    x = np.asarray(values, np.float64)
    mean, half_width = interval(x)
    p_value = 1.0
    if len(x) > 1:
        with np.errstate(invalid="ignore", divide="ignore"):
            p_value = float(np.nan_to_num(scipy.stats.ttest_1samp(x, 0).pvalue, nan=1))
    counts = int((x > 0).sum()), len(x)
    ends = (mean - half_width, mean + half_width)
    return Outcome(Shift(mean, *ends, p_value, *counts), p_value)


def _one_sided(x):
    """The p-value against values that do not exceed 0."""
    ranks = _ranks(x)
    return float((_sums(ranks) >= ranks[x > 0].sum() - 1e-9).mean())


def decide(
    kind: str,
    outcome: Outcome,
    adjusted: float,
    margin: float,
    *,
    is_shrunk: bool = False,
) -> Verdict:
    """The verdict of a contrast, whose p-value was adjusted by `holm`.

    A claim that something is greater is not supported where it is less, or where the
    whole interval is within the margin, a difference of no practical size. Equality is
    supported by `equal` alone, and not supported where the interval is outside. Values
    that are known to be smaller than the differences (`is_shrunk`) say nothing by being
    within the margin.
    """
    low, high = outcome.shift.low, outcome.shift.high
    is_within = not is_shrunk and -margin < low and high < margin
    is_significant = adjusted < ERROR_RATE
    if kind == "equal":
        if is_significant:
            return "supported"
        return "not supported" if low > margin or high < -margin else "undecided"
    if is_significant and not is_within:
        return "supported" if outcome.shift.estimate > 0 else "not supported"
    return "not supported" if is_within else "undecided"
