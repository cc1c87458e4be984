"""The contrasts of the study: what their arms share, and what they compare."""

import dataclasses
import pathlib

import numpy as np
import pytest

from experiments.study import plan

ROOT = pathlib.Path(__file__).parents[3]
PRIMARY = {contrast.name: contrast for contrast in plan.primary()}
RATES = (0.001, 0.003, 0.01)

# What each contrast compares, and the design that all of its arms share.
TEXT = {"task": "imdb", "layer_norm": "pre", "has_skip": True, "pooling": "class_token"}
EXPECTED = {
    "text_pre": ({"num_iters"}, TEXT, RATES),
    "text_post": ({"num_iters"}, TEXT | {"layer_norm": "post"}, RATES),
    "images_pre": ({"num_iters"}, TEXT | {"task": "fashion_mnist"}, RATES),
    "text_no_skip": (
        {"num_iters"},
        TEXT | {"has_skip": False},
        (0.0003, 0.001, 0.003),
    ),
    "skips_softmax": ({"has_skip"}, TEXT | {"num_iters": 0}, RATES[:2]),
    "skips_sinkhorn": ({"has_skip"}, TEXT | {"num_iters": 10}, RATES[:2]),
    "entropy": ({"num_iters"}, TEXT, RATES),
    "pooling": ({"num_iters", "pooling"}, TEXT, RATES),
    "paths": (set(), TEXT | {"num_iters": 0}, RATES),
}


def differing(cells):
    """The names of the settings in which cells differ."""
    settings = [cell.setting for cell in cells]
    return {k for k in settings[0] if any(s[k] != settings[0][k] for s in settings)}


def test_the_protocol_lists_the_primary_contrasts():
    text = (ROOT / "docs" / "protocol.md").read_text()
    table = text.split("## Primary contrasts")[1].split("\n## ")[0]
    rows = [line.split("`")[1] for line in table.splitlines() if "| `" in line]
    assert set(rows) == {*PRIMARY, "pure"}
    assert set(PRIMARY) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_arms_differ_in_what_is_claimed(name):
    compared, shared, rates = EXPECTED[name]
    arms = PRIMARY[name].arms
    by_rate = list(zip(*(arm.cells for arm in arms), strict=True))
    for at, rate in zip(by_rate, rates, strict=True):
        assert differing(at) == compared
        assert {cell.learning_rate for cell in at} == {rate}
        for key in shared.keys() - compared:
            assert {cell.setting[key] for cell in at} == {shared[key]}
    assert sum(arm.sign for arm in arms) == 0
    (sizes,) = {cell.sizes for arm in arms for cell in arm.cells}
    assert len(sizes.seeds) >= 10


def test_signs_say_what_is_claimed_to_be_greater():
    iterations = lambda name: [
        (arm.sign, arm.cells[0].num_iters) for arm in PRIMARY[name].arms
    ]
    for name in ("text_pre", "text_post", "text_no_skip", "images_pre", "entropy"):
        assert iterations(name) == [(1, 10), (-1, 0)]
    for name in ("skips_softmax", "skips_sinkhorn"):
        arms = PRIMARY[name].arms
        assert [(a.sign, a.cells[0].has_skip) for a in arms] == [(1, True), (-1, False)]
    signs = {
        (arm.cells[0].pooling, arm.cells[0].num_iters): arm.sign
        for arm in PRIMARY["pooling"].arms
    }
    expected = {("mean", 10): 1, ("mean", 0): -1}
    expected |= {("class_token", 10): -1, ("class_token", 0): 1}
    assert signs == expected
    assert PRIMARY["paths"].kind == "equal"
    assert {c.kind for n, c in PRIMARY.items() if n != "paths"} == {"greater"}


def test_rates_and_sizes_may_be_changed():
    text = dataclasses.replace(plan.TEXT, width=8, seeds=(3,))
    images = dataclasses.replace(plan.IMAGES, task="digits")
    for contrast in plan.primary(text, images, (0.1, 0.2), (0.2, 0.3)):
        for arm in contrast.arms:
            is_image = contrast.name == "images_pre"
            assert {c.sizes for c in arm.cells} == {images if is_image else text}
            rates = {"text_no_skip": [0.2, 0.3]}.get(contrast.name, [0.1, 0.2])
            if contrast.name.startswith("skips"):
                rates = [0.2]
            assert [c.learning_rate for c in arm.cells] == rates


# Two seeds, two observations; three layers, and the embedding before them.
RESULT = {
    "relative_residual": [
        [[9, 9, 9, 9], [0.5, 0.1, 0.01, 9]],
        [[9, 9, 9, 9], [0.5, 0.1, 1e-9, 9]],
    ],
    "entropy": [[[1, 1, 1], [0.9, 0.6, 0.3]], [[1, 0.8, 0.6], [0.9, 0.9, 0.9]]],
    "validation_accuracy": [0.75, 1],
    "paths": {
        "independent, softmax": [[-1.0, -1.5, -2.0], [-3.0, -4.0, -5.0]],
        "independent, Sinkhorn": [[0.0, -5.0, -10.0], [-3.0, -3.1, -3.2]],
    },
}


def test_each_cell_is_listed_once_in_order():
    first, second = PRIMARY["text_pre"], PRIMARY["entropy"]
    cells = [*first.arms[0].cells, *first.arms[1].cells]
    assert plan.cells_of([first, second]) == cells


def test_quantities_by_hand():
    floor = np.log10(4 * 2.0**-23)  # Four roundings of float32.
    np.testing.assert_allclose(plan.RESIDUAL.of(RESULT), [-2, floor])
    all_layers = [(-1 - 2) / 2, (-1 + floor) / 2]
    np.testing.assert_allclose(plan.ALL_LAYERS.of(RESULT), all_layers)
    np.testing.assert_allclose(plan.ENTROPY.of(RESULT), [-0.4, 0.1])
    np.testing.assert_allclose(plan.LAST.of(RESULT), np.log10([9, 9]))
    np.testing.assert_allclose(plan.log10_residual(RESULT, 0), np.log10([0.5, 0.5]))
    np.testing.assert_array_equal(plan.ACCURACY.of(RESULT), [0.75, 1])
    np.testing.assert_allclose(plan.slope(RESULT, "independent, softmax"), [0.5, 1])
    sinkhorn, softmax = PRIMARY["paths"].arms
    difference = sinkhorn.quantity.of(RESULT) - softmax.quantity.of(RESULT)
    np.testing.assert_allclose(difference, [1, -1], atol=1e-12)
    for name in ("text_pre", "text_post", "images_pre", "skips_softmax", "pooling"):
        assert {arm.quantity for arm in PRIMARY[name].arms} == {plan.RESIDUAL}
    assert {a.quantity for a in PRIMARY["text_no_skip"].arms} == {plan.ALL_LAYERS}
    assert {a.quantity for a in PRIMARY["entropy"].arms} == {plan.ENTROPY}
