"""Encoders trained on the digits, all seeds at once, for questions about attention.

They are those of `compare --preset digits`, with a third of its updates and at one
learning rate, the one that `compare` chose for 10 Sinkhorn iterations. Everything is
measured with the parameters of the last update: nothing is chosen on the validation
split, on which rank and entropy are measured.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..data import Data, load
from ..evidence import answer
from . import ensemble, measures
from .encoder import Encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What the configurations of these questions have in common."""

    depth: int = 2  # Layers, with skip connections, MLPs and LayerNorm before both.
    width: int = 64  # Features of a token.
    num_heads: int = 4  # Attention heads, a divisor of the width.
    mlp_width: int = 128
    patch_size: int = 2  # Side of the square patches of the 8 x 8 images.
    num_steps: int = 400  # Updates; 10 epochs at 32 images.
    batch_size: int = 32  # Images of an update.
    learning_rate: float = 3e-3  # Of Adam, at the peak; the same for all networks.
    num_measured: int = 128  # Validation images on which rank and entropy are measured.
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # Initialisation and order of the images.
    data_seed: int = 0  # Split of the images.
    data_dir: pathlib.Path | None = None  # Of TFDS; None is its default.

    def __post_init__(self):
        names = ("depth", "width", "num_heads", "mlp_width", "patch_size")
        names += ("num_steps", "batch_size", "num_measured")
        least = dict.fromkeys(names, 1) | {"seeds": 0, "data_seed": 0}
        answer.require_at_least(self, least)
        answer.require_even_heads(self)
        if 8 % self.patch_size:
            raise ValueError(
                "patch_size must divide 8, the side of the images, got "
                f"{self.patch_size}."
            )
        answer.require_learning_rate(self)


# Of a quick run, for QUICK.
SMALL: dict[str, Any] = {
    "depth": 2,
    "width": 16,
    "num_heads": 2,
    "mlp_width": 16,
    "num_steps": 12,
    "num_measured": 16,
    "seeds": (0, 1),
}

DEFINITIONS = {
    "relative_residual": measures.DEFINITIONS["relative_residual"],
    "attention_entropy": (
        "Nats; mean over rows, rescaled to sum to 1, heads and measured images; "
        "[seed][layer]. At most the logarithm of the tokens."
    ),
    "column_defect": measures.DEFINITIONS["column_defect"],
    "row_defect": measures.DEFINITIONS["row_defect"],
    "test_accuracy": "Of the parameters after the last update; [seed].",
    "train_loss": "Mean cross-entropy of the last tenth of the updates; [seed].",
}


def digits(setup: Setup) -> Data:
    """The digits, split.

    Raises:
        ValueError: There are fewer validation images than are to be measured.
    """
    data = load("digits", data_dir=setup.data_dir, seed=setup.data_seed)
    if setup.num_measured > (most := len(data.validation)):
        raise ValueError(
            f"num_measured must be at most {most}, the validation images, got "
            f"{setup.num_measured}."
        )
    return data


def encoder(setup: Setup, **options) -> Encoder:
    """The encoder with attention of `options`, which change no parameter."""
    return Encoder(
        depth=setup.depth,
        width=setup.width,
        num_heads=setup.num_heads,
        patch_size=setup.patch_size,
        num_classes=10,
        mlp_width=setup.mlp_width,
        layer_norm="pre",
        pooling="max",
        **options,
    )


def init(setup: Setup, data: Data) -> ensemble.Params:
    """Parameters of every seed, for any attention."""
    softmax = encoder(setup, num_iters=0)
    return ensemble.init_images(softmax, setup.seeds, data.train.inputs.shape[1:])


def train(
    setup: Setup,
    model: Encoder,
    params: ensemble.Params,
    data: Data,
    on_step: Callable[[], object],
) -> tuple[ensemble.Params, list[float]]:
    """Parameters after the last update, and the train_loss.

    Equal seeds see equal batches, whatever the model.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    params, losses = ensemble.train(
        model,
        params,
        data.train,
        has_skip=True,
        seeds=setup.seeds,
        num_steps=setup.num_steps,
        batch_size=setup.batch_size,
        learning_rate=setup.learning_rate,
        on_step=on_step,
    )
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"The loss at learning rate {setup.learning_rate} is not finite. Take a "
            "smaller learning_rate."
        )
    return params, losses[:, -max(1, setup.num_steps // 10) :].mean(axis=1).tolist()


def require_increasing_from(name: str, values: tuple[int, ...], softmax: int) -> None:
    """Refuses counts of steps that do not begin with the softmax's.

    Raises:
        ValueError: They do not, do not increase, or are fewer than two.
    """
    is_increasing = tuple(sorted(set(values))) == values
    if len(values) < 2 or values[0] != softmax or not is_increasing:
        raise ValueError(
            f"{name} must increase from {softmax}, softmax, to compare with, got "
            f"{values}."
        )


def before_and_after(
    setup: Setup,
    model: Encoder,
    initial: ensemble.Params,
    data: Data,
    on_step: Callable[[], object],
) -> dict[str, Any]:
    """The train_loss, and what `evaluate` says of "init" and "trained" parameters.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    params, loss = train(setup, model, initial, data, on_step)
    return {
        "train_loss": loss,
        "init": evaluate(setup, model, initial, data),
        "trained": evaluate(setup, model, params, data),
    }


def evaluate(
    setup: Setup, model: Encoder, params: ensemble.Params, data: Data
) -> dict[str, list]:
    """The measures of `DEFINITIONS` but the loss."""
    examples = data.validation.take(slice(setup.num_measured))
    accuracy = ensemble.accuracy(model, params, data.test, has_skip=True)
    return measures.measure(model, params, examples, has_skip=True) | {
        "test_accuracy": accuracy.tolist()
    }


def last_residual(measured: dict[str, list]) -> np.ndarray:
    """Relative residual of the last layer, [S]."""
    return np.array(measured["relative_residual"])[:, -1]


def mean_entropy(measured: dict[str, list]) -> np.ndarray:
    """Attention entropy in nats, mean over the layers, [S]."""
    return np.array(measured["attention_entropy"]).mean(axis=1)
