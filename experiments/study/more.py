"""The secondary contrasts: no verdict of the study rests on them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from .cell import Cell, Sizes
from .plan import (
    ACCURACY,
    ALL_LAYERS,
    LAST,
    NO_SKIP_RATES,
    RESIDUAL,
    Arm,
    Contrast,
    against_softmax,
    cells,
)

# The seeds and the rate of contrasts with trainings of their own.
FEW: Final = tuple(range(5))
MIDDLE: Final = (3e-3,)
RANK: Final = "Sinkhorn networks keep more rank than softmax networks"


def of_primary(contrast: Contrast) -> Iterator[Contrast]:
    """Yields what else the cells of a primary contrast of the normalisers say.

    Each rate alone, the last layer's output, and the accuracy.
    """
    name, where = contrast.name, contrast.claim.partition(" (")[2]
    for at, cell in enumerate(contrast.arms[0].cells):
        arms = (arm._replace(cells=arm.cells[at : at + 1]) for arm in contrast.arms)
        rate = f"{cell.learning_rate:g}"
        yield Contrast(
            f"{name}_rate_{rate}", f"{RANK} (rate {rate}, {where}", tuple(arms)
        )
    for quantity, claim in (
        (LAST, f"{RANK} after the last layer"),
        (ACCURACY, "Sinkhorn networks classify better than softmax networks"),
    ):
        yield Contrast(
            f"{name}_{'last' if quantity is LAST else 'accuracy'}",
            f"{claim} ({where}",
            tuple(arm._replace(quantity=quantity) for arm in contrast.arms),
            margin=0.1 if quantity is LAST else 0.005,
        )


def best_rates(contrast: Contrast, get: Callable[[Cell], dict[str, Any]]) -> Contrast:
    """Each normaliser at the rate of its best mean validation accuracy."""

    def best(cells):
        return max(cells, key=lambda c: np.mean(get(c)["validation_accuracy"]))

    where = contrast.claim.partition(" (")[2]
    arms = []
    for arm in contrast.arms:
        cell = best(arm.cells)
        name = f"{arm.name} at rate {cell.learning_rate:g}"
        arms.append(arm._replace(name=name, cells=(cell,)))
    return Contrast(
        f"{contrast.name}_best_rates",
        f"{RANK}, each at its best rate ({where}",
        tuple(arms),
    )


def secondary(text: Sizes, images: Sizes) -> Iterator[Contrast]:
    """Yields the contrasts that need trainings of their own."""
    few, few_images = (dataclasses.replace(each, seeds=FEW) for each in (text, images))
    on_text: dict[str, Any] = {"sizes": few, "rates": MIDDLE}
    for num_iters in (1, 3, 50):
        yield Contrast(
            f"iterations_{num_iters}",
            f"{RANK}, with {_iterations(num_iters)} (text)",
            _against_all(num_iters, few, text),
        )
    yield Contrast(
        "max_pooling",
        f"{RANK}, behind a maximum over tokens (text)",
        against_softmax(**on_text, pooling="max"),
    )
    for has_skip in (True, False):
        yield Contrast(
            "depth_12" + "_no_skip" * (not has_skip),
            f"{RANK}, 12 layers, {'' if has_skip else 'no '}skip connections (text)",
            against_softmax(
                RESIDUAL if has_skip else ALL_LAYERS,
                sizes=few,
                rates=MIDDLE if has_skip else NO_SKIP_RATES[1:2],
                depth=12,
                has_skip=has_skip,
            ),
        )
    yield Contrast(
        "updates",
        f"{RANK}, after four times the updates (text)",
        against_softmax(
            sizes=dataclasses.replace(few, num_steps=4 * few.num_steps), rates=MIDDLE
        ),
    )
    wide = dataclasses.replace(
        few,
        width=2 * few.width,
        num_heads=2 * few.num_heads,
        mlp_width=2 * few.mlp_width,
    )
    yield Contrast(
        "width",
        f"{RANK}, at twice the width and heads (text)",
        against_softmax(sizes=wide, rates=MIDDLE),
    )
    for num_iters in (1, 50):
        yield Contrast(
            f"images_iterations_{num_iters}",
            f"{RANK}, with {_iterations(num_iters)} (images)",
            _against_all(num_iters, few_images, images),
        )


def full_size(sizes: Sizes, rate: float) -> Iterator[Contrast]:
    """Yields softmax against 10 and 50 iterations at one rate."""
    for num_iters in (10, 50):
        arms = against_softmax(num_iters=num_iters, sizes=sizes, rates=(rate,))
        claim = f"{RANK}, with {_iterations(num_iters)} ({sizes.task}, full size)"
        yield Contrast(f"iterations_{num_iters}", claim, arms)


def _against_all(num_iters, few, all_seeds):
    """Few seeds with Sinkhorn, less the softmax cell of the primary contrasts."""
    return (
        Arm("Sinkhorn", 1, cells(num_iters, few, MIDDLE)),
        Arm("softmax", -1, cells(0, all_seeds, MIDDLE)),
    )


def _iterations(num_iters):
    return f"{num_iters} iteration" + "s" * (num_iters > 1)
