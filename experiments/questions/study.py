"""Does doubly stochastic attention keep rank with depth, in networks that have learned?

    python -m experiments study

Trains softmax and Sinkhorn networks of one design, with equal initial parameters,
batches, updates and learning rates, on film reviews and on images of clothes, and
compares them seed by seed: the relative residual of the tokens with and without skip
connections, the entropy of the attention, two readouts, and products of attention
matrices along paths. docs/protocol.md has the contrasts, the tests and what would count
as each verdict; it was committed before the trainings.

Every cell, networks of one design and rate, is a file in `cells` beside the result. The
command computes those that are missing; two processes share them, one for each core:

    taskset -c 0 python -m experiments study & taskset -c 1 python -m experiments study

After Lapenna et al. 2026, https://arxiv.org/abs/2604.07925; all sizes are this module's
own.
"""

import dataclasses
import pathlib
import time
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from ..evidence import files
from ..evidence.claims import Finding
from ..figures import study_entropy, study_paths, study_seeds
from ..figures.study import draw
from ..networks.options import Network, require_increasing, require_positive
from ..networks.pure_attention import growth, log10_relative_residual, random_problem
from ..study import plan, rows
from ..study.cell import Sizes
from ..study.observe import DEFINITIONS, significant
from ..study.store import Store
from ..study.train import train_and_measure

# Random networks of attention alone.
PURE: Final = Network(depth=12, width=32, num_heads=2, seeds=tuple(range(10)))
PURE_TOKENS: Final = 32
PURE_DEFINITIONS: Final = {
    "pure": "[S][layer], 0 the input; log10 of the relative residual, by normaliser."
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result."""

    text: Sizes = plan.TEXT
    images: Sizes = plan.IMAGES
    rates: tuple[float, ...] = plan.RATES  # Peaks of Adam's rate.
    no_skip_rates: tuple[float, ...] = plan.NO_SKIP_RATES  # Without skip connections.
    output: pathlib.Path = files.RUNS / "study"  # Folder of the cells and the result.

    def __post_init__(self):
        require_increasing(self, "rates", "no_skip_rates")
        require_positive(self, "rates", "no_skip_rates")
        if not set(self.rates) & set(self.no_skip_rates):
            raise ValueError(
                "rates and no_skip_rates must share one, at which skip connections are "
                f"compared, got {self.rates} and {self.no_skip_rates}."
            )


QUICK = Config(
    text=Sizes(
        width=8,
        num_heads=1,
        mlp_width=8,
        seq_len=12,
        vocab_size=100,
        num_train=64,
        num_validation=32,
        num_measured=8,
        batch_size=8,
        num_steps=4,
        num_observations=2,
        seeds=(0, 1),
    ),
    images=Sizes(
        task="digits",
        patch_size=2,
        width=8,
        num_heads=1,
        mlp_width=8,
        num_train=64,
        num_validation=32,
        num_measured=8,
        batch_size=8,
        num_steps=4,
        num_observations=2,
        seeds=(0, 1),
    ),
    rates=(1e-2,),
    no_skip_rates=(1e-2,),
    output=files.RUNS / "study_quick",
)


def run(config: Config) -> dict[str, Any] | None:
    """Computes missing cells; when all are there, writes JSON, figure and findings."""
    start = time.monotonic()
    store = Store(config.output / "cells")
    contrasts = list(
        plan.primary(config.text, config.images, config.rates, config.no_skip_rates)
    )
    # Each cell once, in the order of the contrasts.
    cells = dict.fromkeys(
        cell for contrast in contrasts for arm in contrast.arms for cell in arm.cells
    )
    if busy := store.compute(list(cells), train_and_measure):
        names = ", ".join(cell.name for cell in busy)
        print(f"Other processes still compute {names}. They write the result.")
        return None
    pure = {
        name: pure_curves(num_iters)
        for name, num_iters in (("softmax", 0), ("Sinkhorn", plan.NUM_ITERS))
    }
    measured = {
        "definitions": DEFINITIONS | PURE_DEFINITIONS,
        "rows": [rows.row(contrast, store.get) for contrast in contrasts]
        + [pure_row(pure["Sinkhorn"])],
        "curves": [rows.curves(cell, store.get(cell)) for cell in cells],
        "pure": {name: significant(curves) for name, curves in pure.items()},
    }
    others = {
        "entropy": study_entropy.draw,
        "seeds": study_seeds.draw,
        "paths": study_paths.draw,
    }
    return files.write_result(
        "study", config, measured, findings, draw, start, others=others
    )


def pure_curves(num_iters: int) -> Float[np.ndarray, "S L+1"]:
    """Decimal logarithms of the residual of random networks of attention alone."""
    problems = (random_problem(seed, PURE_TOKENS, PURE) for seed in PURE.seeds)
    return np.array([log10_relative_residual(*each, num_iters) for each in problems])


def pure_row(curves: Float[np.ndarray, "S L+1"]) -> dict[str, Any]:
    """The primary contrast of networks of attention alone, in the shape of the rows."""
    growths = [growth(curve, PURE.depth // 2) for curve in curves]
    return {
        "name": "pure",
        "claim": (
            "pure Sinkhorn attention loses rank doubly exponentially, the logarithm of "
            "the residual tripling from layer to layer, within 1 %"
        ),
        "kind": "equal",
        "margin": 0.03,
        "rates": [None],
        "arms": [
            {
                "name": "less 3",
                "sign": 1,
                "quantity": "growth of the logarithm of the residual a layer",
                "cells": [],
                "untested": [None],
                "is_at_floor": [False],
                "accuracy": [None],
                "values": [[round(each - 3, 6) for each in growths]],
            }
        ],
    }


def findings(result: dict[str, Any]) -> list[Finding]:
    """Returns the verdicts of the primary contrasts."""
    return rows.primary_findings(result["rows"])
