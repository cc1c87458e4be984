"""The grid of networks: what is run, what an interruption loses, its findings."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from experiments.networks import reviews as review_networks
from experiments.networks.measures import FLOAT32_FLOOR
from experiments.networks.reviews import Grid
from experiments.questions import ablations

DEPTH = 3
SEEDS = (0, 1, 2)


def phase(last, entropy=1.0):
    """Measures of every seed whose residual falls from 1 to `last`."""
    last = np.asarray(last)[:, None]
    residual = last ** (np.arange(DEPTH + 1) / DEPTH)
    rest = np.full((len(last), DEPTH), entropy).tolist()
    return {
        "relative_residual": residual.tolist(),
        "relative_residual_spectral": (residual * 0.5).tolist(),
        "relative_residual_1inf": (residual * 2).tolist(),
        "attention_entropy": rest,
        "column_defect": rest,
    }


def residual_of(case):
    """Skips keep a tenth, doubled by LayerNorm and by ten iterations."""
    if not case.has_skip:
        return FLOAT32_FLOOR / 100
    scale = 2.0 if case.layer_norm == "pre" else 1.0
    return 0.1 * scale * (1 + case.num_iters / 10) * (1 if case.has_mlp else 0.9)


class Trained(list):
    limit = None  # After how many it is interrupted.


@pytest.fixture
def trained(monkeypatch):
    """The cases that were trained, in order; training itself is made up."""
    done = Trained()

    def train_and_measure(case, grid, data):
        if len(done) == done.limit:
            raise KeyboardInterrupt
        done.append(case)
        last = residual_of(case) * np.array([0.99, 1.0, 1.01])
        return case._asdict() | {
            "train_accuracy": [0.5] * len(grid.seeds),
            "init": phase(last / 2),
            "trained": phase(last),
        }

    monkeypatch.setattr(review_networks, "train_and_measure", train_and_measure)
    monkeypatch.setattr(Grid, "reviews", lambda self, *sizes: None)
    monkeypatch.setattr(Grid, "measured", lambda self, data: None)
    monkeypatch.setattr(ablations, "max_entropy", lambda measured: 4.0)
    return done


@pytest.fixture
def config(tmp_path):
    return ablations.Config(
        depth=DEPTH,
        num_steps=2,
        num_iters=(1, 10),
        layer_norms=("none", "pre"),
        seeds=SEEDS,
        output=tmp_path / "ablations",
    )


def test_the_grid_has_every_network_once(config):
    cases = list(ablations.cases(config))
    assert len(set(cases)) == len(cases) == 2 * 2 * 2 * 3
    assert len(list(ablations.cases(ablations.Config()))) == 2 * 2 * 3 * 5
    assert len(ablations.Config().seeds) >= 5


def test_an_interrupted_run_loses_the_network_in_progress_alone(config, trained):
    trained.limit = 5
    with pytest.raises(KeyboardInterrupt):
        ablations.run(config)
    assert not (config.output / "ablations.json").exists()
    trained.limit = None
    result = ablations.run(config)
    assert trained == list(ablations.cases(config))  # None twice.
    written = json.loads((config.output / "ablations.json").read_text())
    assert json.loads(json.dumps(result)) == written
    assert [run["num_iters"] for run in result["runs"]] == [0, 1, 10] * 8
    assert all(run["commit"] and run["wall_time_s"] >= 0 for run in result["runs"])
    assert sorted(p.name for p in config.output.iterdir()) == [
        "ablations.json",
        "ablations.png",
    ]
    image = matplotlib.image.imread(config.output / "ablations.png")
    assert min(image.shape[:2]) > 500
    assert image.std() > 0.01


def test_a_second_run_in_the_same_folder_is_refused(config, trained):
    cases = list(ablations.cases(config))[:1]
    together = lambda: review_networks.trained(cases, config, config.output)
    with together():
        with pytest.raises(BlockingIOError, match=r"Another run writes to .*ablations"):
            with together():
                pass
        assert (config.output / "cells").exists()  # That of the first.
    with together():  # The first has ended.
        pass


def test_an_empty_file_is_computed_again(config, trained):
    trained.limit = 1
    with pytest.raises(KeyboardInterrupt):
        ablations.run(config)
    (cell,) = (config.output / "cells").glob("*.json")
    cell.write_text("")
    trained.limit = None
    assert len(ablations.run(config)["runs"]) == 24
    assert len(trained) == 25


def test_networks_of_other_settings_are_not_taken(config, trained):
    trained.limit = 5
    with pytest.raises(KeyboardInterrupt):
        ablations.run(config)
    trained.limit = None
    # A larger grid of equal networks keeps them, another rate does not.
    more = dataclasses.replace(config, num_iters=(1, 10, 50))
    trained.limit = 7
    with pytest.raises(KeyboardInterrupt):
        ablations.run(more)
    assert [case.num_iters for case in trained] == [0, 1, 10, 0, 1, 50, 10]
    trained.clear()
    trained.limit = None
    ablations.run(dataclasses.replace(config, learning_rate=1e-4))
    assert len(trained) == 24


def test_findings_follow_the_residuals(config, trained):
    found = {f["claim"]: f for f in ablations.run(config)["findings"]}
    for mlp in ("MLP", "no MLP"):
        claim = f"skip connections preserve rank, whatever the normaliser ({mlp}, "
        for place in ("no LayerNorm", "pre-LayerNorm"):
            assert found[f"{claim}{place})"]["verdict"] == "supported"
    ten = found[
        "Sinkhorn, 10, preserves rank better than softmax (skip, MLP, pre-LayerNorm)"
    ]
    assert ten["verdict"] == "supported"
    for text in (
        "-0.40 ± 0.01 against -0.70 ± 0.01",
        "difference by seed of 0.30 ± 0.00",
    ):
        assert text in ten["text"]
    assert "spectral 0.30 ± 0.00, 1inf 0.30 ± 0.00" in ten["text"]
    more = found[
        "more Sinkhorn iterations preserve rank better than fewer "
        "(skip, MLP, no LayerNorm)"
    ]
    # The softmax counts for nothing.
    assert f": {np.log10(2 / 1.1) / np.log2(10):.3f} ± 0.000" in more["text"]
    place = found[
        "pre-LayerNorm preserves rank better than no LayerNorm, whatever the "
        "normaliser (skip, no MLP)"
    ]
    assert place["verdict"] == "supported"
    assert "supported for 3 of 3 normalisers" in place["text"]


def test_a_claim_of_every_normaliser_needs_every_one(config, trained, monkeypatch):
    residual = residual_of
    monkeypatch.setitem(
        globals(),
        "residual_of",
        lambda case: residual(case) * (1e-9 if case.num_iters == 1 else 1),
    )
    found = {f["claim"]: f for f in ablations.run(config)["findings"]}
    one = "Sinkhorn, 1, preserves rank better than softmax (skip, MLP, no LayerNorm)"
    assert found[one]["verdict"] == "not supported"
    skips = (
        "skip connections preserve rank, whatever the normaliser (MLP, pre-LayerNorm)"
    )
    # At the floor of rounding with and without: no difference, so none is seen.
    assert found[skips]["verdict"] == "undecided"
    assert "supported for 2 of 3 normalisers" in found[skips]["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iters": (0, 1)}, "num_iters must be at least 1"),
        ({"num_iters": (5, 5)}, "num_iters must be distinct"),
        ({"layer_norms": ()}, "layer_norms must be distinct"),
        ({"seeds": ()}, "seeds must be distinct"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ablations.Config(**options)
