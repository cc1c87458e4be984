"""Sinkhorn's iterations and their rate: the defect, a whole run, options."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments.data import Examples
from experiments.networks import ensemble
from experiments.networks.encoder import Encoder, apply_with_plans
from experiments.networks.measures import attention_logits
from experiments.questions import convergence
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
        num_steps=0,
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


TINY = dict(
    num_steps=2,
    learning_rates=(0.1,),
    trained_iters=2,
    trained_tokens=(6, 12),
    depth=2,
    width=8,
    vocab_size=100,
    num_train=60,
    num_measured=2,
    batch_size=4,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with networks, in which nothing else takes time."""
    config = convergence.Config(
        **TINY,
        deviations=(1.0,),
        num_tokens=(6,),
        head_dim=4,
        num_iters=60,
        enough=10,
        timed_iters=(0,),
        num_repeats=1,
        seeds=(0, 1),
        output=tmp_path_factory.mktemp("trained"),
    )
    return config, convergence.run(config)


@pytest.mark.few(1)
def test_networks_before_and_after_training(trained):
    config, result = trained
    text = (config.output / "convergence.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    networks = {(c["learning_rate"], c["num_tokens"]): c for c in result["networks"]}
    assert list(networks) == [(None, 6), (None, 12), (0.1, 6), (0.1, 12)]
    for cell in networks.values():
        assert np.shape(cell["defect"]) == (2, len(result["iterations"]))
        # Layers, measured reviews and heads.
        assert np.shape(cell["predicted_rate"]) == (2, 2 * 2 * 2)
        worst = np.max(cell["defect_at_enough"], axis=1)
        np.testing.assert_array_equal(cell["worst_at_enough"], worst)
    before, after = networks[None, 12], networks[0.1, 12]
    assert np.not_equal(before["deviation"], after["deviation"]).all()
    assert before["train_loss"] is None
    # One a seed: not far above that of guessing.
    loss = np.array(after["train_loss"])
    assert loss.shape == (2,)
    assert ((loss > 0) & (loss < np.log(2) + 0.3)).all()
    found = [f for f in result["findings"] if "Training makes" in f["claim"]]
    change = np.log10(after["worst_at_trained"]) - np.log10(before["worst_at_trained"])
    np.testing.assert_allclose(found[1]["mean"], change.mean())
    image = matplotlib.image.imread(config.output / "convergence.png")
    assert image.shape[1] > 1.5 * image.shape[0]  # Three panels beside each other.


@pytest.mark.slow
def test_the_logits_are_those_of_the_attention():
    model = Encoder(vocab_size=9, seq_len=7, depth=2, width=8, num_heads=2, num_iters=3)
    words = np.random.default_rng(0).integers(2, 9, size=(3, 7), dtype=np.int32)
    texts = Examples(inputs=words, lengths=np.full(3, 7, np.int32), labels=words[:, 0])
    params = ensemble.init(model, (0, 1), texts)
    # LayerNorm starts as the identity, under which a wrong scale would go unseen.
    noise = np.random.default_rng(1)
    params["layers"]["LayerNorm_0"] = {
        name: np.float32(noise.normal(1.0, 0.5, x.shape))
        for name, x in params["layers"]["LayerNorm_0"].items()
    }
    logits = attention_logits(model, params, words[:, :5])
    assert logits.shape == (2, 2, 3, 2, 5, 5)
    for seed in (0, 1):
        one = jax.tree.map(lambda x, s=seed: x[s], params)
        lengths = jnp.full(3, 5, jnp.int32)
        _, (_, plans, _) = apply_with_plans(model, one, words[:, :5], lengths)
        expected = sinkhorn(jnp.asarray(logits[seed]), 3)
        np.testing.assert_allclose(plans, expected, atol=2e-6)


def test_too_few_long_reviews_are_refused():
    config = convergence.Config(**TINY | {"num_measured": 300})
    with pytest.raises(ValueError, match=r"num_measured must be at most \d+, .* 300"):
        config.long_reviews(32, config.num_measured)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iters": 50}, "num_iters must exceed enough = 50, got 50"),
        ({"timed_iters": (5,)}, "timed_iters must hold 0"),
        ({"deviations": (0.0,)}, "deviations must be positive"),
        ({"learning_rates": ()}, "learning_rates must be distinct, at least one"),
        ({"num_tokens": (1,)}, "num_tokens must be at least 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        convergence.Config(**options)
