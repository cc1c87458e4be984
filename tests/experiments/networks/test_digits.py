"""The encoders of the digits: training, measures, and whole quick runs."""

import dataclasses

import numpy as np
import pytest

from experiments.networks import digits
from experiments.questions import swap, temperature


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return digits.Setup(
        depth=1,
        width=8,
        num_heads=2,
        mlp_width=8,
        patch_size=4,
        num_steps=40,
        batch_size=16,
        learning_rate=0.03,
        num_measured=8,
        seeds=(0, 1),
        data_dir=tmp_path_factory.mktemp("tensorflow_datasets"),
    )


def test_training_and_measures(setup):
    encoders = digits.Encoders(setup)
    model = encoders.encoder(num_iters=1, finish="columns")
    params, loss = encoders.train(model)
    assert max(loss) < 2.2  # It was log 10 = 2.3, of ten classes.
    before, after = (
        encoders.evaluate(model, each) for each in (encoders.initial, params)
    )
    assert np.shape(after["relative_residual"]) == (2, 2)
    assert before["relative_residual"] != after["relative_residual"]
    assert np.mean(after["test_accuracy"]) > np.mean(before["test_accuracy"])
    np.testing.assert_allclose(after["column_defect"], 0, atol=1e-5)
    assert (np.array(after["row_defect"]) > 1e-4).all()
    residual = digits.RESIDUAL.of(after)
    np.testing.assert_array_equal(residual, np.array(after["relative_residual"])[:, 1])
    entropy = digits.ENTROPY.of(after)
    np.testing.assert_allclose(entropy, np.ravel(after["attention_entropy"]))
    assert (entropy < np.log(4)).all()


def test_bad_setups_are_refused(setup):
    with pytest.raises(ValueError, match="num_measured must be at most 179"):
        digits.Encoders(dataclasses.replace(setup, num_measured=180))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        digits.Setup(num_steps=0)
    with pytest.raises(ValueError, match="seeds must be distinct"):
        digits.Setup(seeds=(1, 1))
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        digits.Setup(learning_rate=float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize("question", [swap, temperature])
def test_quick_runs(question, setup, tmp_path):
    config = dataclasses.replace(
        question.QUICK, data_dir=setup.data_dir, output=tmp_path
    )
    assert question.run(config)["findings"]
