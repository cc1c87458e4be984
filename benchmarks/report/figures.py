"""Figures of the rows of one device."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .. import programs
from ..harness import cases
from ..harness.program import MODES
from ..harness.record import Row

# Colours by Okabe and Ito and by Tol that all forms of colour blindness tell apart.
OURS: Final = ("#0072B2", "#009E73", "#56B4E9", "#332288", "#44AA99")
SOFTMAXES: Final = ("#000000", "#555555", "#999999")
OTHER_SINKHORNS: Final = ("#D55E00", "#CC79A7", "#E69F00", "#882255")


class Plot(NamedTuple):
    """One file: quantities against the variable of a sweep, in either mode."""

    alt: str
    sweep: str
    x: Callable[[Row], float]
    panels: Mapping[str, Callable[[Row], float | None]]  # By label of the y axis.


PLOTS: Final[Mapping[str, Plot]] = {
    "tokens.png": Plot(
        "Time and peak memory against tokens",
        "tokens",
        lambda row: row.case.tokens,
        {
            "time (ms)": lambda row: row.median_ms,
            "peak memory (MiB)": lambda row: row.peak_mib,
        },
    ),
    "iterations.png": Plot(
        "Time over that of softmax against iterations",
        "iterations",
        lambda row: row.num_iters,
        {"time / softmax": lambda row: row.ratio_to_softmax},
    ),
}


def names(rows: Sequence[Row]) -> dict[str, str]:
    """Files that the rows of a device give, with what each shows."""
    return {
        name: plot.alt
        for name, plot in PLOTS.items()
        if len({row.case for row in _in_sweep(plot, rows)}) > 1
    }


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Writes the figures of one device's newest rows as PNG."""
    for name in names(rows):
        figure = _figure(PLOTS[name], _in_sweep(PLOTS[name], rows))
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})


def _in_sweep(plot, rows):
    return [row for row in rows if row.case in cases.SWEEPS[plot.sweep]]


def _figure(plot, rows):
    height = 3.2 * len(plot.panels) + 1.2
    figure = Figure(figsize=(9.5, height), layout="constrained")
    axes = figure.subplots(len(plot.panels), len(MODES), squeeze=False, sharey="row")
    styles = _styles(dict.fromkeys(row.implementation for row in rows))
    for line, (label, value) in zip(axes, plot.panels.items(), strict=True):
        line[0].set_ylabel(label)
        for axis, mode in zip(line, MODES, strict=True):
            # Linear up to 2, so that 0, 1 and 2 iterations are apart.
            axis.set_xscale("symlog", base=2, linthresh=2)
            in_mode = [row for row in rows if row.mode == mode and value(row)]
            for name, style in styles.items():
                some = [row for row in in_mode if row.implementation == name]
                some.sort(key=plot.x)
                axis.plot(
                    [*map(plot.x, some)], [*map(value, some)], label=name, **style
                )
            axis.set(xlabel=plot.sweep, yscale="log", title=mode.replace("_", " + "))
            axis.xaxis.set_major_locator(FixedLocator(sorted({*map(plot.x, rows)})))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.grid(alpha=0.25, linewidth=0.6)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5)
    one = rows[0]
    figure.suptitle(f"{one.device}, {one.case.heads} heads, {one.dtype}", fontsize=11)
    return figure


def _styles(names):
    """Line styles by program: softmax dashed, ours thick, other Sinkhorns thin."""
    groups = {
        "softmax": (iter(SOFTMAXES), {"linestyle": "--", "marker": "s"}),
        "ours": (iter(OURS), {"linewidth": 2.2, "marker": "o"}),
        "other Sinkhorns": (iter(OTHER_SINKHORNS), {"linewidth": 1.0, "marker": "^"}),
    }
    styles = {}
    for name in names:
        kind = "other Sinkhorns" if name in programs.PEERS else "ours"
        kind = kind if programs.is_sinkhorn(name) else "softmax"
        colours, style = groups[kind]
        styles[name] = {"color": next(colours), "markersize": 4, **style}
    return styles
