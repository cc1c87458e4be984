"""The style that all figures share: colours, markers, lines with bands, legends."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from ..evidence.claims import interval

# Okabe and Ito's palette, which can be told apart in all forms of colour blindness.
_CODES = "0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 000000"
COLORS: Final = tuple(f"#{code}" for code in _CODES.split())
MARKERS: Final = "os^Dv<>"
NORMALISERS: Final = {
    "softmax": {"color": COLORS[0], "marker": "o"},
    "Sinkhorn": {"color": COLORS[1], "marker": "s"},
}
# Networks at initialisation and after training.
PHASES: Final = {
    "init": {"linestyle": (0, (4, 2)), "markerfacecolor": "white"},
    "trained": {"linestyle": "-"},
}
PHASE_NAMES: Final = {"init": "at initialisation", "trained": "after training"}
GREY: Final = "#555555"
GUIDE: Final = {"color": GREY, "linestyle": ":", "linewidth": 1.2}
FLOOR: Final = {"color": "0.92", "zorder": 0}  # A span in which all is rounding.

# Decorates a function that draws a figure.
styled = plt.rc_context(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "figure.dpi": 150,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
    }
)


def series(number: int) -> dict[str, Any]:
    """The colour and marker of the series of this number."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def mean_and_interval(axis: plt.Axes, x, values, **style: Any) -> None:
    """Draws the mean over seeds of values [S, X], and a band of its 95 % interval."""
    mean, width = _intervals(np.asarray(values).T)
    axis.plot(x, mean, **style)
    _fill(axis, x, mean - width, mean + width, 0.2, style)


def _centre_and_range(centre: Callable, axis: plt.Axes, x, values, **style: Any):
    values = np.asarray(values)
    axis.plot(x, centre(values, axis=0), **style)
    _fill(axis, x, values.min(axis=0), values.max(axis=0), 0.15, style)


# Draw the mean or median over seeds of values [S, X], and a band of all seeds.
mean_and_range = functools.partial(_centre_and_range, np.mean)
median_and_range = functools.partial(_centre_and_range, np.median)


def seeds_and_interval(axis: plt.Axes, x, values, *, shift=0.0, **style: Any) -> None:
    """Draws every seed of values [X][S] as a dot, and the mean with its interval.

    The dots are `shift` away from the mean along x; `style` is that of the means.
    """
    for at, each in zip(x, values, strict=True):
        at = np.full(len(each), at + shift)
        axis.plot(at, each, ".", color=style["color"], alpha=0.4)
    mean, width = _intervals(values)
    axis.errorbar(x, mean, width, **{"markersize": 6, "capsize": 3} | style)


def number_layers(*axes: plt.Axes) -> None:
    """Puts ticks of the x axes at whole numbers."""
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)


def number_ticks(axis: plt.Axes, values: Sequence[int], label: str) -> None:
    """Makes the x axis logarithmic, with a tick for each of the values alone."""
    axis.set(xscale="log", xlabel=label)
    axis.set_xticks(values, [str(value) for value in values])
    axis.set_xticks([], minor=True)


def line(label: str, **style: Any) -> plt.Line2D:
    """A line for a legend."""
    return plt.Line2D([], [], label=label, **style)


def legend(figure: plt.Figure, title: str, *handles: Any, ncols: int = 3) -> None:
    """Puts a legend below all axes: their labels, each once, and further handles."""
    labelled = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    figure.legend(
        handles=[*labelled.values(), *handles],
        title=title,
        loc="outside lower center",
        ncols=ncols,
        fontsize=10,
    )


def name_of_cell(cell: dict[str, Any]) -> str:
    """The normaliser of a cell of the study."""
    return "Sinkhorn" if cell["num_iters"] else "softmax"


def of_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """The colour and marker of the normaliser of a cell of the study."""
    return NORMALISERS[name_of_cell(cell)]


def legend_of_phases(figure: plt.Figure, title: str, *, ncols: int = 4) -> None:
    """Puts a legend below all axes: each normaliser before and after training."""
    lines = (
        line(f"{name}, {PHASE_NAMES[phase]}", **drawn, **look)
        for name, drawn in NORMALISERS.items()
        for phase, look in PHASES.items()
    )
    legend(figure, title, *lines, ncols=ncols)


def medians_of_phases(axis: plt.Axes, x, values: dict[str, Any], **drawn: Any) -> None:
    """Draws values [S, X] by phase: the median over seeds; if trained, every seed."""
    for phase, look in PHASES.items():
        axis.plot(x, np.median(values[phase], axis=0), **drawn, **look)
    axis.plot(x, np.transpose(values["trained"]), **thin(drawn))


def thin(drawn: dict[str, Any]) -> dict[str, Any]:
    """The look of the line of a single seed."""
    return {"color": drawn["color"], "alpha": 0.25, "linewidth": 0.7}


def shade_floor(axis: plt.Axes, floor: float) -> None:
    """Shades what lies below `floor`, if the axis shows a part of it."""
    bottom, top = axis.get_ylim()
    if bottom < floor:
        axis.axhspan(bottom, floor, **FLOOR)
        axis.set_ylim(bottom, top)


def _intervals(values):
    mean, width = np.array([interval(each) for each in values]).T
    return mean, np.where(np.isinf(width), 0.0, width)


def _fill(axis, x, low, high, alpha, style):
    axis.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0)
