"""The handwritten digits of scikit-learn, as a TFDS data set."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from .labelled import Labelled


class Digits(Labelled):
    """1,797 digits of 8 x 8 pixels in one split, few enough for tests."""

    about = "The test part of the UCI digits of Alpaydin and Kaynak, 1998."
    homepage = "https://archive.ics.uci.edu/dataset/80"
    key = "image"
    feature = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="bytes")
    classes = tuple("0123456789")

    def _split_generators(self, dl_manager) -> dict[str, Iterator[Any]]:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The digits are not installed: no package sklearn. Run "
                "`python -m pip install scikit-learn`.",
                name=error.name,
            ) from error
        digits = load_digits()
        # 16 steps of grey, spread over the range of a byte.
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        return {"train": self._generate_examples(images, digits.target)}
