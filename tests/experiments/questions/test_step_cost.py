"""The time of an update: the rounds, the ratios, and files of a small run."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest
from support import study_data, study_double

from experiments.questions import step_cost
from experiments.study import train

SIZES = dataclasses.replace(study_double.TEXT, batch_size=4, seeds=(3, 4))


def test_a_whole_run(monkeypatch, tmp_path):
    study_data.install(monkeypatch, tmp_path)
    config = step_cost.Config(
        sizes=(SIZES,),
        num_iters=(0, 2),
        num_updates=2,
        num_rounds=3,
        output=tmp_path / "new",
    )
    try:
        result = step_cost.run(config)
    finally:
        train.load_data.cache_clear()
    text = (config.output / "step_cost.json").read_text()
    assert json.loads(text) == result
    assert list(step_cost.findings(json.loads(text))) == result["findings"]
    (cell,) = result["cells"]
    assert cell["task"] == "imdb"
    for n in ("0", "2"):
        assert len(cell["seconds"][n]) == 3
        assert min(cell["seconds"][n]) > 0
        ratio = np.divide(cell["seconds"][n], cell["seconds"]["0"])
        np.testing.assert_allclose(cell["ratio"][n], ratio, atol=1e-3)
    image = matplotlib.image.imread(config.output / "step_cost.png")
    assert min(image.shape[:2]) > 300


def test_normalisers_take_turns(monkeypatch, tmp_path):
    rounds, clock = [], [0.0]

    def a_round(sizes, num_iters):
        assert (sizes.seeds, sizes.num_steps, sizes.num_observations) == ((3,), 8, 1)

        def run():
            rounds.append(num_iters)
            # The machine is twice as slow from round to round.
            clock[0] += (1 + num_iters) * 2.0 ** (len(rounds) // 3)

        return run

    monkeypatch.setattr(step_cost, "_round", a_round)
    monkeypatch.setattr(step_cost.time, "perf_counter", lambda: clock[0])
    config = step_cost.Config(
        sizes=(SIZES,), num_iters=(0, 1, 4), num_rounds=2, output=tmp_path
    )
    (cell,) = step_cost.run(config)["cells"]
    assert rounds == [0, 1, 4] * 3  # The first ones compile.
    assert cell["seconds"]["0"] == [2 / 8, 4 / 8]


def test_findings_have_a_limit():
    ratio = {"0": [1.0] * 3, "1": [1.1, 1.12, 1.14], "10": [1.5, 1.52, 1.54]}
    cells = [{"task": "imdb", "ratio": ratio | {"50": [1.0, 1.2, 1.6]}}]
    found = list(step_cost.findings({"cells": cells}))
    verdicts = [each["verdict"] for each in found]
    assert verdicts == ["supported", "not supported", "undecided"]
    assert found[0]["claim"].startswith("an update with Sinkhorn, 1, takes at most 1.3")
    assert "1.12 ± 0.05 (95 % over 3 rounds)" in found[0]["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rounds": 0}, "num_rounds must be at least 1"),
        ({"num_iters": (1, 10)}, "num_iters must increase from 0, softmax"),
        ({"num_iters": (0,)}, "num_iters must increase from 0, softmax"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        step_cost.Config(**options)
