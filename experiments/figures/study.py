"""The figure of the study: relative residual against layer, every seed."""

from typing import Any, Final

import matplotlib.pyplot as plt

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
        num_rows, len(shown), figsize=size, sharex=True, squeeze=False
    )
    for column, (title, design) in zip(axes.T, shown, strict=True):
        column[0].set_title(title)
        column[-1].set_xlabel("layer, 0 is the embedding")
        for axis, rate in zip(column, rates[design], strict=False):
            found = [c for c in cells if of_design(c) == design]
            _draw_cells(axis, [c for c in found if c["learning_rate"] == rate])
            axis.text(
                *(0.03, 0.04, f"rate {rate:g}"),
                transform=axis.transAxes,
                va="bottom",
                color=style.GREY,
            )
        for axis in column[len(rates[design]) :]:
            axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("relative residual")
    style.number_layers(*axes.flat)
    title = (
        "One thin line a seed, the thick line is the median of all; dotted: the layer "
        "that is tested; shaded: rounding"
    )
    style.legend_of_phases(figure, title, ncols=4 if len(shown) > 2 else 2)
    return figure


def _draw_cells(axis, cells):
    for cell in cells:
        values = cell["residual"]
        layers = range(len(values["trained"][0]))
        style.medians_of_phases(axis, layers, values, **style.of_cell(cell))
    axis.set(yscale="log")
    if cells[0]["has_skip"]:  # Without, the mean over layers is tested.
        axis.axvline(len(cells[0]["residual"]["trained"][0]) - 2, **style.GUIDE)
    style.shade_floor(axis, FLOAT32_FLOOR)
    learned = [cell["has_learned"] for cell in cells]
    if any(sum(each) < len(each) for each in learned):
        counts = (
            f"{sum(each)} of {len(each)} {style.name_of_cell(cell)}"
            for cell, each in zip(cells, learned, strict=True)
        )
        text = "learned:\n" + "\n".join(counts)
        at = {"transform": axis.transAxes, "va": "bottom", "fontsize": 8}
        axis.text(0.03, 0.14, text, color=style.GREY, **at)
