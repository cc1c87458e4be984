"""The follow-up without skip connections: which networks count, and each verdict."""

import re

import pytest

from experiments.study import escape, plan


def cell(num_iters, *, kept, lost, failed):
    """Networks that learn and keep rank, learn and lose it, and keep it at chance."""
    residual = [escape.KEPT] * kept + [0.9 * escape.KEPT] * lost + [1.0] * failed
    return {
        "num_iters": num_iters,
        "has_learned": [True] * (kept + lost) + [False] * failed,
        # The last layer's output does not count.
        "residual": {"trained": [[1.0, each, 1.0] for each in residual]},
    }


def finding(sinkhorn, softmax):
    names = ("kept", "lost", "failed")
    cells = (
        cell(num_iters, **dict(zip(names, numbers, strict=True)))
        for num_iters, numbers in ((0, softmax), (10, sinkhorn))
    )
    return escape.finding(list(cells))


@pytest.mark.parametrize(
    ("sinkhorn", "softmax", "verdict", "p_value"),
    [
        # By hand: (7 + 1) / C(14, 8), and 2 / C(14, 7).
        ((7, 0, 13), (1, 6, 13), "supported", "0.0047"),
        ((0, 7, 13), (7, 0, 13), "not supported", "0.00058"),
        ((7, 0, 13), (4, 3, 13), "undecided", "0.19"),
        ((9, 0, 11), (0, 2, 18), "untested", "0.018"),
        ((0, 0, 20), (0, 0, 20), "untested", "1"),
    ],
)
def test_verdicts(sinkhorn, softmax, verdict, p_value):
    found = finding(sinkhorn, softmax)
    assert found["verdict"] == verdict
    assert found["claim"] == escape.CLAIM
    assert f"p = {p_value} by Fisher's" in found["text"]
    learned = re.search(r"(\d+) learn with Sinkhorn and (\d+) with", found["text"])
    assert list(map(int, learned.groups())) == [sum(sinkhorn[:2]), sum(softmax[:2])]


def test_pairs_are_counted_by_seed():
    text = finding((7, 0, 13), (1, 6, 13))["text"]
    # Six signs of six: 2 / 2^6.
    assert "In 6 seeds only the Sinkhorn network" in text
    assert "in 0 only the softmax network, p = 0.031" in text


def test_no_seed_is_one_of_the_primary_cells():
    assert not set(escape.SEEDS) & set(plan.TEXT.seeds)
