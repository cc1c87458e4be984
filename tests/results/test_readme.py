"""Whether README.md and docs/findings.md say what the committed results say."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
FINDINGS = ROOT / "docs" / "findings.md"
RESULT_LINK = re.compile(r"\]\(((?:\.\./)?experiments/results/[^)]*\.json)\)")
INTERVAL = re.compile(r"-?[\d.]+ (?:± [\d.]+|\[-?[\d.]+, -?[\d.]+\])")


def rows_with_results(page):
    """Cells of the table rows that link a result, and the findings of that result."""
    found = []
    for line in page.read_text().splitlines():
        if line.startswith("|") and (link := RESULT_LINK.search(line)):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            result = json.loads((page.parent / link[1]).read_text())
            found.append(pytest.param(cells, result["findings"], id=cells[0]))
    return found


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 100
    assert 0 < len(rows_with_results(README)) <= 10


@pytest.mark.parametrize(("cells", "findings"), rows_with_results(README))
def test_readme_shows_intervals_and_verdicts_of_a_committed_finding(cells, findings):
    _, verdict, measured = cells
    intervals = INTERVAL.findall(measured)
    assert intervals
    assert any(
        finding["verdict"] == verdict
        and all(interval in finding["text"] for interval in intervals)
        for finding in findings
    )


@pytest.mark.parametrize(("cells", "findings"), rows_with_results(FINDINGS))
def test_findings_are_quoted_from_the_results(cells, findings):
    _, claim, verdict, measured = cells
    quoted = {"verdict": verdict, "text": measured}
    assert [quoted] == [
        {key: finding[key] for key in quoted}
        for finding in findings
        if finding["claim"].rstrip(".") == claim
    ]
