"""Whole trainings of small cells: data, shapes, and accuracies against NumPy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support import study_data, study_double

from experiments.data import load
from experiments.networks import ensemble
from experiments.study import train
from experiments.study.observe import DEFINITIONS, observe

TEXT = dataclasses.replace(study_double.TEXT, num_heads=2, seeds=(0, 3))
DIGITS = dataclasses.replace(TEXT, task="digits", patch_size=4, num_train=40)
DEPTH, NUM_OBSERVATIONS = 2, 3  # With the one before training.


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Random texts; the options with which they are made."""
    yield study_data.install(monkeypatch, tmp_path)
    train.load_data.cache_clear()


@pytest.fixture
def trained(monkeypatch):
    """The parameters before and after each training."""
    seen = []

    def spy(model, params, *arguments, **options):
        before = jax.device_get(params)
        result = spy.train(model, params, *arguments, **options)
        seen.append((before, jax.device_get(result[0])))
        return result

    spy.train = ensemble.train
    monkeypatch.setattr(ensemble, "train", spy)
    return seen


def same_arrays(first, second):
    for name in ("train", "validation"):
        one, other = getattr(first, name), getattr(second, name)
        for field in ("inputs", "lengths", "labels"):
            kept, new = getattr(one, field), getattr(other, field)
            if new is None:
                assert kept is None
            else:
                np.testing.assert_array_equal(kept, new)
                assert kept.dtype == new.dtype
    for field in ("name", "num_classes", "vocab_size"):
        assert getattr(first, field) == getattr(second, field)


def test_texts_that_were_kept_are_those_made_anew(made):
    first = train.load_data(TEXT)
    train.load_data.cache_clear()
    kept = train.load_data(TEXT)
    assert len(made) == 1
    same_arrays(kept, study_data.random_texts(**made[0]))
    same_arrays(first, kept)
    assert len(kept.test) == 0
    for options in ({"seq_len": 5}, {"data_seed": 1}, {"num_validation": 17}):
        train.load_data(dataclasses.replace(TEXT, **options))
    assert len(made) == 4


@pytest.mark.parametrize("size", [100, 0])
# NumPy leaves a file open that is no whole archive.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_is_cut_short_is_made_again(size, made, tmp_path):
    expected = train.load_data(TEXT)
    (path,) = (tmp_path / "runs" / "data").iterdir()
    path.write_bytes(path.read_bytes()[:size])
    train.load_data.cache_clear()
    same_arrays(train.load_data(TEXT), expected)
    assert len(made) == 2


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorflow_datasets")


def test_images_that_were_kept_are_those_made_anew(made, data_dir, monkeypatch):
    monkeypatch.setattr(train, "load", functools.partial(load, data_dir=data_dir))
    train.load_data(DIGITS)
    train.load_data.cache_clear()
    monkeypatch.setattr(train, "load", None)
    kept = train.load_data(DIGITS)
    same_arrays(kept, load("digits", data_dir=data_dir, num_train=40))
    monkeypatch.setattr(train, "load", functools.partial(load, data_dir=data_dir))
    with pytest.raises(ValueError, match="num_validation must be at most 179, got 180"):
        train.load_data(dataclasses.replace(DIGITS, num_validation=180))


def shapes(result):
    return {name: np.shape(each) for name, each in result.items() if name != "paths"}


def expected_shapes(num_seeds, depth, num_observations):
    grid = (num_seeds, num_observations)
    return {
        "updates": (num_observations,),
        "relative_residual": (*grid, depth + 1),
        "words_residual": (*grid, depth + 1),
        "entropy": (*grid, depth),
        "column_defect": (*grid, depth),
        "attention_gradient": (*grid, depth),
        "gradient": (*grid, depth),
        "train_loss": (num_seeds, num_observations - 1),
        "validation_accuracy": (num_seeds,),
        "uniform_accuracy": (num_seeds,),
        "num_parameters": (),
        "max_entropy": (),
    }


def layer_norm(x, params, layer):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normal * params["scale"][layer] + params["bias"][layer]


def uniform_logits(params, words, length):
    """Class logits of a text by NumPy: attention is the mean over valid tokens."""
    x = params["Embed_0"]["embedding"][words] + params["position"]
    x = np.concatenate([params["class_token"][None], x[:length]])
    layers = params["layers"]
    for l in range(DEPTH):
        y = layer_norm(x, layers["LayerNorm_0"], l).mean(axis=0)
        value, out = (layers["attention"][n]["kernel"][l] for n in ("value", "out"))
        x = x + np.einsum("d,dnh,nhe->e", y, value, out)
        y = layer_norm(x, layers["LayerNorm_1"], l)
        for name in ("Dense_0", "Dense_1"):
            y = y @ layers[name]["kernel"][l] + layers[name]["bias"][l]
            y = np.maximum(y, 0) if name == "Dense_0" else y
        x = x + y
    x = layer_norm(x, params["LayerNorm_0"], ...)[0]
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.slow
def test_networks_on_text(made, trained):
    options = {"depth": DEPTH, "learning_rate": 0.1}
    cells = [study_double.cell(TEXT, num_iters=n, **options) for n in (0, 3)]
    softmax, sinkhorn = (train.train_and_measure(cell) for cell in cells)
    for result in (softmax, sinkhorn):
        assert shapes(result) == expected_shapes(2, DEPTH, NUM_OBSERVATIONS)
        assert set(DEFINITIONS) - {"content_residual"} <= set(result)
        assert result["updates"] == [0, 2, 4]
        for name in ("softmax", "Sinkhorn"):
            for kind in ("sampled", "shuffled", "independent"):
                assert np.shape(result["paths"][f"{kind}, {name}"]) == (2, DEPTH)
    # Equal parameters and batches before training; the first layer's input is equal.
    (before, after), (before_sinkhorn, _) = trained
    jax.tree.map(np.testing.assert_array_equal, before, before_sinkhorn)
    first = lambda result, name: np.array(result[name])[:, 0]
    for name in ("relative_residual", "words_residual"):
        np.testing.assert_array_equal(
            first(softmax, name)[:, 0], first(sinkhorn, name)[:, 0]
        )
    assert (first(softmax, "column_defect") > first(sinkhorn, "column_defect")).all()
    # The last observation is of the parameters after the last update.
    data = train.load_data(TEXT)
    model = study_double.encoder(cells[0])
    last = observe(model, after, data.validation.take(slice(8)), has_skip=True)
    for name, values in last.items():
        np.testing.assert_allclose(
            np.array(softmax[name])[:, -1], values, rtol=1e-4, err_msg=name
        )
    # Accuracies.
    np.testing.assert_allclose(
        softmax["validation_accuracy"],
        ensemble.accuracy(model, after, data.validation),
    )
    words, lengths = data.validation.inputs, data.validation.lengths
    assert lengths is not None
    for seed in range(2):
        one = jax.tree.map(lambda x, seed=seed: np.float64(x[seed]), after)
        texts = zip(words, lengths, strict=True)
        logits = np.stack([uniform_logits(one, *each) for each in texts])
        is_right = logits.argmax(axis=1) == data.validation.labels
        assert softmax["uniform_accuracy"][seed] == is_right.mean()
    # Class tokens count; the mean is that of the logarithms.
    most = np.log(lengths[:8] + 1.0).mean()
    np.testing.assert_allclose(softmax["max_entropy"], most)
    sizes = [x.size for x in jax.tree.leaves(after)]
    assert softmax["num_parameters"] == sum(sizes) / 2


@pytest.mark.slow
def test_networks_on_images_without_skips(made, data_dir, monkeypatch, trained):
    monkeypatch.setattr(train, "load", functools.partial(load, data_dir=data_dir))
    sizes = dataclasses.replace(DIGITS, num_steps=2, num_observations=1)
    options = {"depth": DEPTH, "has_skip": False, "pooling": "mean"}
    cell = study_double.cell(sizes, **options)
    result = train.train_and_measure(cell)
    expected = expected_shapes(2, DEPTH, 2)
    expected["content_residual"] = expected["relative_residual"]
    assert shapes(result) == expected
    # Of the images less, at each place, their mean over the images.
    data, model = train.load_data(sizes), cell.encoder(None)
    few = data.validation.take(slice(sizes.num_measured)).inputs
    params = ensemble.init(model, sizes.seeds, data.train)
    apply = jax.jit(functools.partial(model.apply, has_skip=False))
    for seed in range(2):
        one = jax.tree.map(lambda x, seed=seed: x[seed], params)
        hidden = apply({"params": one}, few)[1].hidden_states
        content = np.asarray(hidden, np.float64)
        content -= content.mean(axis=1, keepdims=True)
        norm = lambda x: np.sqrt((x**2).sum(axis=(2, 3)))
        by_image = norm(content - content.mean(axis=2, keepdims=True)) / norm(content)
        np.testing.assert_allclose(
            result["content_residual"][seed][0], np.median(by_image, axis=1), rtol=1e-3
        )
    # Without skip connections products of attention matrices are rounding.
    assert "paths" not in result
    assert result["words_residual"] == result["relative_residual"]
    np.testing.assert_allclose(result["max_entropy"], np.log(4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_network_that_diverged_has_null_in_place_of_numbers(made, monkeypatch):
    def diverge(model, params, *arguments, **options):
        nan = jax.tree.map(lambda x: x.at[1].set(np.nan), params)
        options["observe"](0, params)
        options["observe"](4, nan)
        return nan, np.full((2, 4), np.nan, np.float32)

    monkeypatch.setattr(ensemble, "train", diverge)
    cell = study_double.cell(TEXT, depth=DEPTH, num_iters=0, learning_rate=0.1)
    result = train.train_and_measure(cell)
    assert result["train_loss"] == [[None, None]] * 2
    assert result["relative_residual"][1][1] == [None] * (DEPTH + 1)
    assert None not in result["relative_residual"][0][1]
    decades = result["paths"]["sampled, softmax"]
    assert decades[1] == [None] * DEPTH
    assert None not in decades[0]
