"""The figure of temperature: residual and accuracy against entropy."""

import fractions
from typing import Any

import matplotlib.pyplot as plt

from ..networks.digits import ACCURACY, ENTROPY, RESIDUAL
from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    figure, axes = plt.subplots(1, 3, figsize=(11.0, 4.4))
    trained, scaled = result["softmax_trained"], result["softmax_scaled"]
    _points(axes[0], result, trained, RESIDUAL)
    _points(axes[1], result, scaled, RESIDUAL)
    _points(axes[2], result, trained, ACCURACY)
    axes[1].set_title("factor after training alone")
    title = "digits, after training; small: seeds, large: their means"
    style.legend(figure, title)
    return figure


def _points(axis, result, rows, quantity):
    axis.set(xlabel=ENTROPY.label, ylabel=quantity.label)
    axis.set_title("factor from the first update on")
    means = [(ENTROPY.of(row).mean(), quantity.of(row).mean()) for row in rows]
    color = style.NORMALISERS["softmax"]["color"]
    axis.plot(*zip(*means, strict=True), color=color, linewidth=1.2)
    for i, row in enumerate(rows):
        factor = fractions.Fraction(row["factor"]).limit_denominator(1000)
        look = {"color": color, "marker": style.MARKERS[i % len(style.MARKERS)]}
        look |= {"label": f"softmax, factor {factor}"}
        _seeds_and_mean(axis, row, quantity, **look)
    name = f"Sinkhorn, {result['config']['num_iters']} iterations, factor 1"
    look = {"color": style.NORMALISERS["Sinkhorn"]["color"], "marker": "P"}
    _seeds_and_mean(axis, result["sinkhorn"], quantity, label=name, **look)


def _seeds_and_mean(axis, row, quantity, *, label, **look):
    x, y = ENTROPY.of(row), quantity.of(row)
    look |= {"linestyle": "none"}
    axis.plot(x, y, markersize=3, alpha=0.45, **look)
    axis.plot(x.mean(), y.mean(), markersize=7, label=label, **look)
