"""Does the gain of Sinkhorn over softmax depend on the number of tokens?

    python -m experiments length

Trains encoders on the digits cut into patches of 4 x 4, 2 x 2 and 1 x 1 pixels, which
are 4, 16 and 64 tokens, with softmax and with Sinkhorn, and compares after training the
relative residual of the last layer, the entropy of the attention and the test accuracy.
The images are the same, so a token holds less the more tokens there are: the two causes
cannot be told apart here. The learning rate, too, is the one that `compare` chose for
Sinkhorn at 16 tokens, whatever their number.

Takes 8 minutes of one CPU core, with --quick one. As measured, the gain falls with the
tokens, from 0.30 of the residual at 4 to 0.20 at 16, and at 64 it is a loss of 0.09,
though Sinkhorn's surplus of entropy grows. Accuracies do not differ beyond the seeds.
Lapenna et al. 2026, https://arxiv.org/abs/2604.07925, do not ask this question.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ..evidence import files
from ..evidence.claims import Finding, by_seed
from ..figures.length import draw
from ..networks import digits
from ..networks.digits import ACCURACY, ENTROPY, RESIDUAL
from ..networks.options import require_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(digits.Setup):
    """Everything that can change the result."""

    patch_sizes: tuple[int, ...] = (4, 2, 1)  # One after the other, as patch_size.
    num_iters: int = 10  # Sinkhorn iterations of the Sinkhorn networks.
    output: pathlib.Path = files.RUNS / "length"

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "num_iters")
        values = self.patch_sizes
        is_falling = tuple(sorted(set(values), reverse=True)) == values
        if len(values) < 2 or not is_falling or not {*values} <= {1, 2, 4}:
            raise ValueError(
                "patch_sizes must be two or more of 4, 2 and 1, in this order, which "
                f"cut 8 x 8 images into several tokens, got {values}."
            )


QUICK = Config(
    **digits.SMALL, patch_sizes=(4, 2), num_iters=2, output=files.RUNS / "length_quick"
)


def run(config: Config) -> dict[str, Any]:
    """Trains and measures; writes JSON and figure, prints the findings."""
    start = time.monotonic()
    cells = []
    for patch_size in tqdm(config.patch_sizes, unit="length"):
        encoders = digits.Encoders(dataclasses.replace(config, patch_size=patch_size))
        for num_iters in (0, config.num_iters):
            cell = {"num_tokens": (8 // patch_size) ** 2, "num_iters": num_iters}
            model = encoders.encoder(num_iters=num_iters)
            cells.append(cell | encoders.before_and_after(model))
    measured = {"definitions": digits.DEFINITIONS, "cells": cells}
    return files.write_result("length", config, measured, findings, draw, start)


def findings(result: dict[str, Any]) -> Iterator[Finding]:
    """Yields what the seeds say of each number of tokens, and of their number."""
    sinkhorn, softmax = {}, {}
    for cell in result["cells"]:
        trained = sinkhorn if cell["num_iters"] else softmax
        trained[cell["num_tokens"]] = cell["trained"]
    for quantity, claim in (
        (RESIDUAL, "Sinkhorn preserves rank better than softmax"),
        (ENTROPY, "Sinkhorn attention keeps more entropy than softmax"),
        (ACCURACY, "Sinkhorn classifies better than softmax"),
    ):
        for n in sinkhorn:
            yield quantity.compare(f"{claim} ({n} tokens)", sinkhorn[n], softmax[n])
    few, many = min(sinkhorn), max(sinkhorn)
    more, less = (
        RESIDUAL.of(sinkhorn[n]) - RESIDUAL.of(softmax[n]) for n in (many, few)
    )
    yield by_seed(
        "the more tokens, the more rank Sinkhorn preserves beyond softmax",
        "Gain of the relative residual, last layer",
        more,
        less,
        (f"with {many} tokens", f"with {few}"),
    )
