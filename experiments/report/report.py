"""What did the experiments find? One page with all of it.

    python -m experiments report

Runs the experiments whose results are not there, each with its own defaults, then
writes one Markdown page: for every experiment what it asks, its findings with intervals
and verdicts, its figure and how it was made. The same command continues what was
interrupted, and runs nothing again that had ended.

Reading what is committed takes seconds. From nothing most of the time is the training
of the study, hours on 2 CPU cores. With --quick, small numbers throughout, it takes
minutes. The committed pages are written with `--output experiments/results/README.md
--pages README.md docs/findings.md`.
"""

import dataclasses
import json
import os
import pathlib
import sys

import tyro

from ..evidence import files
from ..registry import QUESTIONS
from . import page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The content of the page, and its path."""

    questions: tuple[str, ...] = ()  # Names of questions; none given is all.
    # Whether missing results are made with small numbers: the option --quick.
    is_quick: tyro.conf.Suppress[bool] = False
    results: pathlib.Path = files.RESULTS  # Folder of the results, where runs write.
    output: pathlib.Path = files.RUNS / "report.md"
    # Pages that have the primary verdicts of the study between two marks, to be
    # brought up to date: the readme has them in short.
    pages: tuple[pathlib.Path, ...] = ()

    def __post_init__(self):
        if unknown := [name for name in self.questions if name not in QUESTIONS]:
            known = list(QUESTIONS)
            raise ValueError(f"questions must be among {known}, got {unknown}.")


QUICK = Config(
    is_quick=True, results=files.RUNS / "quick", output=files.RUNS / "quick/report.md"
)


def run(config: Config) -> pathlib.Path:
    """Runs what is missing, writes the page and returns its path."""
    sections = []
    for name in config.questions or QUESTIONS:
        question = QUESTIONS[name].load()
        full = getattr(question, "REPORT_CONFIGS", (question.Config(),))
        runs = []
        for options in (question.QUICK,) if config.is_quick else full:
            options = dataclasses.replace(options, output=config.results / name)
            path = options.output / f"{getattr(options, 'preset', name)}.json"
            # A run that was interrupted between the two has no figure.
            if not path.exists() or not path.with_suffix(".png").exists():
                print(f"Running {name} for {path}.", file=sys.stderr)
                question.run(options)
            runs.append(page.Run(path, json.loads(path.read_text())))
        sections.append(page.Section(name, question.__doc__, runs))
    for path in config.pages:
        write_verdicts(path, config.results)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(page.render(sections, config.output.parent))
    print(f"Wrote {config.output}.")
    return config.output


def write_verdicts(path: pathlib.Path, results: pathlib.Path) -> None:
    """Brings the primary verdicts of the study on a page up to date."""
    study = results / "study" / "primary.json"
    link = pathlib.Path(os.path.relpath(study, path.parent)).as_posix()
    result = json.loads(study.read_text())
    is_short = path.name == "README.md"
    text = page.with_verdicts(path.read_text(), result, link, is_short=is_short)
    path.write_text(text)
