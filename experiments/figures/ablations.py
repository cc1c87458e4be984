"""The figure of ablations: residual by layer, a row a LayerNorm, a column a network."""

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from ..evidence import answer
from ..networks.measures import FLOAT32_FLOOR

PLACES = {"none": "no LayerNorm", "pre": "pre-LayerNorm", "post": "post-LayerNorm"}
FLOOR = -8.0  # Of the axis, log10; equal tokens have a residual of 0.


def draw(result: dict[str, Any]) -> plt.Figure:
    """A figure of what `ablations.run` returns."""
    places = list(dict.fromkeys(run["layer_norm"] for run in result["runs"]))
    networks = list(
        dict.fromkeys((run["has_skip"], run["has_mlp"]) for run in result["runs"])
    )
    normalisers = list(dict.fromkeys(run["num_iters"] for run in result["runs"]))
    colors = dict(zip(normalisers, answer.COLORS, strict=False))
    figure, axes = plt.subplots(
        len(places),
        len(networks),
        figsize=(2.9 * len(networks) + 0.8, 2.6 * len(places) + 1.3),
        squeeze=False,
        layout="constrained",
        sharex=True,
        sharey="col",
    )
    for row, place in zip(axes, places, strict=True):
        for axis, (has_skip, has_mlp) in zip(row, networks, strict=True):
            for run in result["runs"]:
                key = run["layer_norm"], run["has_skip"], run["has_mlp"]
                if key == (place, has_skip, has_mlp):
                    _curves(axis, run, colors[run["num_iters"]])
            axis.xaxis.get_major_locator().set_params(integer=True)
            if not has_skip:
                axis.set_ylim(FLOOR, 0.3)
                axis.axhspan(FLOOR, np.log10(FLOAT32_FLOOR), color="0.92", zorder=0)
        row[0].set_ylabel(f"{PLACES[place]}\nlog10 of relative residual")
    for axis, (has_skip, has_mlp) in zip(axes[0], networks, strict=True):
        skip = "skip" if has_skip else "no skip"
        axis.set_title(f"{skip}, {'MLP' if has_mlp else 'no MLP'}")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    _legend(figure, colors, len(result["runs"][0]["train_accuracy"]))
    return figure


def _curves(axis, run, color):
    for phase, style in (("init", "--"), ("trained", "-")):
        with np.errstate(divide="ignore"):
            values = np.log10(run[phase]["relative_residual"])
        values = np.maximum(values, FLOOR)
        answer.band(
            axis,
            np.arange(values.shape[1]),
            values,
            color=color,
            linestyle=style,
            alpha=1.0 if phase == "trained" else 0.55,
        )


def _legend(figure, colors, num_seeds):
    handles = [
        plt.Line2D([], [], color=color, label=answer.name_of(n))
        for n, color in colors.items()
    ]
    handles += [
        plt.Line2D([], [], color="0.3", linestyle="--", label="at initialisation"),
        plt.Line2D([], [], color="0.3", label="trained"),
        plt.Rectangle((0, 0), 1, 1, color="0.92", label="float32 rounding"),
    ]
    figure.legend(
        handles=handles,
        title=f"Lines: mean of {num_seeds} seeds; bands: 95 % interval.",
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
