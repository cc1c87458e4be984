"""The main experiment: a whole run, options, findings."""

import json
import math

import jax
import matplotlib.image
import numpy as np
import pytest

from experiments.networks.measures import FLOAT32_FLOOR
from experiments.questions import rank_decay

# Some hundred float32 roundings through a few layers.
ATOL = 2e-5


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_rank_decay_from_its_options_to_its_files(tmp_path, capsys):
    config = rank_decay.Config(
        depth=2,
        width=8,
        seq_len=12,
        vocab_size=200,
        num_train=20,
        num_validation=20,
        num_measured=4,
        num_steps=3,
        batch_size=4,
        num_iters=4,
        layer_norm="none",
        seeds=(0, 5),
        output=tmp_path / "new" / "folder",
    )
    result = rank_decay.run(config)
    loaded = json.loads((config.output / "rank_decay.json").read_text())
    assert loaded == json.loads(json.dumps(result))
    assert loaded["config"]["seeds"] == [0, 5]
    assert {"jax", "flax", "sinkhorn_jax", "python", "device", "commit"} <= set(
        loaded["environment"]
    )
    assert loaded["wall_time_s"] > 0
    assert len(loaded["runs"]) == 8
    for run in loaded["runs"]:
        assert np.shape(run["train_loss"]) == (2, 3)
        for name in ("train_accuracy", "validation_accuracy"):
            assert np.shape(run[name]) == (2,)
        for phase in ("init", "trained"):
            measured = run[phase]
            assert np.shape(measured["relative_residual"]) == (2, 3)
            assert np.shape(measured["attention_entropy"]) == (2, 2)
            assert np.shape(measured["column_defect"]) == (2, 2)
            np.testing.assert_allclose(measured["row_defect"], 0, atol=1e-5)
            assert all(np.isfinite(values).all() for values in measured.values())
            entropy = np.array(measured["attention_entropy"])
            assert (entropy <= loaded["data"]["max_entropy"] + ATOL).all()
            is_pure = run["architecture"] == "pure attention"
            assert ("log10_relative_residual" in measured) == is_pure
            if is_pure:  # Float32 sees the first layer, and the recursion agrees.
                logs = np.log10(np.array(measured["relative_residual"])[:, :2])
                recursion = np.array(measured["log10_relative_residual"])
                np.testing.assert_allclose(logs, recursion[:, :2], atol=0.05)
                assert (recursion[:, 2] < -7).all()
    claims = [finding["claim"].split(" (")[0] for finding in loaded["findings"]]
    assert claims.count("skip connections preserve rank") == 2  # With MLPs; else pure.
    assert claims.count("Sinkhorn preserves rank better than softmax") == 2
    pairs = {(run["architecture"], run["normaliser"]) for run in loaded["runs"]}
    assert len(pairs) == 8
    image = matplotlib.image.imread(config.output / "rank_decay.png")
    assert min(image.shape[:2]) > 500
    assert image.std() > 0.01
    printed = capsys.readouterr().out
    assert all(finding["text"] in printed for finding in loaded["findings"])
    assert str(config.output) in printed


DEPTH = 4
NOISE = np.array([0.99, 1.0, 1.01])  # Of three seeds.


def phase(last):
    """Measures whose last residual is `last`, by seed."""
    residual = np.ones((3, DEPTH + 1))
    residual[:, -1] = last * NOISE
    return {"relative_residual": residual.tolist()}


def result_of(skip_gain, exponents):
    """Networks whose residual with skips is 0.1, for Sinkhorn `skip_gain` times that.

    The decimal logarithms of pure attention are `exponents`, by layer.
    """
    runs = []
    for normaliser, gain in (("softmax", 1.0), ("Sinkhorn", skip_gain)):
        for mlp in ("MLP", "no MLP"):
            for skip, last in (("skip", 0.1 * gain), ("no skip", FLOAT32_FLOOR / 9)):
                run = {"architecture": f"{skip}, {mlp}", "trained": phase(last)}
                runs.append(run | {"normaliser": normaliser})
        pure = {"log10_relative_residual": [[0, *exponents]] * 3}
        run = {"architecture": "pure attention", "trained": pure}
        runs.append(run | {"normaliser": normaliser})
    return {"runs": runs}


def verdicts_of(result):
    return {f["claim"]: f["verdict"] for f in rank_decay.findings(result)}


@pytest.mark.parametrize(
    ("gain", "expected"),
    [(3, "supported"), (1 / 3, "not supported"), (1, "undecided")],
)
def test_findings_follow_the_residuals_of_networks_with_skips(gain, expected):
    verdicts = verdicts_of(result_of(gain, [-1, -4, -13, -40]))
    assert len(verdicts) == 8
    better = "Sinkhorn preserves rank better than softmax (skip, no MLP)"
    assert verdicts[better] == expected
    assert verdicts["skip connections preserve rank (Sinkhorn, MLP)"] == "supported"


def test_a_claim_about_pure_attention_follows_the_growth_of_the_exponent():
    claim = "pure attention decays doubly exponentially (softmax)"
    found = rank_decay.findings(result_of(1, [-1, -4, -13, -40]))
    (pure,) = (f for f in found if f["claim"] == claim)
    assert pure["verdict"] == "supported"
    assert "falls by 3.000 ± 0.000 times" in pure["text"]
    slower = verdicts_of(result_of(1, [-1, -2, -3, -3.5]))
    assert slower[claim] == "not supported"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_iters": 0}, "num_iters must be at least 1"),
        ({"seeds": ()}, "seeds must be distinct"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
        ({"num_measured": 99, "num_validation": 9}, "must not exceed"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"learning_rate": math.inf}, "learning_rate must be"),
        ({"seeds": (-1, 0)}, "seeds must be at least 0"),
        ({"width": 33}, "width must be a multiple of num_heads"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rank_decay.Config(**options)
