"""The figure of bounds: how far each is above the residual, by layer and over depth."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style

_OWN = {"color": style.COLORS[0], "marker": "s", "label": "own"}
STYLES = {
    "column sums": {"color": style.COLORS[2], "marker": "o"},
    "own, softmax": _OWN,
    "own, sinkhorn": _OWN,
    "own, Sinkhorn limit": {"color": style.COLORS[5], "marker": "D"},
    "Dong": {"color": style.COLORS[1], "marker": "^"},
    "reported": {"color": style.COLORS[3], "marker": "v"},
}


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result: two columns a source, fewest and most steps."""
    sources = list(dict.fromkeys(c["source"] for c in result["cells"]))
    figure, axes = plt.subplots(
        2, len(sources) * 2, figsize=(5.4 * len(sources), 6.6), squeeze=False
    )
    shown = []
    for source in sources:
        cells = [c for c in result["cells"] if c["source"] == source]
        shown += [cells[0], max(cells, key=lambda c: c["num_iters"])]
    for (step, depth), cell in zip(axes.T, shown, strict=True):
        source = cell["source"]
        source = source.replace(", ", ",\n") if ", " in source else f"{source}\n"
        step.set_title(f"{cell['normaliser'].replace(', ', ' ')}\n{source}")
        _excesses(step, cell, "log10_step")
        lowest = _excesses(depth, cell, "log10_depth")
        depth.set_yscale("symlog", linthresh=1)
        depth.set_ylim(bottom=min(-1, lowest))
        depth.set_xlabel("layer")
    axes[0, 0].set_ylabel("layer by layer:\nlog$_{10}$ bound / measured")
    axes[1, 0].set_ylabel("over depth:\nlog$_{10}$ bound / measured")
    seeds = len(result["config"]["seeds"])
    title = f"Mean of {seeds} seeds and 95 % interval; below 0 a bound is violated."
    style.legend(figure, title)
    return figure


def _excesses(axis, cell, key):
    """Draws all bounds of a cell over what was measured; returns the lowest."""
    lowest = 0.0
    for bound in cell["bounds"]:
        if key not in bound:
            continue
        values = np.array(bound[key], np.float64)
        lowest = min(lowest, np.nanmin(values, initial=0.0))
        axis.set_xlim(0.7, values.shape[1] + 0.3)
        is_seen = np.isfinite(values).all(axis=0)
        layers = np.arange(1, values.shape[1] + 1)[is_seen]
        if len(layers):
            look = {"label": bound["name"]} | STYLES[bound["name"]]
            style.mean_and_interval(axis, layers, values[:, is_seen], **look)
    axis.axhline(0, color="0.2", linewidth=1)
    style.number_layers(axis)
    return lowest
