"""The primary contrasts of the study: which cells are compared, and in what.

docs/protocol.md says the same in words, and was committed before the trainings.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ..networks.measures import FLOAT32_FLOOR
from .cell import Cell, Sizes

TEXT: Final = Sizes()
IMAGES: Final = Sizes(
    task="fashion_mnist",
    has_own_projections=True,
    num_train=50_000,
    batch_size=16,
    num_steps=4200,
)
# The peaks of Adam's rate, the same for all normalisers.
RATES: Final = (1e-3, 3e-3, 1e-2)
# Without skip connections the largest rate fails, whatever the normaliser.
NO_SKIP_RATES: Final = (3e-4, 1e-3, 3e-3)
NUM_ITERS: Final = 10  # Sinkhorn iterations of the primary contrasts.


class Quantity(NamedTuple):
    """A number for each seed, made from the result of a cell."""

    name: str  # With its unit.
    of: Callable[[dict[str, Any]], Float[np.ndarray, " S"]]
    is_residual: bool = False  # Its least value is that of the rounding.
    deepest: int = -2  # The deepest layer that a residual is of, counted from the end.


def log10_residual(
    result: dict[str, Any], layer: int, observation: int = -1
) -> Float[np.ndarray, " S"]:
    """Decimal logarithm of the relative residual, at least that of the rounding."""
    values = np.array(result["relative_residual"], np.float64)[:, observation, layer]
    return np.log10(np.maximum(values, FLOAT32_FLOOR))


def slope(result: dict[str, Any], kind: str) -> Float[np.ndarray, " S"]:
    """Decades that a product of attention matrices loses with each matrix."""
    values = np.array(result["paths"][kind], np.float64)  # [S, length]
    return -np.polyfit(np.arange(1, values.shape[1] + 1), values.T, 1)[0]


def _entropy_change(result):
    entropy = np.array(result["entropy"], np.float64).mean(axis=2)  # [S, K]
    return entropy[:, -1] - entropy[:, 0]


# The last attention is the deepest layer that reads all tokens: of what it returns, a
# network with a class token reads that token alone. So rank is measured before it.
RESIDUAL: Final = Quantity(
    "log10 of the relative residual of the tokens that enter the last layer",
    lambda result: log10_residual(result, -2),
    is_residual=True,
)
LAST: Final = Quantity(
    "log10 of the relative residual after the last layer",
    lambda result: log10_residual(result, -1),
    is_residual=True,
    deepest=-1,
)
ACCURACY: Final = Quantity(
    "validation accuracy",
    lambda result: np.array(result["validation_accuracy"], np.float64),
)
# Without skip connections the last layers are at the floor of float32.
ALL_LAYERS: Final = Quantity(
    "log10 of the relative residual, mean over the tokens that enter layers 2 to the "
    "last",
    lambda result: np.mean(
        [
            log10_residual(result, layer)
            for layer in range(1, len(result["relative_residual"][0][0]) - 1)
        ],
        axis=0,
    ),
    is_residual=True,
)
ENTROPY: Final = Quantity(
    "change in training of the entropy of the attention, in units of the entropy of "
    "uniform attention, mean over layers",
    _entropy_change,
)


class Arm(NamedTuple):
    """One term of a contrast: a quantity in the cells of a design."""

    name: str
    sign: Literal[1, -1]
    cells: tuple[Cell, ...]  # One for each rate.
    quantity: Quantity = RESIDUAL


class Contrast(NamedTuple):
    """The sum of the arms, seed by seed at equal rates, and what is claimed of it."""

    name: str
    claim: str
    arms: tuple[Arm, ...]
    kind: Literal["greater", "equal"] = "greater"  # Than 0, or to it within the margin.
    margin: float = 0.1  # A sum within it is of no practical size.


def cells(
    num_iters: int,
    sizes: Sizes = TEXT,
    rates: tuple[float, ...] = RATES,
    **design: Any,
) -> tuple[Cell, ...]:
    """The cells of a design at each of the rates."""
    return tuple(
        Cell(sizes=sizes, num_iters=num_iters, learning_rate=rate, **design)
        for rate in rates
    )


def cells_of(contrasts: Iterable[Contrast]) -> list[Cell]:
    """Each cell of the contrasts once, in their order."""
    arms = (arm for contrast in contrasts for arm in contrast.arms)
    return list(dict.fromkeys(cell for arm in arms for cell in arm.cells))


def against_softmax(
    quantity: Quantity = RESIDUAL, num_iters: int = NUM_ITERS, **design: Any
) -> tuple[Arm, Arm]:
    """Sinkhorn less softmax, in equal designs."""
    return (
        Arm("Sinkhorn", 1, cells(num_iters, **design), quantity),
        Arm("softmax", -1, cells(0, **design), quantity),
    )


def primary(
    text: Sizes = TEXT,
    images: Sizes = IMAGES,
    rates: tuple[float, ...] = RATES,
    no_skip_rates: tuple[float, ...] = NO_SKIP_RATES,
) -> Iterator[Contrast]:
    """Yields the contrasts that need training, in the order of the protocol."""
    on_text = {"sizes": text, "rates": rates}
    no_skip = {"sizes": text, "rates": no_skip_rates, "has_skip": False}
    shared = tuple(rate for rate in rates if rate in no_skip_rates)
    rank = "trained Sinkhorn networks keep more rank than softmax networks"
    yield Contrast(
        "text_pre",
        f"{rank} (text, pre-LayerNorm, skip connections)",
        against_softmax(**on_text),
    )
    yield Contrast(
        "text_no_skip",
        f"{rank} (text, pre-LayerNorm, no skip connections)",
        against_softmax(ALL_LAYERS, **no_skip),
    )
    for name, num_iters in (("softmax", 0), ("Sinkhorn", NUM_ITERS)):
        yield Contrast(
            f"skips_{name.lower()}",
            f"skip connections keep rank in trained {name} networks (text)",
            (
                Arm("with skip connections", 1, cells(num_iters, text, shared)),
                Arm("without", -1, cells(num_iters, text, shared, has_skip=False)),
            ),
        )
    yield Contrast(
        "entropy",
        "training takes less entropy from Sinkhorn attention than from softmax "
        "attention (text)",
        against_softmax(ENTROPY, **on_text),
        margin=0.01,
    )
    mean, token = (
        against_softmax(**on_text, pooling=pooling)
        for pooling in ("mean", "class_token")
    )
    yield Contrast(
        "pooling",
        "Sinkhorn's lead in rank is larger behind a mean over tokens than behind a "
        "class token (text)",
        (
            *(each._replace(name=f"{each.name}, mean") for each in mean),
            *(
                each._replace(name=f"{each.name}, class token", sign=-each.sign)
                for each in token
            ),
        ),
    )
    decades = {
        name: Quantity(
            "log10 of the decades that each further matrix takes from the residual of "
            "a product, independent matrices",
            lambda result, name=name: np.log10(slope(result, f"independent, {name}")),
        )
        for name in ("Sinkhorn", "softmax")
    }
    yield Contrast(
        "paths",
        "products of independent matrices made from equal logits lose rank alike with "
        "Sinkhorn and softmax, within 10 %, at nearly uniform attention (text)",
        tuple(
            Arm(name, sign, cells(0, **on_text), decades[name])
            for name, sign in (("Sinkhorn", 1), ("softmax", -1))
        ),
        kind="equal",
        margin=float(np.log10(1.1)),
    )
    yield Contrast(
        "text_post",
        f"{rank} (text, post-LayerNorm, skip connections)",
        against_softmax(**on_text, layer_norm="post"),
    )
    yield Contrast(
        "images_pre",
        f"{rank} (images, pre-LayerNorm, skip connections)",
        against_softmax(sizes=images, rates=rates),
    )
