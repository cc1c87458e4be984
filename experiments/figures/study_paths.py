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


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure: both normalisers, given the logits of softmax networks."""
    cells = [c for c in result["curves"] if c["paths"] and c["num_iters"] == 0]
    cells = [c for c in cells if c["pooling"] == "class_token"]
    figure, axes = plt.subplots(1, len(KINDS), figsize=(10.5, 3.6), sharey=True)
    lines = ("-", "--", ":")
    for axis, kind in zip(axes, KINDS, strict=True):
        for cell, line in zip(cells, lines, strict=False):
            for name, drawn in style.NORMALISERS.items():
                values = np.array(cell["paths"][f"{kind}, {name}"])
                lengths = np.arange(1, values.shape[1] + 1)
                label = f"{name}, rate {cell['learning_rate']:g}"
                style.mean_and_range(
                    axis, lengths, values, linestyle=line, label=label, **drawn
                )
        axis.set(title=TITLES[kind], xlabel="matrices in the product")
        style.number_layers(axis)
    axes[0].set_ylabel("log10 of the relative residual")
    style.legend(figure, "Logits of trained softmax networks; bands hold all seeds")
    return figure
