"""Does a Sinkhorn encoder learn as well as a softmax one, and what does it cost?

    python -m experiments compare --preset digits

Trains the encoder of a preset of `train` with either normaliser, with equal parameters,
updates and search for the learning rate: every rate of the same grid with the first
seed, the best on the validation split with all seeds. Reports test accuracy with 95 %
intervals of Student's t over seeds, relative residual and attention entropy by layer
before and after training, and the time of an update as a multiple of softmax's. Texts
are compared with a linear model on their words, too.

Every training is a run of `train` in its own folder under --runs, so the same command
continues an interrupted run. On 2 CPU cores digits take 10 minutes, fashion_mnist and
imdb an hour each; `--preset sinkformer_imdb --base.dtype bfloat16` and `--preset vit`
are the full sizes, for a GPU. --timed names the iterations of which the time alone is
measured.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from ..evidence import files
from ..evidence.cells import Cells
from ..evidence.claims import Finding, difference, finding, interval, normaliser_name
from ..figures.compare import chosen, draw
from ..networks import measures
from ..networks.options import require_distinct
from ..training import presets, train
from ..training.bag_of_words import bag_of_words
from ..training.step_times import measure_step_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result, and where it goes."""

    preset: str = "digits"  # A preset of `train`.
    num_iters: tuple[int, ...] = (0, 10)  # Sinkhorn iterations to train; 0 is softmax.
    timed: tuple[int, ...] = (0, 10, 50)  # Sinkhorn iterations to time; 0 is softmax.
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)  # The grid of the search.
    seeds: tuple[int, ...] = (0, 1, 2)  # The first one searches the rate.
    base: presets.Config = presets.PRESETS["digits"]  # Its other options.
    runs: pathlib.Path = files.RUNS / "train" / "compare"  # Folder of the trainings.
    output: pathlib.Path = files.RUNS / "compare"  # Folder of the JSON and figure.

    def __post_init__(self):
        require_distinct(self, "num_iters", "timed", "learning_rates", "seeds")
        if 0 not in self.num_iters or 0 not in self.timed:
            raise ValueError(
                "num_iters and timed must hold 0, softmax, to compare with, got "
                f"{self.num_iters} and {self.timed}."
            )
        if not self.base.num_measured or self.base.has_skip != self.base.has_mlp_skip:
            raise ValueError(
                "base.num_measured must be positive and base.has_skip equal to "
                "base.has_mlp_skip, for the rank and entropy of the table, got "
                f"{self.base.num_measured}, {self.base.has_skip} and "
                f"{self.base.has_mlp_skip}."
            )


_GRIDS = {
    "digits": {"num_iters": (0, 10, 50), "learning_rates": (1e-3, 3e-3, 6e-3)},
    "fashion_mnist": {"learning_rates": (1e-3, 2e-3, 4e-3)},
    "mnist": {"learning_rates": (1e-3, 2e-3, 4e-3)},
}
PRESETS: Final = {
    name: Config(preset=name, base=base, **_GRIDS.get(name, {}))
    for name, base in presets.PRESETS.items()
}
# The runs that the report shows.
REPORT_CONFIGS: Final = tuple(
    PRESETS[name] for name in ("digits", "fashion_mnist", "imdb")
)

QUICK = Config(
    preset="quick",
    num_iters=(0, 2),
    timed=(0, 2),
    learning_rates=(3e-3,),
    seeds=(0, 1),
    base=presets.QUICK,
    runs=files.RUNS / "compare_quick" / "runs",
    output=files.RUNS / "compare_quick",
)


def choose(preset: str | None, task: str | None) -> Config:
    """The comparison of a preset of `train`, found as `train` finds its presets."""
    config = presets.choose(preset, task)
    return dataclasses.replace(PRESETS[config.preset], base=config)


DEFINITIONS = measures.DEFINITIONS | {
    "test_accuracy": "Of the parameters best on the validation split.",
    "step_times": (
        "Seconds of an update, median over rounds; ratio: to softmax's in the same "
        "round, median over rounds."
    ),
}


def run(config: Config) -> dict[str, Any]:
    """Trains and measures; writes JSON and figure, prints findings and table."""
    start = time.monotonic()
    folder = config.runs / config.preset
    setting = {"base": dataclasses.asdict(config.base), "timed": config.timed}
    with Cells(folder, setting) as cells:
        rates, rows = {}, []
        for num_iters in config.num_iters:
            seed, *seeds = config.seeds
            search = [_row(config, num_iters, r, seed) for r in config.learning_rates]
            best = max(
                search, key=lambda c: (c["validation_accuracy"], -c["validation_loss"])
            )
            rates[str(num_iters)] = rate = best["learning_rate"]
            rows += search + [_row(config, num_iters, rate, seed) for seed in seeds]
        times = lambda: measure_step_times(config.base, config.timed)
        measured = {
            "preset": config.preset,
            "definitions": DEFINITIONS,
            "learning_rates": rates,
            "cells": rows,
            "step_times": cells.get("step_times", times),
        }
        if config.base.task == "imdb":
            measured["bag_of_words"] = cells.get(
                "bag_of_words", lambda: bag_of_words(config.base)
            )
        result = files.write_result(
            config.preset, config, measured, findings, draw, start, question="compare"
        )
    print("\n".join(table(result)))
    return result


def _row(config, num_iters, rate, seed):
    """One run of `train`, continued or read if it is there, as a cell of the result."""
    name = f"iters{num_iters}_rate{rate:g}_seed{seed}"
    options = {"num_iters": num_iters, "learning_rate": rate, "seed": seed}
    folder = {"output": config.runs / config.preset / name, "resume": True}
    result = train.run(dataclasses.replace(config.base, **options, **folder))
    kept = ("num_parameters", "num_steps", "best_step", "validation_accuracy")
    kept += ("validation_loss", "test_accuracy", "init", "trained", "wall_time_s")
    commit = {"commit": result["environment"]["commit"]}
    return options | commit | {name: result[name] for name in kept}


def findings(result: dict[str, Any]) -> Iterator[Finding]:
    """Yields what the runs of the chosen rates say of Sinkhorn attention."""
    accuracy = "Test accuracy", lambda cell: cell["test_accuracy"]
    residual = (
        "Relative residual of the last layer",
        lambda cell: cell["trained"]["relative_residual"][-1],
    )
    entropy = (
        "Mean entropy of the attention, in nats,",
        lambda cell: np.mean(cell["trained"]["attention_entropy"]),
    )
    for claim, (quantity, value) in (
        ("Sinkhorn attention classifies better than softmax attention", accuracy),
        ("trained Sinkhorn attention preserves rank better than softmax", residual),
        ("trained Sinkhorn attention keeps more entropy than softmax", entropy),
    ):
        softmax = [value(cell) for cell in chosen(result, 0)]
        for num_iters in result["config"]["num_iters"]:
            if num_iters > 0:
                sinkhorn = [value(cell) for cell in chosen(result, num_iters)]
                gain = difference(sinkhorn, softmax)
                text = (
                    f"{quantity} {interval(sinkhorn).text()} against "
                    f"{interval(softmax).text()}: a difference of {gain.text()}."
                )
                where = f"{result['preset']}, {num_iters} iterations"
                yield finding(f"{claim} ({where})", text, gain)


def table(result: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table: one a normaliser, and one for the baseline."""
    header = ("data", "attention", "learning rate", "validation accuracy")
    header += ("test accuracy", "relative residual, last layer: before")
    rows = [(*header, "after training", "time of a step")]
    preset, config = result["preset"], result["config"]
    for num_iters in config["num_iters"]:
        runs = chosen(result, num_iters)
        row = [preset, normaliser_name(num_iters), f"{runs[0]['learning_rate']:g}"]
        for name in ("validation_accuracy", "test_accuracy"):
            row.append(interval([cell[name] for cell in runs]).text())
        for phase in ("init", "trained"):
            last = [cell[phase]["relative_residual"][-1] for cell in runs]
            row.append(f"{np.mean(last):.2f}")
        rows.append((*row, _time(result, num_iters)))
    for num_iters in config["timed"]:
        if num_iters not in config["num_iters"]:
            row = (preset, normaliser_name(num_iters), *"-----")
            rows.append((*row, _time(result, num_iters)))
    if baseline := result.get("bag_of_words"):
        names = ("validation_accuracy", "test_accuracy")
        accuracies = (f"{baseline[name]:.3f}" for name in names)
        rows.append((preset, "none: linear model on words", "-", *accuracies, *"---"))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def _time(result, num_iters):
    if str(num_iters) not in result["step_times"]:
        return "-"
    time = result["step_times"][str(num_iters)]
    if num_iters == 0:
        return f"{1000 * time['seconds']:.0f} ms"
    return f"{time['ratio']:.2f} x softmax's"
