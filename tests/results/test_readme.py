"""Whether README.md and docs/findings.md say what the committed results say."""

import json
import os
import pathlib
import statistics

import pytest

from experiments.report import page

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
FINDINGS = ROOT / "docs" / "findings.md"
RESULTS = ROOT / "experiments" / "results"
STUDY = RESULTS / "study" / "primary.json"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 100
    assert len(json.loads(STUDY.read_text())["findings"]) <= 10


@pytest.mark.parametrize("path", [README, FINDINGS], ids=lambda path: path.stem)
def test_verdicts_are_those_of_the_study(path):
    text, result = path.read_text(), json.loads(STUDY.read_text())
    link = pathlib.Path(os.path.relpath(STUDY, path.parent)).as_posix()
    is_short = path.name == "README.md"
    assert page.with_verdicts(text, result, link, is_short=is_short) == text


@pytest.mark.parametrize(
    ("layer_norm", "pooling", "rates"),
    [
        ("pre", "class_token", [0.001, 0.003, 0.01]),
        ("post", "class_token", [0.003]),
        ("pre", "mean", [0.003, 0.01]),
    ],
)
def test_findings_quote_the_medians_of_the_study(layer_norm, pooling, rates):
    text = FINDINGS.read_text()
    cells = [
        cell
        for cell in json.loads(STUDY.read_text())["curves"]
        if (cell["task"], cell["layer_norm"]) == ("imdb", layer_norm)
        and cell["has_skip"]
        and cell["pooling"] == pooling
        and cell["learning_rate"] in rates
    ]
    assert len(cells) == 2 * len(rates)
    for cell in cells:
        residual = statistics.median(row[-2] for row in cell["residual"]["trained"])
        assert f"{residual:.3f}" in text
        design = layer_norm, pooling, cell["learning_rate"]
        if design == ("pre", "class_token", 0.01):
            layers = zip(*cell["entropy"]["trained"], strict=True)
            for entropy in list(map(statistics.median, layers))[1:4]:
                assert f"{entropy:.3f}" in text


def test_findings_quote_what_an_update_costs():
    result = json.loads((RESULTS / "step_cost" / "step_cost.json").read_text())
    text = FINDINGS.read_text()
    for finding in result["findings"]:
        if "50" not in finding["claim"]:
            ratio = finding["text"].removeprefix("Ratio of the times: ")
            assert ratio.partition(" (")[0] in text
