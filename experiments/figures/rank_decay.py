"""The figure of rank_decay: residual above, entropy below, one column a network."""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Okabe and Ito's palette, told apart in all forms of colour blindness.
STYLES = {
    "softmax": {"color": "#0072B2", "marker": "o"},
    "Sinkhorn": {"color": "#D55E00", "marker": "s"},
}
PHASES = {
    "init": {"linestyle": (0, (4, 2)), "markerfacecolor": "white"},
    "trained": {"linestyle": "-"},
}
PHASE_NAMES = {"init": "at initialisation", "trained": "after training"}
GREY = "#555555"
GUIDE = {"color": GREY, "linestyle": ":", "linewidth": 1.2}  # 3^layer.
MAXIMUM = {"color": GREY, "linestyle": "--", "linewidth": 0.9}  # Uniform attention.
FLOAT64 = np.finfo(np.float64)


def draw(result: dict, path: pathlib.Path, *, floor: float) -> None:
    """Writes the figure of a result as PNG.

    Args:
        result: As `rank_decay.run` returns it.
        path: Of the file.
        floor: Relative residuals below it are roundings.
    """
    maximum = result["data"]["max_entropy"]
    names = list(dict.fromkeys(run["architecture"] for run in result["runs"]))
    with plt.rc_context({"font.size": 10, "axes.titlesize": 11, "savefig.dpi": 150}):
        figure, axes = plt.subplots(
            2,
            len(names),
            figsize=(2.6 * len(names) + 0.5, 6.8),
            squeeze=False,
            layout="constrained",
            sharex=True,
        )
        for (top, bottom), name in zip(axes.T, names, strict=True):
            runs = [run for run in result["runs"] if run["architecture"] == name]
            if name == "pure attention":
                _residuals_below_float64(top, runs)
            else:
                _residuals(top, runs, floor)
            _entropies(bottom, runs, maximum)
            top.set_title(_title(runs[0]))
            for axis in (top, bottom):
                axis.spines[["top", "right"]].set_visible(False)
                axis.grid(alpha=0.25, linewidth=0.6)
                axis.xaxis.get_major_locator().set_params(integer=True)
            bottom.set_xlabel("layer")
        # Else the panel whose entropies differ by 1e-6 would show them as different.
        least = min(axis.get_ylim()[0] for axis in axes[1])
        for axis in axes[1]:
            axis.set_ylim(least, maximum + 0.05 * (maximum - least))
        axes[0, 0].set_ylabel("relative residual ‖res(X)‖ / ‖X‖")
        axes[1, 0].set_ylabel("attention entropy (nats)")
        _legend(figure, result)
        figure.savefig(path)
        plt.close(figure)


def _title(run):
    name = run["architecture"]
    if name == "pure attention":
        return "pure attention\n(no LayerNorm either)"
    return name.replace(", ", ",\n")


def _residuals(axis, runs, floor):
    for run in runs:
        for phase in PHASES:
            y = np.array(run[phase]["relative_residual"])
            _curve(axis, np.maximum(y, 1e-8), run, phase)  # Equal tokens give 0.
    axis.set_yscale("log")
    axis.set_ylim(1e-8, 2)
    axis.axhspan(1e-8, floor, color="0.92", zorder=0)
    axis.text(
        0.03,
        1.4e-8,
        "float32 rounding",
        color=GREY,
        fontsize=9,
        transform=axis.get_yaxis_transform(),
    )


def _residuals_below_float64(axis, runs):
    # The logarithm on a logarithmic axis: decay like 10^(-3^layer) is a straight line.
    for run in runs:
        for phase in PHASES:
            y = -np.array(run[phase]["log10_relative_residual"])
            _curve(axis, y[:, 1:], run, phase, start=1)
    layers = np.arange(1, y.shape[1])
    axis.plot(layers, 3 * y[:, -1].max() * 3.0 ** (layers - layers[-1]), **GUIDE)
    axis.set_yscale("log")
    axis.invert_yaxis()
    axis.yaxis.set_major_formatter(lambda y, _: f"$10^{{-{y:g}}}$")
    for value, name, x, align in (
        (FLOAT64.eps, "float64 rounding", 0.98, "right"),
        (FLOAT64.tiny, "float64 range", 0.03, "left"),
    ):
        y = -np.log10(value)
        axis.axhline(y, color=GREY, linewidth=0.8)
        axis.text(
            x,
            y / 1.06,
            name,
            color=GREY,
            fontsize=9,
            ha=align,
            va="bottom",
            transform=axis.get_yaxis_transform(),
        )


def _entropies(axis, runs, maximum):
    for run in runs:
        for phase in PHASES:
            y = np.array(run[phase]["attention_entropy"])
            _curve(axis, y, run, phase, start=1)
    axis.axhline(maximum, **MAXIMUM)


def _curve(axis, values, run, phase, start=0):
    """The median over seeds with a band from the least to the greatest."""
    style = STYLES[run["normaliser"]] | PHASES[phase]
    layers = np.arange(start, start + values.shape[1])
    axis.fill_between(
        layers,
        values.min(axis=0),
        values.max(axis=0),
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
    axis.plot(layers, np.median(values, axis=0), markersize=4, linewidth=1.4, **style)


def _legend(figure, result):
    curves = [
        (f"{name}, {PHASE_NAMES[phase]}", STYLES[name] | style | {"markersize": 4})
        for name in STYLES
        for phase, style in PHASES.items()
    ]
    guides = [
        ("decay as $10^{-c\\,3^{layer}}$", GUIDE),
        ("greatest entropy, log T", MAXIMUM),
    ]
    seeds = len(result["config"]["seeds"])
    figure.legend(
        handles=[plt.Line2D([], [], label=k, **v) for k, v in curves + guides],
        title=f"Lines: median of {seeds} seeds; bands: least to greatest.",
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
