"""The figure of entropy: through training, and under growing logits."""

from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Okabe and Ito's palette, told apart in all forms of colour blindness.
COLORS = {"softmax": "#0072B2", "Sinkhorn": "#D55E00"}
LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D")
GREY = "#555555"


def draw(result: dict[str, Any]) -> plt.Figure:
    """The figure of what the JSON of `entropy` holds."""
    rates = result["config"]["learning_rates"]
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.2), layout="constrained")
    for row in result["trained"]:
        number = rates.index(row["learning_rate"])
        style = {
            "color": COLORS[row["normaliser"]],
            "linestyle": LINES[number % len(LINES)],
            "marker": MARKERS[number % len(MARKERS)],
        }
        for axis, name in (
            (axes[0], "attention_entropy"),
            (axes[2], "stable_rank"),
        ):
            y = np.array(row[name])
            x = np.arange(y.shape[1]) * result["config"]["observe_every"]
            _curve(axis, x, y, style)
    for normaliser, color in COLORS.items():
        rows = [r for r in result["scaled"] if r["normaliser"] == normaliser]
        x = [row["logit_scale"] for row in rows]
        y = np.array([row["attention_entropy"] for row in rows]).T
        _curve(axes[1], x, y, {"color": color, "marker": "o"})
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    for axis in axes[:2]:
        axis.axhline(result["max_entropy"], color=GREY, linestyle="--", linewidth=0.9)
        axis.set_ylabel("attention entropy (nats)")
    axes[2].set_ylabel("stable rank of the last layer")
    axes[0].set_xlabel("updates")
    axes[1].set_xlabel("factor of the logits, at initialisation")
    axes[2].set_xlabel("updates")
    handles = [
        plt.Line2D([], [], color=color, label=name) for name, color in COLORS.items()
    ]
    handles += [
        plt.Line2D(
            [],
            [],
            color=GREY,
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            label=f"learning rate {rate:g}",
        )
        for i, rate in enumerate(rates)
    ]
    figure.legend(
        handles=handles,
        title=(
            f"Lines: mean of {len(result['config']['seeds'])} seeds; bands: least "
            "to greatest; dashed grey: greatest entropy, log T."
        ),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    return figure


def _curve(axis, x, values, style):
    axis.fill_between(
        x,
        values.min(axis=0),
        values.max(axis=0),
        color=style["color"],
        alpha=0.12,
        linewidth=0,
    )
    axis.plot(x, values.mean(axis=0), markersize=4, linewidth=1.4, **style)
