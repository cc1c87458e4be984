"""The benchmark of attention: a smoke run, its rows, and what is skipped."""

import dataclasses
import importlib.util
import math

import jax
import pytest
from support import benchmark_rows

from benchmarks import attention, programs
from benchmarks.harness import cases, limits, record
from benchmarks.harness.program import MODES
from benchmarks.peers import PEERS
from benchmarks.report import table
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._streaming import attend as streaming

# POT takes as long as all others, and has tests of its own.
NAMES = tuple(name for name in programs.NAMES if name != "pot")


@pytest.fixture
def tiny(monkeypatch):
    """Measures one tiny case in one mode, in the given dtype."""

    def run(dtype="float32", **options):
        case = cases.Case(1, 16, 8, dtype, 2)
        monkeypatch.setattr(cases, "SMOKE", (case,))
        monkeypatch.setattr(attention, "MODES", ("forward",))
        return attention.run(attention.Config(quick=True, repeats=1, **options))

    return run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The rows of a smoke run, and those read from its file."""
    path = tmp_path_factory.mktemp("results") / "device" / "rows.jsonl"
    before = record.read()
    options = {"repeats": 2, "implementations": NAMES, "output": path}
    rows = attention.run(attention.Config(quick=True, **options))
    assert record.read() == before
    return rows, record.read(path.parent.parent)


def can_run(name, mode):
    if name in PEERS:
        return PEERS[name].why_not(cases.SMOKE[0], mode) is None
    return "mosaic" not in name  # Kernels of another platform are skipped.


def test_quick_measures_everything_in_both_modes(quick):
    rows, kept = quick
    assert kept == rows
    assert {(row.implementation, row.mode) for row in rows} == {
        (name, mode)
        for name in (programs.SOFTMAX, *NAMES)
        for mode in MODES
        if can_run(name, mode)
    }
    assert len({row.date for row in rows}) == 1
    for mode in MODES:
        assert sum(row.is_default for row in rows if row.mode == mode) == 1


def test_quick_numbers_are_finite_and_consistent(quick):
    for row in quick[0]:
        is_peer = row.implementation in PEERS
        assert bool(row.version) == is_peer
        for field, value in dataclasses.asdict(row).items():
            if is_peer and field == "ts_arrays_per_head":
                assert value is None
                continue
            if row.memory_source != "compiled" and field.startswith("peak"):
                continue  # The system may not report it.
            assert value is not None, field
            if isinstance(value, float):
                assert math.isfinite(value), field
        assert row.repeats == 2
        # Inputs of standard deviation 1 in float32, 64 tokens.
        assert 0 < row.max_abs_error < 1e-5
        if row.implementation == programs.SOFTMAX:
            assert row.ratio_to_softmax == 1


def test_the_table_has_a_line_for_each_program(quick):
    rows = quick[0]
    lines = table.sweep(rows).splitlines()
    assert len(lines) == 2 + len({row.implementation for row in rows})
    *_, last = lines
    title, header, *printed = table.narrow(rows).splitlines()
    assert title == "4x64 float32, 10 iterations"
    assert len(printed) == len(lines) - 2
    assert {len(header), *map(len, printed)} == {len(header)}
    assert len(header) < 100
    for cell in last.replace("`", "").replace("*", "").strip("| ").split(" | ")[4:8]:
        assert cell in printed[-1]


def test_what_is_slow_is_skipped_with_more_tokens(quick, monkeypatch):
    monkeypatch.setattr(limits, "LONGEST_CALL_S", 0.0)
    (case,) = cases.SMOKE
    more = dataclasses.replace(case, tokens=2 * case.tokens)
    for row in quick[0]:
        check = lambda case, row=row: attention.check_time(
            row.implementation, case, row.mode, quick[0]
        )
        with pytest.raises(NotImplementedError, match="would take about"):
            check(more)
        check(case)
        check(dataclasses.replace(more, num_iters=case.num_iters + 1))


def test_the_time_of_a_call_is_quadratic_in_tokens(monkeypatch):
    monkeypatch.setattr(limits, "LONGEST_CALL_S", 1.0)
    case = cases.Case(1, 64)
    check = lambda ms: attention.check_time(
        "pot",
        case,
        "forward",
        [
            benchmark_rows.row(
                **cases.Case(1, 32).fields, implementation="pot", median_ms=ms
            )
        ],
    )
    check(200.0)
    with pytest.raises(NotImplementedError, match=r"about 2 s.*0.45 s for 32 tokens"):
        check(450.0)


def test_what_cannot_run_is_skipped_with_its_reason(
    tiny, monkeypatch, tmp_path, capsys
):
    reason = "it needs a machine that nobody has"
    monkeypatch.setattr(streaming, "why_not", lambda problem: reason)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "device" / "rows.jsonl"
    rows = tiny(implementations=("streaming", "pot"), output=path)
    assert [row.implementation for row in rows] == ["softmax"]
    printed = capsys.readouterr().out
    assert f"implementation='streaming' cannot run here: {reason}" in printed
    assert "Skipped pot, 1x16 float32 2 iterations, forward: POT is not" in printed
    skips = record.read_skips(tmp_path)
    assert [skip.implementation for skip in skips] == ["streaming", "pot"]
    assert reason in skips[0].reason
    assert skips[0].case == rows[0].case


def test_what_needs_too_much_memory_is_skipped(tiny, monkeypatch, capsys):
    monkeypatch.setattr(limits, "memory_bytes", lambda: 2**8)
    assert tiny(implementations=("reference",)) == []
    printed = capsys.readouterr().out
    for name in ("softmax", "reference"):
        assert f"Skipped {name}, 1x16 float32 2 iterations, forward: it " in printed


def test_float64_is_float64(tiny):
    _, row = tiny("float64", implementations=("scaling",))
    assert row.max_abs_error < 1e-13


def test_runs_without_softmax_where_that_cannot_run(tiny, capsys):
    # XLA has no product of float16 on a CPU that accumulates in float32.
    rows = tiny("float16", implementations=("scaling",))
    assert rows[-1].implementation == "scaling"
    if rows[0].implementation != "softmax":
        assert "is not supported by dot_general" in capsys.readouterr().out
        assert rows[0].ratio_to_softmax is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"implementations": ("fast",)},
            r"Unknown implementations \['fast'\]; expected",
        ),
        ({"cases": ("1x1",)}, r"Unknown cases \['1x1'\]; expected some of \['2x128'"),
        ({"sweeps": ("heads",), "cases": ("2x128",)}, "expected some of .*'96x197'"),
        ({"sweeps": ("sizes",)}, r"Unknown sweeps \['sizes'\]; expected .*'tokens'"),
        (
            {"dtypes": ("float8",)},
            r"Unknown dtypes \['float8'\]; expected .*'bfloat16'",
        ),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"quick": True, "cases": ("2x128",)}, "--quick has its own case"),
        ({"quick": True, "dtypes": ("float32",)}, "--quick has its own case"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        attention.Config(**fields)


def test_a_full_run_measures_everything_that_runs_on_any_device():
    config = attention.Config()
    assert set(config.implementations) == {*IMPLEMENTATIONS, *PEERS}
    assert set(cases.SWEEPS) - set(config.sweeps) == {"gpu"}


def test_cases_of_two_sweeps_are_measured_once():
    selected = cases.select(attention.Config().sweeps)
    assert len(set(selected)) == len(selected) == 8 + 4 + 7 + 4 - 2
    assert cases.select(["heads", "tokens"], ["2x4096"]) == [cases.Case(2, 4096)]
    only = cases.Case(128, 256, dtype="float16")
    assert cases.select(["gpu"], ["128x256"], ["float16"]) == [only]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="There is one.")
def test_the_sweep_for_a_gpu_is_refused_elsewhere(tmp_path):
    output = tmp_path / "rows.jsonl"
    config = attention.Config(sweeps=("gpu",), cases=("128x128",), output=output)
    with pytest.raises(RuntimeError, match="'gpu' needs a GPU, and JAX computes on a"):
        attention.run(config)
    assert not output.exists()
