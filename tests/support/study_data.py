"""Random texts in place of the reviews, and a folder of their own for what is kept."""

import numpy as np
import pytest

from experiments.data import Data, Examples
from experiments.study import train


def random_texts(
    *, seq_len: int, vocab_size: int, num_train: int, num_validation: int, seed: int
) -> Data:
    """Texts of two classes, each with words of its own beside shared ones."""
    rng = np.random.default_rng(seed)

    def split(num):
        labels = (np.arange(num) % 2).astype(np.int32)
        words = rng.integers(2, vocab_size, (num, seq_len))
        words[:, 0] = 2 + labels
        lengths = rng.integers(2, seq_len + 1, num)
        lengths[: num // 2] = seq_len
        words *= np.arange(seq_len) < lengths[:, None]
        return Examples(
            inputs=words.astype(np.int32),
            lengths=lengths.astype(np.int32),
            labels=labels,
        )

    return Data(
        name="imdb",
        train=split(num_train),
        validation=split(num_validation),
        test=split(1),
        num_classes=2,
        vocab_size=vocab_size,
    )


def install(monkeypatch: pytest.MonkeyPatch, folder) -> list[dict]:
    """Replaces the reviews; the options with which texts are made.

    What is kept of them goes into `folder`. Call `train.load_data.cache_clear` at the
    end.
    """
    made = []

    def imdb(**options):
        made.append(options)
        return random_texts(**options)

    train.load_data.cache_clear()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "imdb", imdb)
    return made
