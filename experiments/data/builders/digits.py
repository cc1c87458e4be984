"""The handwritten digits that scikit-learn carries, as a TFDS data set."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 digits of 8 x 8 pixels in one split: small enough for tests."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The test part of the UCI digits of Alpaydin and Kaynak, 1998.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(
                        shape=(8, 8, 1), dtype=np.uint8, encoding="bytes"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

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
        return {"train": self._generate_examples(digits.images, digits.target)}

    def _generate_examples(
        self, images, labels
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        # 16 steps of grey, spread over the range of other images.
        images = np.round(images * (255 / 16)).astype(np.uint8)[..., None]
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": image, "label": int(label)}
