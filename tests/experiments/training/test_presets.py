"""The options of a run: what is refused, and presets as defaults."""

import dataclasses

import pytest

from experiments import __main__ as command
from experiments.training import train
from experiments.training.presets import PRESETS, Config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_iters": -1}, "num_iters must be at least 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\)"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_presets_are_defaults_of_the_command_line(monkeypatch):
    configs = []
    monkeypatch.setattr(train, "run", configs.append)
    command.main(["train", "--task", "imdb", "--num-iters", "0"])
    command.main(["train", "--preset", "vit", "--task", "mnist"])
    command.main(["train", "--preset", "sinkformer_imdb", "--resume"])
    imdb, vit, sinkformer = configs
    assert imdb == dataclasses.replace(PRESETS["imdb"], num_iters=0)
    assert vit == dataclasses.replace(PRESETS["vit"], task="mnist")
    assert (sinkformer.depth, sinkformer.width, sinkformer.num_heads) == (6, 256, 8)
    assert sinkformer.mlp_width == 1024
    assert sinkformer.resume
    with pytest.raises(SystemExit, match="no task 'cifar'"):
        command.main(["train", "--task", "cifar"])
