"""A linear model on the words of texts: the accuracy that a network should reach."""

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ..data import Data, Examples


def linear_accuracy(data: Data) -> float:
    """The validation accuracy of logistic regression on the words of the texts.

    It reads the tokens that networks read, weighted by tf-idf. The regularisation is
    the best one on the validation split, which favours the linear model.
    """
    bags = [_bags(split, data.vocab_size) for split in (data.train, data.validation)]
    scores = []
    for inverse in (0.3, 1.0, 3.0, 10.0):
        model = make_pipeline(
            TfidfTransformer(sublinear_tf=True),
            LogisticRegression(C=inverse, max_iter=1000),
        )
        model.fit(bags[0], data.train.labels)
        scores.append(float(model.score(bags[1], data.validation.labels)))
    return max(scores)


def _bags(examples: Examples, vocab_size):
    """How often each text holds each word, [N, vocab_size]."""
    where = np.arange(examples.inputs.shape[1]) < examples.lengths[:, None]
    rows = np.nonzero(where)[0]
    ones = np.ones(len(rows), np.float64)
    shape = (len(examples), vocab_size)
    return scipy.sparse.csr_matrix((ones, (rows, examples.inputs[where])), shape)
