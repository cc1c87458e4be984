"""The options of a run, and presets of them."""

import dataclasses
import pathlib
from types import MappingProxyType
from typing import Final, Literal

from ..data import Data, check_name, load
from ..data.text import Tokenizer
from ..evidence import files
from ..networks.encoder import LayerNorm, Position
from ..networks.options import require_at_least, require_positive
from ..networks.step import Skips
from ..networks.tokens import Pooling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result, and where it goes."""

    preset: str = "digits"  # A key of PRESETS, which gives the other defaults.
    task: str = "digits"  # imdb, fashion_mnist, mnist, digits or tfds:<name>.
    num_iters: int = 10  # Sinkhorn iterations; 0 is softmax attention.
    # The network.
    depth: int = 2  # Layers.
    width: int = 64  # Features of a token.
    num_heads: int = 4  # Attention heads, a divisor of the width.
    mlp_width: int | None = None  # None is four times the width.
    has_mlp: bool = True
    has_skip: bool = True  # Skip connections of the attention.
    has_mlp_skip: bool = True  # Skip connections of the MLPs.
    layer_norm: LayerNorm = "pre"
    pooling: Pooling = "max"
    position: Position = "learned"
    dropout_rate: float = 0.0
    patch_size: int = 2  # Side of an image's square patches.
    has_conv_stem: bool = False  # Convolutions of that total stride, not patches.
    seq_len: int = 256  # Tokens of a text, from its start.
    vocab_size: int = 8000  # Word identifiers, with padding and unknown.
    tokenizer: Tokenizer = "word"
    bucket_lengths: tuple[int, ...] | None = None  # Each batch has texts of one length.
    max_shift: int = 0  # Pixels by which training images are shifted.
    has_flip: bool = False  # Whether training images are mirrored at random.
    has_remat: bool = False  # Recompute layers in the backward pass.
    dtype: Literal["float32", "bfloat16"] = "float32"  # For all but parameters.
    # The training.
    num_epochs: float = 30.0
    num_steps: int | None = None  # Updates, in place of epochs.
    batch_size: int = 32  # Over all devices.
    learning_rate: float = 3e-3  # The peak.
    warmup_fraction: float = 0.1  # The part of the updates in which it rises.
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    patience: int | None = None  # Evaluations without improvement before it stops.
    num_train: int | None = None  # Training examples; None takes all.
    seed: int = 0  # Initialisation, order, dropout and augmentation.
    data_seed: int = 0  # Split of the examples.
    # What is recorded, and how often.
    eval_every: int | None = None  # Updates; None is an epoch.
    checkpoint_every: int | None = None  # Updates; None is an epoch.
    log_every: int = 20  # Updates.
    eval_batch_size: int = 128
    num_measured: int = 64  # Validation examples for rank and entropy; 0 for none.
    output: pathlib.Path | None = None  # None is a folder named after the run.
    data_dir: pathlib.Path | None = None  # Folder of TFDS; None is TFDS's default.
    resume: bool = False  # Continue the run in the output folder.
    # Where several processes train together.
    coordinator: str | None = None  # HOST:PORT of process 0.
    num_processes: int = 1
    process_id: int = 0

    def __post_init__(self):
        names = ("depth", "width", "num_heads", "batch_size", "patch_size", "log_every")
        names += ("num_steps", "patience", "eval_every", "checkpoint_every")
        given = (name for name in names if getattr(self, name) is not None)
        require_at_least(self, 1, *given)
        require_at_least(self, 0, "num_iters", "num_measured", "seed", "data_seed")
        require_positive(self, "learning_rate", "num_epochs", "max_grad_norm")
        for name in ("dropout_rate", "warmup_fraction"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}.")

    @property
    def folder(self) -> pathlib.Path:
        """The output folder."""
        if self.output is not None:
            return self.output
        task = self.task.replace(":", "_").replace("/", "_")
        name = f"{self.preset}_{task}" if self.preset != self.task else task
        return files.RUNS / "train" / f"{name}_iters{self.num_iters}_seed{self.seed}"

    @property
    def skips(self) -> Skips:
        """The skip connections."""
        return Skips(self.has_skip, self.has_mlp_skip)


_DIGITS = Config(mlp_width=128)
_IMAGES = Config(
    preset="fashion_mnist",
    task="fashion_mnist",
    # With patches of 7 x 7 and twice the width the test accuracy stays at 0.885.
    patch_size=8,
    has_conv_stem=True,
    mlp_width=128,
    has_flip=True,
    num_epochs=10,
    batch_size=64,
    learning_rate=2e-3,
    eval_batch_size=256,
    log_every=50,
)
_TEXTS = Config(
    preset="imdb",
    task="imdb",
    mlp_width=128,
    num_heads=1,  # Attention is most of the time, and each head costs as much.
    seq_len=400,
    vocab_size=20_000,
    bucket_lengths=(100, 200, 300, 400),
    dropout_rate=0.5,
    num_epochs=3,
    learning_rate=1e-3,
)

PRESETS: Final = MappingProxyType(
    {
        "digits": _DIGITS,
        "mnist": dataclasses.replace(_IMAGES, preset="mnist", task="mnist"),
        "fashion_mnist": _IMAGES,
        "imdb": _TEXTS,
        "sinkformer_imdb": dataclasses.replace(
            _TEXTS,
            preset="sinkformer_imdb",
            depth=6,
            width=256,
            num_heads=8,
            mlp_width=1024,
            seq_len=512,
            bucket_lengths=(128, 256, 384, 512),
            dropout_rate=0.1,
            num_epochs=15,
        ),
        "vit": dataclasses.replace(
            _IMAGES,
            preset="vit",
            depth=6,
            width=128,
            num_heads=8,
            mlp_width=512,
            patch_size=4,
            has_conv_stem=False,
            pooling="class_token",
            max_shift=2,
            dropout_rate=0.1,
            num_epochs=40,
            batch_size=128,
            learning_rate=1e-3,
        ),
    }
)

QUICK: Final = dataclasses.replace(_DIGITS, num_steps=20, depth=1, num_train=200)


def choose(preset: str | None, task: str | None) -> Config:
    """The preset of this name, else the preset for the task, else the one for digits.

    Raises:
        ValueError: There is no such preset, no such task, or no preset for the task.
    """
    check_name(task or "digits")
    name = preset or task or "digits"
    if name not in PRESETS:
        of = "" if preset else "for the task "
        raise ValueError(
            f"There is no preset {of}{name!r}; give --preset, one of {list(PRESETS)}."
        )
    config = PRESETS[name]
    return dataclasses.replace(config, task=task) if task else config


def load_data(config: Config) -> Data:
    """The splits of the task."""
    names = ("data_dir", "seq_len", "vocab_size", "tokenizer", "num_train")
    options = {name: getattr(config, name) for name in names}
    return load(config.task, seed=config.data_seed, **options)
