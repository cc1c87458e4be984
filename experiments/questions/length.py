"""Does the gain of Sinkhorn over softmax depend on the number of tokens?

    python -m experiments length

Trains encoders on the digits cut into patches of 4 x 4, 2 x 2 and 1 x 1 pixels, which
are 4, 16 and 64 tokens, with softmax and with Sinkhorn, and compares after training the
relative residual of the last layer, the entropy of the attention and the test accuracy.
The images are the same, but a token holds less the more there are: the two cannot be
told apart here. The learning rate, too, is that which `compare` chose for Sinkhorn at
16 tokens, whatever their number.

Takes 8 minutes of one CPU core, with --quick one. As measured, the gain falls with the
tokens, from 0.30 of the residual at 4 to 0.20 at 16, and at 64 it is a loss of 0.09,
though Sinkhorn's surplus of entropy grows. Accuracies do not differ beyond the seeds.
The question is not asked in Lapenna et al. 2026, https://arxiv.org/abs/2604.07925.
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

    patch_sizes: tuple[int, ...] = (4, 2, 1)  # One after the other, as patch_size.
    num_iters: int = 10  # Sinkhorn iterations of the Sinkhorn networks.
    output: pathlib.Path = answer.RESULTS / "length"

    def __post_init__(self):
        super().__post_init__()
        if self.num_iters < 1:
            raise ValueError(f"num_iters must be at least 1, got {self.num_iters}.")
        values = self.patch_sizes
        is_falling = tuple(sorted(set(values), reverse=True)) == values
        if len(values) < 2 or not is_falling or not {*values} <= {1, 2, 4}:
            raise ValueError(
                "patch_sizes must be two or more of 4, 2 and 1, in this order, which "
                f"cut 8 x 8 images into several tokens, got {values}."
            )


QUICK = Config(
    **digit_encoders.SMALL,
    patch_sizes=(4, 2),
    num_iters=2,
    output=answer.RESULTS / "length_quick",
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
    cells = []
    total = 2 * len(config.patch_sizes) * config.num_steps
    with tqdm(total=total, unit="step", smoothing=0.05, mininterval=1.0) as progress:
        for patch_size in config.patch_sizes:
            setup = dataclasses.replace(config, patch_size=patch_size)
            initial = digit_encoders.init(setup, data)
            for num_iters in (0, config.num_iters):
                model = digit_encoders.encoder(setup, num_iters=num_iters)
                cells.append(
                    {"num_tokens": (8 // patch_size) ** 2, "num_iters": num_iters}
                    | digit_encoders.before_and_after(
                        setup, model, initial, data, progress.update
                    )
                )
    result = {
        "definitions": digit_encoders.DEFINITIONS,
        "cells": cells,
        "findings": findings(cells),
    }
    return answer.write("length", config, result, draw, start)


def _accuracy(measured):
    return np.array(measured["test_accuracy"])


def _pairs(cells, of, phase="trained"):
    """By number of tokens: of Sinkhorn and of softmax, each [S]."""
    values = {(c["num_tokens"], c["num_iters"] > 0): of(c[phase]) for c in cells}
    return {t: (values[t, True], values[t, False]) for t, is_ours in values if is_ours}


def findings(cells: list[dict[str, Any]]) -> list[Finding]:
    """What the seeds say of each number of tokens, and of the most and the fewest."""
    found = []
    names = ("for Sinkhorn", "for softmax")
    what = "Relative residual of the last layer"
    for claim, quantity, of in (
        ("Sinkhorn preserves rank better than softmax", what, last_residual),
        (
            "Sinkhorn attention keeps more entropy than softmax",
            "Mean entropy of the attention in nats",
            mean_entropy,
        ),
        ("Sinkhorn classifies better than softmax", "Test accuracy", _accuracy),
    ):
        found += [
            by_seed(f"{claim} ({num_tokens} tokens)", quantity, ours, softmax, names)
            for num_tokens, (ours, softmax) in _pairs(cells, of).items()
        ]
    gain = {t: np.subtract(*pair) for t, pair in _pairs(cells, last_residual).items()}
    few, many = min(gain), max(gain)
    found.append(
        by_seed(
            "the more tokens, the more rank Sinkhorn preserves beyond softmax",
            "Gain of the relative residual, last layer",
            gain[many],
            gain[few],
            (f"with {many} tokens", f"with {few}"),
        )
    )
    return found


def draw(result: dict[str, Any]) -> plt.Figure:
    """The figure of what the JSON holds: each measure against the tokens."""
    cells = result["cells"]
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.3), layout="constrained")
    name = f"Sinkhorn, {result['config']['num_iters']} iterations"
    for axis, of, label in (
        (axes[0], last_residual, "relative residual, last layer"),
        (axes[1], mean_entropy, "attention entropy (nats)"),
        (axes[2], _accuracy, "test accuracy"),
    ):
        phases = ("trained",) if of is _accuracy else ("init", "trained")
        for phase in phases:
            pairs = _pairs(cells, of, phase)
            tokens = list(pairs)
            for i, (who, marker) in enumerate(((name, "s"), ("softmax", "o"))):
                style = {"color": answer.COLORS[1 - i], "marker": marker}
                style |= {"linestyle": "-" if phase == "trained" else "--"}
                after = "after training" if phase == "trained" else "before"
                style["label"] = f"{who}, {after}"
                answer.band(
                    axis, tokens, np.stack([p[i] for p in pairs.values()]).T, **style
                )
        if of is mean_entropy:
            axis.plot(
                tokens, np.log(tokens), ":", color="0.35", label="greatest, log tokens"
            )
        axis.set(xscale="log", xlabel="tokens", ylabel=label)
        axis.set_xticks(tokens, [str(t) for t in tokens])
        axis.set_xticks([], minor=True)
    figure.legend(
        *axes[1].get_legend_handles_labels(),
        title="digits; mean of seeds and 95 % interval",
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure
