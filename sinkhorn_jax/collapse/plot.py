"""A picture of a summary. This module alone needs matplotlib; nothing imports it."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ._summary import Summary


def plot(summary: Summary, ax: Any = None) -> Any:
    """Axes of matplotlib with measures of a summary, layer by layer.

        from sinkhorn_jax.collapse.plot import plot

        plot(collapse.summarize(hidden_states, plans)).figure.savefig("summary.png")

    The curves are the relative residual of the tokens, the entropy of the plans, and
    the relative residual of the product of all plans so far; below the shaded bound a
    residual is rounding. The y axis is logarithmic. Where there is one layer of tokens
    more than of plans, the first is the embedding, and plan k is drawn at layer k + 1,
    whose tokens it makes.

    Args:
        summary: The result of `summarize`; not under `jit` or `vmap`.
        ax: The axes to draw on; None makes a figure.

    Returns:
        The axes.
    """
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    residual = np.asarray(summary.relative_residual)
    drawn = [("tokens, residual", 0, residual)]
    if summary.attention_entropy is not None:
        entropy = np.asarray(summary.attention_entropy)
        start = int(len(residual) == len(entropy) + 1)
        drawn.append(("plans, entropy", start, entropy))
        if summary.path_residual is not None:
            path = np.asarray(summary.path_residual)
            drawn.append(("product of plans, residual", start, path))
    for (label, start, values), marker in zip(drawn, "os^", strict=False):
        layers = np.arange(start, start + len(values))
        ax.plot(layers, values, marker=marker, markersize=4, label=label)
    ax.set(yscale="log", xlabel="layer", ylabel="relative residual; entropy share")
    ax.xaxis.get_major_locator().set_params(integer=True)
    bottom, top = ax.get_ylim()
    floor = float(summary.floor)
    if bottom < floor:
        ax.axhspan(bottom, floor, color="0.92", zorder=0, label="rounding")
        ax.set_ylim(bottom, top)
    ax.legend()
    return ax
