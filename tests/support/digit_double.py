"""Replaces the training of the digits' encoders, to test what the questions do."""

import numpy as np

from experiments.networks.digits import Encoders


def install(monkeypatch, measure):
    """Replaces training and evaluation by `measure`.

    `measure(model, trained)` returns residual, entropy and accuracy in the encoder
    `model` of parameters that were trained with the encoder `trained`, which is None
    for initial parameters. Seed k gets k tenths more of each.
    """

    def init(self, setup):
        self.setup, self.initial = setup, None

    def train(self, model):
        return model, [0.5] * len(self.setup.seeds)

    def evaluate(self, model, trained):
        assert model.patch_size == self.setup.patch_size
        assert trained is None or trained.patch_size == self.setup.patch_size
        offset = np.arange(len(self.setup.seeds)) / 10
        residual, entropy, accuracy = (
            value + offset for value in measure(model, trained)
        )
        pair = lambda x: np.stack([x * 0 + 9, x], axis=1).tolist()
        return {
            "relative_residual": pair(residual),
            "attention_entropy": np.stack([entropy, entropy], axis=1).tolist(),
            "column_defect": pair(residual),
            "row_defect": pair(residual),
            "test_accuracy": accuracy.tolist(),
        }

    monkeypatch.setattr(Encoders, "__init__", init)
    monkeypatch.setattr(Encoders, "train", train)
    monkeypatch.setattr(Encoders, "evaluate", evaluate)
