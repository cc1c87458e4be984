"""Claims held against measurements: means with intervals, verdicts, findings."""

import math
import warnings
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import scipy.stats

Verdict = Literal["supported", "not supported", "undecided", "untested"]


# What follows the means of the two normalisers in the text of a finding.
NORMALISERS: Final = ("for Sinkhorn", "for softmax")


class Finding(TypedDict):
    """One answer to a question, as its JSON holds it."""

    claim: str
    verdict: Verdict  # Holds at the scale of the experiment.
    text: str  # The numbers behind the verdict.
    mean: NotRequired[float]
    half_width: NotRequired[float | None]  # None for a single seed.


class Interval(NamedTuple):
    """A mean and the half-width of its 95 % interval; infinite for a single value."""

    mean: float
    half_width: float

    def text(self, digits: int = 3) -> str:
        """The mean with its half-width, or alone where there is no interval."""
        if math.isinf(self.half_width):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of independent values, by Student's t."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return Interval(float(values.mean()), math.inf)
    width = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return Interval(float(values.mean()), float(width))


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The interval of the mean of `first` less `second`, seed by seed.

    For networks whose equal seeds have equal initial parameters and equal batches.
    """
    return interval(np.subtract(first, second))


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The interval of the mean of `first` less that of `second`, by Welch's t.

    For independent samples.

    Reference:
        Welch, 1947. https://doi.org/10.1093/biomet/34.1-2.28
    """
    mean = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return Interval(mean, math.inf)
    with warnings.catch_warnings():
        # SciPy warns where all values of a sample are equal; the ends are right there.
        warnings.simplefilter("ignore", RuntimeWarning)
        test = scipy.stats.ttest_ind(first, second, equal_var=False)
        low, high = test.confidence_interval(0.95)
    return Interval(mean, float(high - low) / 2)


def verdict(measured: Interval, *, low: float = 0.0, high: float = math.inf) -> Verdict:
    """The verdict on the claim that a quantity lies between `low` and `high`.

    It is "supported" if the whole interval lies between them, "not supported" if none
    of it does, else "undecided".
    """
    least, most = (measured.mean + sign * measured.half_width for sign in (-1, 1))
    if low < least and most < high:
        return "supported"
    if most < low or least > high:
        return "not supported"
    return "undecided"


def finding(
    claim: str,
    text: str,
    measured: Interval,
    *,
    low: float = 0.0,
    high: float = math.inf,
) -> Finding:
    """The claim with its verdict and the numbers behind it, `text`."""
    decided = verdict(measured, low=low, high=high)
    return Finding(claim=claim, verdict=decided, text=text)


def by_seed(
    claim: str,
    quantity: str,
    first: Sequence[float],
    second: Sequence[float],
    names: tuple[str, str] = NORMALISERS,
) -> Finding:
    """The verdict on the claim that `first` exceeds `second`, seed by seed.

    `quantity` says what was measured, with its unit; `names` follow the means in the
    text.
    """
    gain = paired(first, second)
    text = (
        f"{quantity}: {interval(first).text()} {names[0]}, "
        f"{interval(second).text()} {names[1]}, a "
        f"difference by seed of {gain.text()}."
    )
    return finding(claim, text, gain)


def within(
    claim: str,
    quantity: str,
    values: Sequence[float],
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> Finding:
    """The verdict on the claim that the mean of a quantity lies between two numbers.

    `values` has one value for each seed. The finding holds the mean and the half-width
    as numbers, too.
    """
    measured = interval(values)
    width = None if math.isinf(measured.half_width) else measured.half_width
    text = f"{quantity}: {measured.mean:.4g} (one seed)."
    if width is not None:
        number = f"{measured.mean:.4g} ± {width:.2g}"
        text = f"{quantity}: {number} (95 % over {len(values)} seeds)."
    found = finding(claim, text, measured, low=low, high=high)
    return found | Finding(mean=measured.mean, half_width=width)


# The places of LayerNorm in claims and legends.
LAYER_NORM_NAMES: Final = {
    "none": "no LayerNorm",
    "pre": "pre-LayerNorm",
    "post": "post-LayerNorm",
}


def normaliser_name(num_iters: int) -> str:
    """The name of a normaliser in claims and legends; 0 iterations are the softmax."""
    return f"Sinkhorn, {num_iters}" if num_iters else "softmax"
