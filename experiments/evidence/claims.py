"""What results say of a claim: means with intervals, and a verdict."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import scipy.stats

Verdict = Literal["supported", "not supported", "undecided"]


class Finding(TypedDict):
    """One answer of an experiment, as its JSON holds it."""

    claim: str
    verdict: Verdict  # At the scale of the experiment.
    text: str  # The numbers behind it.


class Interval(NamedTuple):
    """A mean and the half-width of its 95 % interval; infinite for a single value."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half_width

    def text(self, digits: int = 3) -> str:
        """Both, or the mean alone where there is no interval."""
        if math.isinf(self.half_width):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of independent values, by Student's t."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return Interval(float(values.mean()), math.inf)
    width = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return Interval(float(values.mean()), float(width))


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Of the mean of `first` less that of `second`, independent samples, by Welch's t.

    Reference:
        Welch, 1947. https://doi.org/10.1093/biomet/34.1-2.28
    """
    first, second = (np.asarray(x, np.float64) for x in (first, second))
    mean = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return Interval(mean, math.inf)
    parts = [x.var(ddof=1) / len(x) for x in (first, second)]
    if sum(parts) == 0:
        return Interval(mean, 0.0)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (first, second), strict=True)
    )
    width = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    return Interval(mean, float(width))


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Of the mean of `first` less `second`, seed by seed.

    For networks whose equal seeds have equal parameters at the start and equal batches.
    """
    return interval(np.subtract(first, second))


def verdict(interval: Interval, threshold: float = 0.0) -> Verdict:
    """Whether a claim that a quantity exceeds `threshold` is borne out.

    Args:
        interval: Of the quantity.
        threshold: What it is claimed to exceed.
    """
    if interval.low > threshold:
        return "supported"
    if interval.high < threshold:
        return "not supported"
    return "undecided"


def by_seed(
    claim: str,
    quantity: str,
    first: Sequence[float],
    second: Sequence[float],
    names: tuple[str, str],
) -> Finding:
    """Whether `first` exceeds `second`, seed by seed: equal seeds have all else equal.

    Args:
        claim: What is claimed, in a sentence.
        quantity: What was measured, with its unit.
        first: One a seed.
        second: The same seeds.
        names: What follows the mean of each in the text.
    """
    gain = paired(first, second)
    return Finding(
        claim=claim,
        verdict=verdict(gain),
        text=(
            f"{quantity}: {interval(first).text()} {names[0]}, "
            f"{interval(second).text()} {names[1]}, a "
            f"difference by seed of {gain.text()}."
        ),
    )
