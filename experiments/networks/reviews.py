"""Small encoders trained on IMDb reviews, measured layer by layer."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from ..data import Data, Examples, imdb
from ..evidence.cells import Cells
from . import ensemble, options
from .encoder import Encoder, LayerNorm, num_parameters
from .measures import FLOAT32_FLOOR, NORMS, measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(options.Training):
    """The options of all networks that are trained on reviews."""

    vocab_size: int = 4000  # Words, with padding and unknown.
    num_train: int = 10_000  # Training reviews.

    def reviews(self, seq_len: int, num_validation: int) -> Data:
        """The reviews, split, and of each the first `seq_len` tokens."""
        return imdb(
            seq_len=seq_len,
            vocab_size=self.vocab_size,
            num_train=self.num_train,
            num_validation=num_validation,
            seed=self.data_seed,
        )

    def long_reviews(
        self, seq_len: int, num_measured: int
    ) -> tuple[Data, Int[np.ndarray, "B T"]]:
        """The reviews, and the words of some for validation that need no padding.

        Raises:
            ValueError: Too few reviews are that long.
        """
        data = self.reviews(seq_len, num_validation=256)
        words = data.validation.inputs[data.validation.lengths == seq_len]
        if len(words) < num_measured:
            raise ValueError(
                f"num_measured must be at most {len(words)}, the validation reviews of "
                f"{seq_len} tokens and more, got {num_measured}."
            )
        return data, words[:num_measured]

    def encoder(self, data: Data, num_iters: int, **others) -> Encoder:
        """The encoder of the reviews, with LayerNorm before attention and MLP."""
        sizes = {name: getattr(self, name) for name in ("depth", "width", "num_heads")}
        return Encoder(
            **{"layer_norm": "pre"} | sizes | others,
            num_iters=num_iters,
            vocab_size=data.vocab_size,
            seq_len=data.train.inputs.shape[1],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Setup):
    """The options that networks of different `Case`s share."""

    seq_len: int = 64  # Tokens of a review, from its start.
    num_validation: int = 512  # Validation reviews, for the accuracy.
    num_measured: int = 32  # Validation reviews on which residuals are measured.
    learning_rate: float = 1e-3  # Adam's peak rate.

    def __post_init__(self):
        super().__post_init__()
        options.require_at_least(self, 2, "seq_len")
        options.require_at_least(self, 1, "num_measured")
        options.require_positive(self, "learning_rate")
        if self.num_measured > self.num_validation:
            raise ValueError(
                f"num_measured must not exceed num_validation, got {self.num_measured} "
                f"and {self.num_validation}: the reviews are taken from these."
            )

    def shared(self) -> dict[str, Any]:
        """The options of this class, without those that a question adds."""
        names = (field.name for field in dataclasses.fields(Grid))
        return {name: getattr(self, name) for name in names}

    def measured(self, data: Data) -> Examples:
        """The reviews on which residuals are measured."""
        return data.validation.take(slice(self.num_measured))


class Case(NamedTuple):
    """One kind of network."""

    has_skip: bool
    has_mlp: bool
    layer_norm: LayerNorm
    num_iters: int  # 0 is softmax.

    @property
    def name(self) -> str:
        """One word for the whole case."""
        skip = "skip" if self.has_skip else "no_skip"
        mlp = "mlp" if self.has_mlp else "no_mlp"
        return f"{skip}-{mlp}-{self.layer_norm}-{self.num_iters}"

    @property
    def normaliser(self) -> str:
        """The name of the map from logits to plans."""
        return "Sinkhorn" if self.num_iters else "softmax"

    @property
    def architecture(self) -> str:
        """The parts of a layer beside the attention, in words."""
        if (self.has_skip, self.has_mlp, self.layer_norm) == (False, False, "none"):
            return "pure attention"
        skip = "skip" if self.has_skip else "no skip"
        return f"{skip}, {'MLP' if self.has_mlp else 'no MLP'}"


def max_entropy(reviews: Examples) -> float:
    """The entropy of uniform attention in nats, mean over the reviews."""
    return float(np.log(reviews.lengths).mean())


@contextlib.contextmanager
def trained(
    cases: Sequence[Case], grid: Grid, output: pathlib.Path
) -> Iterator[tuple[Data, list[dict[str, Any]]]]:
    """The reviews, and the result of `train_and_measure` for each case, in order.

    Each result is written to a file of its own in the folder `output`. A run that was
    interrupted reads it from there; the files are removed when the block ends without
    an error.

    Raises:
        ValueError: The options fit neither each other nor the data.
        BlockingIOError: Another run writes to the same folder.
        FloatingPointError: The training diverges.
    """
    with Cells(output, grid.shared()) as cells:
        print("Reading and splitting the IMDb reviews.", file=sys.stderr)
        data = grid.reviews(grid.seq_len, grid.num_validation)
        runs = []
        for case in tqdm(cases, unit="network"):
            train = functools.partial(train_and_measure, case, grid, data)
            runs.append(cells.get(case.name, train))
        yield data, runs


def train_and_measure(case: Case, grid: Grid, data: Data) -> dict[str, Any]:
    """Measures of all seeds before and after training, losses and accuracies."""
    model = grid.encoder(
        data, case.num_iters, has_mlp=case.has_mlp, layer_norm=case.layer_norm
    )
    options = {"has_skip": case.has_skip}
    observe = functools.partial(
        measure, model, examples=grid.measured(data), norms=NORMS, **options
    )
    params = ensemble.init(model, grid.seeds, data.train)
    at_init = observe(params)
    trained, losses = ensemble.train(
        model, params, data.train, grid, learning_rate=grid.learning_rate, **options
    )
    ensemble.require_finite(losses, grid.learning_rate)
    accuracy = functools.partial(ensemble.accuracy, model, trained, **options)
    some = data.train.take(slice(grid.num_validation))
    return {
        "architecture": case.architecture,
        "normaliser": case.normaliser,
        **case._asdict(),
        "num_parameters": num_parameters(params) // len(grid.seeds),
        "train_loss": losses.tolist(),
        "train_accuracy": accuracy(some).tolist(),
        "validation_accuracy": accuracy(data.validation).tolist(),
        "init": at_init,
        "trained": observe(trained),
    }


def log10_residual(run: dict[str, Any], phase: str = "trained") -> np.ndarray:
    """Decimal logarithm of the relative residual, [S, L + 1]; -inf where it is 0."""
    if "log10_relative_residual" in run[phase]:
        return np.array(run[phase]["log10_relative_residual"])
    with np.errstate(divide="ignore"):
        return np.log10(run[phase]["relative_residual"])


# What `last_log10` is called in findings.
RESIDUAL: Final = "Decimal logarithm of the relative residual, last layer, trained"


def last_log10(run: dict[str, Any], norm: str = "fro") -> np.ndarray:
    """Decimal logarithm of the last layer's relative residual after training, [S].

    It is at least that of `FLOAT32_FLOOR`, below which a residual is rounding.
    """
    if norm == "fro":
        return np.maximum(log10_residual(run)[:, -1], math.log10(FLOAT32_FLOOR))
    values = np.array(run["trained"][f"relative_residual_{norm}"])[:, -1]
    return np.log10(np.maximum(values, FLOAT32_FLOOR))
