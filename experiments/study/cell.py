"""A cell of the study: networks that differ in their seed alone."""

import dataclasses
from typing import Any, Final, Literal, get_args

from ..networks import options
from ..networks.encoder import Encoder, LayerNorm
from ..networks.tokens import Pooling

Task = Literal["imdb", "fashion_mnist", "digits"]

# Fields of Sizes.
_OF_TEXTS: Final = ("seq_len", "vocab_size")
_OF_IMAGES: Final = ("patch_size", "has_conv_stem", "has_own_projections")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(options.Training):
    """The options that all cells of a task share, so that normalisers compare."""

    task: Task = "imdb"
    width: int = 32  # Features of a token.
    num_heads: int = 2  # Attention heads, a divisor of the width.
    mlp_width: int = 64
    seq_len: int = 96  # Tokens of a text, from its start.
    vocab_size: int = 4000  # Words, with padding and unknown.
    patch_size: int = 4  # Side of the square of an image that becomes a token.
    has_conv_stem: bool = True  # Images become tokens by convolutions, not patches.
    has_own_projections: bool = False  # Each place of an image has its projection.
    num_train: int = 20_000  # Training examples.
    num_validation: int = 2000  # Validation examples, for the accuracy.
    num_measured: int = 64  # Of them, those on which the layers are measured.
    batch_size: int = 64  # Examples of one update and seed.
    num_steps: int = 300  # Updates.
    num_observations: int = 12  # Measurements in training, equally spaced, and at 0.
    seeds: tuple[int, ...] = tuple(range(10))  # Initialisation and order of examples.

    def __post_init__(self):
        super().__post_init__()
        if self.task not in get_args(Task):
            raise ValueError(
                f"task must be one of {get_args(Task)}, got {self.task!r}."
            )
        options.require_at_least(self, 2, "seq_len")
        names = ("num_train", "num_measured", "num_steps", "num_observations")
        options.require_at_least(self, 1, "mlp_width", "patch_size", *names)
        if self.num_measured > self.num_validation:
            raise ValueError(
                f"num_measured must not exceed num_validation, got {self.num_measured} "
                f"and {self.num_validation}: the examples are taken from these."
            )
        if self.num_steps % self.num_observations:
            raise ValueError(
                "num_steps must be a multiple of num_observations, so that the last "
                f"update is measured, got {self.num_steps} and {self.num_observations}."
            )

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return 2 if self.task == "imdb" else 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One design of networks: S networks of equal design, one for each seed."""

    sizes: Sizes
    num_iters: int  # Sinkhorn iterations; 0 is softmax.
    learning_rate: float  # The peak of Adam's rate.
    layer_norm: LayerNorm = "pre"
    has_skip: bool = True  # Around attention and MLPs.
    pooling: Pooling = "class_token"
    depth: int = 6  # Layers; that of `sizes` is not used.
    column_tau: float = 1.0  # How strictly columns have equal sums.

    @property
    def name(self) -> str:
        """The cell in one word: the stem of its file."""
        sizes, skip = self.sizes, "skip" if self.has_skip else "no_skip"
        design = (sizes.task, self.layer_norm, skip, self.pooling)
        numbers = f"w{sizes.width}-d{self.depth}-u{sizes.num_steps}"
        rate, iters = f"rate{self.learning_rate:g}", f"iters{self.num_iters}"
        tau = (f"tau{self.column_tau:g}",) if self.column_tau != 1 else ()
        first = sizes.seeds[0]
        seeds = (f"seed{first}",) if first else ()
        return "-".join((*design, numbers, rate, iters, *tau, *seeds))

    @property
    def setting(self) -> dict[str, Any]:
        """Everything that decides the numbers of the cell."""
        fields = dataclasses.asdict(self)
        sizes = fields.pop("sizes")
        unused = _OF_IMAGES if self.sizes.task == "imdb" else _OF_TEXTS
        for name in ("depth", *unused):
            del sizes[name]
        if self.column_tau == 1:  # As in the files of cells that had no other.
            del fields["column_tau"]
        return {**sizes, **fields}

    def encoder(self, vocab_size: int | None) -> Encoder:
        """The network. `vocab_size` is that of the data; None for images."""
        sizes = self.sizes
        names = _OF_IMAGES if vocab_size is None else ("seq_len",)
        inputs = {name: getattr(sizes, name) for name in names}
        return Encoder(
            depth=self.depth,
            width=sizes.width,
            num_heads=sizes.num_heads,
            mlp_width=sizes.mlp_width,
            num_iters=self.num_iters,
            column_tau=self.column_tau,
            layer_norm=self.layer_norm,
            pooling=self.pooling,
            num_classes=sizes.num_classes,
            vocab_size=vocab_size,
            **inputs,
        )
