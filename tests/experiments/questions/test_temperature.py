"""The experiment on equal entropies: interpolation, findings, files."""

import json

import matplotlib.image
import numpy as np
import pytest
from support import digit_double

from experiments.questions import temperature


def test_interpolation_is_by_seed_and_never_beyond():
    x = np.array([[3.0, 3.0], [1.0, 1.0], [2.0, 2.0]])  # In any order.
    y = np.array([[30.0, 0.3], [10.0, 0.1], [20.0, 0.5]])
    actual = temperature.interpolate(np.array([1.5, 2.5]), x, y)
    np.testing.assert_allclose(actual, [15, 0.4])
    beyond = temperature.interpolate(np.array([0.9, 3.1]), x, y)
    assert np.isnan(beyond).all()


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(entropy_of_sinkhorn):
        def measure(model, trained):
            if model.num_iters:
                assert model == trained
                return 0.8, entropy_of_sinkhorn, 0.9
            # Softmax has 3, 2, 1 nats; trained so, it keeps the residual of Sinkhorn
            # at 2.5 nats, scaled after training it does not.
            entropy = {0.25: 3.0, 0.5: 2.0, 1.0: 1.0}[model.logit_scale]
            if model == trained:
                return 0.3 + 0.2 * entropy, entropy, 0.9
            assert trained.logit_scale == 1
            return 0.1, entropy, 0.1

        digit_double.install(monkeypatch, measure)
        config = temperature.Config(factors=(0.25, 0.5, 1.0), output=tmp_path / "new")
        result = temperature.run(config)
        return config, result, {f["claim"]: f for f in result["findings"]}

    return run


def test_from_options_to_files(run):
    config, result, found = run(2.6)
    text = (config.output / "temperature.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    assert len(result["softmax_trained"]) == len(result["softmax_scaled"]) == 3
    plain = "Sinkhorn preserves rank better than softmax (factor 1)"
    assert found[plain]["verdict"] == "supported"
    trained = "Sinkhorn preserves rank better than softmax trained to the same entropy"
    assert found[trained]["verdict"] == "not supported"
    assert "a difference by seed of -0.020 ± 0.000" in found[trained]["text"]
    assert "at 2.80 nats (5 of 5 seeds enclosed)" in found[trained]["text"]
    scaled = trained.replace("trained to", "scaled to") + " after training"
    assert found[scaled]["verdict"] == "supported"
    quarter = "softmax with 1/4 of the logits preserves rank better than with all"
    assert found[quarter]["verdict"] == "supported"
    image = matplotlib.image.imread(config.output / "temperature.png")
    assert min(image.shape[:2]) > 500


def test_entropies_that_are_not_enclosed_decide_nothing(run):
    _, _, found = run(4.0)
    trained = "Sinkhorn preserves rank better than softmax trained to the same entropy"
    assert found[trained]["verdict"] == "undecided"
    assert "0 of 5 seeds enclosed" in found[trained]["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iters": 0}, "num_iters must be at least 1"),
        ({"factors": (1.0,)}, "factors must hold 1, plain softmax, and another"),
        ({"factors": (0.0, 1.0)}, "factors must be positive"),
        ({"factors": (1.0, 0.5)}, "factors must be increasing"),
        ({"factors": (0.5, 2.0)}, "factors must hold 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        temperature.Config(**options)
