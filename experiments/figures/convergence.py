"""The figure of the convergence experiment."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..evidence import answer


def draw(result: dict[str, Any]) -> plt.Figure:
    """Of what the JSON holds; the third column if networks were trained."""
    config = result["config"]
    num_columns = 3 if result["networks"] else 2
    figure, axes = plt.subplots(2, num_columns, figsize=(4.8 * num_columns, 7.6))
    figure.set_layout_engine("constrained")
    (curves, rates), (enough, cost) = axes[:, :2]
    if result["networks"]:
        _draw_networks(result, *axes[:, 2])
    iterations = np.array(result["iterations"])
    pairs = []
    longest = max(config["num_tokens"])
    for i, deviation in enumerate(config["deviations"]):
        color = answer.COLORS[i % len(answer.COLORS)]
        cells = [c for c in result["cells"] if c["deviation"] == deviation]
        for cell in cells:
            if cell["num_tokens"] == longest:
                label = f"{deviation:g}"
                _draw_curve(curves, iterations, cell, label, color=color)
            pairs.append((color, cell["measured_rate"], cell["predicted_rate"]))
    _finish_curves(curves, config)
    curves.set_title(f"{longest} tokens; median and range of seeds")
    curves.legend(
        title="deviation\nof logits",
        title_fontsize=9,
        frameon=False,
        fontsize=9,
        loc="lower left",
    )
    _draw_rates(rates, pairs)
    rates.set_title("all tokens and seeds, colours as left")
    for i, n in enumerate(config["num_tokens"]):
        style = {
            "color": answer.COLORS[i % len(answer.COLORS)],
            "marker": "os^Dv<>"[i % 7],
        }
        cells = [c for c in result["cells"] if c["num_tokens"] == n]
        values = np.array([c["defect_at_enough"] for c in cells])
        enough.plot(
            config["deviations"],
            np.maximum(np.median(values, axis=1), 1e-16),
            label=f"{n} tokens",
            markersize=4,
            **style,
        )
        times = {
            t["num_iters"]: np.median(t["milliseconds"])
            for t in result["times"]
            if t["num_tokens"] == n
        }
        ratio = [times[k] / times[0] for k in times]
        cost.plot(list(times), ratio, label=f"{n} tokens", markersize=4, **style)
    enough.axhline(config["tolerance"], color="0.35", linestyle=":")
    enough.set(yscale="log", xlabel="standard deviation of logits")
    enough.set_ylabel(f"column defect after {config['enough']} iterations")
    enough.set_title("median of seeds; dotted: tolerance")
    enough.legend(frameon=False, fontsize=9)
    cost.set(xlabel="iterations", ylabel="processor time / softmax's")
    cost.set_title("cost on this machine, float32")
    cost.legend(frameon=False, fontsize=9)
    return figure


def _draw_networks(result, curves, rates):
    iterations = np.array(result["iterations"])
    networks = result["networks"]
    sources = list(dict.fromkeys(cell["source"] for cell in networks))
    longest = max(cell["num_tokens"] for cell in networks)
    pairs = []
    for cell in networks:
        i = sources.index(cell["source"])
        color = answer.COLORS[i % len(answer.COLORS)]
        if cell["num_tokens"] == longest:
            style = {"color": color, "linestyle": ("-", "--", "-.")[i % 3]}
            _draw_curve(curves, iterations, cell, cell["source"], **style)
        flat = (np.ravel(cell[key]) for key in ("measured_rate", "predicted_rate"))
        pairs.append((color, *flat))
    _finish_curves(curves, result["config"])
    curves.set_title(f"encoders on reviews, {longest} tokens;\nmedian, range of seeds")
    curves.legend(frameon=False, fontsize=9, loc="lower left")
    _draw_rates(rates, pairs)
    rates.set_title("their heads, all tokens and seeds,\ncolours as above")


def _draw_curve(axis, iterations, cell, label, **style):
    values = np.maximum(cell["defect"], 1e-16)
    axis.plot(iterations + 1, np.median(values, axis=0), label=label, **style)
    axis.fill_between(
        iterations + 1,
        values.min(axis=0),
        values.max(axis=0),
        color=style["color"],
        alpha=0.15,
        lw=0,
    )


def _finish_curves(axis, config):
    axis.axvline(config["enough"] + 1, color="0.35", linestyle=":")
    axis.set(xscale="log", yscale="log", ylim=(1e-14, 2))
    axis.set(xlabel="iterations + 1", ylabel="column defect")


def _draw_rates(axis, cells):
    """Measured against predicted, of cells (color, measured, predicted)."""
    least = 1.0
    for color, measured, predicted in cells:
        pairs = zip(measured, predicted, strict=True)
        both = np.array([p for p in pairs if p[0] is not None]).reshape(-1, 2)
        both = both.astype(np.float64)
        # Where blocks fall apart the rate is 1 to rounding.
        both = both[(both < 1 - 1e-9).all(axis=1)]
        least = min(least, (-np.log(both)).min(initial=1.0))
        axis.plot(-np.log(both[:, 1]), -np.log(both[:, 0]), ".", color=color)
    limits = np.array([least, 10.0])
    axis.plot(limits, limits, color="0.35", linestyle=":")
    axis.set(xscale="log", yscale="log")
    axis.set(xlabel="predicted $-$log rate, per iteration")
    axis.set(ylabel="measured $-$log rate, per iteration")
