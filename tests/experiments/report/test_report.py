"""The page of all findings."""

import dataclasses
from types import MappingProxyType, SimpleNamespace

import pytest

from experiments.evidence import files
from experiments.report import page, report


@dataclasses.dataclass(frozen=True)
class Options:
    output: object = None


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Two questions, one of which has been run; the names of those that are run."""
    ran = []

    def question(name, verdict):
        def run(options):
            ran.append(name)
            options.output.mkdir(parents=True, exist_ok=True)
            environment = {"jax": "1.2.3", "commit": "abc", "device": "1 x cpu"}
            result = {
                "environment": environment,
                "findings": [{"claim": "|a| < b", "verdict": verdict, "text": "1 ± 2"}],
                "wall_time_s": 12.3,
            }
            files.write_json(options.output / f"{name}.json", result)
            (options.output / f"{name}.png").write_bytes(b"")

        about = f"Is {name} asked?\n\n    run it\n\n* Yes.\n"
        module = SimpleNamespace(
            run=run, Config=Options, QUICK=Options(), __doc__=about
        )
        return SimpleNamespace(load=lambda: module)

    table = {
        "one": question("one", "not supported"),
        "two": question("two", "supported"),
    }
    monkeypatch.setattr(report, "QUESTIONS", MappingProxyType(table))
    table["one"].load().run(Options(tmp_path / "results" / "one"))
    ran.clear()
    return ran


@pytest.fixture
def write(tmp_path):
    def write(**options):
        paths = {"results": tmp_path / "results", "output": tmp_path / "new/report.md"}
        return report.run(report.Config(**paths | options)).read_text()

    return write


def test_what_is_missing_is_run_and_all_is_on_the_page(runs, write, tmp_path):
    text = write()
    assert runs == ["two"]
    for part in (
        "1. [one](#one): Is one asked? (1 not supported)",
        "## two\n\nIs two asked?\n\n    run it\n\n* Yes.\n",
        "![Figure of two](../results/two/two.png)",
        "| \\|a\\| &lt; b | supported | 1 ± 2 |",
        "Made by `python -m experiments two` in 12 s on 1 x cpu, commit abc, with jax "
        "1.2.3. [All numbers, options and definitions](../results/two/two.json).",
    ):
        assert part in text
    write()
    assert runs == ["two"]
    # A kill between the result and its figure leaves the first alone.
    (tmp_path / "results" / "one" / "one.png").unlink()
    write()
    assert runs == ["two", "one"]


def test_further_figures_are_shown_after_the_first(runs, write, tmp_path):
    folder = tmp_path / "results" / "one"
    for name in ("one_b.png", "one_a.png", "other.png"):
        (folder / name).write_bytes(b"")
    text = write(questions=("one",))
    shown = [
        f"![Figure of {stem}](../results/one/{stem}.png)"
        for stem in ("one", "one_a", "one_b")
    ]
    assert "\n\n".join(shown) in text
    assert "other.png" not in text


def test_long_tables_are_folded(tmp_path):
    def text(num_claims):
        finding = {"claim": "a", "verdict": "undecided", "text": "b"}
        environment = {"device": "x", "commit": "y"}
        result = {"findings": [finding] * num_claims, "environment": environment}
        run = page.Run(tmp_path / "a.json", result)
        return page.render([page.Section("a", "Asks?", [run])], tmp_path)

    assert "<details" not in text(2)
    assert "<details markdown><summary>99 claims</summary>\n\n| claim |" in text(99)


def test_questions_may_be_chosen(runs, write):
    text = write(questions=("one",))
    assert runs == []
    assert "## two" not in text
    with pytest.raises(ValueError, match="questions must be among"):
        report.Config(questions=("three",))
