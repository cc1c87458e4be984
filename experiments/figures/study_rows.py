"""Contrasts of the study as rows: estimate, interval and every seed."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..evidence.claims import interval
from ..study import rows
from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the contrasts that were tested, but for accuracies."""
    tested = [
        (row["name"], rows.sums(row, rates))
        for row in result["rows"]
        if (rates := rows.tested_rates(row))
        and "accuracy" not in row["arms"][0]["quantity"]
    ]
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.28 * len(tested)))
    for at, (_, values) in enumerate(tested):
        mean, width = interval(values)
        axis.plot(
            values, np.full(len(values), at), ".", color=style.COLORS[0], alpha=0.4
        )
        width = None if np.isinf(width) else width
        axis.errorbar(mean, at, xerr=width, fmt="s", color=style.COLORS[1], capsize=3)
    axis.axvline(0.0, **style.GUIDE)
    axis.set_yticks(range(len(tested)), [name for name, _ in tested])
    axis.invert_yaxis()
    axis.set_xlabel("Sinkhorn less softmax, log10 of the relative residual")
    return figure
