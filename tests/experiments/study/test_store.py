"""The cells on disk: what is computed, what is left alone, what goes on."""

import dataclasses
import json

import pytest
from support import study_double
from support.training_runs import run_python

from experiments.study.store import Store

CELLS = [study_double.cell(num_iters=n) for n in (0, 1, 2)]


def kept(folder, cell):
    """The result of a cell that was computed."""
    result = Store(folder).get(cell)
    assert result is not None
    return result


@pytest.fixture
def computed():
    return []


@pytest.fixture
def compute(computed):
    def compute(cell):
        computed.append(cell)
        return {"values": [cell.num_iters, 0.5]}

    return compute


def test_a_cell_is_computed_once(tmp_path, compute, computed):
    folder = tmp_path / "new" / "cells"
    store = Store(folder)
    assert store.get(CELLS[1]) is None
    assert store.compute(CELLS[:2], compute) == []
    assert Store(folder).compute(CELLS, compute) == []
    assert computed == CELLS
    result = kept(folder, CELLS[1])
    assert result["values"] == [1, 0.5]
    assert result["wall_time_s"] >= 0
    assert {"jax", "commit", "device"} <= set(result["environment"])
    assert {path.name for path in folder.iterdir()} == {f"{c.name}.json" for c in CELLS}


def test_another_setting_is_computed_again(tmp_path, compute, computed):
    store = Store(tmp_path)
    sizes = dataclasses.replace(study_double.TEXT, seeds=(0, 1, 2))
    other = dataclasses.replace(CELLS[0], sizes=sizes)
    store.compute(CELLS[:1], compute)
    assert store.get(other) is None
    store.compute([other], compute)
    assert computed == [CELLS[0], other]
    assert kept(tmp_path, other)["values"] == [0, 0.5]


@pytest.mark.parametrize("damaged", [b"", b'{"setting": {', b"\0" * 20])
def test_a_damaged_file_is_computed_again(damaged, tmp_path, compute, computed):
    path = tmp_path / f"{CELLS[0].name}.json"
    path.write_bytes(damaged)
    store = Store(tmp_path)
    assert store.get(CELLS[0]) is None
    store.compute(CELLS[:1], compute)
    assert computed == CELLS[:1]
    assert json.loads(path.read_text())["result"]["values"] == [0, 0.5]


def test_what_another_one_has_begun_is_left_alone(tmp_path, compute, computed):
    busy = []

    def compute_slowly(cell):
        # Meanwhile the same command runs a second time.
        busy.append(Store(tmp_path).compute(CELLS, compute))
        return {"values": "slow"}

    assert Store(tmp_path).compute(CELLS[1:2], compute_slowly) == []
    assert busy == [CELLS[1:2]]
    assert computed == [CELLS[0], CELLS[2]]
    assert kept(tmp_path, CELLS[1])["values"] == "slow"


def test_what_ends_elsewhere_in_the_meantime_is_not_busy(tmp_path):
    def outer(cell):
        return {"by": "outer"}

    def inner(cell):
        return {"by": "inner"}

    def outer_with_inner(cell):
        if cell == CELLS[0]:
            Store(tmp_path).compute(CELLS[1:], inner)
        return outer(cell)

    assert Store(tmp_path).compute(CELLS, outer_with_inner) == []
    found = [kept(tmp_path, cell)["by"] for cell in CELLS]
    assert found == ["outer", "inner", "inner"]


def test_an_interrupted_run_goes_on(tmp_path, compute, computed):
    def interrupted(cell):
        if cell == CELLS[1]:
            raise KeyboardInterrupt
        return compute(cell)

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).compute(CELLS, interrupted)
    assert computed == CELLS[:1]
    assert Store(tmp_path).compute(CELLS, compute) == []
    assert computed == CELLS


def test_a_run_goes_on_after_a_process_was_killed(tmp_path, compute, computed):
    script = (
        "import pathlib, time\n"
        "from support import study_double\n"
        "from experiments.study.store import Store\n"
        "def compute(cell):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(600)\n"
        f"store = Store(pathlib.Path({str(tmp_path)!r}))\n"
        "store.compute([study_double.cell(num_iters=1)], compute)\n"
    )
    process = run_python(f"import sys\nsys.path.append('tests')\n{script}")
    try:
        assert process.stdout is not None
        shown = iter(process.stdout.readline, "")
        assert any(line == "begun\n" for line in shown)
        assert Store(tmp_path).compute(CELLS, compute) == CELLS[1:2]
        assert computed == [CELLS[0], CELLS[2]]
    finally:
        process.kill()
        process.communicate()
    assert Store(tmp_path).compute(CELLS, compute) == []
    assert computed == [CELLS[0], CELLS[2], CELLS[1]]
