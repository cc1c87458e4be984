"""Rank, entropy and accuracy against column_tau, every seed."""

from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np

from . import style

PANELS: Final = {
    "relative residual,\ninput of the last layer": lambda cell: np.array(
        cell["residual"]["trained"]
    )[:, -2],
    "entropy over that of uniform\nattention, mean over layers": lambda cell: np.array(
        cell["entropy"]["trained"]
    ).mean(axis=1),
    "validation accuracy": lambda cell: np.array(cell["validation_accuracy"]),
}


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure; softmax is at 0 and Sinkhorn at 1."""
    cells = sorted(result["curves"], key=_tau)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3.4 * len(PANELS), 3.2))
    for axis, (label, of) in zip(axes, PANELS.items(), strict=True):
        values = [of(cell) for cell in cells]
        for cell, each in zip(cells, values, strict=True):
            x = np.full(len(each), _tau(cell))
            axis.plot(x, each, ".", color=style.COLORS[0], alpha=0.5)
        means = [each.mean() for each in values]
        axis.plot([_tau(cell) for cell in cells], means, "s-", color=style.COLORS[1])
        axis.set(xlabel="column_tau", ylabel=label)
        axis.set_xticks([_tau(cell) for cell in cells])
    return figure


def _tau(cell):
    return cell["column_tau"] if cell["num_iters"] else 0.0
