"""The demo from options to files, with made-up results in place of trainings."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest
from support import study_double

from experiments.questions import demo

SIZES = dataclasses.replace(study_double.TEXT, num_observations=1, seeds=(0, 1))


def measure(cell):
    residual = {(True, 0): 0.2, (True, 4): 0.4, (False, 0): 1e-7, (False, 4): 3e-4}
    return study_double.made_up(
        cell,
        residual=residual[cell.has_skip, cell.num_iters],
        accuracy=0.8 if cell.num_iters else 0.7,
    )


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train_and_measure", measure)
    return demo.Config(sizes=SIZES, num_iters=4, output=tmp_path / "new")


def test_from_options_to_files(config, capsys):
    result = demo.run(config)
    assert json.loads((config.output / "demo.json").read_text()) == result
    assert result["findings"] == []
    rates = {c["name"]: (c["has_skip"], c["learning_rate"]) for c in result["curves"]}
    assert sorted(rates.values()) == [(False, 1e-3)] * 2 + [(True, 1e-2)] * 2
    image = matplotlib.image.imread(config.output / "demo.png")
    assert min(image.shape[:2]) > 400
    printed = capsys.readouterr().out
    with_skips, without, alone = demo.seen(result)
    for sentence in (with_skips, without, alone):
        assert sentence in printed
    for sentence, kept in (
        (with_skips, ("0.4 and 0.4 of", "0.2 and 0.2 with")),
        (without, ("0.0003 and 0.0003 of", "1e-07 and 1e-07 with")),
    ):
        for part in kept:
            assert part in sentence
        assert "accuracy is 0.80 and 0.80, and 0.70 and 0.70." in sentence
    assert with_skips.startswith("With skip connections")
    assert without.startswith("Without skip connections")
    for name in ("Sinkhorn", "softmax"):
        curves = np.array(result["pure"][name])
        assert curves.shape == (2, SIZES.depth + 1)
        assert (np.diff(curves[:, -3:]) < -1).all()  # It has collapsed.
        assert f"10^{np.median(curves[:, -1]):.0f}" in alone


def test_a_second_run_waits(config, monkeypatch):
    refused = []

    def compute(cell):
        if not refused:
            refused.append(True)
            with pytest.raises(BlockingIOError, match=r"Another run writes to .*new"):
                demo.run(config)
        return measure(cell)

    monkeypatch.setattr(demo, "train_and_measure", compute)
    assert demo.run(config)["curves"]
    assert refused == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iters": 0}, "num_iters must be at least 1"),
        ({"pure_tokens": 1}, "pure_tokens must be at least 2"),
        ({"skip_rate": 0.0}, "skip_rate must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        demo.Config(**options)


@pytest.mark.slow
def test_a_quick_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo.run(demo.QUICK)
    assert (tmp_path / demo.QUICK.output / "demo.png").exists()
