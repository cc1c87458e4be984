import dataclasses
import math
from types import MappingProxyType

import numpy as np
import pytest
import reference

from benchmarks import __main__ as benchmarks
from benchmarks import _cases, _machine, _measure, _oracle, _readme, _record, _table
from sinkhorn_jax._dispatch import Implementation
from sinkhorn_jax.attention import IMPLEMENTATIONS, _api


def row(**fields):
    """A row as one run would give; a difference is named by the test."""
    defaults = dict(
        implementation="softmax",
        mode="forward",
        shape_btnh=(1, 64, 4, 16),
        kv_len=64,
        dtype="float32",
        num_iters=10,
        matmul_precision="default",
        median_ms=2.0,
        iqr_ms=0.5,
        repeats=5,
        compile_ms=100.0,
        tokens_per_second=32e3,
        ratio_to_softmax=1.0,
        peak_mib=1.5,
        peak_in_ts_arrays=96.0,
        one_head_mib=0.03,
        ts_arrays_per_head=2.0,
        max_abs_error=1e-7,
        device="Some CPU",
        platform="cpu",
        num_cpus=2,
        jax_version="0.0",
        jaxlib_version="0.0",
        python_version="3.11",
        commit="abc1234",
        date="2026-01-01T00:00:00+00:00",
    )
    return _record.Row(**defaults | fields)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The rows of a smoke run, and those read from its file."""
    path = tmp_path_factory.mktemp("results") / "device" / "rows.jsonl"
    before = _record.read()
    rows = benchmarks.run(benchmarks.Config(quick=True, repeats=2, output=path))
    assert _record.read() == before
    return rows, _record.read(path.parent.parent)


def test_quick_measures_every_implementation_in_both_modes(quick):
    rows, kept = quick
    assert kept == rows
    assert {(row.implementation, row.mode) for row in rows} == {
        (name, mode)
        for name in (_measure.SOFTMAX, *IMPLEMENTATIONS)
        for mode in _measure.MODES
    }
    assert len({row.date for row in rows}) == 1


def test_quick_numbers_are_finite_and_consistent(quick):
    for row in quick[0]:
        for field, value in dataclasses.asdict(row).items():
            assert value is not None, field
            if isinstance(value, float):
                assert math.isfinite(value), field
        assert row.repeats == 2
        assert row.tokens_per_second == pytest.approx(64e3 / row.median_ms)
        # Inputs of standard deviation 1 in float32, 64 tokens.
        assert 0 < row.max_abs_error < 1e-5
        assert row.ts_arrays_per_head < row.one_head_mib * 2**20 / (64 * 64 * 4) + 0.01
        if row.implementation == _measure.SOFTMAX:
            assert row.ratio_to_softmax == 1


def test_quick_table_has_a_line_for_each_row(quick):
    lines = _table.aligned(quick[0]).splitlines()
    assert len(lines) == 1 + len(quick[0])
    assert max(map(len, lines)) == len(lines[0])  # The last column is right-aligned.


@pytest.mark.parametrize("num_iters", [0, 3])
def test_oracle_agrees_with_the_reference_of_the_tests(num_iters):
    rng = np.random.default_rng(1)
    q, k, v, do = (rng.standard_normal(x) for x in ((6, 4), (9, 4), (9, 3), (6, 3)))

    def out(q, k, v):
        one_head = (x[None, :, None] for x in (q, k, v))
        return reference.sinkhorn_attention(*one_head, num_iters=num_iters)[0, :, 0]

    got = _oracle.attention(q, k, v, do, num_iters)
    np.testing.assert_allclose(got.out, out(q, k, v), rtol=0, atol=1e-14)
    step = 1e-5  # Central differences are then good to about 1e-10.
    for i, gradient in enumerate((got.dq, got.dk, got.dv)):
        direction = rng.standard_normal(gradient.shape)
        moved = [
            [
                x + sign * step * direction if j == i else x
                for j, x in enumerate((q, k, v))
            ]
            for sign in (1, -1)
        ]
        slope = np.vdot(do, out(*moved[0]) - out(*moved[1])) / (2 * step)
        assert np.vdot(gradient, direction) == pytest.approx(slope, abs=1e-8)


def test_oracle_does_not_overflow():
    x = np.full((4, 1), 40.0)  # Logits 1600.
    out = _oracle.attention(x, x, np.eye(4), np.eye(4), 2).out
    np.testing.assert_allclose(out, 0.25, atol=1e-12)


def test_error_sees_a_wrong_head_and_a_nan():
    case = _cases.Case(3, 8, head_dim=4)
    inputs = _cases.inputs(case, "float32")
    want = _measure.expected(case, inputs, 2)
    out = np.stack([x.out for x in want], axis=1)[None]
    assert _measure.error(case, "forward", (out,), want) == 0
    out[0, 5, 1, 2] += 0.5
    assert _measure.error(case, "forward", (out,), want) == pytest.approx(0.5)
    gradients = [np.stack(x, axis=1)[None] for x in zip(*want, strict=True)][1:]
    assert _measure.error(case, "forward_backward", (out, gradients), want) == 0
    gradients[1] = 1.25 * gradients[1]
    found = _measure.error(case, "forward_backward", (out, gradients), want)
    assert found == pytest.approx(0.25)
    gradients[0][0, 0, 0, 0] = np.nan
    found = _measure.error(case, "forward_backward", (out, gradients), want)
    assert math.isnan(found)


@pytest.mark.parametrize("name", _cases.CASES)
def test_checked_heads_are_distinct_and_few_where_tokens_are_many(name):
    case = _cases.CASES[name]
    heads = _measure.checked_heads(case)
    assert len(set(heads)) == len(heads)
    assert heads[-1] == case.heads - 1
    assert heads.min() >= 0
    assert len(heads) == 1 or len(heads) * case.tokens**2 <= _measure.CHECKED_ENTRIES


def test_calls_take_turns():
    calls = []
    fns = {name: lambda x, name=name: calls.append(name) for name in "abc"}
    times = _measure.time_in_turns(fns, (0,), repeats=2, budget_s=0)
    assert calls == [*"abc", *"abc", *"cba"]  # Untimed, then back and forth.
    assert [len(x) for x in times.values()] == [2, 2, 2]


def test_calls_go_on_for_the_budget():
    times = _measure.time_in_turns({"a": lambda x: x}, (0,), repeats=1, budget_s=0.05)
    assert len(times["a"]) > 1


def test_what_cannot_run_is_skipped_with_its_reason(monkeypatch, tmp_path, capsys):
    reason = "it needs a machine that nobody has"
    broken = Implementation(
        None, lambda problem: reason, lambda problem, platform: False
    )
    table = MappingProxyType({"broken": broken, **IMPLEMENTATIONS})
    monkeypatch.setattr(_api, "IMPLEMENTATIONS", table)
    monkeypatch.setattr(benchmarks, "IMPLEMENTATIONS", table)
    monkeypatch.setattr(_measure, "MODES", ("forward",))
    rows = benchmarks.run(
        benchmarks.Config(quick=True, repeats=1, implementations=("broken",))
    )
    assert [row.implementation for row in rows] == ["softmax"]
    assert (
        f"Skipped broken, 4x64, forward: {reason}"
        in capsys.readouterr().out.replace(
            "implementation='broken' cannot run here: ", ""
        )
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"implementations": ("fast",)},
            r"Unknown implementations \['fast'\]; expected",
        ),
        ({"implementations": ("softmax",)}, "always measured"),
        ({"cases": ("1x1",)}, r"Unknown cases \['1x1'\]; expected some of \['96x197'"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.Config(**fields)


def test_full_run_has_the_four_cases():
    assert benchmarks.Config().cases == ("96x197", "32x512", "16x1024", "2x4096")
    shapes = [_cases.CASES[name].shape_btnh for name in benchmarks.Config().cases]
    assert shapes == [
        (1, 197, 96, 64),
        (1, 512, 32, 64),
        (1, 1024, 16, 64),
        (1, 4096, 2, 64),
    ]
    assert benchmarks.Config().num_iters == 10


def test_rows_are_appended(tmp_path):
    path = tmp_path / "results" / "device" / "rows.jsonl"
    first, second = row(), row(peak_mib=None, date="2026-01-02T00:00:00+00:00")
    _record.append(path, [second])
    _record.append(path, [first])
    assert len(path.read_text().splitlines()) == 2
    assert _record.read(tmp_path / "results") == [first, second]


@pytest.mark.parametrize(
    ("device", "platform", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "cpu", "cpu-intel-xeon-processor-2cores"),
        ("NVIDIA H100 80GB HBM3", "gpu", "nvidia-h100-80gb-hbm3"),
        ("../Some CPU @ 2.5GHz", "cpu", "cpu-..-some-cpu-2.5ghz-2cores"),
    ],
)
def test_directory_of_a_device(device, platform, name):
    assert _machine.directory_name(device, platform, 2) == name


def test_commit_is_dirty_when_what_is_measured_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(_machine, "ROOT", tmp_path)
    # Not the repository that the temporary folder may lie in, nor anyone's settings.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    assert _machine.commit() == "unknown"
    _machine._git("init")
    assert _machine.commit() == "unknown"  # Without a commit.
    person = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    _machine._git(*person, "commit", "--allow-empty", "--message=first")
    clean = _machine.commit()
    assert clean == _machine._git("rev-parse", "--short", "HEAD")
    (tmp_path / "README.md").touch()
    (tmp_path / "benchmarks" / "results" / "device").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "device" / "rows.jsonl").touch()
    assert _machine.commit() == clean
    (tmp_path / "code.py").touch()
    assert _machine.commit() == f"{clean}-dirty"


def test_markdown_shows_the_newest_run_and_the_ratios():
    rows = [row(median_ms=77.0, date="2025-01-01T00:00:00+00:00")]
    for mode in _measure.MODES:
        rows += [
            row(mode=mode),
            row(
                mode=mode, implementation="scaling", median_ms=1.0, ratio_to_softmax=0.5
            ),
            row(mode=mode, implementation="reference", median_ms=6.0, peak_mib=None),
        ]
    text = _table.markdown(rows)
    assert "**Some CPU, 2 cores**, float32, 10 iterations, jax 0.0" in text
    assert "commit `abc1234`, 2026-01-01" in text
    assert "77" not in text
    line = next(x for x in text.splitlines() if "`scaling`" in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "4x64"
    assert cells[2:7] == ["1 ± 0.25", "0.50", "1 ± 0.25", "0.50", "6"]
    assert len({x.count("|") for x in text.splitlines() if x.startswith("|")}) == 1


def test_markdown_keeps_devices_and_dtypes_apart():
    rows = [
        row(),
        row(dtype="bfloat16", date="2026-02-01T00:00:00+00:00"),
        row(device="Some GPU", platform="gpu", date="2025-01-01T00:00:00+00:00"),
    ]
    text = _table.markdown(rows)
    assert text.count("heads x tokens") == 3
    assert "**Some GPU**" in text
    # One mode alone leaves the other's cells empty.
    assert _table.MISSING in text


def test_readme_block_is_replaced(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n\n{_readme.BEGIN}\nold\n{_readme.END}\n\nafter\n")
    _record.append(results / "device" / "rows.jsonl", [row()])
    assert not _readme.is_current(readme, results)
    _readme.update(readme, results)
    assert _readme.is_current(readme, results)
    text = readme.read_text()
    assert text.startswith(f"before\n\n{_readme.BEGIN}\n**Some CPU")
    assert text.endswith(f"{_table.LEGEND}\n{_readme.END}\n\nafter\n")
    assert "old" not in text
    _readme.update(readme, results)
    assert readme.read_text() == text


def test_readme_needs_markers_and_rows(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="There are no rows below"):
        _readme.update(readme, tmp_path)
    _record.append(tmp_path / "device" / "rows.jsonl", [row()])
    with pytest.raises(ValueError, match="got 0 and 0"):
        _readme.update(readme, tmp_path)
    assert readme.read_text() == "no markers"


def test_the_readme_says_what_the_rows_give():
    if not _record.read():
        pytest.skip("no rows are kept")
    if _readme.BEGIN not in _readme.README.read_text(encoding="utf-8"):
        pytest.skip("the README has no table")
    assert _readme.is_current(), "Run python -m benchmarks --readme."


def test_command(monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(benchmarks, "run", configs.append)
    command = "--cases 2x4096 32x512 --implementations scaling --num-iters 3"
    benchmarks.main(f"{command} --repeats 7 --dtype bfloat16".split())
    config = configs[0]
    assert config.cases == ("2x4096", "32x512")
    assert config.implementations == ("scaling",)
    assert (config.num_iters, config.repeats, config.dtype) == (3, 7, "bfloat16")
    updated = []
    monkeypatch.setattr(_readme, "update", lambda: updated.append(True))
    benchmarks.main(["--readme"])
    assert updated == [True]
    assert len(configs) == 1
