"""Does it help to swap the normaliser of a network that is trained already?

    python -m experiments swap

Parameters do not depend on the normaliser. So encoders are trained on the digits with
softmax and with 1 and 10 Sinkhorn iterations, and each is evaluated with every one of
them: relative residual of the last layer, entropy of the attention, test accuracy. The
gain of Sinkhorn is the sum of two parts: that of its weights, both evaluated with
softmax, and that of its plan on them. All networks have two layers and one learning
rate: what happens in deeper ones is the subject of `study`.

Takes 3 minutes of one CPU core, with --quick half a minute. As measured:

* Of the gain of 10 iterations, 0.20 of the residual, the weights alone make 0.15.
* The swap alone makes none beyond the seeds (0.00 ± 0.09), and lowers the accuracy of
  softmax's weights from 0.94 to 0.31; the swap to softmax lowers that of Sinkhorn's
  from 0.93 to 0.84.

Lapenna et al. 2026, https://arxiv.org/abs/2604.07925, whose claim is taken apart here,
do not ask this question.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ..evidence import files
from ..evidence.claims import Finding, by_seed, normaliser_name
from ..figures.swap import draw
from ..networks import digits
from ..networks.digits import ACCURACY, RESIDUAL
from ..networks.options import require_increasing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(digits.Setup):
    """Everything that can change the result."""

    num_iters: tuple[int, ...] = (0, 1, 10)  # Sinkhorn iterations; 0 is softmax.
    output: pathlib.Path = files.RUNS / "swap"

    def __post_init__(self):
        super().__post_init__()
        require_increasing(self, "num_iters", start=0)


QUICK = Config(**digits.SMALL, num_iters=(0, 2), output=files.RUNS / "swap_quick")


def run(config: Config) -> dict[str, Any]:
    """Trains and measures; writes JSON and figure, prints the findings."""
    start = time.monotonic()
    encoders = digits.Encoders(config)
    models = {n: encoders.encoder(num_iters=n) for n in config.num_iters}
    cells = []
    for trained_with, model in tqdm(models.items(), unit="network"):
        params, _ = encoders.train(model)
        cells += [
            {"trained_with": trained_with, "evaluated_with": evaluated_with}
            | encoders.evaluate(other, params)
            for evaluated_with, other in models.items()
        ]
    measured = {"definitions": digits.DEFINITIONS, "cells": cells}
    return files.write_result("swap", config, measured, findings, draw, start)


def findings(result: dict[str, Any]) -> Iterator[Finding]:
    """Yields what the seeds say of the parts of the gain."""
    cells = {(c["trained_with"], c["evaluated_with"]): c for c in result["cells"]}
    softmax = cells[0, 0]
    for n in sorted({trained for trained, _ in cells} - {0}):
        name = normaliser_name(n)
        claim = f"trained and evaluated with {name}, networks preserve rank better"
        names = (f"with {name}", "with softmax")
        yield RESIDUAL.compare(claim, cells[n, n], softmax, names)
        claim = f"swapping softmax for {name} after training preserves rank better"
        names = (f"evaluated with {name}", "with softmax, as trained")
        yield RESIDUAL.compare(claim, cells[0, n], softmax, names)
        claim = f"weights trained with {name} preserve rank better, even with softmax"
        names = (f"trained with {name}", "trained with softmax")
        yield RESIDUAL.compare(claim, cells[n, 0], softmax, names)
        yield by_seed(
            f"more of the gain of {name} is in the weights than in the swap",
            RESIDUAL.name,
            RESIDUAL.of(cells[n, 0]) - RESIDUAL.of(softmax),
            RESIDUAL.of(cells[0, n]) - RESIDUAL.of(softmax),
            (
                "gained by its weights, with softmax",
                "gained by its plan, on softmax's weights",
            ),
        )
        for trained, other in ((0, n), (n, 0)):
            first, second = (normaliser_name(i) for i in (other, trained))
            yield ACCURACY.compare(
                f"{first} classifies better than {second} on the latter's weights",
                cells[trained, other],
                cells[trained, trained],
                (f"with {first}", f"with {second}"),
            )
