"""Networks without skip connections in training: which ones learn, and keep rank."""

from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np

from ..networks.measures import FLOAT32_FLOOR
from . import style

# What is drawn of the course in training, one row each, with its label.
ROWS: Final = {
    "middle_residual": "relative residual after\nhalf of the layers",
    "residual": "relative residual,\ninput of the last layer",
    "first_gradient": "gradient of the\nfirst attention",
}
# The look of a network by whether it learned.
LOOKS: Final = {True: {"linewidth": 1.2}, False: {"color": "0.6", "linewidth": 0.8}}


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the largest rate; without such networks it is empty."""
    cells = [cell for cell in result["curves"] if not cell["has_skip"]]
    largest = max((cell["learning_rate"] for cell in cells), default=None)
    shown = [cell for cell in cells if cell["learning_rate"] == largest]
    num_columns = max(1, len(shown))
    size = (4.2 * num_columns + 0.4, 7.0)
    figure, axes = plt.subplots(
        len(ROWS), num_columns, figsize=size, sharex=True, sharey="row", squeeze=False
    )
    for column, cell in zip(axes.T, shown, strict=False):
        _draw_cell(column, cell)
        name = "Sinkhorn" if cell["num_iters"] else "softmax"
        learned = f"{sum(cell['has_learned'])} of {len(cell['has_learned'])} learn"
        column[0].set_title(f"{name}, rate {largest:g}: {learned}")
        column[-1].set_xlabel("updates")
    for row, label in zip(axes, ROWS.values(), strict=True):
        row[0].set(ylabel=label, yscale="log")
    for axis in axes[:2].flat:
        style.shade_floor(axis, FLOAT32_FLOOR)
    names = [
        style.line(f"{name}, learned", **LOOKS[True], color=drawn["color"])
        for name, drawn in style.NORMALISERS.items()
    ]
    names.append(style.line("at chance", **LOOKS[False]))
    figure.suptitle("Text, pre-LayerNorm, no skip connections")
    style.legend(figure, "One line a seed; shaded: rounding", *names)
    return figure


def _draw_cell(axes, cell):
    course, color = cell["course"], style.of_cell(cell)["color"]
    for axis, name in zip(axes, ROWS, strict=True):
        for values, learned in zip(course[name], cell["has_learned"], strict=True):
            look = {"color": color} | LOOKS[learned]
            axis.plot(course["updates"], np.array(values, float), **look)
