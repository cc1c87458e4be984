"""The decay of pure attention: the law, a whole run, options."""

import json

import matplotlib.image
import numpy as np
import pytest

from experiments import __main__ as command
from experiments.evidence import answer
from experiments.networks.pure_attention import Weights, follow, random_problem
from experiments.questions import doubly_exponential


@pytest.mark.parametrize("num_iters", [0, 2])
def test_small_residuals_have_the_factor_of_the_cubic_law(num_iters):
    x, weights = random_problem(
        0, depth=1, num_tokens=6, width=4, num_heads=2, token_scale=1e-4
    )
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


def test_findings_have_the_verdict_of_their_interval():
    values = [1.0, 2.0, 3.0]  # 2 +- 4.303 / sqrt(3), of Student's t.
    mean, width = answer.interval(values)
    np.testing.assert_allclose((mean, width), (2.0, 4.302653 / 3**0.5), rtol=1e-6)
    verdict = lambda **k: answer.finding("claim", "it", values, **k)["verdict"]
    assert verdict(low=-1) == "supported"
    assert verdict(low=1) == "undecided"
    assert verdict(low=5) == "not supported"
    assert verdict(high=-1) == "not supported"
    assert answer.finding("claim", "it", [1.0], low=0.0)["verdict"] == "undecided"
    assert answer.interval([3.0]) == (3.0, None)


def test_command_line(monkeypatch):
    configs = []
    monkeypatch.setattr(doubly_exponential, "run", configs.append)
    command.main(["doubly_exponential", "--depth", "12"])
    assert configs == [doubly_exponential.Config(depth=12)]
