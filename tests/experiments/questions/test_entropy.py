"""The entropy experiment: observations through training, scaled logits, findings."""

import copy
import dataclasses
import json

import jax
import matplotlib.image
import numpy as np
import pytest

from experiments.questions import entropy


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    config = dataclasses.replace(
        entropy.QUICK,
        depth=1,
        width=8,
        seq_len=12,
        vocab_size=100,
        num_train=60,
        num_measured=4,
        num_steps=4,
        observe_every=2,
        batch_size=4,
        num_iters=2,
        output=tmp_path_factory.mktemp("entropy"),
    )
    return config, entropy.run(config)


def test_from_options_to_files(result):
    config, result = result
    loaded = json.loads((config.output / "entropy.json").read_text())
    assert loaded == json.loads(json.dumps(result))
    assert len(loaded["trained"]) == len(loaded["scaled"]) == 4
    for row in loaded["trained"]:
        for name in ("attention_entropy", "stable_rank"):
            assert np.shape(row[name]) == (2, 3)  # Seeds, and steps 0, 2 and 4.
        assert (
            np.array(row["attention_entropy"]) <= loaded["max_entropy"] + 1e-5
        ).all()
    image = matplotlib.image.imread(config.output / "entropy.png")
    assert min(image.shape[:2]) > 500
    assert image.std() > 0.01


def test_training_starts_at_the_initialisation_and_rates_differ(result):
    result = result[1]
    for normaliser in ("softmax", "Sinkhorn"):
        rows = [r for r in result["trained"] if r["normaliser"] == normaliser]
        first = [np.array(row["attention_entropy"])[:, 0] for row in rows]
        np.testing.assert_array_equal(*first)
        last = [np.array(row["attention_entropy"])[:, -1] for row in rows]
        assert (last[0] != last[1]).all()
        scaled = [r for r in result["scaled"] if r["normaliser"] == normaliser]
        np.testing.assert_allclose(scaled[0]["attention_entropy"], first[0], rtol=1e-6)
        # Larger logits: less entropy.
        assert np.less(scaled[1]["attention_entropy"], first[0]).all()


def test_findings_are_by_seed(result):
    result = copy.deepcopy(result[1])
    for row in result["trained"]:
        seeds = np.array([0.0, 1.0])  # Far apart, but alike under both normalisers.
        gain = 0.1 if row["normaliser"] == "Sinkhorn" else 0.0
        curve = np.stack([seeds, seeds + gain * 0.5, seeds + gain], axis=1)
        row["attention_entropy"] = curve.tolist()
    found = {f["claim"]: f for f in entropy.findings(result)}
    keeps = "Sinkhorn attention keeps more of its entropy in training (rate 0.05)"
    assert found[keeps]["verdict"] == "supported"
    assert "a difference by seed of 0.100 ± 0.000" in found[keeps]["text"]
    lowers = "training lowers the entropy of softmax attention (rate 0.05)"
    assert found[lowers]["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observe_every": 40}, "num_steps must be a multiple of observe_every"),
        ({"num_iters": 0}, "num_iters must be at least 1"),
        ({"learning_rates": (0.1, 0.01)}, "learning_rates must be increasing"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        entropy.Config(**options)
