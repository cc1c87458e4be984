"""Pages and README against the committed rows of the benchmarks."""

import json

import pytest

from benchmarks import collapse_measures
from benchmarks.harness import record
from benchmarks.report import figures, page, readme

CONFIG = readme.Config()


def test_the_readme_and_pages_say_what_the_rows_give():
    for path, text in readme.texts(CONFIG).items():
        if path.read_text(encoding="utf-8") != text:
            pytest.fail(f"{path} is stale: run python -m benchmarks readme")


def test_the_figures_of_pages_are_there():
    rows = record.read()
    for one in {row.machine: row for row in rows}.values():
        folder = page.folder(one, record.RESULTS)
        of_machine = [row for row in rows if row.machine == one.machine]
        for name in figures.names(of_machine):
            assert (folder / name).exists(), name


def test_all_measures_of_collapse_take_at_most_twice_the_least():
    paths = list(collapse_measures.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        row = json.loads(path.read_text())
        assert {name: row[name] for name in collapse_measures.SIZES} == (
            collapse_measures.SIZES
        )
        assert not row["commit"].endswith("-dirty")
        assert row["processor_ratio"] <= 2
        assert row["temp_mib"]["measures"] < 0.1 * row["input_mib"]
