"""The figure of demo: relative residual against layer, three kinds of networks."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..networks.measures import FLOAT32_FLOOR
from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6))
    for axis, has_skip in zip(axes, (True, False), strict=False):
        for cell in result["curves"]:
            if cell["has_skip"] == has_skip:
                _draw_cell(axis, cell)
        kind = "skip connections" if has_skip else "no skip connections"
        axis.set(yscale="log", title=f"trained on reviews, {kind}")
    style.shade_floor(axes[1], FLOAT32_FLOOR)
    for name, values in result["pure"].items():
        layers = np.arange(len(values[0]))
        for each in values:
            axes[2].plot(layers, each, **style.NORMALISERS[name])
    axes[2].set(
        title="attention alone, random weights",
        ylabel="log10 of the relative residual",
    )
    axes[0].set_ylabel("relative residual")
    for axis in axes:
        axis.set_xlabel("layer, 0 is the embedding")
    style.number_layers(*axes)
    title = "One line a seed; grey is the rounding of float32"
    style.legend_of_phases(figure, title)
    return figure


def _draw_cell(axis, cell):
    drawn = style.of_cell(cell)
    for phase, line in style.PHASES.items():
        for values in cell["residual"][phase]:
            axis.plot(np.arange(len(values)), values, **drawn, **line)
