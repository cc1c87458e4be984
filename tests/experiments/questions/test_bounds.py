"""The bounds against measured residuals: a whole run, a violation, options."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from experiments.questions import bounds

SMALL = dict(depth=2, num_tokens=6, width=4, token_scales=(1.0,), seeds=(0, 1, 2))


def test_a_whole_run(tmp_path):
    config = bounds.Config(**SMALL, num_iters=(0, 10), output=tmp_path / "new")
    result = bounds.run(config)
    text = (config.output / "bounds.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    softmax, sinkhorn = result["cells"]
    names = ["column sums", "own, softmax", "Dong", "reported"]
    assert [b["name"] for b in softmax["bounds"]] == names
    names[1:2] = ["own, sinkhorn", "own, Sinkhorn limit"]
    assert [b["name"] for b in sinkhorn["bounds"]] == names
    for cell in result["cells"]:
        for bound in cell["bounds"]:
            assert np.shape(bound["log10_residual"]) == (3, 3)
            assert np.shape(bound["log10_step"]) == (3, 2)
        # Those with a proof for these networks.
        for bound in cell["bounds"][:2]:
            assert bound["violations_step"] == bound.get("violations_depth", 0) == 0
            assert bound["num_step"] > 0
        own = cell["bounds"][1]
        # The first step starts from the input, as the bound over depth does.
        step, depth = np.array(own["log10_step"]), np.array(own["log10_depth"])
        np.testing.assert_allclose(step[:, 0], depth[:, 0])
        assert (depth[:, 1] >= step[:, 1]).all()
    image = matplotlib.image.imread(config.output / "bounds.png")
    assert min(image.shape[:2]) > 400


def test_violations_are_counted_and_refute_the_claim(tmp_path):
    config = bounds.Config(
        **SMALL, num_iters=(0,), prefactor=1e-9, output=tmp_path / "low"
    )
    result = bounds.run(config)
    reported = result["cells"][0]["bounds"][-1]
    assert reported["violations_step"] == reported["num_step"] == 6
    found = [f for f in result["findings"] if "'reported' holds" in f["claim"]]
    assert [f["verdict"] for f in found] == ["not supported"]
    assert found[0]["text"].startswith("6 of 6 layers violate it")


def test_the_least_lambda_is_the_one_with_which_the_bound_is_met(tmp_path):
    config = bounds.Config(**SMALL, num_iters=(10,), output=tmp_path / "new")
    result = bounds.run(config)
    (text,) = (
        f["text"] for f in result["findings"] if "'reported' holds" in f["claim"]
    )
    least = float(text.rpartition("lambda from ")[2].partition(" ")[0])
    assert 0 < least < 1
    for factor, verdict in ((1.1, "supported"), (0.9, "not supported")):
        changed = dataclasses.replace(config, prefactor=least * factor)
        found = bounds.run(changed)["findings"]
        (again,) = (f for f in found if "'reported' holds" in f["claim"])
        assert again["verdict"] == verdict


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of num_heads"):
        bounds.Config(width=9)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        bounds.Config(depth=0)
    with pytest.raises(ValueError, match=r"prefactor must be in \(0, 1\], got 2"):
        bounds.Config(prefactor=2.0)
