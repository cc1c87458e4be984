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
    bottom, top = axes[1].get_ylim()
    axes[1].axhspan(bottom, FLOAT32_FLOOR, **style.FLOOR)
    axes[1].set_ylim(bottom, top)
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
    style.legend(
        figure,
        "One line a seed; grey is the rounding of float32",
        *(
            style.line(f"{name}, {style.PHASE_NAMES[phase]}", **drawn, **line)
            for name, drawn in style.NORMALISERS.items()
            for phase, line in style.PHASES.items()
        ),
        ncols=4,
    )
    return figure


def _draw_cell(axis, cell):
    drawn = style.NORMALISERS["Sinkhorn" if cell["num_iters"] else "softmax"]
    for phase, line in style.PHASES.items():
        for values in cell["residual"][phase]:
            axis.plot(np.arange(len(values)), values, **drawn, **line)
