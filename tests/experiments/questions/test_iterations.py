"""The experiment on the number of half steps: options, findings, files."""

import json

import matplotlib.image
import numpy as np
import pytest
from support import digit_double

from experiments.questions import iterations


def test_half_steps_are_full_iterations_and_a_finish():
    options = [iterations.attention(n) for n in (1, 2, 3, 21)]
    expected = [(0, "rows"), (1, "columns"), (1, "rows"), (10, "rows")]
    assert [tuple(o.values()) for o in options] == expected


@pytest.fixture
def result(monkeypatch, tmp_path):
    # By half step; the last has no more than the third.
    values = {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.6, 7: 0.8}

    def measure(model, trained):
        n = 2 * model.num_iters + (model.finish == "rows")
        assert trained in (None, model)
        return values[n], 1.0, 0.9 if n == 1 else 0.8

    digit_double.install(monkeypatch, measure)
    config = iterations.Config(half_steps=tuple(values), output=tmp_path / "new")
    return config, iterations.run(config)


def test_from_options_to_files(result):
    config, result = result
    text = (config.output / "iterations.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    assert [c["half_steps"] for c in result["cells"]] == [1, 2, 3, 4, 7]
    assert np.shape(result["cells"][0]["init"]["relative_residual"]) == (5, 2)
    image = matplotlib.image.imread(config.output / "iterations.png")
    assert min(image.shape[:2]) > 500


def test_findings(result):
    found = {f["claim"]: f for f in result[1]["findings"]}
    better = found["2 half steps preserve rank better than softmax (digits)"]
    assert better["verdict"] == "supported"
    assert "a difference by seed of 0.400 ± 0.000" in better["text"]
    half = "{} half steps have more than half of the effect of 7"
    assert found[half.format(3)]["verdict"] == "supported"
    assert found[half.format(4)]["verdict"] == "not supported"
    row = "a row step after the columns lowers the residual (2 half steps)"
    assert found[row]["verdict"] == "supported"
    assert row.replace("(2", "(4") not in found  # 5 half steps were not trained.
    assert "7 half steps preserve rank better than 3" in found
    classify = found["7 half steps classify better than softmax (digits)"]
    assert classify["verdict"] == "not supported"


@pytest.mark.parametrize("half_steps", [(1,), (2, 3), (1, 3, 2), (1, 1, 2)])
def test_bad_options_are_refused(half_steps):
    with pytest.raises(ValueError, match="half_steps must increase from 1"):
        iterations.Config(half_steps=half_steps)
