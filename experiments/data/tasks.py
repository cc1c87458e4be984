"""Tasks by name: prepared once by TFDS, then split, their texts encoded."""

import pathlib
import sys
from types import MappingProxyType
from typing import Final

import tensorflow_datasets as tfds

from . import builders, prepared
from .examples import Data, Examples
from .splits import proportional_split
from .text import Tokenizer, encode_splits

# A task is a builder and a line here.
TASKS: Final = MappingProxyType(
    {
        "imdb": builders.MovieReviews,
        "fashion_mnist": builders.FashionMnistIdx,
        "mnist": builders.MnistIdx,
        "digits": builders.Digits,
    }
)

# The fractions of the training split that become a split which a data set lacks.
TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.1


def check_name(task: str) -> None:
    """Raises a ValueError unless it is a key of `TASKS` or begins with "tfds:"."""
    if task not in TASKS and not (task.startswith("tfds:") and task != "tfds:"):
        raise ValueError(
            f"There is no task {task!r}; give one of {list(TASKS)} or tfds:<name>."
        )


def load(
    task: str,
    *,
    data_dir: pathlib.Path | None = None,
    seed: int = 0,
    seq_len: int = 256,
    vocab_size: int = 8000,
    tokenizer: Tokenizer = "word",
    num_train: int | None = None,
) -> Data:
    """The disjoint splits of a task, which is prepared first if needed.

    Args:
        task: A key of `TASKS`, or "tfds:" and the name of a data set that TFDS has
            prepared.
        data_dir: The folder of TFDS; None takes TFDS_DATA_DIR of the environment, or
            TFDS's default.
        seed: Decides which training examples are split off for validation and, if the
            data set has no test split, for testing.
        seq_len: Tokens kept of each text, from its start.
        vocab_size: The largest number of identifiers, for words of the training split.
        tokenizer: "word" or "bpe".
        num_train: Training examples, from the first; None takes all. Validation and
            test do not depend on it.

    Raises:
        ValueError: There is no such task, or an option does not fit it.
        FileNotFoundError: The data are missing; says how to install them.
        ModuleNotFoundError: A package with the data is missing; says how to install it.
    """
    tables = _tables(task, data_dir)
    train, validation, test = _splits(task, tables.by_split, seed)
    if num_train is not None:
        if not 1 <= num_train <= len(train.labels):
            raise ValueError(
                f"num_train must be in [1, {len(train.labels)}], the training examples "
                f"of {task}, got {num_train}."
            )
        train = _take(train, slice(num_train))
    splits = (train, validation, test)
    about = {"name": task, "num_classes": tables.num_classes}
    if train.inputs.dtype == object:
        options = {"vocab_size": vocab_size, "tokenizer": tokenizer}
        return encode_splits(splits, seq_len=seq_len, **options, **about)
    train, validation, test = (
        Examples(inputs=table.inputs, lengths=None, labels=table.labels)
        for table in splits
    )
    return Data(train=train, validation=validation, test=test, vocab_size=None, **about)


def prepare(
    task: str, *, data_dir: pathlib.Path | None = None, download: bool = False
) -> tfds.core.DatasetBuilder:
    """Writes the records of a task of `TASKS` unless they are there, and says where.

    Missing files are downloaded only with `download`.

    Returns:
        The TFDS builder of the data set.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: As in `load`.
    """
    check_name(task)
    if task not in TASKS:
        raise ValueError(
            f"Here {list(TASKS)} are prepared, and {task} by TFDS. Where TensorFlow is "
            f"installed, run `tfds build {task.removeprefix('tfds:')} --file_format "
            "array_record`."
        )
    builder = TASKS[task](
        data_dir=data_dir, file_format="array_record", download=download
    )
    if not builder.data_path.exists():
        print(f"Preparing {task} in {builder.data_path}, once.", file=sys.stderr)
    builder.download_and_prepare()
    return builder


def _tables(task, data_dir):
    if task.startswith("tfds:"):
        return prepared.read_named(task.removeprefix("tfds:"), data_dir)
    builder = prepare(task, data_dir=data_dir)
    # One call for all rows takes a quarter of the time. Mocked sources lack it.
    rows = {
        split: source.__getitems__(list(range(len(source))))
        for split, source in builder.as_data_source().items()
    }
    return prepared.read(builder.info, rows)


def _splits(task, tables, seed):
    """The tables for training, validation and test; training is shuffled."""
    if "train" not in tables:
        raise ValueError(
            f"{task} must have a labelled split train, got {list(tables)}. Take "
            "another data set."
        )
    fractions = {"validation": VALIDATION_FRACTION, "test": TEST_FRACTION}
    missing = {k: v for k, v in fractions.items() if k not in tables}
    train = tables["train"]
    *parts, rest = proportional_split(train.labels, list(missing.values()), seed)
    taken = {k: _take(train, part) for k, part in zip(missing, parts, strict=True)}
    tables = {**tables, **taken}
    return _take(train, rest), tables["validation"], tables["test"]


def _take(table, index):
    return prepared.Table(table.inputs[index], table.labels[index])
