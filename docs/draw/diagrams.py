"""Diagrams of how the iteration is computed."""

from collections.abc import Callable, Mapping
from typing import Final

import matplotlib.pyplot as plt
import numpy as np

from . import style

MINUS: Final = "\N{MINUS SIGN}"
# A column that lies far below the maximum of every row.
LOGITS: Final = np.array(
    [[2.0, 5.0, -198.0, 1.0], [7.0, 3.0, -195.0, 4.0], [0.0, 2.0, -199.0, 3.0]]
)


def _numbers(axis, title, matrix, marked, text):
    t, s = matrix.shape
    axis.set_title(title, loc="left")
    for i in range(t):
        for j in range(s):
            color = style.SINKHORN if marked[i, j] else "#EEEEEE"
            alpha = 0.45 if marked[i, j] else 1.0
            cell = plt.Rectangle((j, i), 0.94, 0.94, color=color, alpha=alpha)
            axis.add_patch(cell)
            axis.text(j + 0.47, i + 0.5, text(matrix[i, j]), ha="center", va="center")
    axis.set(xlim=(0, s), ylim=(t, 0), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def shift() -> plt.Figure:
    """The two-sided shift of a small matrix, in numbers."""
    m = LOGITS.max(axis=1, keepdims=True)
    rows = LOGITS - m
    n = rows.max(axis=0, keepdims=True)
    shifted = rows - n
    lost = np.exp(rows.astype("float32"))
    kernel = np.exp(shifted.astype("float32"))
    none = np.zeros_like(LOGITS, dtype=bool)
    figure, axes = plt.subplots(3, 2, figsize=(style.WIDTH, 5.6))
    whole = lambda x: f"{x:.0f}".replace("-", MINUS)
    short = lambda x: "0" if x == 0 else "1" if x == 1 else f"{x:.1g}".lstrip("0")
    _numbers(axes[0, 0], "logits Z", LOGITS, none, whole)
    _numbers(axes[1, 0], f"Z {MINUS} m: a 0 in each row", rows, rows == 0, whole)
    _numbers(axes[1, 1], "its exp: a column is lost", lost, lost == 1, short)
    _numbers(
        axes[2, 0],
        f"Z {MINUS} m {MINUS} n: in columns too",
        shifted,
        shifted == 0,
        whole,
    )
    _numbers(axes[2, 1], "E, its exp: all have a 1", kernel, kernel == 1, short)
    axes[0, 1].axis("off")
    note = (
        f"m, row maxima: {', '.join(map(whole, m[:, 0]))}\n\n"
        f"n, column maxima\nof Z {MINUS} m: {', '.join(map(whole, n[0]))}"
    )
    axes[0, 1].text(0.02, 0.5, note, va="center", transform=axes[0, 1].transAxes)
    return figure


def _arrow(axis, start, end, color, **options):
    style_of = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6} | options
    axis.annotate("", end, start, arrowprops=style_of)


def sweep() -> plt.Figure:
    """The chain of half steps with L = 2, and the reverse sweep below it."""
    figure, axis = plt.subplots(figsize=(style.WIDTH, 3.4))
    names = ["$g_0$", "$f_0$", "$g_1$", "$f_1$", "$g_2$", "$f_2$"]
    cotangents = [None, r"$\lambda_0$", r"$\mu_1$", r"$\lambda_1$", r"$\mu_2$"]
    cotangents += [r"$\lambda_2$"]
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "linewidth": 1.4}
    for k, (name, cotangent) in enumerate(zip(names, cotangents, strict=True)):
        color = style.BLUE if name.startswith("$f") else style.ORANGE
        look = {"ha": "center", "va": "center", "fontsize": 14}
        axis.text(k, 2, name, bbox=box | {"edgecolor": color}, **look)
        if cotangent:
            axis.text(k, 0.75, cotangent, bbox=box | {"edgecolor": color}, **look)
        if k:
            _arrow(axis, (k - 0.72, 2), (k - 0.28, 2), "black")
        if k > 1:
            _arrow(axis, (k - 0.28, 0.75), (k - 0.72, 0.75), style.GREEN)
            matrix = f"$Q_{k // 2}$" if k % 2 else f"$R_{k // 2}$"
            axis.text(k - 0.5, 0.95, matrix, color=style.GREEN, ha="center")
    axis.text(6, 2, "P", ha="center", va="center", fontsize=14)
    axis.text(6, 0.75, "dP", ha="center", va="center", fontsize=14)
    _arrow(axis, (5.3, 2), (5.8, 2), "black")
    _arrow(axis, (5.74, 0.75), (5.3, 0.75), style.GREEN)
    axis.text(-0.35, 2.55, "forward: row steps give f, column steps give g")
    axis.text(
        -0.35, 1.3, "backward: each step undone, one product with a plan", color="black"
    )
    axis.text(
        -0.35,
        -0.1,
        "Each green arrow takes the weight of its step times\n"
        r"$Q_k$ (rows exact) or $R_k$ (columns exact) off $dZ$.",
        color=style.GREEN,
        va="center",
    )
    axis.set(xlim=(-0.4, 6.3), ylim=(-0.5, 2.9))
    axis.axis("off")
    return figure


def streaming() -> plt.Figure:
    """A pass of the implementation that never has the whole plan."""
    figure, axis = plt.subplots(figsize=(style.WIDTH, 3.9))
    axis.add_patch(plt.Rectangle((1.2, 0), 4, 4, facecolor="#F4F4F4", edgecolor="0.6"))
    for i in range(1, 5):
        axis.plot([1.2, 5.2], [i * 0.8, i * 0.8], color="0.8", linewidth=0.8)
    strip = {"facecolor": style.SINKHORN, "alpha": 0.45, "edgecolor": style.SINKHORN}
    axis.add_patch(plt.Rectangle((1.2, 1.6), 4, 0.8, **strip))
    axis.text(3.2, 2.0, "the query block in memory", ha="center", va="center")
    axis.text(3.2, 3.6, "done", ha="center", va="center", color=style.SOFT)
    axis.text(3.2, 2.8, "done", ha="center", va="center", color=style.SOFT)
    axis.text(3.2, 1.2, "to come", ha="center", va="center", color=style.SOFT)
    axis.text(3.2, 0.4, "to come", ha="center", va="center", color=style.SOFT)
    column = {"facecolor": style.BLUE, "alpha": 0.35, "edgecolor": style.BLUE}
    axis.add_patch(plt.Rectangle((0.75, 1.6), 0.25, 2.4, **column))
    axis.text(0.6, 2.8, "f", ha="right", va="center", color=style.BLUE, fontsize=14)
    row = {"facecolor": style.ORANGE, "alpha": 0.35, "edgecolor": style.ORANGE}
    axis.add_patch(plt.Rectangle((1.2, 4.2), 4, 0.25, **row))
    axis.text(3.2, 4.6, "g of this pass", ha="center", va="bottom", color=style.ORANGE)
    axis.add_patch(plt.Rectangle((1.2, -0.45), 4, 0.25, **row))
    axis.text(
        3.2,
        -0.6,
        "column sums so far: g of the next pass",
        ha="center",
        va="top",
        color=style.ORANGE,
    )
    axis.text(
        5.4, 2.0, "1  logits + g\n2  row step: f\n3  add column\n    sums", va="center"
    )
    axis.text(5.4, 3.9, "S keys wide,\nT queries high", va="top", color=style.SOFT)
    axis.set(xlim=(0.2, 7.4), ylim=(-1.1, 5.0))
    axis.axis("off")
    return figure


PICTURES: Final[Mapping[str, Callable[[], plt.Figure]]] = {
    "shift": shift,
    "sweep": sweep,
    "streaming": streaming,
}
