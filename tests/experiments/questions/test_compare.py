"""The comparison of normalisers: cells, search, table, figure, baseline, times."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from experiments.data import Data, Examples
from experiments.questions import compare
from experiments.training import bag_of_words as baseline
from experiments.training import presets, step_times


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    sizes = dict(depth=1, width=8, num_heads=2, mlp_width=8)
    options = dict(num_train=40, num_steps=4, batch_size=8, num_measured=4)
    config = dataclasses.replace(
        compare.QUICK,
        num_iters=(0, 2),
        learning_rates=(1e-3, 1e-9),
        base=dataclasses.replace(presets.QUICK, **sizes, **options, data_dir=folder),
        runs=folder / "runs",
        output=folder / "out",
    )
    return config, compare.run(config)


def test_a_comparison_from_its_options_to_its_files(quick, capsys):
    config, result = quick
    assert json.loads((config.output / "quick.json").read_text()) == result
    assert len(result["cells"]) == 2 * 3
    parameters = {cell["num_parameters"] for cell in result["cells"]}
    assert len(parameters) == 1
    for num_iters in (0, 2):
        runs = compare.chosen(result, num_iters)
        assert [cell["seed"] for cell in runs] == [0, 1]
        search = [
            cell
            for cell in result["cells"]
            if cell["num_iters"] == num_iters and cell["seed"] == 0
        ]
        assert [cell["learning_rate"] for cell in search] == [1e-3, 1e-9]
        best = max(cell["validation_accuracy"] for cell in search)
        assert runs[0]["validation_accuracy"] == best
    assert result["step_times"]["0"]["ratio"] == 1
    assert result["step_times"]["2"]["seconds"] > 0
    image = matplotlib.image.imread(config.output / "quick.png")
    assert min(image.shape[:2]) > 400
    assert image.std() > 0.01
    # Again: nothing is trained, the same comes out.
    again = compare.run(config)
    assert again["cells"] == result["cells"]
    lines = compare.table(result)
    assert all(line in capsys.readouterr().out.splitlines() for line in lines[:1])
    assert len(lines) == 4
    found = result["findings"]
    assert [f["claim"].split(" (")[1] for f in found] == ["quick, 2 iterations)"] * 3
    runs = {n: compare.chosen(result, n) for n in (0, 2)}
    gain = np.diff([np.mean([c["test_accuracy"] for c in runs[n]]) for n in (0, 2)])
    assert f"a difference of {gain[0]:.3f} ± " in found[0]["text"]


def test_claims_are_about_the_chosen_runs():
    def cell(num_iters, seed, accuracy, residual):
        trained = {"relative_residual": [1, residual], "attention_entropy": [1, 2]}
        return {
            "num_iters": num_iters,
            "learning_rate": 0.1,
            "seed": seed,
            "test_accuracy": accuracy,
            "trained": trained,
        }

    noise = (-0.01, 0.0, 0.01)
    result = {
        "preset": "digits",
        "config": {"num_iters": [0, 5]},
        "learning_rates": {"0": 0.1, "5": 0.1},
        "cells": [
            cell(0, 9, 0.0, 9.0) | {"learning_rate": 0.2},  # Was not chosen.
            *[cell(0, i, 0.9 + x, 0.5 + x) for i, x in enumerate(noise)],
            *[cell(5, i, 0.8 + x, 0.8 + x) for i, x in enumerate(noise)],
        ],
    }
    found = list(compare.findings(result))
    assert [f["verdict"] for f in found] == ["not supported", "supported", "undecided"]
    assert "0.800 ± 0.025 against 0.900 ± 0.025" in found[0]["text"]
    assert "difference of 0.300 ± 0.023" in found[1]["text"]


def test_times_need_softmax():
    with pytest.raises(ValueError, match="must hold 0"):
        step_times.measure_step_times(presets.QUICK, (10,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iters": (10,)}, "must hold 0"),
        ({"seeds": ()}, "seeds must be distinct"),
        ({"learning_rates": (0.1, 0.1)}, "learning_rates must be distinct"),
        (
            {"base": dataclasses.replace(presets.QUICK, num_measured=0)},
            "num_measured must be positive",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare.Config(**options)


def test_bag_of_words_learns_what_words_tell(monkeypatch):
    rng = np.random.default_rng(0)

    def texts(num):
        labels = rng.integers(0, 2, num).astype(np.int32)
        inputs = rng.integers(2, 30, (num, 12)).astype(np.int32)
        inputs[:, 0] = 30 + labels  # A word for each class, before the padding.
        inputs[:, 8:] = 30 + rng.integers(0, 2, (num, 4))  # Padding, not to be read.
        lengths = np.full(num, 8, np.int32)
        return Examples(inputs=inputs, lengths=lengths, labels=labels)

    data = Data(
        name="x",
        train=texts(300),
        validation=texts(60),
        test=texts(60),
        num_classes=2,
        vocab_size=32,
    )
    monkeypatch.setattr(baseline, "load_data", lambda config: data)
    result = baseline.bag_of_words(presets.PRESETS["imdb"])
    assert result["test_accuracy"] > 0.95
    assert result["validation_accuracy"] > 0.95
