"""Residual of products of attention matrices against the number of matrices."""

from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np

from ..study.products import KINDS
from . import style

TITLES: Final = {
    "sampled": "layers in order",
    "shuffled": "layers shuffled",
    "independent": "independent matrices",
}


TASKS: Final = {"imdb": "text", "fashion_mnist": "images"}
LINES: Final = ("-", "--", ":")  # One for each rate.


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure: both normalisers, given the logits of softmax networks."""
    cells = [c for c in result["curves"] if c["paths"] and c["num_iters"] == 0]
    cells = [c for c in cells if c["pooling"] == "class_token"]
    tasks = [task for task in TASKS if any(c["task"] == task for c in cells)]
    size = (10.5, 3.0 * max(1, len(tasks)) + 0.8)
    figure, axes = plt.subplots(
        max(1, len(tasks)), len(KINDS), figsize=size, sharey="row", squeeze=False
    )
    for task, row in zip(tasks, axes, strict=False):
        of_task = [cell for cell in cells if cell["task"] == task]
        for axis, kind in zip(row, KINDS, strict=True):
            _draw_kind(axis, of_task, kind)
        row[0].set_ylabel(f"{TASKS[task]}: log10 of\nthe relative residual")
    for axis, kind in zip(axes[0], KINDS, strict=True):
        axis.set_title(TITLES[kind])
    for axis in axes[-1]:
        axis.set_xlabel("matrices in the product")
    style.number_layers(*axes.flat)
    title = "Logits of trained softmax networks; one thin line a seed, thick the median"
    style.legend(figure, title)
    return figure


def _draw_kind(axis, cells, kind):
    for cell, line in zip(cells, LINES, strict=False):
        for name, drawn in style.NORMALISERS.items():
            values = np.array(cell["paths"][f"{kind}, {name}"])
            lengths = np.arange(1, values.shape[1] + 1)
            label = f"{name}, rate {cell['learning_rate']:g}"
            median = np.median(values, axis=0)
            axis.plot(lengths, median, linestyle=line, label=label, **drawn)
            axis.plot(lengths, values.T, **style.thin(drawn))
