"""Data sets that TFDS has prepared, read into memory without TensorFlow."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Shaped, UInt8

from .text import clean


class Table(NamedTuple):
    """N labelled examples of one split."""

    inputs: Shaped[np.ndarray, " N"] | UInt8[np.ndarray, "N H W C"]  # Texts or images.
    labels: Int[np.ndarray, " N"]


class Tables(NamedTuple):
    """All labelled splits of a data set, by name."""

    by_split: dict[str, Table]
    num_classes: int


def read_named(name: str, data_dir: pathlib.Path | None) -> Tables:
    """The data set of a TFDS name, which must be prepared.

    Raises:
        FileNotFoundError: There are no array records of it.
        ValueError: It holds neither texts nor images of one size with class labels.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        # TFDS may know how to make the data set and yet have no records.
        is_there = builder.data_path.exists()
        sources = builder.as_data_source(split=None) if is_there else {}
    except (tfds.core.DatasetNotFoundError, NotImplementedError):
        sources = {}
    if not sources:
        where = data_dir or tfds.core.constants.DATA_DIR
        raise FileNotFoundError(
            f"TFDS finds no data set {name!r} prepared as array records in {where}. "
            "Where TensorFlow is installed, run `python -m pip install "
            f"tensorflow-datasets tensorflow && tfds build {name} --data_dir {where} "
            "--file_format array_record`."
        )
    return read(builder.info, sources)


def read(
    info: tfds.core.DatasetInfo, sources: dict[str, Sequence[dict[str, Any]]]
) -> Tables:
    """The labelled splits of `sources`.

    Raises:
        ValueError: They hold neither texts nor images of one size with class labels.
    """
    keys = info.supervised_keys
    label = info.features[keys[1]] if keys and keys[1] in info.features else None
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"{info.name} must have an input and a class label to learn, got the keys "
            f"{keys} of {info.features}. Take another data set."
        )
    is_text = isinstance(info.features[keys[0]], tfds.features.Text)
    to_inputs = _texts if is_text else _images
    by_split = {}
    for split, source in sources.items():
        rows = list(source)
        # Real labels are ints; tfds.testing.mock_data makes 0-d arrays.
        labels = np.array([int(row[keys[1]]) for row in rows], np.int32)
        if (labels >= 0).all():  # -1 means unlabelled.
            inputs = to_inputs([row[keys[0]] for row in rows], info.name)
            by_split[split] = Table(inputs, labels)
    return Tables(by_split, label.num_classes)


def _texts(values, name):
    # Real texts are bytes; tfds.testing.mock_data makes str.
    texts = (clean(v.decode() if isinstance(v, bytes) else v) for v in values)
    return np.array(list(texts), object)


def _images(values, name):
    shapes = {np.shape(value) for value in values}
    dtypes = {np.asarray(value).dtype for value in values}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3 or dtypes != {np.dtype("uint8")}:
        raise ValueError(
            f"{name} must hold texts, or images of one size in bytes, got shapes "
            f"{sorted(shapes)[:3]} and dtypes {sorted(map(str, dtypes))}. Take another "
            "data set."
        )
    return np.stack(values)
