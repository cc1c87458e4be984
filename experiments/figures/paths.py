"""The figure of paths: residuals of products and of paths, and their share."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    cells = result["cells"]
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.6))
    residual, share = axes[1]
    lengths = np.arange(result["config"]["depth"] + 1)
    for axis, cell in zip(axes[0], (cells[0], cells[-1]), strict=True):
        for i, (kind, values) in enumerate(cell["products"].items()):
            look = style.series(i) | {"label": kind}
            style.mean_and_interval(axis, lengths[1:], values, **look)
        axis.set_xlabel("attention matrices multiplied")
        axis.set_ylabel("log$_{10}$ relative residual of product")
        axis.set_title(cell["normaliser"])
        axis.legend(loc="lower left")
    for i, cell in enumerate(cells):
        look = style.series(i) | {"label": cell["normaliser"]}
        style.mean_and_interval(residual, lengths, cell["path_residual"], **look)
        style.mean_and_interval(share, lengths, cell["path_share"], **look)
    residual.set_ylabel("log$_{10}$ relative residual")
    residual.set_title("all paths of a length, summed")
    share.plot(lengths, result["path_number"], label="share of number", **style.GUIDE)
    share.set_ylabel("share of the norms")
    share.set_title("how much each length contributes")
    for axis in axes[1]:
        axis.set_xlabel("length of path")
        axis.legend()
    style.number_layers(*axes.flat)
    seeds = len(result["config"]["seeds"])
    figure.suptitle(f"Mean of {seeds} seeds and 95 % interval.", fontsize=10)
    return figure
