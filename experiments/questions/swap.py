"""Does it help to swap the normaliser of a network that is trained already?

    python -m experiments swap

Parameters do not depend on the normaliser. So encoders are trained on the digits with
softmax and with 1 and 10 Sinkhorn iterations, and each is evaluated with every one of
them: relative residual of the last layer, entropy of the attention, test accuracy. The
gain of Sinkhorn is the sum of two parts: that of its weights, both evaluated with
softmax, and that of its plan on them. All have the learning rate that `compare` chose
for 10 iterations, which is half of softmax's own.

Takes 3 minutes of one CPU core, with --quick half a minute. As measured:

* Of the gain of 10 iterations, 0.20 of the residual, the weights alone make 0.15.
* The swap alone makes none beyond the seeds (0.00 ± 0.09), and takes softmax's weights
  from an accuracy of 0.94 to 0.31; that to softmax takes Sinkhorn's from 0.93 to 0.84.

The question is not asked in Lapenna et al. 2026, https://arxiv.org/abs/2604.07925,
whose claim it takes apart.
"""

import dataclasses
import pathlib
import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from ..evidence import answer
from ..evidence.claims import Finding, by_seed
from ..networks import digits as digit_encoders
from ..networks.digits import last_residual, mean_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(digit_encoders.Setup):
    """Everything that can change the result."""

    num_iters: tuple[int, ...] = (0, 1, 10)  # Sinkhorn iterations; 0 is softmax.
    output: pathlib.Path = answer.RESULTS / "swap"

    def __post_init__(self):
        super().__post_init__()
        digit_encoders.require_increasing_from("num_iters", self.num_iters, 0)


QUICK = Config(
    **digit_encoders.SMALL, num_iters=(0, 2), output=answer.RESULTS / "swap_quick"
)


def run(config: Config) -> dict[str, Any]:
    """Trains and measures; writes JSON and figure, prints the findings.

    Returns:
        What the JSON holds.

    Raises:
        ValueError: The options do not fit the data.
        FloatingPointError: A loss is not finite.
    """
    start = time.monotonic()
    data = digit_encoders.digits(config)
    initial = digit_encoders.init(config, data)
    models = {n: digit_encoders.encoder(config, num_iters=n) for n in config.num_iters}
    cells = []
    total = len(models) * config.num_steps
    with tqdm(total=total, unit="step", smoothing=0.05, mininterval=1.0) as progress:
        for trained_with, model in models.items():
            params, _ = digit_encoders.train(
                config, model, initial, data, progress.update
            )
            cells += [
                {"trained_with": trained_with, "evaluated_with": evaluated_with}
                | digit_encoders.evaluate(config, other, params, data)
                for evaluated_with, other in models.items()
            ]
    result = {
        "definitions": digit_encoders.DEFINITIONS,
        "cells": cells,
        "findings": findings(cells),
    }
    return answer.write("swap", config, result, draw, start)


def findings(cells: list[dict[str, Any]]) -> list[Finding]:
    """What the seeds say of the parts of the gain."""
    residual, accuracy = (
        {(c["trained_with"], c["evaluated_with"]): of(c) for c in cells}
        for of in (last_residual, lambda c: np.array(c["test_accuracy"]))
    )
    what = "Relative residual of the last layer"
    found = []
    for n in sorted({trained for trained, _ in residual} - {0}):
        name = answer.name_of(n)
        both, weights, plan = residual[n, n], residual[n, 0], residual[0, n]
        neither = residual[0, 0]
        pairs = (
            (
                f"trained and evaluated with {name}, networks preserve rank better",
                both,
                neither,
                (f"with {name}", "with softmax"),
            ),
            (
                f"swapping softmax for {name} after training preserves rank better",
                plan,
                neither,
                (f"evaluated with {name}", "with softmax, as trained"),
            ),
            (
                f"weights trained with {name} preserve rank better, even with softmax",
                weights,
                neither,
                (f"trained with {name}", "trained with softmax"),
            ),
            (
                f"more of the gain of {name} is in the weights than in the swap",
                weights - neither,
                plan - neither,
                (
                    "gained by its weights, with softmax",
                    "gained by its plan, on softmax's weights",
                ),
            ),
        )
        found += [by_seed(claim, what, *rest) for claim, *rest in pairs]
        found += [
            by_seed(
                f"{names[0]} classifies better than {names[1]} on the latter's weights",
                "Test accuracy",
                accuracy[trained, evaluated],
                accuracy[trained, trained],
                (f"with {names[0]}", f"with {names[1]}"),
            )
            for trained, evaluated, names in (
                (0, n, (name, "softmax")),
                (n, 0, ("softmax", name)),
            )
        ]
    return found


def draw(result: dict[str, Any]) -> plt.Figure:
    """The figure of what the JSON holds: one group of points a training."""
    num_iters = result["config"]["num_iters"]
    cells = {(c["trained_with"], c["evaluated_with"]): c for c in result["cells"]}
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.3), layout="constrained")
    for axis, of, label in (
        (axes[0], last_residual, "relative residual, last layer"),
        (axes[1], mean_entropy, "attention entropy (nats)"),
        (axes[2], lambda c: np.array(c["test_accuracy"]), "test accuracy"),
    ):
        for i, evaluated in enumerate(num_iters):
            style = {
                "color": answer.COLORS[i % len(answer.COLORS)],
                "marker": "os^Dv<>"[i % 7],
            }
            x = np.arange(len(num_iters)) + 0.6 * ((i + 0.5) / len(num_iters) - 0.5)
            values = [of(cells[trained, evaluated]) for trained in num_iters]
            for at, each in zip(x, values, strict=True):
                at = np.full(len(each), at + 0.06)
                axis.plot(at, each, ".", color=style["color"], alpha=0.4, markersize=4)
            mean, width = zip(*map(answer.interval, values), strict=True)
            axis.errorbar(
                x,
                mean,
                [w or 0.0 for w in width],
                linestyle="none",
                markersize=6,
                capsize=3,
                label=answer.name_of(evaluated),
                **style,
            )
        axis.set_xticks(range(len(num_iters)), [answer.name_of(n) for n in num_iters])
        axis.set(xlabel="trained with", ylabel=label)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        title="evaluated with (dots: seeds; bars: mean and 95 % interval)",
        loc="outside lower center",
        ncols=len(num_iters),
        frameon=False,
    )
    return figure
