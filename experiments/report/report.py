"""What did the experiments find? One page with all of it.

    python -m experiments report

Runs the experiments whose results are not there, each with its own defaults, then
writes one HTML page that needs no other file: for every experiment what it asks, its
findings with intervals and verdicts, figure, configuration, versions and commit. What
was interrupted is run again by the same command, and what had ended is not.

Reading what is committed takes seconds. From nothing it takes 6 hours on 2 CPU cores,
which were at times busy with other work: the sum of what the results say of their wall
time. Of these 39 % are the training of `compare`, 22 % `ablations`. With --quick, small
numbers throughout, it takes 5 minutes of processor time.
"""

import dataclasses
import json
import pathlib
import sys
from types import ModuleType
from typing import Any, Final, Literal, NamedTuple

from ..questions import (
    ablations,
    bounds,
    compare,
    convergence,
    doubly_exponential,
    entropy,
    iterations,
    length,
    paths,
    rank_decay,
    swap,
    temperature,
)
from . import page as report_page

RESULTS = pathlib.Path("experiments") / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is on the page, and where it goes."""

    questions: tuple[str, ...] = ()  # Modules of the experiments; none given is all.
    size: Literal["full", "quick"] = "full"  # Of the experiments' defaults.
    output: pathlib.Path = RESULTS / "report.html"

    def __post_init__(self):
        known = list(EXPERIMENTS)
        if unknown := [name for name in self.questions if name not in known]:
            raise ValueError(f"questions must be among {known}, got {unknown}.")


class Experiment(NamedTuple):
    """A module with `run`, and the runs of it that the page shows."""

    module: ModuleType
    full: tuple[Any, ...]  # Configurations.
    quick: tuple[Any, ...]


def _plain(module: ModuleType) -> Experiment:
    return Experiment(module, (module.Config(),), (module.QUICK,))


# In the order of the page.
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "rank_decay": _plain(rank_decay),
    "ablations": _plain(ablations),
    "doubly_exponential": _plain(doubly_exponential),
    "bounds": _plain(bounds),
    "paths": _plain(paths),
    "entropy": _plain(entropy),
    "convergence": _plain(convergence),
    "iterations": _plain(iterations),
    "swap": _plain(swap),
    "temperature": _plain(temperature),
    "length": _plain(length),
    "compare": Experiment(
        compare,
        tuple(compare.PRESETS[name] for name in ("digits", "fashion_mnist", "imdb")),
        (compare.QUICK,),
    ),
}

# What the README shows: a result and a claim of it.
HIGHLIGHTS: Final = (
    (
        "ablations",
        "skip connections preserve rank, whatever the normaliser (MLP, pre-LayerNorm)",
    ),
    (
        "doubly_exponential",
        "The logarithm of the residual triples from layer to layer "
        "(Sinkhorn, 10, tokens of deviation 1).",
    ),
    *(
        (
            name,
            "trained Sinkhorn attention preserves rank better than softmax "
            f"({name}, 10 iterations)",
        )
        for name in ("digits", "fashion_mnist", "imdb")
    ),
    (
        "ablations",
        "Sinkhorn, 10, preserves rank better than softmax (skip, MLP, pre-LayerNorm)",
    ),
    ("length", "Sinkhorn preserves rank better than softmax (64 tokens)"),
    ("iterations", "2 half steps preserve rank better than softmax (digits)"),
    (
        "temperature",
        "Sinkhorn preserves rank better than softmax trained to the same entropy",
    ),
    ("swap", "swapping softmax for Sinkhorn, 10 after training preserves rank better"),
    (
        "entropy",
        "Sinkhorn attention keeps more of its entropy in training (rate 0.01)",
    ),
    (
        "paths",
        "Paths lose rank more slowly with Sinkhorn, 10, than with the softmax.",
    ),
    (
        "bounds",
        "The bound 'Dong' holds over depth (softmax, trained on reviews).",
    ),
    (
        "convergence",
        "50 iterations are enough for a column defect of 0.1 % "
        "(64 tokens, logits of deviation 10).",
    ),
)

QUICK = Config(size="quick", output=RESULTS / "report_quick" / "report.html")


def run(config: Config) -> pathlib.Path:
    """Runs what is missing and writes the page; its path.

    Raises:
        As the experiments that are run.
    """
    sections = []
    for name, experiment in EXPERIMENTS.items():
        if config.questions and name not in config.questions:
            continue
        for options in getattr(experiment, config.size):
            path = result_path(name, options)
            # Interrupted between the two, it has no figure.
            if not path.exists() or not path.with_suffix(".png").exists():
                print(f"Running {name} for {path}.", file=sys.stderr)
                experiment.module.run(options)
            sections.append(
                report_page.Section(
                    name=path.stem,
                    about=experiment.module.__doc__ or "",
                    result=json.loads(path.read_text()),
                    figure=path.with_suffix(".png"),
                )
            )
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(report_page.render(sections))
    print(f"Wrote {config.output}.")
    return config.output


def highlights() -> list[str]:
    """The lines of the README's table of findings, from what is committed.

    Raises:
        FileNotFoundError: A result is not there.
        StopIteration: A result does not have the claim.
    """
    paths = {
        path.stem: path
        for name, experiment in EXPERIMENTS.items()
        for path in (result_path(name, options) for options in experiment.full)
    }
    lines = ["| experiment | claim | verdict | measured |", "|---|---|---|---|"]
    for stem, claim in HIGHLIGHTS:
        result = json.loads(paths[stem].read_text())
        found = next(f for f in result["findings"] if f["claim"] == claim)
        claim = claim.rstrip(".")
        lines.append(f"| {stem} | {claim} | {found['verdict']} | {found['text']} |")
    return lines


def result_path(name: str, options: Any) -> pathlib.Path:
    """Where an experiment writes the JSON of a run, and the figure beside it."""
    return options.output / f"{getattr(options, 'preset', name)}.json"
