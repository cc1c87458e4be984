"""Runs of `train`: their files, seeds, early stopping and options of networks."""

import json

import jax
import numpy as np
import pytest
from support.training_runs import TINY, metrics, tiny

from experiments.training import train
from experiments.training.metrics import read_metrics


def test_a_run_from_its_options_to_its_files(uninterrupted):
    folder, result = uninterrupted
    assert json.loads((folder / "result.json").read_text()) == result
    assert json.loads((folder / "config.json").read_text())["num_steps"] == 12
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if r["split"] == "validation"] == [6, 12]
    (test,) = (r for r in records if r["split"] == "test")
    assert test["accuracy"] == result["test_accuracy"]
    best = max(r["accuracy"] for r in records if r["split"] == "validation")
    assert result["validation_accuracy"] == best
    rates = [r["learning_rate"] for r in records if r["split"] == "train"]
    assert max(rates) <= TINY.learning_rate
    assert rates[-1] < rates[1]
    for phase in ("init", "trained"):
        assert np.shape(result[phase]["relative_residual"]) == (2,)
        assert np.shape(result[phase]["attention_entropy"]) == (1,)
    assert result["num_parameters"] > 0
    assert result["environment"]["jax"] == jax.__version__


def test_the_same_seed_gives_the_same_curve_and_another_another(
    uninterrupted, tmp_path, data_dir
):
    train.run(tiny(tmp_path / "again", data_dir))
    assert metrics(tmp_path / "again") == metrics(uninterrupted[0])
    train.run(tiny(tmp_path / "other", data_dir, seed=1, num_measured=0))
    assert metrics(tmp_path / "other") != metrics(uninterrupted[0])


def test_early_stopping(tmp_path, data_dir):
    # At this rate nothing improves after the first evaluation.
    options = dict(learning_rate=1e-12, eval_every=2, patience=2, num_measured=0)
    result = train.run(tiny(tmp_path / "run", data_dir, **options))
    assert result["num_steps"] < 12
    assert result["num_steps"] == result["best_step"] + 4


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {"has_remat": True, "pooling": "class_token"},
        {"dtype": "bfloat16", "position": "sinusoidal", "layer_norm": "post"},
        {"has_mlp": False, "has_skip": False, "has_mlp_skip": False},
        {"has_conv_stem": True, "dtype": "bfloat16"},
    ],
)
def test_switches_run(options, tmp_path, data_dir):
    options = dict(num_steps=2, checkpoint_every=2, **options)
    with jax.numpy_dtype_promotion("standard"):
        result = train.run(tiny(tmp_path / "run", data_dir, **options))
    assert np.isfinite(result["test_loss"])


def test_it_learns(tmp_path, data_dir):
    options = dict(
        width=32, mlp_width=32, num_train=None, num_steps=200, eval_every=100,
        checkpoint_every=100, dropout_rate=0.0, max_shift=0, batch_size=32,
    )  # fmt: skip
    result = train.run(tiny(tmp_path / "run", data_dir, **options))
    assert result["test_accuracy"] > 0.75


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, data_dir):
    config = tiny(tmp_path, data_dir, learning_rate=1e30, warmup_fraction=0.0)
    with pytest.raises(FloatingPointError, match="Lower --learning-rate"):
        train.run(config)
    assert not (tmp_path / "result.json").exists()
