"""The page of all findings."""

import dataclasses
import json
import pathlib
from html.parser import HTMLParser
from types import ModuleType

import pytest

from experiments.evidence import files as record
from experiments.report import page as report_page
from experiments.report import report

ROOT = pathlib.Path(__file__).parents[3]
PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Options:
    output: object
    answer: int = 42


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for name, v in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Two experiments, one of which has ended; the names of those that are run."""
    ran = []

    def experiment(name, verdict):
        module = ModuleType(name, f"Is <{name}> asked?\n\nYes.")

        def run(options):
            ran.append(name)
            options.output.mkdir(parents=True, exist_ok=True)
            result = {
                "config": dataclasses.asdict(options) | {"output": "there"},
                "environment": {"jax": "1.2.3", "commit": "abc"},
                "findings": [{"claim": "a < b", "verdict": verdict, "text": "1 ± 2"}],
            }
            record.write_json(options.output / f"{name}.json", result)
            (options.output / f"{name}.png").write_bytes(PNG)

        module.run = run
        options = (Options(tmp_path / name),)
        return report.Experiment(module, options, options)

    table = {
        name: experiment(name, verdict)
        for name, verdict in (("one", "not supported"), ("two", "supported"))
    }
    monkeypatch.setattr(report, "EXPERIMENTS", table)
    table["one"].module.run(table["one"].full[0])
    ran.clear()
    return ran


def test_what_is_missing_is_run_and_all_is_on_the_page(runs, tmp_path):
    path = report.run(report.Config(output=tmp_path / "new" / "report.html"))
    assert runs == ["two"]
    page = Page(path.read_text())
    for text in ("Is <one> asked?", "Is <two> asked?", "a < b", "1 ± 2", "1.2.3", "42"):
        assert text in page.text
    assert "not supported" in page.text
    assert page.tags.count("img") == 2
    # It needs no other file and no network.
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    report.run(report.Config(output=tmp_path / "new" / "report.html"))
    assert runs == ["two"]
    # A kill between the result and its figure leaves the first alone.
    (tmp_path / "one" / "one.png").unlink()
    report.run(report.Config(output=tmp_path / "new" / "report.html"))
    assert runs == ["two", "one"]


def test_long_tables_are_folded_and_docstrings_are_text(tmp_path):
    figure = tmp_path / "a.png"
    figure.write_bytes(PNG)

    def page(num_claims):
        finding = {"claim": "a", "verdict": "not supported", "text": "b"}
        section = report_page.Section(
            name="a",
            about="Asks?\n\n    run <x>\n\nOne\nline:\n\n* First\n  item.\n* Two.\n",
            result={
                "findings": [finding] * num_claims,
                "config": {},
                "environment": {"jax": "1"},
            },
            figure=figure,
        )
        return report_page.render([section])

    few = page(2)
    assert "<pre>run &lt;x&gt;</pre><p>One line:</p>" in few
    assert "<ul><li>First item.</li><li>Two.</li></ul>" in few
    assert "<details open><summary>Claims: 2 not supported<" in few
    assert "<details><summary>Claims: 99 not supported<" in page(99)


def test_questions_may_be_chosen(runs, tmp_path):
    path = report.run(report.Config(questions=("one",), output=tmp_path / "one.html"))
    assert runs == []
    assert "<two>" not in Page(path.read_text()).text
    with pytest.raises(ValueError, match="questions must be among"):
        report.Config(questions=("three",))


def test_the_readme_shows_findings_as_they_were_measured():
    readme = (ROOT / "README.md").read_text()
    table = "\n".join(report.highlights())
    assert len(table.splitlines()) == 2 + len(report.HIGHLIGHTS)
    assert table in readme


def test_paths_are_those_that_the_experiments_write():
    for name, experiment in report.EXPERIMENTS.items():
        for options in experiment.full:
            path = report.result_path(name, options)
            assert path.exists(), f"{path} is not committed."
            assert path.with_suffix(".png").exists()
            assert json.loads(path.read_text())["findings"]
