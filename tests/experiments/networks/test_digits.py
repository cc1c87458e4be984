"""The encoders of the digits: training, measures, and whole quick runs."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import __main__ as command
from experiments.networks import digits as digit_encoders
from experiments.questions import iterations, length, swap, temperature


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return digit_encoders.Setup(
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
    data = digit_encoders.digits(setup)
    initial = digit_encoders.init(setup, data)
    model = digit_encoders.encoder(setup, num_iters=1, finish="columns")
    steps = []
    params, loss = digit_encoders.train(
        setup, model, initial, data, lambda: steps.append(1)
    )
    assert len(steps) == 40
    assert max(loss) < 2.2  # It was log 10 = 2.3, of ten classes.
    before, after = (
        digit_encoders.evaluate(setup, model, each, data) for each in (initial, params)
    )
    assert np.shape(after["relative_residual"]) == (2, 2)
    assert before["relative_residual"] != after["relative_residual"]
    assert np.mean(after["test_accuracy"]) > np.mean(before["test_accuracy"])
    np.testing.assert_allclose(after["column_defect"], 0, atol=1e-5)
    assert (np.array(after["row_defect"]) > 1e-4).all()
    residual = digit_encoders.last_residual(after)
    np.testing.assert_array_equal(residual, np.array(after["relative_residual"])[:, 1])
    entropy = digit_encoders.mean_entropy(after)
    np.testing.assert_allclose(entropy, np.ravel(after["attention_entropy"]))
    assert (entropy < np.log(4)).all()


def test_bad_setups_are_refused(setup):
    with pytest.raises(ValueError, match="num_measured must be at most 179"):
        digit_encoders.digits(dataclasses.replace(setup, num_measured=180))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        digit_encoders.Setup(num_steps=0)
    with pytest.raises(ValueError, match="seeds must be distinct"):
        digit_encoders.Setup(seeds=(1, 1))
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        digit_encoders.Setup(learning_rate=float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize("question", [iterations, swap, temperature, length])
def test_quick_runs(question, setup, tmp_path):
    config = dataclasses.replace(
        question.QUICK, data_dir=setup.data_dir, output=tmp_path
    )
    assert question.run(config)["findings"]


@pytest.mark.parametrize("question", [iterations, swap, temperature, length])
def test_command_line(question, monkeypatch):
    configs = []
    monkeypatch.setattr(question, "run", configs.append)
    name = question.__name__.rpartition(".")[-1]
    command.main([name, "--num-steps", "7"])
    assert configs == [question.Config(num_steps=7)]
