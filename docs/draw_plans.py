"""Draws docs/plans.png and docs/dial.png: plans of the same logits.

python docs/draw_plans.py
"""

import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb

from sinkhorn_jax import sinkhorn

NUM_TOKENS = 10
SOFTMAX, SINKHORN = "#D55E00", "#0072B2"
TAUS = (0.0, 0.25, 0.5, 1.0)

Plan = Float[np.ndarray, "T T"]


def main() -> None:
    """Writes the pictures."""
    key_of_entries, key_of_columns = jax.random.split(jax.random.key(2))
    # The second term is the same in every row, so that all queries agree on which keys
    # are attractive: softmax attention then neglects the rest.
    logits = 1.5 * jax.random.normal(key_of_entries, (NUM_TOKENS, NUM_TOKENS))
    logits += 1.2 * jax.random.normal(key_of_columns, (1, NUM_TOKENS))
    softmax = np.asarray(jax.nn.softmax(logits))
    plans = [np.asarray(sinkhorn(logits, 20, column_tau=tau)) for tau in TAUS]
    both = {"softmax": (softmax, SOFTMAX), "Sinkhorn": (plans[-1], SINKHORN)}
    draw(both, "plans.png", width=9.0)
    names = ("0, softmax", "0.25", "0.5", "1, doubly stochastic")
    colors = [between(tau) for tau in TAUS]
    each = zip(plans, colors, strict=True)
    dial = {f"τ = {n}": plan for n, plan in zip(names, each, strict=True)}
    draw(dial, "dial.png", width=16.0)


def between(tau: float) -> str:
    """The colour on the way from softmax to Sinkhorn."""
    ends = (np.array(to_rgb(color)) for color in (SOFTMAX, SINKHORN))
    start, end = ends
    return to_hex((1 - tau) * start + tau * end)


def draw(plans: dict[str, tuple[Plan, str]], name: str, width: float) -> None:
    """Draws plans beside each other, each in its colour, with their column sums."""
    top = max(plan.max() for plan, _ in plans.values())
    highest = 1.08 * max(plan.sum(axis=0).max() for plan, _ in plans.values())
    plt.rcParams.update({"font.size": 15, "axes.titlesize": 18})
    figure, axes = plt.subplots(
        2,
        len(plans),
        figsize=(width, 6.4),
        height_ratios=(1, 2.2),
        sharex=True,
        layout="constrained",
    )
    for (bars, cells), (title, (plan, color)) in zip(
        axes.T, plans.items(), strict=True
    ):
        bars.bar(range(NUM_TOKENS), plan.sum(axis=0), color=color)
        bars.axhline(1, color="black", linewidth=1, linestyle="--")
        bars.set(title=title, ylim=(0, highest))
        bars.spines[["top", "right"]].set_visible(False)
        shades = LinearSegmentedColormap.from_list(title, ["white", color])
        cells.imshow(plan, cmap=shades, vmin=0, vmax=top, aspect="auto")
        cells.set(xlabel="key", xticks=[], yticks=[])
    axes[0, 0].set_ylabel("column sum")
    axes[1, 0].set_ylabel("query")
    figure.savefig(pathlib.Path(__file__).with_name(name), dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
