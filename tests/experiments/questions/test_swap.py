"""The experiment on swapped normalisers: every pair, findings, files."""

import json

import matplotlib.image
import pytest
from support import digit_double

from experiments.questions import swap


@pytest.fixture
def result(monkeypatch, tmp_path):
    def measure(model, trained):
        # The weights give 0.3, the plan takes 0.1; swaps cost accuracy.
        residual = 0.5 + 0.3 * (trained.num_iters > 0) - 0.1 * (model.num_iters > 0)
        return residual, 1.0 + model.num_iters, 0.9 - 0.2 * (model != trained)

    digit_double.install(monkeypatch, measure)
    config = swap.Config(num_iters=(0, 2), output=tmp_path / "new")
    return config, swap.run(config)


def test_from_options_to_files(result):
    config, result = result
    text = (config.output / "swap.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    pairs = [(c["trained_with"], c["evaluated_with"]) for c in result["cells"]]
    assert pairs == [(0, 0), (0, 2), (2, 0), (2, 2)]
    entropy = [c["attention_entropy"][0][0] for c in result["cells"]]
    assert entropy == [1.0, 3.0, 1.0, 3.0]
    image = matplotlib.image.imread(config.output / "swap.png")
    assert min(image.shape[:2]) > 500


def test_findings(result):
    verdicts = {f["claim"]: f["verdict"] for f in result[1]["findings"]}
    assert verdicts == {
        "trained and evaluated with Sinkhorn, 2, networks preserve rank better": (
            "supported"
        ),
        "swapping softmax for Sinkhorn, 2 after training preserves rank better": (
            "not supported"
        ),
        "weights trained with Sinkhorn, 2 preserve rank better, even with softmax": (
            "supported"
        ),
        "more of the gain of Sinkhorn, 2 is in the weights than in the swap": (
            "supported"
        ),
        "Sinkhorn, 2 classifies better than softmax on the latter's weights": (
            "not supported"
        ),
        "softmax classifies better than Sinkhorn, 2 on the latter's weights": (
            "not supported"
        ),
    }


@pytest.mark.parametrize("num_iters", [(0,), (1, 2), (0, 2, 1)])
def test_bad_options_are_refused(num_iters):
    with pytest.raises(ValueError, match="num_iters must increase from 0"):
        swap.Config(num_iters=num_iters)
