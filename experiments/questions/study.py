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
import functools
import pathlib
import time
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from ..evidence import files
from ..evidence.claims import Finding
from ..figures import (
    study_courses,
    study_dial,
    study_entropy,
    study_paths,
    study_rows,
    study_seeds,
)
from ..figures.study import draw
from ..networks.options import Network, require_increasing, require_positive
from ..networks.pure_attention import growth, random_curves
from ..study import dial, escape, more, plan, rows
from ..study.bag_of_words import linear_accuracy
from ..study.cell import Sizes
from ..study.observe import DEFINITIONS, significant
from ..study.plan import Contrast
from ..study.store import Store
from ..study.train import load_data, train_and_measure

# Random networks of attention alone.
PURE: Final = Network(depth=12, width=32, num_heads=2, seeds=tuple(range(10)))
PURE_TOKENS: Final = 32
PURE_DEFINITIONS: Final = {
    "pure": "[S][layer], 0 the input; log10 of the relative residual, by normaliser."
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result."""

    preset: str = "primary"  # A key of PRESETS.
    text: Sizes = plan.TEXT
    images: Sizes = plan.IMAGES
    rates: tuple[float, ...] = plan.RATES  # Peaks of Adam's rate.
    no_skip_rates: tuple[float, ...] = plan.NO_SKIP_RATES  # Without skip connections.
    is_partial: bool = False  # Train nothing; write the result of the cells there are.
    output: pathlib.Path = files.RUNS / "study"  # Folder of the cells and the result.

    def __post_init__(self):
        require_increasing(self, "rates", "no_skip_rates")
        require_positive(self, "rates", "no_skip_rates")
        if self.preset == "primary" and not set(self.rates) & set(self.no_skip_rates):
            raise ValueError(
                "rates and no_skip_rates must share one, at which skip connections are "
                f"compared, got {self.rates} and {self.no_skip_rates}."
            )

    @property
    def primary(self) -> list[Contrast]:
        """The primary contrasts that need training."""
        rates = (self.rates, self.no_skip_rates)
        return list(plan.primary(self.text, self.images, *rates))


# Full sizes, for a GPU: those of Sander et al. 2022, https://arxiv.org/abs/2110.11773,
# and of a small vision transformer, with as many updates as an H100 should make in 8
# minutes. That is by arithmetic: it was not measured.
SINKFORMER: Final = Sizes(
    width=256,
    num_heads=8,
    mlp_width=1024,
    seq_len=256,
    vocab_size=20_000,
    num_steps=960,
    seeds=(0, 1, 2),
)
VIT: Final = Sizes(
    task="fashion_mnist",
    width=128,
    num_heads=8,
    mlp_width=512,
    has_conv_stem=False,
    num_train=50_000,
    batch_size=128,
    num_steps=6000,
    seeds=(0, 1, 2),
)
PRESETS: Final = MappingProxyType(
    {
        "primary": Config(),
        "secondary": Config(preset="secondary"),
        "escape": Config(
            preset="escape",
            text=dataclasses.replace(plan.TEXT, seeds=escape.SEEDS),
            no_skip_rates=(escape.RATE,),
        ),
        "dial": Config(preset="dial"),
        "sinkformer_imdb": Config(
            preset="sinkformer_imdb", text=SINKFORMER, rates=(1e-4,)
        ),
        "vit": Config(preset="vit", images=VIT, rates=(1e-3,)),
    }
)
# The results that are committed.
REPORT_CONFIGS: Final = tuple(
    PRESETS[name] for name in ("primary", "secondary", "escape", "dial")
)


def choose(preset: str | None, task: str | None) -> Config:
    """The configuration of a preset; `task` is for other commands.

    Raises:
        ValueError: There is no such preset.
    """
    if task is not None or preset not in (None, *PRESETS):
        raise ValueError(
            f"study takes --preset, one of {list(PRESETS)}, got {preset!r}; it takes "
            f"no --task, got {task!r}."
        )
    return PRESETS[preset or "primary"]


_TINY: Final = Sizes(
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
)
QUICK = Config(
    text=_TINY,
    images=dataclasses.replace(_TINY, task="digits", patch_size=2),
    rates=(1e-2,),
    no_skip_rates=(1e-2,),
    output=files.RUNS / "study_quick",
)


def run(config: Config) -> dict[str, Any] | None:
    """Computes missing cells; when all are there, writes JSON, figure and findings."""
    start = time.monotonic()
    store = Store(config.output / "cells")
    trained = {
        "primary": lambda: config.primary,
        "secondary": lambda: more.secondary(config.text, config.images),
        "escape": lambda: [escape.contrast(config.text, config.no_skip_rates)],
        "dial": lambda: dial.contrasts(config.images),
        "sinkformer_imdb": lambda: more.full_size(config.text, config.rates[0]),
        "vit": lambda: more.full_size(config.images, config.rates[0]),
    }
    contrasts = list(trained[config.preset]())
    cells = plan.cells_of(contrasts)
    if config.is_partial:
        cells = [cell for cell in cells if store.get(cell) is not None]
        if not cells:
            raise FileNotFoundError(f"{config.output / 'cells'} has no cell of these.")
    elif busy := store.compute(cells, train_and_measure):
        names = ", ".join(cell.name for cell in busy)
        print(f"Other processes still compute {names}. They write the result.")
        return None
    measured: dict[str, Any] = {"preset": config.preset, "definitions": DEFINITIONS}
    others = {}
    if config.preset == "primary":
        pure = {
            name: random_curves(PURE, PURE_TOKENS, num_iters)
            for name, num_iters in (("softmax", 0), ("Sinkhorn", plan.NUM_ITERS))
        }
        found = [rows.row(contrast, store.get) for contrast in contrasts]
        measured["definitions"] = DEFINITIONS | PURE_DEFINITIONS
        measured["rows"] = [*found, pure_row(pure["Sinkhorn"])]
        measured["pure"] = {name: significant(each) for name, each in pure.items()}
        measured["linear_accuracy"] = linear_accuracy(load_data(config.text))
        others = {
            "entropy": functools.partial(study_entropy.draw, is_text=True),
            "entropy_images": functools.partial(study_entropy.draw, is_text=False),
            "seeds": study_seeds.draw,
            "paths": study_paths.draw,
            "courses": study_courses.draw,
        }
    else:
        if config.preset == "secondary":
            contrasts = [*_of_primary(config, store), *contrasts]
        measured["rows"] = [rows.row(contrast, store.get) for contrast in contrasts]
    measured["curves"] = [rows.curves(cell, store.get(cell)) for cell in cells]
    figures = {
        "secondary": study_rows.draw,
        "escape": study_courses.draw,
        "dial": study_dial.draw,
    }
    figure = figures.get(config.preset, draw)
    options = {"question": "study", "others": others}
    return files.write_result(
        config.preset, config, measured, findings, figure, start, **options
    )


def _of_primary(config, store):
    """Yields secondary contrasts on cells of the primary ones.

    Raises:
        FileNotFoundError: The primary cells are not there.
    """
    primary = config.primary
    if missing := [c.name for c in plan.cells_of(primary) if store.get(c) is None]:
        raise FileNotFoundError(
            f"{config.output / 'cells'} lacks {len(missing)} cells of the primary "
            f"contrasts, {missing[0]} among them. Run --preset primary first."
        )
    for contrast in primary:
        if contrast.name in ("text_pre", "text_post", "images_pre", "text_no_skip"):
            yield from more.of_primary(contrast)
            yield more.best_rates(contrast, store.get)


def pure_row(curves: Float[np.ndarray, "S L+1"]) -> dict[str, Any]:
    """The primary contrast of networks of attention alone, in the shape of the rows."""
    growths = [growth(curve, PURE.depth // 2) for curve in curves]
    return {
        "name": "pure",
        "claim": (
            "pure Sinkhorn attention loses rank doubly exponentially, the logarithm of "
            "the residual tripling from layer to layer from layer 6 on, within 1 %"
        ),
        "kind": "equal",
        "margin": 0.03,
        "rates": [None],
        "num_missing": 0,
        "arms": [
            {
                "name": "Sinkhorn",
                "sign": 1,
                "quantity": (
                    "growth of the logarithm of the residual from layer to layer, "
                    "less 3"
                ),
                "cells": [],
                "untested": [None],
                "is_at_floor": [False],
                "is_bounded": [False],
                "accuracy": [None],
                "values": [[round(each - 3, 6) for each in growths]],
            }
        ],
    }


def findings(result: dict[str, Any]) -> list[Finding]:
    """Returns the verdicts of the contrasts."""
    if result["preset"] == "primary":
        return rows.primary_findings(result["rows"])
    if result["preset"] == "escape":
        return [escape.finding(result["curves"])]
    return rows.secondary_findings(result["rows"])
