"""The figure of entropy: through training, and under growing logits."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style

LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1, 1, 1)))


@style.styled
def draw(result: dict[str, Any]) -> plt.Figure:
    """Returns the figure of the result."""
    config = result["config"]
    rates = config["learning_rates"]
    looks = [
        {"linestyle": LINES[i % 4], "marker": style.MARKERS[i % 4]}
        for i in range(len(rates))
    ]
    figure, (entropy, scaled, rank) = plt.subplots(1, 3, figsize=(10.5, 4.2))
    for row in result["trained"]:
        look = looks[rates.index(row["learning_rate"])]
        look = look | {"color": style.NORMALISERS[row["normaliser"]]["color"]}
        for axis, name in ((entropy, "attention_entropy"), (rank, "stable_rank")):
            x = np.arange(len(row[name][0])) * config["observe_every"]
            style.mean_and_range(axis, x, row[name], **look)
    for normaliser, look in style.NORMALISERS.items():
        rows = [r for r in result["scaled"] if r["normaliser"] == normaliser]
        x = [row["logit_scale"] for row in rows]
        y = np.array([row["attention_entropy"] for row in rows]).T
        style.mean_and_range(scaled, x, y, color=look["color"], marker="o")
    scaled.set_xscale("log", base=2)
    scaled.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    for axis in (entropy, scaled):
        axis.axhline(result["max_entropy"], **style.GUIDE | {"linestyle": "--"})
        axis.set_ylabel("attention entropy (nats)")
    entropy.set_xlabel("updates")
    scaled.set_xlabel("factor of the logits, at initialisation")
    rank.set(xlabel="updates", ylabel="stable rank of the last layer")
    handles = [
        style.line(name, color=look["color"])
        for name, look in style.NORMALISERS.items()
    ]
    handles += [
        style.line(f"learning rate {rate:g}", color=style.GREY, **look)
        for rate, look in zip(rates, looks, strict=True)
    ]
    title = (
        f"Lines: mean of {len(config['seeds'])} seeds; bands: least "
        "to greatest; dashed grey: greatest entropy, log T."
    )
    style.legend(figure, title, *handles, ncols=len(handles))
    return figure
