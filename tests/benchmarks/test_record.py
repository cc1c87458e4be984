"""The files of rows and skips, and the facts of a machine."""

import dataclasses

import pytest
from support.benchmark_rows import SKIP, row

from benchmarks.harness import machine, record


def test_rows_are_appended(tmp_path):
    path = tmp_path / "results" / "device" / "rows.jsonl"
    first, second = row(), row(peak_mib=None, date="2026-01-02T00:00:00+00:00")
    record.append(path, [second])
    record.append(path, [first])
    assert len(path.read_text().splitlines()) == 2
    # Other benchmarks have folders of their own below that of the device.
    (path.parent / "blocks").mkdir()
    (path.parent / "blocks" / "2026-01-01.jsonl").write_text('{"blocks": {}}\n')
    assert record.read(tmp_path / "results") == [first, second]


def test_skips_are_kept_beside_the_rows(tmp_path):
    path = tmp_path / "results" / "device" / "2026-01-01.jsonl"
    record.append(path, [row()])
    record.append(record.skips_path(path), [SKIP])
    record.append(record.skips_path(path), [])
    assert record.read(tmp_path / "results") == [row()]
    assert record.read_skips(tmp_path / "results") == [SKIP]
    assert SKIP.case == row().case


def test_lines_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "device" / "rows.jsonl"
    fields = dataclasses.asdict(row())
    for new in ("version", "is_default", "memory_source", "load"):
        del fields[new]
    record.append(path, [fields | {"no_longer_recorded": 1}])
    assert record.read(tmp_path) == [row()]


def test_newest_takes_a_case_from_one_run():
    later = "2026-01-02T00:00:00+00:00"
    rows = [
        row(),
        row(implementation="scaling"),
        row(date=later),
        row(num_iters=5, implementation="scaling"),
        row(device="Other CPU"),
    ]
    assert record.newest(rows, rows) == rows[2:]
    assert record.newest([SKIP], rows) == []
    assert record.newest([SKIP], rows[:2]) == [SKIP]


@pytest.mark.parametrize(
    ("device", "platform", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "cpu", "cpu-intel-xeon-processor-2cores"),
        ("NVIDIA H100 80GB HBM3", "gpu", "nvidia-h100-80gb-hbm3"),
        ("../Some CPU @ 2.5GHz", "cpu", "cpu-..-some-cpu-2.5ghz-2cores"),
    ],
)
def test_directory_of_a_device(device, platform, name):
    assert machine.directory_name(device, platform, 2) == name


def test_commit_is_dirty_when_what_is_measured_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    # Not the repository that the temporary folder may lie in, nor anyone's settings.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    assert machine.commit() == "unknown"
    machine._git("init")
    assert machine.commit() == "unknown"  # Without a commit.
    person = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    machine._git(*person, "commit", "--allow-empty", "--message=first")
    clean = machine.commit()
    assert clean == machine._git("rev-parse", "--short", "HEAD")
    (tmp_path / "README.md").touch()
    (tmp_path / "benchmarks" / "results" / "device").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "device" / "rows.jsonl").touch()
    assert machine.commit() == clean
    (tmp_path / "code.py").touch()
    assert machine.commit() == f"{clean}-dirty"
