"""Plots of the rows of one device."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sinkhorn_jax.attention import IMPLEMENTATIONS

from .. import programs as _programs
from ..harness import cases as _cases
from ..harness.program import MODES
from ..harness.record import Row
from ..peers import PEERS

# Okabe and Ito's colours and some of Tol's, told apart in all forms of colour
# blindness. Cold ones are ours and warm ones the peers'.
OURS: Final = ("#0072B2", "#009E73", "#56B4E9", "#332288", "#44AA99")
THEIRS: Final = ("#D55E00", "#CC79A7", "#E69F00", "#882255", "#999933")
SOFTMAX_COLOURS: Final = ("#000000", "#555555", "#999999")
MARKERS: Final = "osD^vP*X<>hp"
MODE_TITLES: Final = {"forward": "forward", "forward_backward": "forward + backward"}
NAME_SIZE: Final = 8.5


class Panel(NamedTuple):
    """What one axis shows."""

    value: Callable[[Row], float | None]
    label: str


class Plot(NamedTuple):
    """One file."""

    alt: str
    sweep: str
    x: Callable[[Row], float]
    x_label: str
    panels: tuple[Panel, ...]  # A line of panels each, a column for each mode.
    draw_x: Callable[[Axes, Sequence[float]], None]


def _octaves(axis, xs):
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(xs))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:.0f}k" if x >= 1024 else f"{x:.0f}")
    )


def _counts(axis, xs):
    # Linear up to 2, so that 0, 1 and 2 are apart, and logarithmic from there.
    axis.set_xscale("symlog", linthresh=2, linscale=0.6)
    axis.xaxis.set_major_locator(FixedLocator(xs))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))


PLOTS: Final[Mapping[str, Plot]] = {
    "tokens.png": Plot(
        "Time and peak memory against tokens",
        "tokens",
        lambda row: row.case.tokens,
        "tokens",
        (
            Panel(lambda row: row.median_ms, "time (ms)"),
            Panel(lambda row: row.peak_mib, "peak memory (MiB)"),
        ),
        _octaves,
    ),
    "iterations.png": Plot(
        "Time over that of softmax against iterations",
        "iterations",
        lambda row: row.num_iters,
        "iterations",
        (Panel(lambda row: row.ratio_to_softmax, "time / softmax"),),
        _counts,
    ),
}


def names(rows: Sequence[Row]) -> dict[str, str]:
    """The files that the rows of a device give, and what they show."""
    return {
        name: plot.alt
        for name, plot in PLOTS.items()
        if len({plot.x(row) for row in _in_sweep(plot, rows)}) > 1
    }


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Writes the plots as PNG, from the newest rows of one device."""
    for name in names(rows):
        plot = PLOTS[name]
        figure = _figure(plot, _in_sweep(plot, rows))
        figure.savefig(folder / name, dpi=150, metadata={"Software": None})


def _in_sweep(plot, rows):
    cases = _cases.SWEEPS[plot.sweep]
    return [row for row in rows if row.case in cases]


def _figure(plot, rows):
    figure = Figure(figsize=(10.5, 3.6 * len(plot.panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(plot.panels), len(MODES), squeeze=False, sharey="row")
    xs = sorted({plot.x(row) for row in rows})
    for line, panel in zip(axes, plot.panels, strict=True):
        for axis, mode in zip(line, MODES, strict=True):
            curves = _curves(plot, panel, [row for row in rows if row.mode == mode])
            for name, points in curves.items():
                axis.plot(*zip(*points, strict=True), **_style(name))
            axis.set_yscale("log")
            plot.draw_x(axis, xs)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.set_xlabel(plot.x_label)
            axis.set_title(MODE_TITLES[mode], fontsize=10)
        line[0].set_ylabel(panel.label)
    # Names are placed when the limits of shared axes are known.
    for line, panel in zip(axes, plot.panels, strict=True):
        for axis, mode in zip(line, MODES, strict=True):
            axis.tick_params(labelleft=True)
            curves = _curves(plot, panel, [row for row in rows if row.mode == mode])
            _name_curves(axis, curves)
    figure.suptitle(_title(plot, rows), fontsize=11)
    return figure


def _title(plot, rows):
    one = rows[0]
    fixed = {
        "tokens": f"{one.case.heads} heads, {one.num_iters} iterations",
        "iterations": f"{one.case.heads} heads, {one.case.tokens} tokens",
    }[plot.sweep]
    return f"{one.device}: {fixed}, head dimension {one.case.head_dim}, {one.dtype}"


def _curves(plot, panel, rows):
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        y = panel.value(row)
        if y is not None and y > 0:  # 0 MiB has no place on a logarithmic axis.
            curves.setdefault(row.implementation, []).append((plot.x(row), y))
    return {name: sorted(points) for name, points in curves.items()}


def _name_curves(axis, curves):
    """Names right of the axis, in the order of the curves' ends, none over another."""
    if not curves:
        return
    low, high = (math.log(y) for y in axis.get_ylim())
    names = sorted(curves, key=lambda name: _extended(curves, name))
    wanted = [(_extended(curves, name) - low) / (high - low) for name in names]
    for name, y in zip(names, _spread(wanted), strict=True):
        style = _style(name)
        marker = {key: style[key] for key in ("color", "marker", "markerfacecolor")}
        axis.plot(
            [1.03], [y], transform=axis.transAxes, clip_on=False, markersize=5, **marker
        )
        axis.text(
            *(1.055, y, name),
            transform=axis.transAxes,
            color=style["color"],
            fontsize=NAME_SIZE,
            va="center_baseline",
        )


def _extended(curves, name):
    """Logarithm of a curve's last value, moved on to the last x of all.

    A curve that ends early is moved as far as one that goes on rises from there, so the
    names stay in the order that the curves would have.
    """
    x, y = curves[name][-1]
    longest = max(curves.values(), key=lambda points: points[-1][0])
    logs = [math.log(value) for _, value in longest]
    at_end = np.interp(x, [point[0] for point in longest], logs)
    return math.log(y) + logs[-1] - float(at_end)


def _spread(wanted, distance=0.062):
    """Ascending positions in [0, 1.02] at least `distance` apart, near the wanted."""
    ys = np.clip(np.asarray(wanted, float), 0, 1)
    for _ in range(200):
        gaps = np.diff(ys)
        short = np.maximum(0, distance - gaps)
        if not short.any():
            break
        ys[:-1] -= short / 2
        ys[1:] += short / 2
        ys = np.clip(ys, 0, 1.02)
    return ys


def _style(name: str) -> dict[str, Any]:
    softmaxes = [_programs.SOFTMAX, *(x for x in PEERS if not PEERS[x].is_sinkhorn)]
    peers = [x for x in PEERS if PEERS[x].is_sinkhorn]
    ours = list(IMPLEMENTATIONS)
    everyone = [*softmaxes, *ours, *peers]
    if name not in everyone:  # Of an older commit.
        ours.append(name)
        everyone.append(name)
    marker = MARKERS[everyone.index(name) % len(MARKERS)]
    style = {"marker": marker, "markersize": 4.5, "linewidth": 1.2}
    if name in softmaxes:
        color = SOFTMAX_COLOURS[softmaxes.index(name) % len(SOFTMAX_COLOURS)]
        style |= {"linestyle": (0, (4, 2)), "zorder": 3}
    elif name in ours:
        color = OURS[ours.index(name) % len(OURS)]
        style |= {"linewidth": 2.0, "zorder": 4}
    else:
        color = THEIRS[peers.index(name) % len(THEIRS)]
    is_ours = name in ours or name == _programs.SOFTMAX
    return style | {"color": color, "markerfacecolor": color if is_ours else "white"}
