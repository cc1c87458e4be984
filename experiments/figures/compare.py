"""The figure of compare: rank and entropy by layer, and test accuracy."""

import pathlib
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Okabe and Ito's palette, told apart in all forms of colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
PHASES = {
    "init": {"linestyle": (0, (4, 2)), "markerfacecolor": "white"},
    "trained": {"linestyle": "-"},
}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Writes the figure of a result of `compare.run` as PNG."""
    with plt.rc_context({"font.size": 10, "savefig.dpi": 150}):
        figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
        measures = ("relative_residual", "attention_entropy")
        for number, num_iters in enumerate(result["config"]["num_iters"]):
            rate = result["learning_rates"][str(num_iters)]
            runs = [
                cell
                for cell in result["cells"]
                if (cell["num_iters"], cell["learning_rate"]) == (num_iters, rate)
            ]
            color = COLORS[number % len(COLORS)]
            for axis, measure in zip(axes[:2], measures, strict=True):
                for phase, style in PHASES.items():
                    y = np.array([cell[phase][measure] for cell in runs])
                    # The residual begins with the embedding, layer 0.
                    x = np.arange(y.shape[1]) + (measure == "attention_entropy")
                    axis.plot(
                        x,
                        y.mean(axis=0),
                        color=color,
                        marker="o",
                        markersize=4,
                        **style,
                    )
                    axis.fill_between(
                        x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, lw=0
                    )
            accuracies = [cell["test_accuracy"] for cell in runs]
            name = f"Sinkhorn, {num_iters} iterations" if num_iters else "softmax"
            axes[2].plot(
                [number] * len(runs),
                accuracies,
                "o",
                color=color,
                label=name,
                alpha=0.7,
            )
            axes[2].plot(number, np.mean(accuracies), "_", color=color, markersize=24)
        if baseline := result.get("bag_of_words"):
            axes[2].axhline(
                baseline["test_accuracy"],
                color="0.4",
                linestyle=":",
                label="linear model on words",
            )
        axes[0].set_ylabel("relative residual ‖res(X)‖ / ‖X‖")
        axes[0].set_ylim(bottom=0)
        axes[1].set_ylabel("attention entropy (nats)")
        axes[2].set_ylabel("test accuracy")
        axes[2].set_xticks([])
        axes[2].margins(x=0.3)
        axes[2].ticklabel_format(useOffset=False)
        for axis in axes[:2]:
            axis.set_xlabel("layer")
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in axes:
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        phases = [
            plt.Line2D([], [], color="0.3", marker="o", markersize=4, label=label, **s)
            for label, s in zip(
                ("at initialisation", "after training"), PHASES.values(), strict=True
            )
        ]
        handles, _ = axes[2].get_legend_handles_labels()
        figure.legend(
            handles=[*handles, *phases],
            title=f"{result['preset']}; lines: mean of seeds, bands: least to greatest",
            loc="outside lower center",
            ncols=5,
            frameon=False,
        )
        figure.savefig(path)
        plt.close(figure)
