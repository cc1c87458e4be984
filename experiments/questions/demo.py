"""What does Sinkhorn attention do to rank? A small study in five minutes.

    python -m experiments demo

Trains networks of 6 layers on film reviews, with softmax and with Sinkhorn attention,
with and without skip connections, two seeds each, and follows the relative residual of
their tokens through the layers; beside it, networks of attention alone. Ends with the
figure and with what was seen in it. Two seeds decide nothing: `python -m experiments
study` has the seeds, the tests and the verdicts.

Takes 5 minutes on 2 CPU cores, with --quick about one; an interrupted run goes on
with the network in progress.

After Lapenna et al. 2026, https://arxiv.org/abs/2604.07925; all sizes are this module's
own.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from ..evidence import files
from ..figures.demo import draw
from ..networks import options
from ..networks.pure_attention import random_curves
from ..study import rows
from ..study.cell import Cell, Sizes
from ..study.observe import significant
from ..study.store import Store
from ..study.train import train_and_measure

SIZES: Final = Sizes(num_steps=120, num_observations=1, seeds=(0, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result."""

    sizes: Sizes = SIZES
    num_iters: int = 10  # Sinkhorn iterations.
    skip_rate: float = 1e-2  # Adam's peak rate with skip connections.
    no_skip_rate: float = 1e-3  # The same without.
    pure_tokens: int = 32  # Of the random networks of attention alone.
    output: pathlib.Path = files.RUNS / "demo"

    def __post_init__(self):
        options.require_at_least(self, 1, "num_iters")
        options.require_at_least(self, 2, "pure_tokens")
        options.require_positive(self, "skip_rate", "no_skip_rate")


QUICK = Config(
    sizes=Sizes(
        width=16,
        num_heads=2,
        mlp_width=16,
        seq_len=24,
        vocab_size=1000,
        num_train=2000,
        num_validation=256,
        num_measured=16,
        batch_size=16,
        num_steps=40,
        num_observations=1,
        seeds=(0, 1),
    ),
    output=files.RUNS / "demo_quick",
)


def run(config: Config) -> dict[str, Any]:
    """Trains and measures; writes JSON and figure, and says what was seen."""
    start = time.monotonic()
    store = Store(config.output / "cells")
    cells = [
        Cell(
            sizes=config.sizes,
            num_iters=num_iters,
            learning_rate=config.skip_rate if has_skip else config.no_skip_rate,
            has_skip=has_skip,
        )
        for has_skip in (True, False)
        for num_iters in (0, config.num_iters)
    ]
    if store.compute(cells, train_and_measure):
        raise BlockingIOError(
            f"Another run writes to {config.output}. Wait until it ends, or give "
            "another output."
        )
    pure = {
        name: significant(random_curves(config.sizes, config.pure_tokens, n))
        for name, n in (("softmax", 0), ("Sinkhorn", config.num_iters))
    }
    measured = {
        "curves": [rows.curves(cell, store.get(cell)) for cell in cells],
        "pure": pure,
    }
    return files.write_result(
        "demo", config, measured, lambda result: (), draw, start, say=seen
    )


def seen(result: dict[str, Any]) -> Iterator[str]:
    """Yields three sentences on what the figure shows."""
    of_cell = {
        (cell["has_skip"], bool(cell["num_iters"])): cell for cell in result["curves"]
    }
    for has_skip, name in ((True, "With"), (False, "Without")):
        softmax, sinkhorn = (of_cell[has_skip, n] for n in (False, True))
        yield (
            f"{name} skip connections the tokens that enter the last layer keep "
            f"{_kept(sinkhorn)} of their norm apart from their mean with Sinkhorn "
            f"attention, {_kept(softmax)} with softmax (one number a seed); their "
            f"validation accuracy is {_accuracy(sinkhorn)}, and {_accuracy(softmax)}."
        )
    softmax, sinkhorn = (
        np.median(np.array(result["pure"][n])[:, -1]) for n in ("softmax", "Sinkhorn")
    )
    yield (
        "Attention alone loses nearly all with either: after the last layer "
        f"10^{sinkhorn:.0f} is left with Sinkhorn, 10^{softmax:.0f} with softmax."
    )


def _kept(cell):
    values = np.array(cell["residual"]["trained"])[:, -2]
    return " and ".join(f"{value:.2g}" for value in values)


def _accuracy(cell):
    return " and ".join(f"{value:.2f}" for value in cell["validation_accuracy"])
