"""Tasks by name: prepared by TFDS once, then split, and texts encoded."""

import pathlib
from types import MappingProxyType
from typing import Final

import numpy as np
import tensorflow_datasets as tfds

from . import builders, prepared
from .builders import IdxBuilder
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

# What is taken off the training split where a data set lacks these.
TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.1


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
    """The splits of a task, disjoint, prepared first where they are not yet.

    Args:
        task: A key of `TASKS`, or "tfds:" and the name of what TFDS has prepared.
        data_dir: Where TFDS keeps data sets; None takes its default, of which
            TFDS_DATA_DIR in the environment can decide.
        seed: Decides which examples are split off for testing, if there is no such
            split, and for validation.
        seq_len: Tokens kept of each text, from its start.
        vocab_size: At most this many identifiers, of the training split's words.
        tokenizer: "word" or "bpe".
        num_train: Training examples, of those there are; None takes all. Validation
            and test do not depend on it, and fewer examples are among more.

    Raises:
        ValueError: There is no such task, or an option does not fit it.
        FileNotFoundError: The data are not there; says how to install them.
        ModuleNotFoundError: As before, for a package.
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
    if isinstance(train.inputs, list):
        return encode_splits(
            task,
            splits,
            num_classes=tables.num_classes,
            seq_len=seq_len,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )
    train, validation, test = (
        Examples(inputs=table.inputs, lengths=None, labels=table.labels)
        for table in splits
    )
    return Data(
        name=task,
        train=train,
        validation=validation,
        test=test,
        num_classes=tables.num_classes,
        vocab_size=None,
    )


def prepare(
    task: str, *, data_dir: pathlib.Path | None = None, download: bool = False
) -> tfds.core.DatasetBuilder:
    """Writes the records of a task of `TASKS` unless they are there.

    Args:
        task: A key of `TASKS`.
        data_dir: As in `load`.
        download: Whether files that are not there may be fetched.

    Returns:
        TFDS's builder.

    Raises:
        ValueError: There is no such task.
        FileNotFoundError: The data are not there; says how to install them.
        ModuleNotFoundError: As before, for a package.
    """
    if task not in TASKS:
        raise ValueError(
            f"Unknown task {task!r}; expected one of {list(TASKS)} or tfds:<name>."
        )
    options = (
        {"download": True} if download and issubclass(TASKS[task], IdxBuilder) else {}
    )
    builder = TASKS[task](data_dir=data_dir, file_format="array_record", **options)
    builder.download_and_prepare()
    return builder


def _tables(task, data_dir):
    if task.startswith("tfds:"):
        return prepared.read_named(task.removeprefix("tfds:"), data_dir)
    builder = prepare(task, data_dir=data_dir)
    # All at once takes a quarter of the time of one by one, but mocks cannot do it.
    rows = {
        split: source.__getitems__(list(range(len(source))))
        for split, source in builder.as_data_source().items()
    }
    return prepared.read(builder.info, rows)


def _splits(task, tables, seed):
    """Tables for training, validation and test, of which the first is shuffled."""
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
    inputs = table.inputs
    if isinstance(inputs, list):
        inputs = [inputs[i] for i in np.arange(len(inputs))[index]]
    else:
        inputs = inputs[index]
    return prepared.Table(inputs, table.labels[index])
