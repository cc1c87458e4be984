"""The figure of the study: relative residual against layer, every seed."""

from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np

from ..networks.measures import FLOAT32_FLOOR
from . import style

# The designs, one column each: their title, and what their cells have.
COLUMNS: Final = (
    ("text, pre-LayerNorm, skip", ("imdb", "pre", True, "class_token")),
    ("text, post-LayerNorm, skip", ("imdb", "post", True, "class_token")),
    ("images, pre-LayerNorm, skip", ("fashion_mnist", "pre", True, "class_token")),
    ("text, pre-LayerNorm, no skip", ("imdb", "pre", False, "class_token")),
)
DESIGN: Final = ("task", "layer_norm", "has_skip", "pooling")


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    cells = result["curves"]
    of_design = lambda cell: tuple(cell[name] for name in DESIGN)
    shown = [
        (title, design)
        for title, design in COLUMNS
        if any(of_design(cell) == design for cell in cells)
    ]
    # Every design has rates of its own.
    rates = {
        design: sorted(
            {cell["learning_rate"] for cell in cells if of_design(cell) == design}
        )
        for _, design in shown
    }
    num_rows = max(map(len, rates.values()))
    size = (3.2 * len(shown) + 0.4, 2.6 * num_rows + 0.8)
    figure, axes = plt.subplots(
        num_rows, len(shown), figsize=size, sharex=True, sharey="col", squeeze=False
    )
    for column, (title, design) in zip(axes.T, shown, strict=True):
        column[0].set_title(title)
        column[-1].set_xlabel("layer, 0 is the embedding")
        for axis, rate in zip(column, rates[design], strict=False):
            for cell in cells:
                if (of_design(cell), cell["learning_rate"]) == (design, rate):
                    _draw_cell(axis, cell)
            axis.set(yscale="log")
            bottom, top = axis.get_ylim()
            if bottom < FLOAT32_FLOOR:
                axis.axhspan(bottom, FLOAT32_FLOOR, **style.FLOOR)
                axis.set_ylim(bottom, top)
            at = {"transform": axis.transAxes, "ha": "right", "va": "top"}
            axis.text(0.98, 0.97, f"rate {rate:g}", color=style.GREY, **at)
        for axis in column[len(rates[design]) :]:
            axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("relative residual")
    style.number_layers(*axes.flat)
    style.legend(
        figure,
        "One thin line a seed, the thick line is the median",
        *(
            style.line(f"{name}, {style.PHASE_NAMES[phase]}", **drawn, **line)
            for name, drawn in style.NORMALISERS.items()
            for phase, line in style.PHASES.items()
        ),
        ncols=4 if len(shown) > 2 else 2,
    )
    return figure


def _draw_cell(axis, cell):
    name = "Sinkhorn" if cell["num_iters"] else "softmax"
    drawn = style.NORMALISERS[name]
    for phase, line in style.PHASES.items():
        values = np.array(cell["residual"][phase])
        layers = np.arange(values.shape[1])
        axis.plot(layers, np.median(values, axis=0), **drawn, **line)
        if phase == "trained":
            axis.plot(layers, values.T, color=drawn["color"], alpha=0.25, linewidth=0.7)
