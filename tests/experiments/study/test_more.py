"""The secondary contrasts: their arms, and those made of primary cells."""

import dataclasses

import pytest

from experiments.study import more, plan

PRIMARY = {contrast.name: contrast for contrast in plan.primary()}
SECONDARY = {c.name: c for c in more.secondary(plan.TEXT, plan.IMAGES)}


@pytest.mark.parametrize("name", SECONDARY)
def test_normalisers_are_compared_with_fewer_seeds(name):
    sinkhorn, softmax = SECONDARY[name].arms
    assert (sinkhorn.sign, softmax.sign) == (1, -1)
    for first, second in zip(sinkhorn.cells, softmax.cells, strict=True):
        assert first.num_iters > second.num_iters == 0
        assert first.sizes.seeds == (0, 1, 2, 3, 4)
        assert second.sizes.seeds[:5] == first.sizes.seeds
        sizes = dataclasses.replace(second.sizes, seeds=first.sizes.seeds)
        assert first == dataclasses.replace(
            second, num_iters=first.num_iters, sizes=sizes
        )
    assert name not in PRIMARY


def test_each_changes_what_it_says():
    one = {name: contrast.arms[0].cells[0] for name, contrast in SECONDARY.items()}
    base = plan.cells(10, dataclasses.replace(plan.TEXT, seeds=more.FEW), (0.003,))[0]
    change = lambda **options: dataclasses.replace(base, **options)
    sizes = lambda **options: change(sizes=dataclasses.replace(base.sizes, **options))
    for name, expected in {
        "iterations_1": change(num_iters=1),
        "iterations_3": change(num_iters=3),
        "iterations_50": change(num_iters=50),
        "max_pooling": change(pooling="max"),
        "depth_12": change(depth=12),
        "depth_12_no_skip": change(depth=12, has_skip=False, learning_rate=0.001),
        "updates": sizes(num_steps=1200),
        "width": sizes(width=64, num_heads=4, mlp_width=128),
    }.items():
        assert one.pop(name) == expected
    assert {(c.num_iters, c.sizes.task) for c in one.values()} == {
        (1, "fashion_mnist"),
        (50, "fashion_mnist"),
    }
    claims = [contrast.claim for contrast in SECONDARY.values()]
    assert len(set(claims)) == len(claims)


def test_primary_cells_are_compared_at_each_rate_and_in_other_quantities():
    contrast = PRIMARY["text_no_skip"]
    *by_rate, last, accuracy = more.of_primary(contrast)
    for at, (each, rate) in enumerate(zip(by_rate, plan.NO_SKIP_RATES, strict=True)):
        assert [a.cells for a in each.arms] == [(a.cells[at],) for a in contrast.arms]
        assert f"(rate {rate:g}, text, pre-LayerNorm, no skip" in each.claim
        assert {a.quantity for a in each.arms} == {plan.ALL_LAYERS}
    assert {a.quantity for a in last.arms} == {plan.LAST}
    assert {a.quantity for a in accuracy.arms} == {plan.ACCURACY}
    for each in (last, accuracy):
        assert [a.cells for a in each.arms] == [a.cells for a in contrast.arms]
        assert each.claim.endswith("(text, pre-LayerNorm, no skip connections)")


def test_the_best_rate_is_that_of_the_best_mean_accuracy():
    accuracy = {
        (10, 0.001): [0.6, 0.6],
        (10, 0.003): [0.9, 0.2],
        (10, 0.01): [0.5, 0.75],
        (0, 0.001): [0.8, 0.9],
        (0, 0.003): [0.9, 0.7],
        (0, 0.01): [0.5, 0.5],
    }
    get = lambda cell: {
        "validation_accuracy": accuracy[cell.num_iters, cell.learning_rate]
    }
    found = more.best_rates(PRIMARY["text_pre"], get)
    rates = {arm.name: [c.learning_rate for c in arm.cells] for arm in found.arms}
    assert rates == {
        "Sinkhorn at rate 0.01": [0.01],
        "softmax at rate 0.001": [0.001],
    }


def test_full_sizes_are_compared_at_one_rate():
    found = list(more.full_size(plan.IMAGES, 0.002))
    cells = plan.cells_of(found)
    assert [cell.num_iters for cell in cells] == [10, 0, 50]
    assert {(c.sizes, c.learning_rate) for c in cells} == {(plan.IMAGES, 0.002)}
