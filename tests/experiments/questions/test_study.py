"""The study from options to files, with made-up results in place of trainings."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest
from support import study_double

from experiments.networks.pure_attention import random_curves
from experiments.questions import study
from experiments.study import escape
from experiments.study.store import Store

TEXT = dataclasses.replace(study_double.TEXT, seeds=tuple(range(10)))
IMAGES = dataclasses.replace(TEXT, task="fashion_mnist")


def measure(cell):
    """Sinkhorn keeps more rank on text, less on images, and all of it without skips."""
    lead = {"imdb": 2.0, "fashion_mnist": 0.5}[cell.sizes.task]
    residual = 0.1 * (lead if cell.num_iters else 1.0)
    if cell.pooling == "mean" and cell.num_iters:
        residual *= 3
    if not cell.has_skip:
        residual /= 10
    accuracy = 0.5 if cell.layer_norm == "post" else 0.9
    entropy = 0.85 if cell.num_iters else 0.8
    return study_double.made_up(
        cell,
        residual=residual,
        accuracy=accuracy,
        entropy=entropy,
        decades=(0.5, 0.6),
    )


@pytest.fixture
def computed(monkeypatch):
    """The cells that are computed, by `measure`; the data have no linear model."""
    cells = []

    def compute(cell):
        cells.append(cell)
        return measure(cell)

    monkeypatch.setattr(study, "train_and_measure", compute)
    monkeypatch.setattr(study, "load_data", lambda sizes: sizes)
    monkeypatch.setattr(study, "linear_accuracy", lambda data: 0.875)
    return cells


@pytest.fixture
def config(tmp_path):
    return study.Config(
        text=TEXT,
        images=IMAGES,
        rates=(0.001, 0.003),
        no_skip_rates=(0.001, 0.002),
        output=tmp_path / "new",
    )


def run(config):
    """The result of a study that no other process computes."""
    result = study.run(config)
    assert result is not None
    return result


def check_figure(path, least):
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > least
    assert 0.001 < (image[..., :3] < 0.9).mean() < 0.5  # Something is drawn.


def test_from_options_to_files(computed, config, capsys):
    result = run(config)
    # Two rates: pre, post, images, mean and no skip, of two normalisers each.
    assert len(computed) == len(set(computed)) == 5 * 2 * 2
    text = (config.output / "primary.json").read_text()
    assert json.loads(text) == result
    assert list(study.findings(json.loads(text))) == result["findings"]
    assert result["linear_accuracy"] == 0.875
    assert len(result["curves"]) == 20
    rows = {row["name"]: row for row in result["rows"]}
    found = dict(zip(rows, result["findings"], strict=True))
    verdicts = {name: each["verdict"] for name, each in found.items()}
    assert verdicts == {
        "text_pre": "supported",
        "text_no_skip": "supported",
        "skips_softmax": "supported",
        "skips_sinkhorn": "supported",
        "entropy": "supported",
        "pooling": "supported",
        "paths": "not supported",
        "text_post": "untested",
        "images_pre": "not supported",
        "pure": "supported",
    }
    for name, values in {
        "text_pre": "By seed 0.301",
        "skips_softmax": "By seed 1.000",
        "entropy": "By seed 0.050",
        "pooling": "By seed 0.477",
        "paths": "By seed 0.079",
        "images_pre": "By seed -0.301",
        "text_post": "0% of the networks are better than chance",
    }.items():
        assert values in found[name]["text"]
    assert "at rate 0.001: " in found["skips_softmax"]["text"]
    printed = capsys.readouterr().out
    for each in result["findings"]:
        assert f"{each['verdict']}: {each['claim']}\n    {each['text']}" in printed
    for name in ("", "_entropy", "_entropy_images", "_seeds", "_paths"):
        check_figure(config.output / f"primary{name}.png", 400)


def test_pure_attention_triples_the_logarithm():
    curves = random_curves(study.PURE, study.PURE_TOKENS, 10)
    assert curves.shape == (10, 13)
    np.testing.assert_allclose(curves[:, -1] / curves[:, -2], 3, rtol=1e-3)
    (row,) = study.pure_row(curves)["arms"]
    np.testing.assert_allclose(row["values"], np.zeros((1, 10)), atol=0.01)
    tenfold = -(10.0 ** np.arange(13))[None]
    (row,) = study.pure_row(tenfold)["arms"]
    np.testing.assert_allclose(row["values"], [[7]], atol=1e-5)


def test_what_another_process_computes_is_left_to_it(
    computed, config, monkeypatch, capsys
):
    replaced = study.train_and_measure
    inner = []

    def compute(cell):
        # The same command, started a second time.
        if not inner:
            inner.append(cell)
            inner.append(study.run(config))
        return replaced(cell)

    monkeypatch.setattr(study, "train_and_measure", compute)
    assert run(config)
    begun, result = inner
    assert result is None
    printed = capsys.readouterr().out
    assert f"Other processes still compute {begun.name}. They write" in printed
    assert len(computed) == 20


def test_a_partial_result_has_the_cells_there_are(computed, config):
    partial = dataclasses.replace(config, is_partial=True)
    with pytest.raises(FileNotFoundError, match="has no cell of these"):
        run(partial)
    first = config.primary[0]
    cells = [cell for arm in first.arms for cell in arm.cells]
    Store(config.output / "cells").compute(cells, measure)
    result = run(partial)
    assert computed == []
    assert len(result["curves"]) == 4
    tested = [row["name"] for row in result["rows"] if not row["num_missing"]]
    assert tested == ["text_pre", "entropy", "paths", "pure"]
    for row, found in zip(result["rows"], result["findings"], strict=True):
        if row["num_missing"]:
            text = f"{row['num_missing']} of its cells are not trained yet."
            assert (found["verdict"], found["text"]) == ("untested", text)


def test_secondary_contrasts_follow_the_primary_ones(computed, config):
    secondary = dataclasses.replace(config, preset="secondary")
    run(config)
    primary = set(computed)
    result = run(secondary)
    assert not primary & set(computed[20:])
    assert (result["question"], result["preset"]) == ("study", "secondary")
    text = (config.output / "secondary.json").read_text()
    assert study.findings(json.loads(text)) == result["findings"]
    names = [row["name"] for row in result["rows"]]
    found = dict(zip(names, result["findings"], strict=True))
    assert len(found) == len(names)
    assert found["text_pre_rate_0.003"]["verdict"] == "supported"
    assert found["images_iterations_50"]["verdict"] == "not supported"
    assert found["text_pre_accuracy"]["verdict"] == "not supported"  # Equal.
    check_figure(config.output / "secondary.png", 300)
    # The primary cells are still there.
    store = Store(config.output / "cells")
    assert all(store.get(cell) for cell in primary)
    assert len(set(computed)) == len(computed)


def test_secondary_contrasts_need_the_primary_ones(computed, config):
    with pytest.raises(FileNotFoundError, match="Run --preset primary first"):
        run(dataclasses.replace(config, preset="secondary"))


def test_the_follow_up_has_cells_of_its_own(computed, config):
    text = dataclasses.replace(TEXT, seeds=(10, 11, 12))
    options = {"preset": "escape", "text": text, "no_skip_rates": (0.003,)}
    result = run(dataclasses.replace(config, **options))
    assert [cell.num_iters for cell in computed] == [10, 0]
    assert not any(cell.has_skip for cell in computed)
    assert all(cell.name.endswith("-seed10") for cell in computed)
    (found,) = result["findings"]
    assert (found["verdict"], found["claim"]) == ("undecided", escape.CLAIM)
    assert "Of 3 networks each, 3 learn with Sinkhorn and 3" in found["text"]
    check_figure(config.output / "escape.png", 300)


def test_networks_between_the_normalisers(computed, config):
    result = run(dataclasses.replace(config, preset="dial"))
    assert [cell.column_tau for cell in computed] == [0.25, 1.0, 1.0, 0.5, 0.75]
    assert [cell.num_iters for cell in computed] == [10, 0, 10, 10, 10]
    assert {cell.learning_rate for cell in computed} == {0.01}
    assert len(result["findings"]) == 12
    check_figure(config.output / "dial.png", 300)
    names = [row["name"] for row in result["rows"]]
    found = dict(zip(names, result["findings"], strict=True))
    assert found["entropy_0.5"]["verdict"] == "supported"
    assert found["rank_0.5"]["verdict"] == "not supported"


def test_full_sizes(computed, config):
    text = dataclasses.replace(TEXT, seeds=(0, 1, 2))
    full = dataclasses.replace(config, preset="sinkformer_imdb", text=text)
    result = run(full)
    assert [cell.num_iters for cell in computed] == [10, 0, 50]
    assert {cell.learning_rate for cell in computed} == {0.001}
    assert len(result["findings"]) == 2
    check_figure(config.output / "sinkformer_imdb.png", 300)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="must share one, at which skip connections"):
        study.Config(rates=(0.1,), no_skip_rates=(0.2,))
    with pytest.raises(ValueError, match="rates must be increasing"):
        study.Config(rates=(0.01, 0.003))
    with pytest.raises(ValueError, match="rates must be positive"):
        study.Config(rates=(0.0, 0.001))
    with pytest.raises(ValueError, match=r"study takes --preset, .* got 'x'"):
        study.choose("x", None)
    assert study.choose(None, None) == study.Config()
    assert study.choose("vit", None).images == study.VIT


@pytest.mark.slow
def test_a_quick_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study.load_data.cache_clear()
    result = run(study.QUICK)
    assert len(result["findings"]) == 10
