import dataclasses
import importlib.util
import math
import os

import jax
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import attention as _run
from benchmarks import programs as _programs
from benchmarks.harness import cases as _cases
from benchmarks.harness import limits as _limits
from benchmarks.harness import program as _program
from benchmarks.harness import record as _record
from benchmarks.peers import PEERS
from benchmarks.report import readme as _readme
from benchmarks.report import table as _table
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._streaming import attend as streaming


def can_run(name, mode):
    if name in PEERS:
        return PEERS[name].why_not(_cases.SMOKE[0], mode) is None
    # The kernels of another platform are skipped, as another test sees.
    return "mosaic" not in name


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The rows of a smoke run, and those read from its file."""
    path = tmp_path_factory.mktemp("results") / "device" / "rows.jsonl"
    before = _record.read()
    rows = benchmarks.run(benchmarks.Config(quick=True, repeats=2, output=path))
    assert _record.read() == before
    return rows, _record.read(path.parent.parent)


def test_quick_measures_everything_in_both_modes(quick):
    rows, kept = quick
    assert kept == rows
    assert {(row.implementation, row.mode) for row in rows} == {
        (name, mode)
        for name in (_programs.SOFTMAX, *_programs.names())
        for mode in _program.MODES
        if can_run(name, mode)
    }
    assert len({row.date for row in rows}) == 1
    for mode in _program.MODES:
        assert sum(row.is_default for row in rows if row.mode == mode) == 1


def test_what_is_slow_is_skipped_with_more_tokens(quick, monkeypatch):
    monkeypatch.setattr(_limits, "LONGEST_CALL_S", 0.0)
    (case,) = _cases.SMOKE
    more = dataclasses.replace(case, tokens=2 * case.tokens)
    for row in quick[0]:
        check = lambda case, row=row: _run._check_time(
            row.implementation, case, row.mode, quick[0]
        )
        with pytest.raises(NotImplementedError, match="would take about"):
            check(more)
        check(case)
        check(dataclasses.replace(more, num_iters=case.num_iters + 1))


def test_quick_numbers_are_finite_and_consistent(quick):
    for row in quick[0]:
        is_peer = row.implementation in PEERS
        assert bool(row.version) == is_peer
        for field, value in dataclasses.asdict(row).items():
            if is_peer and field in ("one_head_mib", "ts_arrays_per_head"):
                assert value is None
                continue
            if row.memory_source != "compiled" and field.startswith("peak"):
                continue  # The system may not tell.
            assert value is not None, field
            if isinstance(value, float):
                assert math.isfinite(value), field
        assert row.repeats == 2
        assert row.tokens_per_second == pytest.approx(64e3 / row.median_ms)
        # Inputs of standard deviation 1 in float32, 64 tokens.
        assert 0 < row.max_abs_error < 1e-5
        if not is_peer:
            whole = row.one_head_mib * 2**20 / (64 * 64 * 4)
            assert row.ts_arrays_per_head < whole + 0.01
        if row.implementation == _programs.SOFTMAX:
            assert row.ratio_to_softmax == 1


def test_quick_table_has_a_line_for_each_row(quick):
    lines = _table.aligned(quick[0]).splitlines()
    assert len(lines) == 1 + len(quick[0])
    assert max(map(len, lines)) == len(lines[0])  # The last column is right-aligned.


def test_what_cannot_run_is_skipped_with_its_reason(monkeypatch, tmp_path, capsys):
    reason = "it needs a machine that nobody has"
    monkeypatch.setattr(streaming, "why_not", lambda problem: reason)
    monkeypatch.setattr(_run, "MODES", ("forward",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "device" / "rows.jsonl"
    rows = benchmarks.run(
        benchmarks.Config(
            quick=True, repeats=1, implementations=("streaming", "pot"), output=path
        )
    )
    assert [row.implementation for row in rows] == ["softmax"]
    printed = capsys.readouterr().out
    assert f"implementation='streaming' cannot run here: {reason}" in printed
    assert "Skipped pot, 4x64 float32 10 iterations, forward: POT is not" in printed
    skips = _record.read_skips(tmp_path)
    assert [skip.implementation for skip in skips] == ["streaming", "pot"]
    assert reason in skips[0].reason
    assert skips[0].case == rows[0].case


def test_what_needs_too_much_memory_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(_limits, "memory_bytes", lambda: 2**10)
    monkeypatch.setattr(_run, "MODES", ("forward",))
    config = benchmarks.Config(quick=True, repeats=1, implementations=("reference",))
    assert benchmarks.run(config) == []
    printed = capsys.readouterr().out
    for name in ("softmax", "reference"):
        assert f"Skipped {name}, 4x64 float32 10 iterations, forward: it " in printed


def test_float64_is_float64(monkeypatch):
    monkeypatch.setattr(_cases, "SMOKE", (_cases.Case(1, 16, 8, "float64", 2),))
    config = benchmarks.Config(quick=True, repeats=1, implementations=("scaling",))
    rows = benchmarks.run(config)
    assert all(
        row.max_abs_error < 1e-13 for row in rows if row.implementation == "scaling"
    )


@pytest.mark.parametrize(("load", "is_busy"), [(3.0, True), (0.0, False)])
def test_a_busy_machine_is_reported(load, is_busy, monkeypatch, capsys):
    monkeypatch.setattr(_run, "run", lambda *_: [])
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    benchmarks.run(benchmarks.Config(quick=True))
    assert ("The machine was busy" in capsys.readouterr().out) == is_busy


def test_runs_without_softmax_where_that_cannot_run(monkeypatch, capsys):
    # XLA has no product of float16 on a CPU that accumulates in float32.
    monkeypatch.setattr(_cases, "SMOKE", (_cases.Case(1, 16, 8, "float16", 2),))
    config = benchmarks.Config(quick=True, repeats=1, implementations=("scaling",))
    rows = benchmarks.run(config)
    modes = [row.mode for row in rows if row.implementation == "scaling"]
    assert modes == list(_program.MODES)
    if "softmax" not in {row.implementation for row in rows}:
        assert "is not supported by dot_general" in capsys.readouterr().out
        assert {row.ratio_to_softmax for row in rows} == {None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"implementations": ("fast",)},
            r"Unknown implementations \['fast'\]; expected",
        ),
        ({"implementations": ("softmax",)}, "always measured"),
        ({"cases": ("1x1",)}, r"Unknown cases \['1x1'\]; expected some of \['2x128'"),
        ({"sweeps": ("heads",), "cases": ("2x128",)}, "expected some of .*'96x197'"),
        ({"sweeps": ("sizes",)}, r"Unknown sweeps \['sizes'\]; expected .*'tokens'"),
        (
            {"dtypes": ("float8",)},
            r"Unknown dtypes \['float8'\]; expected .*'bfloat16'",
        ),
        ({"quick": True, "dtypes": ("float32",)}, "cases of --quick are its own"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"quick": True, "cases": ("2x128",)}, "cases of --quick are its own"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.Config(**fields)


def test_full_run_has_the_sweeps():
    config = benchmarks.Config()
    assert config.sweeps == ("tokens", "heads", "iterations", "dtypes")
    assert set(config.implementations) == {*IMPLEMENTATIONS, *PEERS}
    assert set(_cases.SWEEPS) - set(config.sweeps) == {"gpu"}
    cases = {
        sweep: [(case.name, case.dtype, case.num_iters) for case in cases]
        for sweep, cases in _cases.SWEEPS.items()
    }
    assert cases["tokens"] == [
        (f"2x{2**i}", "float32", 10) for i in (7, 8, 9, 10, 11, 12, 13, 14)
    ]
    names = ("96x197", "32x512", "16x1024", "2x4096")
    assert cases["heads"] == [(name, "float32", 10) for name in names]
    assert cases["iterations"] == [
        ("4x1024", "float32", num) for num in (0, 1, 2, 5, 10, 20, 50)
    ]
    assert cases["dtypes"] == [
        ("4x1024", dtype, 10) for dtype in ("float32", "bfloat16", "float16", "float64")
    ]
    assert cases["gpu"] == [
        (f"128x{num}", dtype, 10)
        for dtype in ("bfloat16", "float16")
        for num in (128, 256, 512, 1024, 2048, 4096)
    ]
    for case in _cases.select(_cases.SWEEPS):
        assert case.shape_btnh == (1, case.tokens, case.heads, 64)


def test_cases_of_two_sweeps_are_measured_once():
    cases = _cases.select(_cases.ANYWHERE)
    assert len(set(cases)) == len(cases) == 8 + 4 + 7 + 4 - 2
    assert _cases.select(["heads", "tokens"], ["2x4096"]) == [_cases.Case(2, 4096)]
    only = _cases.Case(128, 256, dtype="float16")
    assert _cases.select(["gpu"], ["128x256"], ["float16"]) == [only]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="There is one.")
def test_the_sweep_for_a_gpu_is_refused_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(_run, "run", lambda *_: pytest.fail("it was measured"))
    output = tmp_path / "rows.jsonl"
    config = benchmarks.Config(sweeps=("gpu",), cases=("128x128",), output=output)
    with pytest.raises(RuntimeError, match="'gpu' needs a GPU, and JAX computes on a"):
        benchmarks.run(config)
    assert not output.exists()


def test_the_memory_of_a_single_head_may_be_left_out(monkeypatch):
    monkeypatch.setattr(_cases, "SMOKE", (_cases.Case(1, 16, 8, "float32", 2),))
    monkeypatch.setattr(_run, "MODES", ("forward",))
    config = benchmarks.Config(
        quick=True, repeats=1, implementations=("scaling",), single_head_memory=False
    )
    rows = benchmarks.run(config)
    assert [row.implementation for row in rows] == ["softmax", "scaling"]
    assert {row.one_head_mib for row in rows} == {None}
    assert all(row.peak_mib is not None for row in rows)


def test_command(monkeypatch):
    configs = []
    monkeypatch.setattr(benchmarks, "run", configs.append)
    command = "--sweeps heads tokens --cases 2x4096 32x512 --implementations scaling"
    benchmarks.main(f"{command} pot --repeats 7".split())
    config = configs[0]
    assert config.sweeps == ("heads", "tokens")
    assert config.cases == ("2x4096", "32x512")
    assert config.implementations == ("scaling", "pot")
    assert config.repeats == 7
    updated = []
    monkeypatch.setattr(_readme, "update", lambda: updated.append(True))
    benchmarks.main(["--readme"])
    assert updated == [True]
    assert len(configs) == 1
