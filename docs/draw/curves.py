"""Curves of committed results."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np

from . import style

ROOT: Final = pathlib.Path(__file__).parents[2]
RESULTS: Final = ROOT / "experiments" / "results"
# Residuals below this are rounding in float32, as docs/protocol.md says.
FLOOR: Final = 5e-7


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def defects(num_tokens: int = 256) -> plt.Figure:
    """The column defect against iterations, for growing deviation of the logits."""
    result = _read("convergence/convergence.json")
    iterations = np.array(result["iterations"])
    figure, axis = plt.subplots(figsize=(style.WIDTH, 4.0))
    cells = [x for x in result["cells"] if x["num_tokens"] == num_tokens]
    shades = plt.get_cmap("viridis")(np.linspace(0.0, 0.72, len(cells)))
    # Where each curve is labelled, in iterations.
    places = {1.0: 3.2, 2.0: 8.0, 4.0: 19.0, 6.0: 44.0, 8.0: 90.0, 10.0: 215.0}
    for cell, color in zip(cells, shades, strict=True):
        values = np.array(cell["defect"])
        middle = np.maximum(np.median(values, axis=0), 1e-30)
        axis.plot(iterations, middle, color=color, linewidth=2)
        x = places[cell["deviation"]]
        y = 10 ** np.interp(np.log(x), np.log(iterations[1:]), np.log10(middle[1:]))
        axis.annotate(
            f"{cell['deviation']:g}",
            (x, y),
            color=color,
            ha="center",
            va="center",
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "linewidth": 0},
        )
    axis.axvline(10, color=style.SOFT, linestyle=":", linewidth=1.2)
    axis.text(10.4, 1.3, "default", color=style.SOFT, va="bottom")
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(1, 500),
        ylim=(1e-7, 1.2),
        xlabel="full iterations",
        ylabel="column defect",
    )
    axis.set_xticks([1, 2, 5, 10, 20, 50, 100, 200, 500])
    axis.set_xticklabels(["1", "2", "5", "10", "20", "50", "100", "200", "500"])
    axis.set_xticks([], minor=True)
    axis.text(25, 0.7, "on each curve: standard\ndeviation of the logits", va="top")
    axis.grid(alpha=0.25)
    return figure


def depth(learning_rate: float = 0.001) -> plt.Figure:
    """The residual by layer of the study's trained networks on text."""
    curves = _read("study/primary.json")["curves"]
    figure, axis = plt.subplots(figsize=(style.WIDTH, 3.8))
    for cell in curves:
        design = cell["task"], cell["layer_norm"], cell["pooling"]
        is_drawn = design == ("imdb", "pre", "class_token")
        if not is_drawn or cell["learning_rate"] != learning_rate:
            continue
        color = style.SINKHORN if cell["num_iters"] else style.SOFTMAX
        marker = "s" if cell["num_iters"] else "o"
        values = np.array(cell["residual"]["trained"])
        layers = np.arange(values.shape[1])
        axis.plot(layers, np.median(values, axis=0), color=color, marker=marker)
        low, high = values.min(axis=0), values.max(axis=0)
        axis.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
    axis.axhspan(1e-9, FLOOR, color="0.92", zorder=0)
    axis.text(0.05, FLOOR / 1.6, "rounding of float32", color=style.SOFT, va="top")
    axis.text(4.5, 0.05, "with skip connections", ha="center")
    axis.text(4.4, 3e-4, "without")
    axis.text(0.1, 2.2e-3, "Sinkhorn, squares", color=style.SINKHORN)
    axis.text(0.1, 4.5e-4, "softmax, circles", color=style.SOFTMAX)
    axis.set(
        yscale="log",
        ylim=(3e-8, 1.5),
        xlabel="layers that the tokens have passed",
        ylabel="relative residual",
    )
    axis.grid(alpha=0.25)
    return figure


PICTURES: Final[Mapping[str, Callable[[], plt.Figure]]] = {
    "defects": defects,
    "depth": depth,
}
