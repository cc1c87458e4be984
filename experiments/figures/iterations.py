"""The figure of iterations: each measure against the half steps."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..networks.digits import ACCURACY, ENTROPY, RESIDUAL
from . import style

STYLES = {
    "rows": style.series(0) | {"label": "rows last"},
    "columns": style.series(1) | {"label": "columns last"},
}


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    cells = result["cells"]
    figure, axes = plt.subplots(2, 2, figsize=(9.0, 6.6))
    (residual, entropy), (defect, accuracy) = axes
    _points(residual, cells, RESIDUAL)
    _points(entropy, cells, ENTROPY)
    _points(accuracy, cells, ACCURACY)
    entropy.legend()
    for finish, other in (("rows", "column"), ("columns", "row")):
        some = [c for c in cells if c["finish"] == finish]
        counts = [c["half_steps"] for c in some]
        means = [np.mean(c["trained"][f"{other}_defect"]) for c in some]
        look = STYLES[finish] | {"markersize": 6, "linewidth": 1.0}
        look["label"] = f"of {other}s, {look['label']}"
        defect.plot(counts, means, **look)
    defect.set(yscale="log", ylabel="mean |sum - 1| of what is not last")
    defect.legend()
    for axis in axes.flat:
        counts = result["config"]["half_steps"]
        style.number_ticks(axis, counts, "half steps (1 is softmax)")
    figure.suptitle(
        "Digits, after training: every seed small, mean and 95 % interval large; "
        "dashed: softmax.",
        fontsize=10,
    )
    return figure


def _points(axis, cells, quantity):
    axis.set_ylabel(quantity.label)
    for finish, look in STYLES.items():
        some = [c for c in cells if c["finish"] == finish]
        x = [c["half_steps"] for c in some]
        values = [quantity.of(c["trained"]) for c in some]
        style.seeds_and_interval(axis, x, values, linewidth=1.0, **look)
    softmax = quantity.of(cells[0]["trained"]).mean()
    axis.axhline(softmax, color="0.35", linestyle="--", linewidth=0.9, zorder=0)
