"""The decay of pure attention: the law, a whole run, options."""

import json

import matplotlib.image
import numpy as np
import pytest

from experiments.networks.options import Network
from experiments.networks.pure_attention import Weights, follow, random_problem
from experiments.questions import doubly_exponential


@pytest.mark.parametrize("num_iters", [0, 2])
def test_small_residuals_have_the_factor_of_the_cubic_law(num_iters):
    x, weights = random_problem(0, 6, Network(depth=1, width=4, num_heads=2), 1e-4)
    before, after = follow(x, weights, num_iters)
    factor = np.exp(after.log_scale - 3 * before.log_scale)
    layer = Weights(*(w[0] for w in weights))
    expected = doubly_exponential.cubic_factor(before, layer)
    np.testing.assert_allclose(factor, expected, rtol=1e-3)


def test_a_whole_run(tmp_path, capsys):
    config = doubly_exponential.Config(
        depth=6,
        num_tokens=6,
        width=4,
        token_scales=(0.1,),
        num_iters=(0, 1),
        fit_from=3,
        seeds=(0, 1, 2),
        output=tmp_path / "new",
    )
    result = doubly_exponential.run(config)
    text = (config.output / "doubly_exponential.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    assert len(result["cells"]) == 2
    for cell in result["cells"]:
        logs = np.array(cell["log10_relative_residual"])
        assert logs.shape == (3, 7)
        # The factors are the differences of these, but for the mean token's norm.
        np.testing.assert_allclose(cell["base"], 3, atol=0.1)
        np.testing.assert_allclose(np.array(cell["ratio"])[:, 2:], 1, rtol=1e-6)
    verdicts = {"supported", "not supported", "undecided"}
    assert {f["verdict"] for f in result["findings"]} <= verdicts
    assert all(f["half_width"] >= 0 for f in result["findings"])
    image = matplotlib.image.imread(config.output / "doubly_exponential.png")
    assert min(image.shape[:2]) > 400
    assert "cubic law" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 30}, "from fit_from [+] 2 = 8 to 25, got 30"),
        ({"width": 9}, "width must be a multiple of num_heads"),
        ({"seeds": ()}, "seeds must be distinct, at least one"),
        ({"num_iters": (0, -1)}, "num_iters must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        doubly_exponential.Config(**options)
