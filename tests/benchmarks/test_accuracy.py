"""The errors of rows: what they are measured against, and that they show mistakes."""

import math

import numpy as np
import pytest
from support import reference

from benchmarks.harness import accuracy, cases


@pytest.mark.parametrize("num_iters", [0, 3])
def test_what_is_expected_agrees_with_the_reference_of_the_tests(num_iters):
    case = cases.Case(3, 12, head_dim=4, num_iters=num_iters)
    inputs = [np.asarray(x, np.float64) for x in cases.inputs(case)]
    out, gradients = accuracy.expected(case)

    def attend(*arrays):
        return reference.sinkhorn_attention(*arrays, num_iters=num_iters)

    np.testing.assert_allclose(out, attend(*inputs[:3]), rtol=0, atol=1e-14)
    rng = np.random.default_rng(1)
    step = 1e-5  # Central differences are then good to about 1e-9.
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        moved = (
            attend(
                *(
                    x + sign * step * direction * (j == i)
                    for j, x in enumerate(inputs[:3])
                )
            )
            for sign in (1, -1)
        )
        slope = np.vdot(inputs[3], np.subtract(*moved)) / (2 * step)
        assert np.vdot(gradient, direction) == pytest.approx(slope, abs=1e-7)


def test_long_heads_are_expected_of_the_implementation_that_stores_no_plan(monkeypatch):
    case = cases.Case(1, 20, head_dim=4, num_iters=2)
    exact = accuracy.expected(case)
    monkeypatch.setattr(accuracy, "MOST_TOKENS", 10)
    accuracy.expected.cache_clear()
    for x, y in zip(accuracy.expected(case)[1], exact[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)
    accuracy.expected.cache_clear()


def test_error_sees_a_wrong_head_and_a_nan():
    case = cases.Case(3, 8, head_dim=4, num_iters=2)
    want = accuracy.expected(case)
    out, gradients = want[0].copy(), list(want[1])
    assert accuracy.error(case, "forward", (out,), want) == 0
    out[0, 5, 1, 2] += 0.5
    assert accuracy.error(case, "forward", (out,), want) == pytest.approx(0.5)
    assert accuracy.error(case, "forward_backward", (out, gradients), want) == 0
    gradients[1] = 1.25 * gradients[1]
    found = accuracy.error(case, "forward_backward", (out, gradients), want)
    assert found == pytest.approx(0.25)
    gradients[0] = gradients[0] * np.nan
    found = accuracy.error(case, "forward_backward", (out, gradients), want)
    assert math.isnan(found)


@pytest.mark.parametrize("case", cases.select(cases.SWEEPS), ids=str)
def test_checked_heads_are_distinct_and_few_where_tokens_are_many(case):
    heads = accuracy.checked_heads(case)
    assert len(set(heads)) == len(heads)
    assert heads[-1] == case.heads - 1
    assert heads.min() >= 0
    assert len(heads) == 1 or len(heads) * case.tokens**2 <= accuracy.CHECKED_ENTRIES
