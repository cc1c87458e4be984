"""A linear model on the words of texts: the accuracy that a network should exceed."""

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ..data import Examples
from .presets import Config, load_data

# Tokens of a text. No review is longer, so the model reads all of each.
SEQ_LEN = 4000


def bag_of_words(config: Config) -> dict[str, Any]:
    """The accuracy of logistic regression on the words of whole texts.

    Splits and vocabulary are those of `config`. The words are weighted by tf-idf. The
    regularisation is chosen on the validation split, and the test split is read once.
    """
    data = load_data(dataclasses.replace(config, seq_len=SEQ_LEN))
    bags = [_bags(split, data.vocab_size) for split in (data.train, data.validation)]
    best = (-1.0,)
    for inverse in (0.3, 1.0, 3.0, 10.0, 30.0):
        model = make_pipeline(
            TfidfTransformer(sublinear_tf=True),
            LogisticRegression(C=inverse, max_iter=1000),
        )
        model.fit(bags[0], data.train.labels)
        accuracy = float(model.score(bags[1], data.validation.labels))
        best = max(best, (accuracy, inverse, model), key=lambda x: x[0])
    accuracy, inverse, model = best
    test = _bags(data.test, data.vocab_size)
    return {
        "inverse_regularisation": inverse,
        "validation_accuracy": accuracy,
        "test_accuracy": float(model.score(test, data.test.labels)),
    }


def _bags(examples: Examples, vocab_size):
    """How often each text holds each word, [N, vocab_size]."""
    where = np.arange(examples.inputs.shape[1]) < examples.lengths[:, None]
    rows = np.nonzero(where)[0]
    ones = np.ones(len(rows), np.float64)
    shape = (len(examples), vocab_size)
    return scipy.sparse.csr_matrix((ones, (rows, examples.inputs[where])), shape)
