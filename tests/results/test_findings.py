"""The committed results of the experiments: findings, figures, pages."""

import json
import os
import pathlib

import pytest

from experiments.questions import compare
from experiments.registry import QUESTIONS
from experiments.report import report

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = sorted((ROOT / "experiments" / "results").glob("*/*.json"))


def test_every_question_is_committed():
    assert {path.parent.name for path in RESULTS} == set(QUESTIONS)
    stems = {path.stem for path in RESULTS if path.parent.name == "compare"}
    assert stems == {config.preset for config in compare.REPORT_CONFIGS}


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
    results = os.path.relpath(ROOT / "experiments" / "results", tmp_path)
    assert written.replace(f"({results}/", "(") == committed.read_text(), (
        "Write it again with `python -m experiments report --output "
        "experiments/results/README.md`."
    )


@pytest.mark.parametrize("config", compare.REPORT_CONFIGS, ids=lambda c: c.preset)
def test_the_findings_page_shows_the_comparison_as_it_was_measured(config):
    path = ROOT / "experiments" / "results" / "compare" / f"{config.preset}.json"
    page = (ROOT / "docs" / "findings.md").read_text().splitlines()
    assert set(compare.table(json.loads(path.read_text()))) <= set(page)
