"""The figure of rank_decay: residual above, entropy below, one column a network."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..networks.measures import FLOAT32_FLOOR
from . import style

MAXIMUM = style.GUIDE | {"linestyle": "--", "linewidth": 0.9}  # Uniform attention.
FLOAT64 = np.finfo(np.float64)


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    maximum = result["data"]["max_entropy"]
    names = list(dict.fromkeys(run["architecture"] for run in result["runs"]))
    figure, axes = plt.subplots(
        2,
        len(names),
        figsize=(2.6 * len(names) + 0.5, 6.8),
        squeeze=False,
        sharex=True,
    )
    style.number_layers(*axes.flat)
    for (top, bottom), name in zip(axes.T, names, strict=True):
        runs = [run for run in result["runs"] if run["architecture"] == name]
        top.set_title(name.replace(", ", ",\n"))
        if name == "pure attention":
            top.set_title("pure attention\n(no LayerNorm either)")
            _residuals_below_float64(top, runs)
        else:
            _residuals(top, runs)
        for run, phase, look in _curves(runs):
            y = np.array(run[phase]["attention_entropy"])
            style.median_and_range(bottom, np.arange(1, y.shape[1] + 1), y, **look)
        bottom.axhline(maximum, **MAXIMUM)
        bottom.set_xlabel("layer")
    # One scale for all: entropies that differ by 1e-6 must not look different.
    least = min(axis.get_ylim()[0] for axis in axes[1])
    for axis in axes[1]:
        axis.set_ylim(least, maximum + 0.05 * (maximum - least))
    axes[0, 0].set_ylabel("relative residual ‖res(X)‖ / ‖X‖")
    axes[1, 0].set_ylabel("attention entropy (nats)")
    handles = [
        style.line(f"{name}, {style.PHASE_NAMES[phase]}", **look, **phase_look)
        for name, look in style.NORMALISERS.items()
        for phase, phase_look in style.PHASES.items()
    ]
    handles += [
        style.line("decay as $10^{-c\\,3^{layer}}$", **style.GUIDE),
        style.line("greatest entropy, log T", **MAXIMUM),
    ]
    seeds = len(result["config"]["seeds"])
    title = f"Lines: median of {seeds} seeds; bands: least to greatest."
    style.legend(figure, title, *handles)
    return figure


def _curves(runs):
    for run in runs:
        for phase, phase_look in style.PHASES.items():
            yield run, phase, style.NORMALISERS[run["normaliser"]] | phase_look


def _residuals(axis, runs):
    for run, phase, look in _curves(runs):
        # Equal tokens give 0, which a logarithmic axis does not show.
        y = np.maximum(run[phase]["relative_residual"], 1e-8)
        style.median_and_range(axis, np.arange(y.shape[1]), y, **look)
    axis.set(yscale="log", ylim=(1e-8, 2))
    axis.axhspan(1e-8, FLOAT32_FLOOR, **style.FLOOR)
    _note(axis, 0.03, 1.4e-8, "float32 rounding")


def _residuals_below_float64(axis, runs):
    # The logarithm on a logarithmic axis: decay like 10^(-3^layer) is a straight line.
    for run, phase, look in _curves(runs):
        y = -np.array(run[phase]["log10_relative_residual"])[:, 1:]
        layers = np.arange(1, y.shape[1] + 1)
        style.median_and_range(axis, layers, y, **look)
    guide = 3 * y[:, -1].max() * 3.0 ** (layers - layers[-1])
    axis.plot(layers, guide, **style.GUIDE)
    axis.set_yscale("log")
    axis.invert_yaxis()
    axis.yaxis.set_major_formatter(lambda y, _: f"$10^{{-{y:g}}}$")
    for value, text, x, side in (
        (FLOAT64.eps, "float64 rounding", 0.98, "right"),
        (FLOAT64.tiny, "float64 range", 0.03, "left"),
    ):
        y = -np.log10(value)
        axis.axhline(y, color=style.GREY, linewidth=0.8)
        _note(axis, x, y / 1.06, text, ha=side, va="bottom")


def _note(axis, x, y, text, **place):
    at = axis.get_yaxis_transform()
    axis.text(x, y, text, color=style.GREY, fontsize=9, transform=at, **place)
