"""The figure of convergence: the defect over iterations, its rate, and the cost."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style

LEAST = 1e-16  # What a defect of 0 is drawn at.


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result; its third column if networks were trained."""
    num_columns = 3 if result["networks"] else 2
    figure, axes = plt.subplots(2, num_columns, figsize=(4.8 * num_columns, 7.6))
    _draw_logits(result, *axes[:, 0])
    rates, cost = axes[:, 1]
    deviations = result["config"]["deviations"]
    numbers = [deviations.index(cell["deviation"]) for cell in result["cells"]]
    _draw_rates(rates, result["cells"], numbers)
    rates.set_title("all tokens and seeds, colours as left")
    _draw_cost(result, cost)
    if result["networks"]:
        _draw_networks(result, *axes[:, 2])
    return figure


def _draw_logits(result, curves, enough):
    """Draws the defect of random logits: over iterations, and after `enough`."""
    config = result["config"]
    longest = max(config["num_tokens"])
    for cell in result["cells"]:
        if cell["num_tokens"] == longest:
            i = config["deviations"].index(cell["deviation"])
            look = {"color": style.series(i)["color"]}
            look |= {"label": f"{cell['deviation']:g}"}
            _draw_curve(curves, result, cell, **look)
    curves.set_title(f"{longest} tokens; median and range of seeds")
    curves.legend(title="deviation\nof logits", title_fontsize=9, loc="lower left")
    for i, n in enumerate(config["num_tokens"]):
        cells = [c for c in result["cells"] if c["num_tokens"] == n]
        defects = np.median([c["defect_at_enough"] for c in cells], axis=1)
        look = style.series(i) | {"label": f"{n} tokens"}
        enough.plot(config["deviations"], np.maximum(defects, LEAST), **look)
    enough.axhline(config["tolerance"], **style.GUIDE)
    enough.set(yscale="log", xlabel="standard deviation of logits")
    enough.set_ylabel(f"column defect after {config['enough']} iterations")
    enough.set_title("median of seeds; dotted: tolerance")
    enough.legend()


def _draw_cost(result, axis):
    for i, n in enumerate(result["config"]["num_tokens"]):
        times = {
            t["num_iters"]: np.median(t["milliseconds"])
            for t in result["times"]
            if t["num_tokens"] == n
        }
        ratio = [time / times[0] for time in times.values()]
        axis.plot(list(times), ratio, label=f"{n} tokens", **style.series(i))
    axis.set(xlabel="iterations", ylabel="processor time / softmax's")
    axis.set_title("cost on this machine, float32")
    axis.legend()


def _draw_networks(result, curves, rates):
    networks = result["networks"]
    sources = list(dict.fromkeys(cell["source"] for cell in networks))
    longest = max(cell["num_tokens"] for cell in networks)
    numbers = [sources.index(cell["source"]) for cell in networks]
    for cell, i in zip(networks, numbers, strict=True):
        if cell["num_tokens"] == longest:
            look = {"color": style.series(i)["color"]}
            look |= {"linestyle": ("-", "--", "-.")[i % 3]}
            _draw_curve(curves, result, cell, label=cell["source"], **look)
    curves.set_title(f"encoders on reviews, {longest} tokens;\nmedian, range of seeds")
    curves.legend(loc="lower left")
    _draw_rates(rates, networks, numbers)
    rates.set_title("their heads, all tokens and seeds,\ncolours as above")


def _draw_curve(axis, result, cell, **look):
    """Draws one cell's defect over iterations, with a line at `enough` of them."""
    iterations = np.array(result["iterations"]) + 1
    style.median_and_range(axis, iterations, np.maximum(cell["defect"], LEAST), **look)
    axis.axvline(result["config"]["enough"] + 1, **style.GUIDE)
    axis.set(xscale="log", yscale="log", ylim=(1e-14, 2))
    axis.set(xlabel="iterations + 1", ylabel="column defect")


def _draw_rates(axis, cells, numbers):
    """Draws measured against predicted rates, in the colours of the numbers."""
    least = 1.0
    for cell, number in zip(cells, numbers, strict=True):
        keys = ("measured_rate", "predicted_rate")
        rates = np.array([np.ravel(cell[key]) for key in keys], np.float64)
        # Where blocks fall apart the rate is 1 to rounding; NaN stands for null.
        measured, predicted = -np.log(rates[:, (rates < 1 - 1e-9).all(axis=0)])
        least = min([least, *measured, *predicted])
        color = style.series(number)["color"]
        axis.plot(predicted, measured, ".", color=color, ms=6)
    limits = np.array([least, 10.0])
    axis.plot(limits, limits, **style.GUIDE)
    axis.set(xscale="log", yscale="log")
    axis.set(xlabel="predicted $-$log rate, per iteration")
    axis.set(ylabel="measured $-$log rate, per iteration")
