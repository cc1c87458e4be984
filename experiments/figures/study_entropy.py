"""Entropy of the attention: against layer and against training, every rate."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style


@style.styled
def draw(result: dict[str, Any], *, is_text: bool) -> plt.Figure:
    """Returns the figure of networks with pre-LayerNorm and skip connections.

    Those on text or those on images; without any it is empty.
    """
    cells = [
        cell
        for cell in result["curves"]
        if (cell["task"] == "imdb") == is_text
        and cell["layer_norm"] == "pre"
        and cell["has_skip"]
        and cell["pooling"] == "class_token"
    ]
    rates = sorted({cell["learning_rate"] for cell in cells})
    num_columns = max(1, len(rates))
    size = (3.4 * num_columns + 0.4, 5.6)
    figure, axes = plt.subplots(
        2, num_columns, figsize=size, sharey="row", squeeze=False
    )
    for rate, above, below in zip(rates, *axes, strict=False):
        for cell in cells:
            if cell["learning_rate"] == rate:
                _draw_cell(above, below, cell)
        above.set(title=f"rate {rate:g}", xlabel="layer")
        below.set_xlabel("updates")
        style.number_layers(above)
    axes[0, 0].set_ylabel("entropy, 1 is uniform")
    axes[1, 0].set_ylabel("entropy in training,\nmean over layers")
    task = "Text" if is_text else "Images"
    figure.suptitle(f"{task}, pre-LayerNorm, skip connections, class token")
    style.legend_of_phases(figure, "One thin line a seed, the thick line is the median")
    return figure


def _draw_cell(above, below, cell):
    drawn, values = style.of_cell(cell), cell["entropy"]
    layers = range(1, len(values["trained"][0]) + 1)
    style.medians_of_phases(above, layers, values, **drawn)
    updates, course = cell["course"]["updates"], cell["course"]["entropy"]
    below.plot(updates, np.median(course, axis=0), **drawn)
    below.plot(updates, np.transpose(course), **style.thin(drawn))
