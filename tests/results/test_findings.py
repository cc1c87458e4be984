"""The committed results of the experiments: findings, figures, pages."""

import json
import os
import pathlib

import numpy as np
import pytest

from experiments.questions import study
from experiments.registry import QUESTIONS
from experiments.report import report
from experiments.study import dial, escape, more, plan, rows
from experiments.study.store import Store

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = sorted((ROOT / "experiments" / "results").glob("*/*.json"))


def test_every_question_is_committed():
    assert {path.parent.name for path in RESULTS} == set(QUESTIONS)
    stems = {path.stem for path in RESULTS if path.parent.name == "study"}
    assert stems == {config.preset for config in study.REPORT_CONFIGS}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_findings_are_those_of_the_measurements(path):
    result = json.loads(path.read_text())
    found = QUESTIONS[path.parent.name].load().findings(result)
    assert list(found) == result["findings"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_has_its_figure(path):
    assert path.with_suffix(".png").exists()


def test_the_page_of_results_is_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = pathlib.Path("experiments") / "results" / "README.md"
    copy = tmp_path / "README.md"
    written = report.run(report.Config(output=copy)).read_text()
    # The same links, from another folder.
    root = os.path.relpath(ROOT, tmp_path)
    written = written.replace(f"({root}/experiments/results/", "(")
    written = written.replace(f"({root}/", "(../../")
    assert written == committed.read_text(), (
        "Write it again with `python -m experiments report --output "
        "experiments/results/README.md`."
    )


def follow_up():
    config = study.PRESETS["escape"]
    return escape.contrast(config.text, config.no_skip_rates)


CELLS = sorted((ROOT / "experiments" / "results" / "study" / "cells").glob("*.json"))


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_cells_are_of_the_plan_and_whole(path):
    cells = {cell.name: cell for cell in plan.cells_of(plan.primary())}
    secondary = more.secondary(plan.TEXT, plan.IMAGES)
    contrasts = [*secondary, follow_up(), *dial.contrasts(plan.IMAGES)]
    cells |= {c.name: c for c in plan.cells_of(contrasts)}
    cell = cells[path.stem]
    result = Store(path.parent).get(cell)
    assert result is not None, "Its setting is not that of the plan."
    shape = (len(cell.sizes.seeds), cell.sizes.num_observations + 1, cell.depth)
    assert np.shape(result["entropy"]) == shape
    assert np.shape(result["relative_residual"]) == (*shape[:2], cell.depth + 1)


def test_the_rows_of_the_study_are_those_of_its_cells():
    folder = ROOT / "experiments" / "results" / "study"
    get = Store(folder / "cells").get
    committed = json.loads((folder / "primary.json").read_text())["rows"]
    made = [rows.row(contrast, get) for contrast in plan.primary()]
    assert json.loads(json.dumps(made)) == committed[: len(made)]
