"""The benchmark of small matrices: a smoke run, its numbers, what is refused."""

import json

import jax
import numpy as np
import pytest
from support import reference
from support.gpu_interpreter import interpreted

from benchmarks import matrices
from benchmarks.harness import machine, timing
from sinkhorn_jax.matrix import IMPLEMENTATIONS


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Rows of a smoke run, read from their file."""
    output = tmp_path_factory.mktemp("matrices") / "new" / "rows.jsonl"
    matrices.run(matrices.Config(quick=True, repeats=2, output=output))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_smoke_run_measures_the_table_in_both_modes(quick):
    runs_here = [name for name in IMPLEMENTATIONS if "mosaic" not in name]
    for mode in matrices.MODES:
        of_mode = [row for row in quick if row["mode"] == mode]
        assert {"scaling", "reference"} <= {row["implementation"] for row in of_mode}
        if jax.default_backend() == "cpu":
            assert [row["implementation"] for row in of_mode] == runs_here
        assert sum(row["is_default"] for row in of_mode) == 1
        (of_reference,) = (x for x in of_mode if x["implementation"] == "reference")
        assert of_reference["ratio_to_reference"] == pytest.approx(1)
    for row in quick:
        assert (row["repeats"], row["calls"]) == (2, 1)
        assert 0 < row["max_abs_error"] < 1e-5


def test_a_time_is_that_of_one_call(monkeypatch):
    """Programs of ten calls take 20 and 40 ms."""

    def in_turns(calls, repeats, budget_s, name, first_result):
        for one, call in calls.items():
            first_result(one, call())
        return timing.Times({"scaling": [20.0] * 3, "reference": [40.0] * 3}, {})

    monkeypatch.setattr(timing, "time_in_turns", in_turns)
    unchanged = lambda program, logits: (lambda x: (x,), 0.0)
    monkeypatch.setattr(matrices, "compile_within_limits", unchanged)
    scaling, of_reference = matrices.run(matrices.Config(quick=True, calls=10))[:2]
    assert scaling["median_ms"] == pytest.approx(2)
    assert of_reference["median_ms"] == pytest.approx(4)
    assert scaling["ratio_to_reference"] == pytest.approx(0.5)


def test_what_is_timed_is_the_plan_and_the_gradient_of_its_squares():
    with jax.enable_x64(True):
        logits = np.random.default_rng(1).standard_normal((2, 3, 3))
        plan = lambda z: reference.sinkhorn(z, 2)
        run = lambda mode: matrices.step(jax.numpy.asarray(logits), 2, "scaling", mode)
        np.testing.assert_allclose(run("forward"), plan(logits), atol=1e-12)
        direction = np.random.default_rng(2).standard_normal(logits.shape)
        move = 1e-5 * direction
        low, high = ((plan(logits + x) ** 2).sum() / 2 for x in (-move, move))
        slope = np.vdot(run("forward_backward"), direction)
        assert slope == pytest.approx((high - low) / 2e-5, abs=1e-8)


def test_a_wrong_result_is_seen(monkeypatch):
    exact = matrices.expected
    monkeypatch.setattr(matrices, "expected", lambda *args: exact(*args) + 0.25)
    config = matrices.Config(
        num_matrices=3, num_iters=2, repeats=1, budget_s=0, calls=1
    )
    rows = matrices.measure(config, 4, "forward")
    assert {round(row["max_abs_error"], 4) for row in rows} == {0.25}


@pytest.mark.slow
def test_kernels_for_a_gpu_in_the_interpreter(monkeypatch):
    """The kernels run as they do on a GPU; their times mean nothing."""
    monkeypatch.setattr(machine, "require_kernel", lambda name: None)
    names = ("mosaic_gpu", "reference")
    table = {name: IMPLEMENTATIONS[name] for name in names}
    monkeypatch.setattr(matrices, "IMPLEMENTATIONS", table)
    config = matrices.Config(
        num_matrices=130, num_iters=2, calls=2, repeats=1, budget_s=0
    )
    for mode in matrices.MODES:
        with interpreted():
            rows = matrices.measure(config, 2, mode)
        assert tuple(row["implementation"] for row in rows) == names
        assert all(row["max_abs_error"] < 3e-6 for row in rows)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="There is one.")
def test_another_platform_than_wanted_is_refused():
    with pytest.raises(RuntimeError, match="This run needs a GPU, and JAX computes on"):
        matrices.run(matrices.Config(quick=True, platform="gpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (4, 0)}, r"sizes must be positive, got \(4, 0\)"),
        ({"repeats": 0}, "repeats must be positive, got 0"),
        ({"num_matrices": 0}, "num_matrices must be positive, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        matrices.Config(**options)
