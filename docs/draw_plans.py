"""Draws docs/plans.png: the softmax and the Sinkhorn plan of the same logits.

python docs/draw_plans.py
"""

import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from sinkhorn_jax import sinkhorn

NUM_TOKENS = 10


def main() -> None:
    """Writes the picture."""
    key_of_entries, key_of_columns = jax.random.split(jax.random.key(2))
    # The second term is the same in every row, so that all queries agree on which keys
    # are attractive: softmax attention then neglects the rest.
    logits = 1.5 * jax.random.normal(key_of_entries, (NUM_TOKENS, NUM_TOKENS))
    logits += 1.2 * jax.random.normal(key_of_columns, (1, NUM_TOKENS))
    plans = {
        "softmax": (np.asarray(jax.nn.softmax(logits)), "#D55E00"),
        "Sinkhorn": (np.asarray(sinkhorn(logits, num_iters=20)), "#0072B2"),
    }
    top = max(plan.max() for plan, _ in plans.values())
    highest = 1.08 * max(plan.sum(axis=0).max() for plan, _ in plans.values())
    plt.rcParams.update({"font.size": 15, "axes.titlesize": 18})
    figure, axes = plt.subplots(
        2,
        2,
        figsize=(9, 6.4),
        height_ratios=(1, 2.2),
        sharex=True,
        layout="constrained",
    )
    for (bars, cells), (name, (plan, color)) in zip(axes.T, plans.items(), strict=True):
        bars.bar(range(NUM_TOKENS), plan.sum(axis=0), color=color)
        bars.axhline(1, color="black", linewidth=1, linestyle="--")
        bars.set(title=name, ylim=(0, highest))
        bars.spines[["top", "right"]].set_visible(False)
        shades = LinearSegmentedColormap.from_list(name, ["white", color])
        cells.imshow(plan, cmap=shades, vmin=0, vmax=top, aspect="auto")
        cells.set(xlabel="key", xticks=[], yticks=[])
    axes[0, 0].set_ylabel("column sum")
    axes[1, 0].set_ylabel("query")
    figure.savefig(pathlib.Path(__file__).with_name("plans.png"), dpi=100)


if __name__ == "__main__":
    main()
