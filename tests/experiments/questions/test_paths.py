"""The paths through a network: exact sums, products, a whole run, options."""

import itertools
import json

import matplotlib.image
import numpy as np
import pytest

from experiments.networks.options import Network
from experiments.networks.pure_attention import random_problem
from experiments.questions import paths


def test_paths_add_up_to_the_network():
    x, weights = random_problem(0, 5, Network(depth=3, width=4, num_heads=2))
    _, plans, by_length = paths.decompose(x, weights, 2)
    w = np.einsum("ldnh,lnhe->lnde", weights.value, weights.out)
    y = x
    for plan, value in zip(plans, w, strict=True):
        y = y + (plan @ y @ value).sum(axis=0)
    np.testing.assert_allclose(by_length.sum(axis=0), y)
    # None is the skip.
    expected = np.zeros_like(by_length)
    for path in itertools.product((None, 0, 1), repeat=3):
        term = x
        for layer, head in enumerate(path):
            if head is not None:
                term = plans[layer, head] @ term @ w[layer, head]
        expected[sum(head is not None for head in path)] += term
    np.testing.assert_allclose(by_length, expected)


def test_a_whole_run(tmp_path):
    config = paths.Config(
        depth=3,
        num_tokens=6,
        width=4,
        num_heads=2,
        num_iters=(0, 3),
        num_paths=4,
        seeds=(0, 1, 2),
        output=tmp_path / "new",
    )
    result = paths.run(config)
    text = (config.output / "paths.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result))
    # (1 + 2)^3 paths, of which 1, 3 * 2, 3 * 4 and 8 have each length.
    np.testing.assert_allclose(result["path_number"], np.array([1, 6, 12, 8]) / 27)
    for cell in result["cells"]:
        np.testing.assert_allclose(np.sum(cell["path_share"], axis=1), 1)
        for kind in paths.KINDS:
            assert np.shape(cell["products"][kind]) == (3, 3)
        # All layers make one path whose order alone can differ.
        assert (np.array(cell["products"]["sampled paths"])[:, -1] < 0).all()
    image = matplotlib.image.imread(config.output / "paths.png")
    assert min(image.shape[:2]) > 400


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of num_heads"):
        paths.Config(width=9)
    with pytest.raises(ValueError, match="num_paths must be at least 1, got 0"):
        paths.Config(num_paths=0)
