"""Small encoders that learn to tell good reviews from bad, measured layer by layer."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data import Data, imdb
from ..evidence import answer
from ..evidence.cells import Cells
from . import ensemble
from .encoder import Encoder, LayerNorm, num_parameters
from .measures import FLOAT32_FLOOR, NORMS, measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the networks of a comparison have in common."""

    depth: int = 6  # Layers.
    width: int = 32  # Features of a token.
    num_heads: int = 2  # Attention heads, a divisor of the width.
    seq_len: int = 64  # Tokens of a review, from its start.
    vocab_size: int = 4000  # Words, with padding and unknown.
    num_train: int = 10_000  # Training reviews.
    num_validation: int = 512  # Validation reviews, for the accuracy.
    num_measured: int = 32  # Of these, reviews on which residuals are measured.
    num_steps: int = 150  # Updates; 0 leaves the networks as initialised.
    batch_size: int = 32  # Reviews of an update.
    learning_rate: float = 1e-3  # Of Adam, at its peak.
    seeds: tuple[int, ...] = (0, 1, 2)  # Initialisation and order of the reviews.
    data_seed: int = 0  # Split of the reviews.

    def __post_init__(self):
        least = dict.fromkeys(
            ("depth", "width", "num_heads", "num_measured", "batch_size"), 1
        )
        least |= {"seq_len": 2, "num_steps": 0, "seeds": 0, "data_seed": 0}
        answer.require_at_least(self, least)
        answer.require_even_heads(self)
        if self.num_measured > self.num_validation:
            raise ValueError(
                f"num_measured must not exceed num_validation, got {self.num_measured} "
                f"and {self.num_validation}: the reviews are taken from these."
            )
        answer.require_learning_rate(self)

    def setting(self) -> dict[str, Any]:
        """These options alone, without those that a comparison adds."""
        names = (field.name for field in dataclasses.fields(Setting))
        return {name: getattr(self, name) for name in names}

    def reviews(self) -> Data:
        """The reviews, split.

        Raises:
            ModuleNotFoundError: They are not installed.
        """
        return imdb(
            seq_len=self.seq_len,
            vocab_size=self.vocab_size,
            num_train=self.num_train,
            num_validation=self.num_validation,
            seed=self.data_seed,
        )

    def max_entropy(self, dataset: Data) -> float:
        """The entropy of uniform attention on the measured reviews, in nats."""
        lengths = dataset.validation.lengths[: self.num_measured]
        return float(np.log(lengths).mean())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of network."""

    num_iters: int  # 0 is softmax.
    has_skip: bool
    has_mlp: bool
    layer_norm: LayerNorm

    @property
    def name(self) -> str:
        """One word for all of it."""
        skip = "skip" if self.has_skip else "no_skip"
        mlp = "mlp" if self.has_mlp else "no_mlp"
        return f"{skip}-{mlp}-{self.layer_norm}-{self.num_iters}"

    @property
    def normaliser(self) -> str:
        """Name of the map from logits to attention weights."""
        return "Sinkhorn" if self.num_iters else "softmax"

    @property
    def is_pure(self) -> bool:
        """Whether the layers are attention and nothing else."""
        return not self.has_skip and not self.has_mlp and self.layer_norm == "none"

    @property
    def architecture(self) -> str:
        """What surrounds the attention."""
        if self.is_pure:
            return "pure attention"
        skip = "skip" if self.has_skip else "no skip"
        return f"{skip}, {'MLP' if self.has_mlp else 'no MLP'}"


def encoder(case: Case, setting: Setting, vocab_size: int) -> Encoder:
    """The network of a case.

    Raises:
        ValueError: The options do not fit together.
    """
    return Encoder(
        vocab_size=vocab_size,
        seq_len=setting.seq_len,
        depth=setting.depth,
        width=setting.width,
        num_heads=setting.num_heads,
        num_iters=case.num_iters,
        has_mlp=case.has_mlp,
        layer_norm=case.layer_norm,
    )


@contextlib.contextmanager
def trained(
    cases: Sequence[Case], setting: Setting, output: pathlib.Path
) -> Iterator[tuple[Data, list[dict[str, Any]]]]:
    """The reviews, and of each case what `train_and_measure` says, in order.

    Each case is written to a file of its own when it ends, and read from there by the
    next run, until the block ends without an error.

    Args:
        cases: What to train.
        setting: What they have in common.
        output: Folder of the experiment's results.

    Raises:
        ValueError: The options do not fit together or the data.
        ModuleNotFoundError: The reviews are not installed.
        BlockingIOError: Another run writes to the same folder.
        FloatingPointError: The training diverges.
    """
    for case in cases:
        encoder(case, setting, setting.vocab_size)  # Bad options fail before the work.
    with Cells(output, setting.setting()) as cells:
        print("Reading and splitting the IMDb reviews.", file=sys.stderr)
        dataset = setting.reviews()
        runs = []
        total = len(cases) * setting.num_steps
        with tqdm(total=total, unit="step", smoothing=0.05, mininterval=1.0) as bar:
            for case in cases:
                bar.set_description(case.name)
                train = functools.partial(
                    train_and_measure, case, setting, dataset, bar.update
                )
                runs.append(cells.get(case.name, train))
                bar.n = len(runs) * setting.num_steps  # Also of one that was there.
        yield dataset, runs


def train_and_measure(
    case: Case, setting: Setting, dataset: Data, on_step: Callable[[], object]
) -> dict[str, Any]:
    """All seeds of a case: measures before and after training, losses, accuracies.

    Raises:
        FloatingPointError: The training diverges.
    """
    model = encoder(case, setting, dataset.vocab_size)
    measured = dataset.validation.take(slice(setting.num_measured))
    observe = functools.partial(
        measure, examples=measured, has_skip=case.has_skip, norms=NORMS
    )
    # One program for all cases whose parameters have equal shapes.
    stem = model.clone(num_iters=0)
    params = ensemble.init(stem, setting.seeds, setting.seq_len)
    at_init = observe(model, params)
    trained, losses = ensemble.train(
        model,
        params,
        dataset.train,
        has_skip=case.has_skip,
        seeds=setting.seeds,
        num_steps=setting.num_steps,
        batch_size=setting.batch_size,
        learning_rate=setting.learning_rate,
        on_step=on_step,
    )
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"The loss of {case.architecture}, {case.normaliser} became infinite or "
            f"NaN with learning_rate={setting.learning_rate}. Lower it."
        )
    accuracy = functools.partial(
        ensemble.accuracy, model, trained, has_skip=case.has_skip
    )
    some = dataset.train.take(slice(setting.num_validation))
    return {
        "architecture": case.architecture,
        "normaliser": case.normaliser,
        **dataclasses.asdict(case),
        "num_parameters": num_parameters(params) // len(setting.seeds),
        "train_loss": losses.tolist(),
        "train_accuracy": accuracy(some).tolist(),
        "validation_accuracy": accuracy(dataset.validation).tolist(),
        "init": at_init,
        "trained": observe(model, trained),
    }


def log10_residual(run: dict, phase: str) -> np.ndarray:
    """Decimal logarithm of the relative residual, [S, L + 1]; -inf if it is zero."""
    if "log10_relative_residual" in run[phase]:
        return np.array(run[phase]["log10_relative_residual"])
    with np.errstate(divide="ignore"):
        return np.log10(run[phase]["relative_residual"])


def last_log10(
    run: dict[str, Any], norm: str = "fro", phase: str = "trained"
) -> np.ndarray:
    """Decimal logarithm of the last layer's relative residual, [S].

    Not below that of rounding: what rounding leaves is no residual, and below it all
    networks are alike.
    """
    floor = math.log10(FLOAT32_FLOOR)
    if norm == "fro":
        return np.maximum(log10_residual(run, phase)[:, -1], floor)
    values = np.array(run[phase][f"relative_residual_{norm}"])[:, -1]
    return np.log10(np.maximum(values, FLOAT32_FLOOR))
