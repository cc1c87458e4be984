"""Sinkhorn's iterations and their rate: the defect, a whole run, options."""

import json

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import __main__ as command
from experiments import convergence
from sinkhorn_jax import sinkhorn


def test_the_defect_is_that_of_the_plans():
    logits = jnp.asarray(convergence.logits_of(0, 6, 4, 3.0)[None])
    np.testing.assert_allclose(logits.std(), 3.0)
    defects, plan = convergence.follow(logits, 3)
    for k in (0, 3):
        expected = sinkhorn(logits, k)
        defect = np.abs(np.asarray(expected).sum(axis=1) - 1).mean()
        np.testing.assert_allclose(defects[0, k], defect, rtol=1e-9)
    # One row step after the last defect.
    np.testing.assert_allclose(plan.sum(axis=-1), 1, rtol=1e-12)


def test_a_whole_run(tmp_path):
    config = convergence.Config(
        deviations=(1.0, 12.0),
        num_tokens=(6,),
        head_dim=4,
        num_iters=60,
        enough=10,
        timed_iters=(0, 2),
        num_repeats=2,
        seeds=(0, 1, 2),
        output=tmp_path / "new",
    )
    result = convergence.run(config)
    text = (config.output / "convergence.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    small, large = result["cells"]
    np.testing.assert_allclose(
        np.log(small["measured_rate"]), np.log(small["predicted_rate"]), rtol=0.3
    )
    assert max(small["defect_at_enough"]) < 1e-3 < max(large["defect_at_enough"])
    verdicts = [f["verdict"] for f in result["findings"]]
    assert verdicts[0] == "supported"
    assert all(len(t["milliseconds"]) == 2 for t in result["times"])
    assert config.enough in result["iterations"]
    image = matplotlib.image.imread(config.output / "convergence.png")
    assert min(image.shape[:2]) > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iters": 50}, "num_iters must exceed enough = 50, got 50"),
        ({"timed_iters": (5,)}, "timed_iters hold 0"),
        ({"deviations": (0.0,)}, "deviations must be > 0"),
        ({"num_tokens": (1,)}, "num_tokens must be at least 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        convergence.Config(**options)


def test_command_line(monkeypatch):
    configs = []
    monkeypatch.setattr(convergence, "run", configs.append)
    command.main(["convergence", "--enough", "20"])
    assert configs == [convergence.Config(enough=20)]
