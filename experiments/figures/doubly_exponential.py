"""The figure of doubly_exponential: the residual above, a layer's factor below."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result, one column a deviation of the tokens."""
    config = result["config"]
    scales = config["token_scales"]
    figure, axes = plt.subplots(
        2, len(scales), figsize=(3.6 * len(scales), 6.4), squeeze=False, sharex=True
    )
    for (top, bottom), scale in zip(axes.T, scales, strict=True):
        for cell in result["cells"]:
            if cell["token_scale"] != scale:
                continue
            look = style.series(config["num_iters"].index(cell["num_iters"]))
            look |= {"label": cell["normaliser"]}
            logs = -np.array(cell["log10_relative_residual"])[:, 1:]
            layers = np.arange(1, logs.shape[1] + 1)
            style.median_and_range(top, layers, logs, **look)
            style.mean_and_interval(bottom, layers, cell["ratio"], **look)
        guide = np.median(logs[:, -1]) * 3 * 3.0 ** (layers - layers[-1])
        top.plot(layers, guide, label="slope of $3^{layer}$", **style.GUIDE)
        top.set_yscale("log")
        top.invert_yaxis()
        top.set_title(f"tokens of deviation {scale:g}")
        bottom.ticklabel_format(axis="y", useOffset=False)
        bottom.axhline(1, **style.GUIDE)
        bottom.set_xlabel("layer")
        style.number_layers(bottom)
    axes[0, 0].set_ylabel("$-$log$_{10}$ relative residual\n(downwards)")
    axes[1, 0].set_ylabel("factor of a layer,\nmeasured / cubic law")
    seeds = len(config["seeds"])
    title = f"Above: median and range of {seeds} seeds; below: mean and 95 %."
    style.legend(figure, title)
    return figure
