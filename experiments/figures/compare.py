"""The figure of compare: rank and entropy by layer, and test accuracy."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style


def chosen(result: dict[str, Any], num_iters: int) -> list[dict[str, Any]]:
    """The runs of the rate that was chosen for `num_iters`, one a seed."""
    chosen = (num_iters, result["learning_rates"][str(num_iters)])
    cells = result["cells"]
    return [c for c in cells if (c["num_iters"], c["learning_rate"]) == chosen]


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    figure, (residual, entropy, accuracy) = plt.subplots(1, 3, figsize=(10.5, 3.6))
    for number, num_iters in enumerate(result["config"]["num_iters"]):
        runs = chosen(result, num_iters)
        color = style.series(number)["color"]
        for phase, phase_style in style.PHASES.items():
            for axis, name, first in (
                (residual, "relative_residual", 0),
                (entropy, "attention_entropy", 1),
            ):
                y = np.array([cell[phase][name] for cell in runs])
                x = np.arange(first, first + y.shape[1])
                look = {"color": color, "marker": "o", **phase_style}
                style.mean_and_range(axis, x, y, **look)
        accuracies = [cell["test_accuracy"] for cell in runs]
        name = f"Sinkhorn, {num_iters} iterations" if num_iters else "softmax"
        look = {"color": color, "markersize": 6, "alpha": 0.7, "label": name}
        accuracy.plot([number] * len(runs), accuracies, "o", **look)
        accuracy.plot(number, np.mean(accuracies), "_", color=color, markersize=24)
    if baseline := result.get("bag_of_words"):
        look = style.GUIDE | {"label": "linear model on words"}
        accuracy.axhline(baseline["test_accuracy"], **look)
    residual.set(ylabel="relative residual ‖res(X)‖ / ‖X‖", xlabel="layer")
    residual.set_ylim(bottom=0)
    entropy.set(ylabel="attention entropy (nats)", xlabel="layer")
    accuracy.set(ylabel="test accuracy", xticks=[])
    accuracy.margins(x=0.3)
    accuracy.ticklabel_format(useOffset=False)
    style.number_layers(residual, entropy)
    phases = [
        style.line(style.PHASE_NAMES[phase], color="0.3", marker="o", **phase_style)
        for phase, phase_style in style.PHASES.items()
    ]
    title = f"{result['preset']}; lines: mean of seeds, bands: least to greatest"
    style.legend(figure, title, *phases, ncols=5)
    return figure
