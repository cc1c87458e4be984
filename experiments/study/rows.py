"""Contrasts as rows of a JSON: their values by seed, then their verdicts."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float

from ..evidence import contrasts
from ..evidence.claims import Finding
from ..networks.measures import FLOAT32_FLOOR
from .cell import Cell
from .observe import significant
from .plan import Arm, Contrast

# Attention whose entropy is within this of uniform attention's, in every layer, does
# not tell normalisers apart.
UNIFORM: Final = 0.01
# The part of the networks of a cell that must learn.
LEARNED: Final = 0.8
# Standard errors of the accuracy by which a network that learned is above chance.
ABOVE_CHANCE: Final = 3.0


def why_untested(cell: Cell, result: dict[str, Any]) -> str | None:
    """Why a cell cannot test a claim about trained attention; None if it can."""
    residual = np.array(result["relative_residual"], np.float64)[:, -1]
    if diverged := int((~np.isfinite(residual).all(axis=1)).sum()):
        return f"{diverged} of the networks diverged"
    learned = has_learned(cell, result).mean()
    if learned < LEARNED:
        return f"{learned:.0%} of the networks are better than chance"
    entropy = np.array(result["entropy"], np.float64)[:, -1]  # [S, L]
    if np.median(entropy.min(axis=1)) > 1 - UNIFORM:
        return f"attention is uniform to within {UNIFORM:.0%} in every layer"
    return None


def has_learned(cell: Cell, result: dict[str, Any]) -> Bool[np.ndarray, " S"]:
    """Whether each network classifies better than chance after training."""
    chance = 1 / cell.sizes.num_classes
    error = math.sqrt(chance * (1 - chance) / cell.sizes.num_validation)
    return np.array(result["validation_accuracy"]) > chance + ABOVE_CHANCE * error


def is_at_floor(arm: Arm, result: dict[str, Any]) -> bool:
    """Whether all of a quantity of residuals is rounding, in the median seed."""
    if not arm.quantity.is_residual:
        return False
    return bool(np.median(arm.quantity.of(result)) < math.log10(FLOAT32_FLOOR) + 1e-6)


def is_bounded(arm: Arm, result: dict[str, Any]) -> bool:
    """Whether a part of a quantity of residuals is rounding, in the median seed."""
    if not arm.quantity.is_residual:
        return False
    residual = np.array(result["relative_residual"], np.float64)[:, -1]
    return bool(np.median(residual[:, arm.quantity.deepest]) <= FLOAT32_FLOOR)


def row(
    contrast: Contrast, get: Callable[[Cell], dict[str, Any] | None]
) -> dict[str, Any]:
    """The values of a contrast by arm, rate and seed; no arms if a cell is missing."""
    arms = []
    found = [[get(cell) for cell in arm.cells] for arm in contrast.arms]
    missing = sum(result is None for results in found for result in results)
    for arm, results in () if missing else zip(contrast.arms, found, strict=True):
        arms.append(
            {
                "name": arm.name,
                "sign": arm.sign,
                "quantity": arm.quantity.name,
                "cells": [cell.name for cell in arm.cells],
                "untested": [
                    why_untested(cell, result)
                    for cell, result in zip(arm.cells, results, strict=True)
                ],
                "is_at_floor": [is_at_floor(arm, result) for result in results],
                "is_bounded": [is_bounded(arm, result) for result in results],
                "accuracy": [
                    float(np.mean(result["validation_accuracy"])) for result in results
                ],
                "values": [significant(arm.quantity.of(result)) for result in results],
            }
        )
    return {
        "name": contrast.name,
        "claim": contrast.claim,
        "kind": contrast.kind,
        "margin": contrast.margin,
        "rates": [
            rates[0] if len(set(rates)) == 1 else None
            for rates in zip(
                *([cell.learning_rate for cell in arm.cells] for arm in contrast.arms),
                strict=True,
            )
        ],
        "num_missing": missing,
        "arms": arms,
    }


def curves(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """The first and last observation of a cell and its course, for figures."""
    of = lambda name: np.array(result[name], np.float64)
    residual, entropy = of("relative_residual"), of("entropy")
    gradient = of("attention_gradient")
    return {
        "name": cell.name,
        "task": cell.sizes.task,
        "layer_norm": cell.layer_norm,
        "has_skip": cell.has_skip,
        "pooling": cell.pooling,
        "num_iters": cell.num_iters,
        "column_tau": cell.column_tau,
        "learning_rate": cell.learning_rate,
        "untested": why_untested(cell, result),
        "has_learned": has_learned(cell, result).tolist(),
        "residual": {
            "init": significant(residual[:, 0]),
            "trained": significant(residual[:, -1]),
        },
        "entropy": {
            "init": significant(entropy[:, 0]),
            "trained": significant(entropy[:, -1]),
        },
        "course": {
            "updates": result["updates"],
            "residual": significant(residual[:, :, -2]),
            "middle_residual": significant(residual[:, :, cell.depth // 2]),
            "entropy": significant(entropy.mean(axis=2)),
            "first_gradient": significant(gradient[:, :, 0]),
        },
        "validation_accuracy": result["validation_accuracy"],
        "uniform_accuracy": result["uniform_accuracy"],
        "paths": result.get("paths"),
    }


def sums(row: dict[str, Any], rates: Sequence[int]) -> Float[np.ndarray, " S"]:
    """The sum of the arms by seed, mean over the rates of these numbers.

    Where arms have different numbers of seeds, the first are those they share.
    """
    num = min(len(arm["values"][rate]) for arm in row["arms"] for rate in rates)
    return np.mean(
        [
            sum(
                arm["sign"] * np.array(arm["values"][rate][:num], np.float64)
                for arm in row["arms"]
            )
            for rate in rates
        ],
        axis=0,
    )


def tested_rates(row: dict[str, Any]) -> list[int]:
    """The numbers of the rates at which every arm can test the claim."""
    reasons = zip(*(arm["untested"] for arm in row["arms"]), strict=True)
    return [i for i, why in enumerate(reasons) if not any(why)]


def primary_findings(rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """The verdicts of contrasts, by tests that assume no distribution."""

    def test(row, values):
        if row["kind"] == "equal":
            return contrasts.equal(values, row["margin"])
        return contrasts.greater(values)

    return _findings(rows, test)


def secondary_findings(rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """The verdicts of contrasts with few seeds, by Student's t.

    With 5 seeds a test without the assumption of normal values cannot reject.
    """
    return _findings(rows, lambda row, values: contrasts.by_t(values))


def _findings(rows, test):
    """The findings of all rows, with Holm's correction for the number of them."""
    outcomes = []
    for each in rows:
        rates = tested_rates(each)
        is_tested = bool(rates) and not _all_at_floor(each, rates)
        outcomes.append(test(each, sums(each, rates)) if is_tested else None)
    adjusted = contrasts.holm([1.0 if o is None else o.p_value for o in outcomes])
    return [
        _finding(each, outcome, float(p), functools.partial(test, each))
        for each, outcome, p in zip(rows, outcomes, adjusted, strict=True)
    ]


def _all_at_floor(row, rates):
    return all(arm["is_at_floor"][rate] for arm in row["arms"] for rate in rates)


def _finding(row, outcome, adjusted, test):
    rates = tested_rates(row)
    if outcome is None:
        text = _why_not_tested(row, rates)
        return Finding(claim=row["claim"], verdict="untested", text=text)
    bounded = [any(arm["is_bounded"][r] for r in rates) for arm in row["arms"]]
    verdict = contrasts.decide(
        row["kind"],
        outcome,
        adjusted,
        row["margin"],
        # What is rounding on every side differs by 0, whatever the networks do.
        is_shrunk=all(bounded),
    )
    arms = ", ".join(
        f"{np.mean([np.median(arm['values'][r]) for r in rates]):.3f} {arm['name']}"
        for arm in row["arms"]
    )
    at = ", ".join(f"{row['rates'][r]:g}" for r in rates if row["rates"][r])
    if len(rates) > 1:
        medians = f"mean over the rates {at} of the medians"
    else:
        medians = f"medians at rate {at}" if at else "medians"
    quantity = row["arms"][0]["quantity"]
    text = (
        f"{quantity[0].upper()}{quantity[1:]}, {medians}: {arms}. By seed "
        f"{outcome.shift.text()}, p = {adjusted:.2g} after Holm's correction."
    )
    rest = _remarks(row, rates, bounded, test)
    return Finding(claim=row["claim"], verdict=verdict, text="".join((text, *rest)))


def _why_not_tested(row, rates):
    reasons = {why for arm in row["arms"] for why in arm["untested"] if why}
    if rates:
        least = -math.log10(FLOAT32_FLOOR)
        reasons = [f"all residuals are rounding: at least {least:.1f} decades lost"]
    if row["num_missing"]:
        reasons = [f"{row['num_missing']} of its cells are not trained yet"]
    reason = "; ".join(sorted(reasons))
    return f"{reason[:1].upper()}{reason[1:]}."


def _remarks(row, rates, bounded, test):
    """Yields sentences on each rate, on rounding, and on rates that are left out."""

    def at_rate(rate):
        values = sums(row, [rate])
        is_finite = np.isfinite(values).all()
        return test(values).shift.interval_text() if is_finite else "not finite"

    if len(rates) > 1:
        yield f" At each rate: {'; '.join(map(at_rate, rates))}."
    if all(bounded):
        yield (
            " Residuals that are rounding, on both sides, count as equal, which makes "
            "the difference smaller than it is."
        )
    elif any(bounded):
        yield (
            f" Residuals that are rounding count as {FLOAT32_FLOOR:.1g}, so the "
            "difference is at least this."
        )
    for r in sorted(set(range(len(row["rates"]))) - set(rates)):
        why = ", ".join(
            f"{arm['name']}: {arm['untested'][r]}"
            for arm in row["arms"]
            if arm["untested"][r]
        )
        yield f" Rate {row['rates'][r]:g} is left out ({why}); there: {at_rate(r)}."
