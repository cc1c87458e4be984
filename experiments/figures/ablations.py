"""The figure of ablations: residual by layer, a row a LayerNorm, a column a network."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..evidence.claims import LAYER_NORM_NAMES, normaliser_name
from ..networks.measures import FLOAT32_FLOOR
from . import style

BOTTOM = -8.0  # The end of the axis, log10; equal tokens have a residual of 0.


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    runs = result["runs"]
    places = list(dict.fromkeys(run["layer_norm"] for run in runs))
    networks = list(dict.fromkeys((run["has_skip"], run["has_mlp"]) for run in runs))
    normalisers = list(dict.fromkeys(run["num_iters"] for run in runs))
    colors = dict(zip(normalisers, style.COLORS, strict=False))
    figure, axes = plt.subplots(
        len(places),
        len(networks),
        figsize=(2.9 * len(networks) + 0.8, 2.6 * len(places) + 1.3),
        squeeze=False,
        sharex=True,
        sharey="col",
    )
    style.number_layers(*axes.flat)
    for run in runs:
        column = networks.index((run["has_skip"], run["has_mlp"]))
        axis = axes[places.index(run["layer_norm"]), column]
        _curves(axis, run, colors[run["num_iters"]])
    for column, (has_skip, has_mlp) in zip(axes.T, networks, strict=True):
        skip, mlp = "skip" if has_skip else "no skip", "MLP" if has_mlp else "no MLP"
        column[0].set_title(f"{skip}, {mlp}")
        column[-1].set_xlabel("layer")
        for axis in () if has_skip else column:
            axis.set_ylim(BOTTOM, 0.3)
            axis.axhspan(BOTTOM, np.log10(FLOAT32_FLOOR), **style.FLOOR)
    for row, place in zip(axes, places, strict=True):
        row[0].set_ylabel(f"{LAYER_NORM_NAMES[place]}\nlog10 of relative residual")
    handles = [style.line(normaliser_name(n), color=c) for n, c in colors.items()]
    handles += [
        style.line(style.PHASE_NAMES["init"], color="0.3", linestyle="--"),
        style.line(style.PHASE_NAMES["trained"], color="0.3"),
        plt.Rectangle((0, 0), 1, 1, color="0.92", label="float32 rounding"),
    ]
    num_seeds = len(runs[0]["train_accuracy"])
    title = f"Lines: mean of {num_seeds} seeds; bands: 95 % interval."
    style.legend(figure, title, *handles, ncols=4)
    return figure


def _curves(axis, run, color):
    for phase, look in (
        ("init", {"linestyle": "--", "alpha": 0.55}),
        ("trained", {"linestyle": "-"}),
    ):
        with np.errstate(divide="ignore"):
            values = np.log10(run[phase]["relative_residual"])
        values = np.maximum(values, BOTTOM)
        layers = np.arange(values.shape[1])
        style.mean_and_interval(axis, layers, values, color=color, **look)
