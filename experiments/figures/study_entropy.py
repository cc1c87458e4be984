"""Entropy of the attention: against layer and against training, every rate."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the networks on text with pre-LayerNorm and skips."""
    cells = [
        cell
        for cell in result["curves"]
        if (cell["task"], cell["layer_norm"]) == ("imdb", "pre")
        and cell["has_skip"]
        and cell["pooling"] == "class_token"
    ]
    rates = sorted({cell["learning_rate"] for cell in cells})
    size = (3.4 * len(rates) + 0.4, 5.6)
    figure, axes = plt.subplots(
        2, len(rates), figsize=size, sharey="row", squeeze=False
    )
    for rate, above, below in zip(rates, *axes, strict=True):
        for cell in cells:
            if cell["learning_rate"] == rate:
                _draw_cell(above, below, cell)
        above.set(title=f"rate {rate:g}", xlabel="layer")
        below.set_xlabel("updates")
        style.number_layers(above)
    axes[0, 0].set_ylabel("entropy, 1 is uniform")
    axes[1, 0].set_ylabel("entropy, mean over layers")
    style.legend(
        figure,
        "One thin line a seed, the thick line is the median",
        *(
            style.line(f"{name}, {style.PHASE_NAMES[phase]}", **drawn, **line)
            for name, drawn in style.NORMALISERS.items()
            for phase, line in style.PHASES.items()
        ),
        ncols=4,
    )
    return figure


def _draw_cell(above, below, cell):
    drawn = style.NORMALISERS["Sinkhorn" if cell["num_iters"] else "softmax"]
    thin = {"color": drawn["color"], "alpha": 0.25, "linewidth": 0.7}
    for phase, line in style.PHASES.items():
        values = np.array(cell["entropy"][phase])
        layers = np.arange(1, values.shape[1] + 1)
        above.plot(layers, np.median(values, axis=0), **drawn, **line)
        if phase == "trained":
            above.plot(layers, values.T, **thin)
    course = np.array(cell["course"]["entropy"])
    below.plot(cell["course"]["updates"], np.median(course, axis=0), **drawn)
    below.plot(cell["course"]["updates"], course.T, **thin)
