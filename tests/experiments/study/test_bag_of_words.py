"""The linear model on words."""

import numpy as np

from experiments.data import Data, Examples
from experiments.study.bag_of_words import linear_accuracy


def data(words, lengths, labels):
    """Equal texts for training and validation."""
    examples = Examples(
        inputs=np.array(words, np.int32),
        lengths=np.array(lengths, np.int32),
        labels=np.array(labels, np.int32),
    )
    splits = dict(train=examples, validation=examples, test=examples)
    return Data(name="few", num_classes=2, vocab_size=6, **splits)


def test_words_that_tell_the_class_are_enough():
    texts = [[2, 4, 4], [5, 2, 4], [3, 4, 5], [4, 3, 3]] * 4
    assert linear_accuracy(data(texts, [3] * 16, [0, 0, 1, 1] * 4)) == 1


def test_order_and_padding_tell_nothing():
    # The classes differ in the order of their words, and beyond the length.
    texts = [[2, 3, 4], [3, 2, 5]] * 8
    assert linear_accuracy(data(texts, [2] * 16, [0, 1] * 8)) == 0.5
    assert linear_accuracy(data(texts, [3] * 16, [0, 1] * 8)) == 1
