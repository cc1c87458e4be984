"""The time of many small matrices: a smoke run, its numbers, what is refused."""

import json

import jax
import numpy as np
import pytest

# Not public: the switch of the GPU's interpreter.
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter
from support import reference

from benchmarks import matrices
from benchmarks.harness import machine as _machine
from benchmarks.harness import record as _record
from sinkhorn_jax.matrix import IMPLEMENTATIONS


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Rows of a smoke run and the file of them."""
    output = tmp_path_factory.mktemp("matrices") / "new" / "rows.jsonl"
    args = ["--quick", "--repeats", "2", "--calls", "2", "--bandwidth-gb-s", "10"]
    matrices.main([*args, "--output", str(output)])
    return [json.loads(line) for line in output.read_text().splitlines()], output


def test_a_smoke_run_measures_the_table_in_both_modes(quick):
    rows, output = quick
    runs_here = [x for x in IMPLEMENTATIONS if _machine.why_not_kernel(x) is None]
    assert {"scaling", "reference"} <= set(runs_here)
    for mode in matrices.MODES:
        of_mode = [row for row in rows if row["mode"] == mode]
        assert [row["implementation"] for row in of_mode] == runs_here
        assert sum(row["is_default"] for row in of_mode) == 1
        assert of_mode[-1]["ratio_to_reference"] == pytest.approx(1)
    text = _record.skips_path(output).read_text()
    skips = [json.loads(line) for line in text.splitlines()]
    skipped = {(x["implementation"], x["mode"]) for x in skips}
    others = set(IMPLEMENTATIONS) - set(runs_here)
    assert skipped == {(name, mode) for name in others for mode in matrices.MODES}
    assert all("kernels are for a" in skip["reason"] for skip in skips)


def test_numbers_of_a_row_follow_from_one_another(quick):
    for row in quick[0]:
        arrays = {"forward": 2, "forward_backward": 5}[row["mode"]]
        assert row["num_bytes"] == arrays * 64 * 4 * 4 * 4
        gb_per_s = row["num_bytes"] / 1e6 / row["median_ms"]
        assert row["gb_per_s"] == pytest.approx(gb_per_s)
        assert row["fraction_of_bandwidth"] == pytest.approx(gb_per_s / 10)
        assert row["repeats"] == 2
        assert row["calls"] == 2
        assert 0 < row["max_abs_error"] < 1e-5


def test_a_time_is_that_of_one_call(monkeypatch):
    """Of programs of ten calls that take 20 and 40 ms."""

    def in_turns(calls, repeats, budget_s, name, first_result):
        for one, call in calls.items():
            first_result(one, call())
        times = {"scaling": [20.0] * 3, "reference": [40.0] * 3}
        return matrices._turns.Times(times, {})

    monkeypatch.setattr(matrices._turns, "time_in_turns", in_turns)
    config = matrices.Config(quick=True, calls=10, implementations=("scaling",))
    scaling, of_reference = matrices.run(config)[:2]
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


@pytest.mark.parametrize("mode", matrices.MODES)
def test_a_wrong_result_is_seen(monkeypatch, mode):
    exact = matrices._expected(matrices.Config(num_matrices=3, num_iters=2), 4, mode)

    def wrong(config, size, mode):
        return exact + 0.25

    monkeypatch.setattr(matrices, "_expected", wrong)
    config = matrices.Config(
        sizes=(4,), num_matrices=3, num_iters=2, repeats=1, budget_s=0, calls=1
    )
    rows, _ = matrices._measure(config, 4, mode, {"device": "x"})
    assert {round(row["max_abs_error"], 4) for row in rows} == {0.25}


@pytest.mark.slow
def test_kernels_for_a_gpu_in_the_interpreter(monkeypatch):
    """As they are measured on one, but for its times."""
    monkeypatch.setattr(_machine, "why_not_kernel", lambda name: None)
    config = matrices.Config(
        sizes=(2,),
        num_matrices=130,
        num_iters=2,
        implementations=("mosaic_gpu",),
        calls=2,
        repeats=1,
        budget_s=0,
    )
    jax.clear_caches()
    for mode in matrices.MODES:
        with interpreter.force_gpu_interpret_mode(interpreter.InterpretGPUParams()):
            rows, skips = matrices._measure(config, 2, mode, {"device": "x"})
        assert skips == []
        names = ["mosaic_gpu", "reference"]
        assert [row["implementation"] for row in rows] == names
        assert all(row["max_abs_error"] < 3e-6 for row in rows)
    jax.clear_caches()


def test_the_bandwidth_of_a_known_device(monkeypatch):
    config, facts = matrices.Config(), {"device": "NVIDIA H200"}
    traffic = matrices._traffic(config, 4, "forward", facts, [0.001])
    # 65,536 x 4 x 4 float32 there and back are 8.4 MB.
    assert traffic["num_bytes"] == 8388608
    assert traffic["fraction_of_bandwidth"] == pytest.approx(8388.608 / 4800)
    traffic = matrices._traffic(config, 4, "forward", {"device": "other"}, [1.0])
    assert traffic["fraction_of_bandwidth"] is None


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="There is one.")
def test_another_platform_than_wanted_is_refused():
    with pytest.raises(RuntimeError, match="This run needs a GPU, and JAX computes on"):
        matrices.run(matrices.Config(quick=True, platform="gpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"implementations": ("fast",)},
            r"Unknown implementations \['fast'\]; expected",
        ),
        ({"sizes": ()}, r"sizes must be some positive numbers, got \(\)"),
        ({"sizes": (0,)}, "positive numbers, got"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"num_matrices": 0}, "num_matrices must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        matrices.Config(**options)
