"""The page of the report, in Markdown."""

import collections
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

INTRODUCTION = """\
# Findings on doubly stochastic attention

The primary contrasts of the study come first. Their tests, verdicts and correction for
the number of claims were written down in docs/protocol.md before the trainings.

All else is secondary. Intervals are of 95 %, over seeds. A claim is supported, or not,
where the whole interval says so, and at the scale of the experiment alone; otherwise it
is undecided. But for the study nothing is corrected for the number of claims: where
there is no effect at all, one claim of twenty gets a verdict by chance.
"""

ROOT = pathlib.Path(__file__).parents[2]
PROTOCOL = "docs/protocol.md"  # The pages' name of it, which becomes a link.

# The claims of a run; where there are more, the reader unfolds them.
MOST_OPEN = 16


class Run(NamedTuple):
    """One run of a question."""

    path: pathlib.Path  # The JSON, with the figure beside it.
    result: dict[str, Any]  # What the JSON holds.


class Section(NamedTuple):
    """A question with its runs."""

    name: str
    about: str  # The docstring of its module.
    runs: Sequence[Run]


def render(sections: Sequence[Section], folder: pathlib.Path) -> str:
    """The text of the page, whose links lead from `folder` to figures and numbers."""
    protocol = pathlib.Path(os.path.relpath(ROOT / PROTOCOL, folder)).as_posix()
    linked = lambda text: text.replace(PROTOCOL, f"[{PROTOCOL}]({protocol})")
    lines = [linked(INTRODUCTION)]
    for name, about, runs in sections:
        findings = [found for run in runs for found in run.result["findings"]]
        title = about.splitlines()[0]
        lines.append(f"1. [{name}](#{name}): {title} ({_counts(findings)})")
    for name, about, runs in sections:
        lines.append(f"\n## {name}\n\n{linked(about.strip())}")
        lines += [_run(name, run, folder) for run in runs]
    return "\n".join(lines)


BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


def with_verdicts(
    page: str, result: dict[str, Any], link: str, *, is_short: bool
) -> str:
    """A page with the primary verdicts of the study between its two marks.

    Args:
        page: The text of the page.
        result: What the JSON of the study holds.
        link: From the page to that JSON.
        is_short: Whether to give the estimates without the numbers behind them.

    Raises:
        ValueError: The page lacks a mark.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"The page must have {BEGIN} and {END} once each.")
    lines = ["| claim | verdict | measured |", "|---|---|---|"]
    for found in result["findings"]:
        text = found["text"]
        if is_short and found["verdict"] != "untested":
            text = text.partition("By seed ")[2].partition(", p = ")[0]
        measured = f"[{text}]({link})" if is_short else text
        lines.append(f"| {_cell(found['claim'])} | {found['verdict']} | {measured} |")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    return "\n".join([before + BEGIN, *lines, END + after])


def _counts(findings):
    counts = collections.Counter(finding["verdict"] for finding in findings)
    return ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))


def _run(question, run, folder):
    findings = run.result["findings"]
    link = pathlib.Path(os.path.relpath(run.path, folder)).as_posix()
    table = "| claim | verdict | measured |\n|---|---|---|\n" + "".join(
        f"| {_cell(found['claim'])} | {found['verdict']} | {_cell(found['text'])} |\n"
        for found in findings
    )
    if len(findings) > MOST_OPEN:
        summary = f"<summary>{len(findings)} claims</summary>"
        table = f"<details markdown>{summary}\n\n{table}\n</details>\n"
    others = sorted(run.path.parent.glob(f"{run.path.stem}_*.png"))
    stems = [run.path.stem, *(path.stem for path in others)]
    folder = pathlib.PurePosixPath(link).parent
    figures = "\n\n".join(f"![Figure of {s}]({folder / s}.png)" for s in stems)
    return f"""
{figures}

{table}
{_origin(question, run.result)} [All numbers, options and definitions]({link}).
"""


def _origin(question, result):
    """How a result was made, in a sentence."""
    environment = dict(result["environment"])
    command = f"python -m experiments {question}"
    if "preset" in result:
        command += f" --preset {result['preset']}"
    took = f" in {result['wall_time_s']:.0f} s" if "wall_time_s" in result else ""
    where = f"on {environment.pop('device')}, commit {environment.pop('commit')}"
    versions = ", ".join(f"{key} {value}" for key, value in environment.items())
    return f"Made by `{command}`{took} {where}, with {versions}."


def _cell(text):
    return text.replace("|", "\\|").replace("<", "&lt;")
