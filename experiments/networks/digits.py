"""Encoders trained on the digits, all seeds at once, for questions about attention.

They have two layers and read the maximum over tokens. All are trained at one learning
rate, and measured after the last update: nothing is chosen on the validation split, on
which rank and entropy are measured.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Float

from ..data import load
from ..evidence import claims
from ..evidence.claims import Finding
from . import ensemble, measures, options
from .encoder import Encoder
from .step import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(options.Training):
    """The options that the configurations of these questions share."""

    depth: int = 2  # Layers, with skip connections, MLPs and LayerNorm before both.
    width: int = 64  # Features of a token.
    num_heads: int = 4  # Attention heads, a divisor of the width.
    mlp_width: int = 128
    patch_size: int = 2  # Side of the square patches of the 8 x 8 images.
    num_steps: int = 400  # Updates; 10 epochs at 32 images.
    learning_rate: float = 3e-3  # Adam's peak rate, the same for all networks.
    num_measured: int = 128  # Validation images on which rank and entropy are measured.
    data_dir: pathlib.Path | None = None  # Folder of TFDS; None is TFDS's default.

    def __post_init__(self):
        super().__post_init__()
        names = ("mlp_width", "patch_size", "num_steps", "num_measured")
        options.require_at_least(self, 1, *names)
        options.require_positive(self, "learning_rate")


# The options of a quick run, for QUICK.
SMALL: Final[dict[str, Any]] = {
    "depth": 2,
    "width": 16,
    "num_heads": 2,
    "mlp_width": 16,
    "num_steps": 12,
    "num_measured": 16,
    "seeds": (0, 1),
}

_SHARED = ("relative_residual", "column_defect", "row_defect")
DEFINITIONS: Final = {name: measures.DEFINITIONS[name] for name in _SHARED} | {
    "attention_entropy": (
        "Nats; mean over rows, rescaled to sum to 1, heads and measured images; "
        "[seed][layer]. At most the logarithm of the tokens."
    ),
    "test_accuracy": "Of the parameters after the last update; [seed].",
    "train_loss": "Mean cross-entropy of the last tenth of the updates; [seed].",
}


class Encoders:
    """Encoders of one setup: they share images, initial parameters and batches."""

    def __init__(self, setup: Setup):
        """Loads the images and makes the initial parameters of every seed.

        Raises:
            ValueError: There are fewer validation images than are to be measured.
        """
        self.setup = setup
        self.data = load("digits", data_dir=setup.data_dir, seed=setup.data_seed)
        if setup.num_measured > (most := len(self.data.validation)):
            raise ValueError(
                f"num_measured must be at most {most}, the validation images, got "
                f"{setup.num_measured}."
            )
        softmax = self.encoder(num_iters=0)
        self.initial = ensemble.init(softmax, setup.seeds, self.data.train)

    def encoder(self, **attention) -> Encoder:
        """The encoder with options of the attention, which change no parameter."""
        names = ("depth", "width", "num_heads", "patch_size", "mlp_width")
        sizes = {name: getattr(self.setup, name) for name in names}
        return Encoder(
            **sizes, num_classes=10, layer_norm="pre", pooling="max", **attention
        )

    def train(self, model: Encoder) -> tuple[Params, list[float]]:
        """Parameters after the last update, and the train_loss of `DEFINITIONS`.

        Raises:
            FloatingPointError: A loss is not finite.
        """
        rate = self.setup.learning_rate
        params, losses = ensemble.train(
            model, self.initial, self.data.train, self.setup, learning_rate=rate
        )
        ensemble.require_finite(losses, rate)
        return params, ensemble.last_loss(losses)

    def evaluate(self, model: Encoder, params: Params) -> dict[str, list]:
        """The measures of `DEFINITIONS`, without the loss."""
        examples = self.data.validation.take(slice(self.setup.num_measured))
        accuracy = ensemble.accuracy(model, params, self.data.test)
        return measures.measure(model, params, examples, has_skip=True) | {
            "test_accuracy": accuracy.tolist()
        }

    def before_and_after(self, model: Encoder) -> dict[str, Any]:
        """The train_loss, and the measures of "init" and "trained" parameters."""
        params, loss = self.train(model)
        return {
            "train_loss": loss,
            "init": self.evaluate(model, self.initial),
            "trained": self.evaluate(model, params),
        }


class Quantity(NamedTuple):
    """A number for each of S seeds, made from what `Encoders.evaluate` returns."""

    name: str  # In findings.
    label: str  # In figures.
    of: Callable[[dict[str, list]], Float[np.ndarray, " S"]]

    def compare(
        self,
        claim: str,
        first: dict[str, list],
        second: dict[str, list],
        names: tuple[str, str] = claims.NORMALISERS,
    ) -> Finding:
        """`claims.by_seed` of the quantity in two results of `Encoders.evaluate`."""
        return claims.by_seed(claim, self.name, self.of(first), self.of(second), names)


RESIDUAL: Final = Quantity(
    "Relative residual of the last layer",
    "relative residual, last layer",
    lambda measured: np.array(measured["relative_residual"])[:, -1],
)
ENTROPY: Final = Quantity(
    "Mean entropy of the attention in nats",  # The mean is over the layers.
    "attention entropy (nats)",
    lambda measured: np.array(measured["attention_entropy"]).mean(axis=1),
)
ACCURACY: Final = Quantity(
    "Test accuracy",
    "test accuracy",
    lambda measured: np.array(measured["test_accuracy"]),
)
