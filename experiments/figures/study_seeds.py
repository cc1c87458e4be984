"""Every seed of the study: its residual at the end, and its course in training."""

from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np

from . import style

# The designs with skip connections, one column each: their title, and what their cells
# have.
COLUMNS: Final = (
    ("text, class token", ("imdb", "pre", "class_token")),
    ("text, mean over tokens", ("imdb", "pre", "mean")),
    ("text, class token, post-LayerNorm", ("imdb", "post", "class_token")),
    ("images, class token", ("fashion_mnist", "pre", "class_token")),
)
DESIGN: Final = ("task", "layer_norm", "pooling")


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the networks with skip connections."""
    cells = [cell for cell in result["curves"] if cell["has_skip"]]
    columns = []
    for title, design in COLUMNS:
        found = [c for c in cells if tuple(c[name] for name in DESIGN) == design]
        if found:
            columns.append((title, found))
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3.6 * len(columns) + 0.4, 6.0), squeeze=False
    )
    for (title, found), above, below in zip(columns, *axes, strict=True):
        _draw_ends(above, found)
        _draw_course(below, found)
        above.set(title=title, yscale="log", xlabel="rate")
        below.set(yscale="log", xlabel="updates")
    axes[0, 0].set_ylabel("relative residual,\ninput of the last layer")
    axes[1, 0].set_ylabel("the same in training")
    names = (style.line(n, **drawn) for n, drawn in style.NORMALISERS.items())
    style.legend(figure, "One dot or line a seed; lines above join equal seeds", *names)
    return figure


def _draw_ends(axis, cells):
    rates = sorted({cell["learning_rate"] for cell in cells})
    for at, rate in enumerate(rates):
        pair = sorted(
            (c for c in cells if c["learning_rate"] == rate),
            key=lambda c: c["num_iters"],
        )
        ends = [np.array(c["residual"]["trained"])[:, -2] for c in pair]
        for x, values, name in zip((-0.2, 0.2), ends, style.NORMALISERS, strict=False):
            marker = style.NORMALISERS[name] | {"linestyle": "", "markersize": 4}
            axis.plot(np.full(len(values), at + x), values, **marker, alpha=0.7)
        if len(ends) == 2:
            x = np.array([[at - 0.2], [at + 0.2]])
            axis.plot(np.repeat(x, len(ends[0]), axis=1), ends, "0.7", linewidth=0.6)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])


def _draw_course(axis, cells):
    # The largest rate at which both normalisers learn, if there is one.
    failed = {cell["learning_rate"] for cell in cells if cell["untested"]}
    rates = {cell["learning_rate"] for cell in cells}
    largest = max(rates - failed or rates)
    at = {"transform": axis.transAxes, "va": "bottom", "ha": "right"}
    axis.text(0.97, 0.04, f"rate {largest:g}", color=style.GREY, **at)
    for cell in cells:
        if cell["learning_rate"] == largest:
            color = style.of_cell(cell)["color"]
            course = np.array(cell["course"]["residual"]).T
            axis.plot(cell["course"]["updates"], course, color=color, linewidth=0.8)
