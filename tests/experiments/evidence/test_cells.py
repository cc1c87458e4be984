"""Partial results: computed once, of one setting, by one run at a time."""

import json

import pytest

from experiments.evidence.cells import Cells


def interrupted(output, setting, names):
    """The names that a run computes before an error ends it."""
    computed = []

    def compute(name):
        computed.append(name)
        return {"value": len(name)}

    def run():
        with Cells(output, setting) as cells:
            for name in names:
                result = cells.get(name, lambda name=name: compute(name))
                assert result["value"] == len(name)
                assert {"commit", "wall_time_s"} <= set(result)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    return computed


def test_what_was_computed_is_found_again_until_the_whole_is_written(tmp_path):
    assert interrupted(tmp_path, {"rate": 0.1}, ["a", "bb"]) == ["a", "bb"]
    assert interrupted(tmp_path, {"rate": 0.1}, ["a", "bb", "c"]) == ["c"]
    with Cells(tmp_path, {"rate": 0.1}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_results_of_other_settings_are_computed_again(tmp_path):
    interrupted(tmp_path, {"rate": 0.1}, ["a"])
    assert interrupted(tmp_path, {"rate": 0.2}, ["a"]) == ["a"]


def test_a_damaged_file_is_computed_again(tmp_path):
    interrupted(tmp_path, {}, ["a"])
    (path,) = (tmp_path / "cells").glob("*.json")
    path.write_text("")
    assert interrupted(tmp_path, {}, ["a"]) == ["a"]
    assert json.loads(path.read_text())["result"]["value"] == 1


def test_a_folder_serves_one_run_at_a_time(tmp_path):
    with Cells(tmp_path, {}):
        with pytest.raises(BlockingIOError, match="Another run writes to"):
            with Cells(tmp_path, {}):
                pass
        assert (tmp_path / "cells").exists()  # That of the first.
    with Cells(tmp_path, {}):  # The first has ended.
        pass
