"""The experiments: the encoder, the recursion, a whole run."""

import decimal
import functools
import json
import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import __main__ as command
from experiments.data import Examples
from experiments.evidence import files as record
from experiments.networks import encoder as models
from experiments.networks import ensemble, measures, pure_attention
from experiments.networks.encoder import Encoder
from experiments.networks.pure_attention import Weights, log10_relative_residual
from experiments.questions import rank_decay
from sinkhorn_jax import collapse, sinkhorn_attention

ROOT = pathlib.Path(__file__).parents[2]

# Some hundred float32 roundings through a few layers.
ATOL = 2e-5


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# The encoder.

SMALL = dict(vocab_size=11, seq_len=6, depth=2, width=8, num_heads=2, num_iters=3)


@functools.partial(jax.jit, static_argnums=0, static_argnames="with_plans")
def forward(model, params, tokens, lengths, has_skip=True, with_plans=True):
    options = {"has_skip": has_skip, "with_plans": with_plans}
    return model.apply({"params": params}, tokens, lengths, **options)


def params_of(model):
    params = ensemble.init(model, (0,), model.seq_len)
    # Large embeddings, so that attention is far from uniform.
    params = jax.tree.map(lambda x: x[0], params)
    scale = lambda x: x * jnp.asarray(50, x.dtype)
    embedding = {"embedding": scale(params["Embed_0"]["embedding"])}
    return params | {"Embed_0": embedding, "position": scale(params["position"])}


def test_padding_changes_nothing():
    model = Encoder(**SMALL)
    params = params_of(model)
    tokens = np.array([[3, 4, 5, 6, 0, 0], [7, 8, 9, 10, 1, 2]], np.int32)
    others = np.where([[0, 0, 0, 0, 1, 1]] * 2, 10 - tokens, tokens).astype(np.int32)
    lengths = np.array([4, 4], np.int32)
    crops = forward(model, params, tokens[:, :4], lengths)
    for padded in (tokens, others):
        logits, (hidden, plans, _) = forward(model, params, padded, lengths)
        cropped, (hidden_crop, plans_crop, _) = crops
        np.testing.assert_allclose(logits, cropped, atol=ATOL)
        np.testing.assert_allclose(hidden[:, :, :4], hidden_crop, atol=ATOL)
        np.testing.assert_allclose(plans[..., :4, :4], plans_crop, atol=ATOL)
        np.testing.assert_array_equal(plans[..., 4:, :], 0)
        np.testing.assert_array_equal(plans[..., 4:], 0)


def test_intermediates():
    model = Encoder(**SMALL)
    tokens, lengths = np.ones((3, 6), np.int32), np.array([6, 2, 4], np.int32)
    params = params_of(model)
    logits, (hidden, plans, _) = forward(model, params, tokens, lengths)
    assert logits.shape == (3, 2)
    assert hidden.shape == (3, 3, 6, 8)
    assert plans.shape == (2, 3, 2, 6, 6)
    assert {x.dtype.name for x in (logits, hidden, plans)} == {"float32"}
    rows = np.arange(6) < lengths[:, None]
    sums = np.broadcast_to(rows[None, :, None], (2, 3, 2, 6))
    np.testing.assert_allclose(plans.sum(axis=-1), sums, atol=ATOL)
    without = jax.eval_shape(
        lambda: forward(model, params, tokens, lengths, with_plans=False)
    )
    assert without[1].plans is None


@pytest.mark.parametrize("num_iters", [0, 3])
def test_the_plan_is_the_one_that_attention_applies(num_iters, key):
    q, k, v = (jax.random.normal(k, (2, 6, 2, 4), "float32") * 2 for k in split(key, 3))
    lengths = jnp.asarray([6, 3], jnp.int32)
    out = jax.jit(
        lambda q, k, v: sinkhorn_attention(
            q,
            k,
            v,
            num_iters=num_iters,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
        )
    )(q, k, v)
    plan = models.attention_plan(q, k, lengths, num_iters)
    expected = np.einsum("bnts,bsnh->btnh", plan, v)
    np.testing.assert_allclose(out, expected, atol=ATOL)
    where = models.valid_tokens(lengths, 6)[:, None]
    defect = measures.column_defect(plan, where)
    by_hand = [np.abs(plan[1, n, :3, :3].sum(0) - 1).sum() / 3 for n in range(2)]
    np.testing.assert_allclose(defect[1], by_hand, atol=ATOL)


@pytest.mark.parametrize(
    "options", [{"finish": "columns"}, {"logit_scale": 0.25, "num_iters": 0}]
)
def test_the_encoder_reports_the_plan_that_it_applies(options):
    pure = {"depth": 1, "layer_norm": "none", "has_mlp": False}
    model = Encoder(**SMALL | pure | options)
    tokens, lengths = np.arange(6, dtype=np.int32)[None], np.array([6], np.int32)
    params = params_of(model)
    _, (hidden, plans, _) = forward(model, params, tokens, lengths, has_skip=False)
    kernels = {
        name: np.asarray(layer["kernel"][0], np.float64)
        for name, layer in params["layers"]["attention"].items()
    }
    x = np.asarray(hidden[0, 0], np.float64)
    query, key, value = (
        np.einsum("td,dnh->nth", x, kernels[name]) for name in ("query", "key", "value")
    )
    scale = options.get("logit_scale", 1.0) / 2.0  # The heads' dimension is 4.
    expected = np.exp(scale * query @ key.swapaxes(1, 2))
    expected /= expected.sum(axis=2, keepdims=True)
    for _ in range(model.num_iters):
        expected /= expected.sum(axis=2, keepdims=True)
        expected /= expected.sum(axis=1, keepdims=True)
    assert plans[0, 0].std() > 0.02
    np.testing.assert_allclose(plans[0, 0], expected, atol=ATOL)
    out = np.einsum("nts,nsh,nhd->td", expected, value, kernels["out"])
    np.testing.assert_allclose(hidden[1, 0], out, atol=20 * ATOL)


def split(key, num):
    return list(jax.random.split(key, num))


@pytest.mark.parametrize("layer_norm", ["none", "pre", "post"])
def test_switches_do_what_they_say(layer_norm):
    options = {"num_iters": 0, "has_mlp": False, "layer_norm": layer_norm}
    model = Encoder(**SMALL | options)
    tokens, lengths = np.arange(6, dtype=np.int32)[None], np.array([6], np.int32)
    params = params_of(model)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: x * jnp.asarray("attention" not in str(path), x.dtype), params
    )
    with_skip = forward(model, silent, tokens, lengths, has_skip=True)[1].hidden_states
    without = forward(model, silent, tokens, lengths, has_skip=False)[1].hidden_states
    np.testing.assert_allclose(without[1:], 0, atol=1e-6)
    x = np.asarray(with_skip[0], np.float64)
    normal = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    expected = normal if layer_norm == "post" else x
    np.testing.assert_allclose(with_skip[1], expected, atol=1e-4)
    # LayerNorm hides the scale of its input from the attention.
    larger = params | {
        "Embed_0": {"embedding": params["Embed_0"]["embedding"] * np.float32(4)},
        "position": params["position"] * np.float32(4),
    }
    plans = [forward(model, p, tokens, lengths)[1].plans[0] for p in (params, larger)]
    is_same = np.allclose(*plans, atol=1e-3)
    assert is_same == (layer_norm == "pre")


def test_the_mlp_adds_parameters_and_bad_models_are_refused():
    sizes = [
        models.num_parameters(ensemble.init(Encoder(**SMALL, has_mlp=m), (0,), 6))
        for m in (False, True)
    ]
    norm, mlp = 2 * 8, (8 * 32 + 32) + (32 * 8 + 8)
    assert sizes[1] - sizes[0] == SMALL["depth"] * (mlp + norm)
    with pytest.raises(ValueError, match="layer_norm must be one of"):
        Encoder(**SMALL, layer_norm="before")
    with pytest.raises(ValueError, match="multiple of num_heads"):
        Encoder(**SMALL | {"num_heads": 3})
    with pytest.raises(ValueError, match="needs num_iters of at least 1"):
        Encoder(**SMALL | {"num_iters": 0}, finish="columns")


# Training.


class Bag(nn.Module):
    @nn.compact
    def __call__(self, tokens, lengths, has_skip=True):
        return nn.Embed(4, 2)(tokens).mean(axis=1), None


def test_training_learns_and_seeds_differ():
    labels = np.arange(60, dtype=np.int32) % 2
    data = Examples(
        inputs=np.repeat(labels[:, None] + 2, 3, axis=1),
        lengths=np.full(60, 3, np.int32),
        labels=labels,
    )
    model = Bag()
    params = ensemble.init(model, (0, 1), 3)
    assert ensemble.accuracy(
        model, params, data, has_skip=True, batch_size=32
    ).shape == (2,)
    options = dict(has_skip=True, seeds=(0, 1), batch_size=8, learning_rate=0.1)
    trained, losses = ensemble.train(model, params, data, num_steps=30, **options)
    assert losses.shape == (2, 30)
    assert (losses[0] != losses[1]).any()
    assert losses[:, -1].max() < losses[:, 0].min()
    accuracy = ensemble.accuracy(model, trained, data, has_skip=True, batch_size=32)
    np.testing.assert_array_equal(accuracy, 1)
    _, again = ensemble.train(model, params, data, num_steps=30, **options)
    np.testing.assert_array_equal(losses, again)
    _, none = ensemble.train(model, params, data, num_steps=0, **options)
    assert none.shape == (2, 0)


# The recursion.


def stack(seed=0, depth=5, width=4, heads=2, size=3, scale=0.3, tokens=5):
    rng = np.random.default_rng(seed)
    shapes = [(depth, width, heads, size)] * 3 + [(depth, heads, size, width)]
    weights = Weights(*(rng.normal(size=shape) * 0.7 for shape in shapes))
    return rng.normal(size=(tokens, width)) * scale, weights


def in_decimals(x, weights, num_iters):
    """The relative residuals with 400 digits, by the definition of attention."""
    exact = np.vectorize(lambda v: decimal.Decimal(float(v)), otypes=[object])
    exp = np.vectorize(lambda v: v.exp(), otypes=[object])

    def log10_ratio(x):
        residual = x - x.sum(axis=0) / decimal.Decimal(len(x))
        return float(((residual**2).sum() / (x**2).sum()).sqrt().log10())

    with decimal.localcontext(prec=400):
        x = exact(x)
        ratios = [log10_ratio(x)]
        for layer in zip(*weights, strict=True):
            by_head = [np.moveaxis(w, -2, 0) for w in layer[:3]]
            heads = zip(*by_head, layer[3], strict=True)
            y = 0
            for query, key, value, out in (map(exact, head) for head in heads):
                root = decimal.Decimal(query.shape[1]).sqrt()
                plan = exp((x @ query) @ (x @ key).T / root)
                plan = plan / plan.sum(axis=1, keepdims=True)
                for _ in range(num_iters):
                    plan = plan / plan.sum(axis=0, keepdims=True)
                    plan = plan / plan.sum(axis=1, keepdims=True)
                y = y + plan @ (x @ value) @ out
            x = y
            ratios.append(log10_ratio(x))
    return np.array(ratios)


@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_recursion_agrees_with_400_digits(num_iters, scale):
    x, weights = stack(scale=scale)
    actual = log10_relative_residual(x, weights, num_iters)
    expected = in_decimals(x, weights, num_iters)
    np.testing.assert_allclose(10 ** (actual - expected), 1, rtol=1e-9)
    if scale < 1:
        assert expected[-1] < -70  # Where float64 would have nothing left.


@pytest.mark.parametrize("num_iters", [0, 1, 10])
def test_recursion_is_smooth_where_its_two_ways_meet(num_iters, monkeypatch):
    x, weights = stack(depth=3, tokens=8, scale=1.0)
    results = []
    for bound in (0.0, 1.0, np.inf):
        monkeypatch.setattr(pure_attention, "SMALL", bound)
        results.append(log10_relative_residual(x, weights, num_iters))
    np.testing.assert_allclose(10 ** (results[0] - results[1]), 1, rtol=1e-6)
    np.testing.assert_allclose(10 ** (results[2] - results[1]), 1, rtol=1e-6)


@pytest.mark.parametrize("num_iters", [0, 1, 10])
def test_small_residuals_follow_the_cubic_law(num_iters):
    x, weights = stack(depth=1, heads=1, scale=1e-4)
    query, key, value, out = (w[0] for w in weights)
    res = x - x.mean(axis=0)
    m = (res @ query[:, 0]) @ (res @ key[:, 0]).T / math.sqrt(3)
    m = m - m.mean(axis=0)
    cubed = m @ res @ value[:, 0] @ out[0] / len(x)
    mean = x.mean(axis=0) @ value[:, 0] @ out[0]
    expected = np.linalg.norm(cubed) / np.linalg.norm(mean) / math.sqrt(len(x))
    actual = log10_relative_residual(x, weights, num_iters)[-1]
    np.testing.assert_allclose(10**actual, expected, rtol=1e-3)


@pytest.mark.parametrize("num_iters", [0, 10])
def test_exponents_grow_threefold_far_below_float64(num_iters):
    x, weights = stack(depth=9, tokens=16, scale=0.1)
    logs = log10_relative_residual(x, weights, num_iters)
    assert logs[-1] < -5000
    np.testing.assert_allclose(logs[-3:] / logs[-4:-1], 3, rtol=5e-3)


def test_equal_tokens_have_no_residual_to_follow():
    x, weights = stack()
    with pytest.raises(ValueError, match="All 5 tokens are equal"):
        log10_relative_residual(np.ones_like(x), weights, 0)
    without_queries = weights._replace(query=np.zeros_like(weights.query))
    logs = log10_relative_residual(x, without_queries, 3)
    assert np.isfinite(logs[0])
    assert np.isneginf(logs[1:]).all()


# The whole of rank_decay.


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
    assert all(architecture in printed for architecture, _ in pairs)
    assert str(config.output) in printed


def test_findings_follow_the_residuals():
    result = json.loads(
        (ROOT / "experiments/results/rank_decay/rank_decay.json").read_text()
    )
    found = {f["claim"]: f for f in rank_decay.findings(result)}
    assert len(found) == 8
    pure = found["pure attention decays doubly exponentially (softmax)"]
    assert pure["verdict"] == "supported"
    assert re.search(r"falls by (2\.9|3\.0)", pure["text"])
    skip = "skip connections preserve rank (Sinkhorn, MLP)"
    assert found[skip]["verdict"] == "supported"
    (ours,) = (
        run
        for run in result["runs"]
        if (run["architecture"], run["normaliser"]) == ("skip, no MLP", "Sinkhorn")
    )
    better = "Sinkhorn preserves rank better than softmax (skip, no MLP)"
    residual = np.array(ours["trained"]["relative_residual"])
    for factor, expected in ((3, "supported"), (1 / 3, "not supported")):
        ours["trained"]["relative_residual"] = residual * factor
        verdicts = {f["claim"]: f["verdict"] for f in rank_decay.findings(result)}
        assert verdicts[better] == expected


def test_measures_leave_padding_out():
    model = Encoder(**SMALL | {"num_iters": 0}, layer_norm="none", has_mlp=False)
    params = jax.tree.map(lambda x: x[None], params_of(model))
    lengths = np.array([4, 4], np.int32)
    tokens = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 0]], np.int32)
    measured = [
        measures.measure(
            model,
            params,
            Examples(inputs=t, lengths=lengths, labels=lengths),
            has_skip=True,
        )
        for t in (tokens, tokens[::-1], np.stack([tokens[1]] * 2))
    ]
    for other in measured[1:]:
        for name, values in measured[0].items():
            np.testing.assert_allclose(values, other[name], atol=ATOL)
    x = jnp.asarray(params["Embed_0"]["embedding"][0])[tokens[0, :4]]
    x = x + params["position"][0, :4]
    residual = measured[0]["relative_residual"][0][0]
    np.testing.assert_allclose(residual, collapse.relative_residual(x), rtol=1e-4)


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


def test_command_line(monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(rank_decay, "run", configs.append)
    command.main(["rank_decay"])
    command.main(["rank_decay", "--depth", "3", "--seeds", "4", "5"])
    command.main(["rank_decay", "--quick", "--depth", "3"])
    default, changed, quick = configs
    assert default == rank_decay.Config()
    assert (changed.depth, changed.seeds) == (3, (4, 5))
    assert quick.depth == 3
    assert quick.num_steps == rank_decay.QUICK.num_steps
    assert quick.output != default.output
    with pytest.raises(SystemExit):
        command.main(["rank_decay", "--help"])
    assert "--num-steps" in capsys.readouterr().out


def test_the_command_line_shows_what_was_refused_without_a_traceback(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(
        rank_decay, "run", lambda config: rank_decay.Config(depth=config.depth - 99)
    )
    with pytest.raises(SystemExit, match="error: depth must be at least 1, got -93"):
        command.main(["rank_decay"])
    missing = tmp_path / "missing" / "a.json"
    monkeypatch.setattr(
        rank_decay, "run", lambda config: record.write_json(missing, {})
    )
    with pytest.raises(SystemExit, match=r"error: .*No such file.*missing"):
        command.main(["rank_decay"])
    # A defect keeps its traceback.
    monkeypatch.setattr(rank_decay, "run", lambda config: {}["depth"])
    with pytest.raises(KeyError):
        command.main(["rank_decay"])


def test_environment_without_a_repository(monkeypatch):
    def run(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(record.subprocess, "run", run)
    assert record.environment()["commit"] is None
