"""Does a Sinkhorn encoder learn as well as a softmax one, and what does it cost?

    python -m experiments compare --preset digits

Trains the encoder of a preset of `train` with either normaliser, with equal parameters,
updates and search for the learning rate: every rate of the same grid with the first
seed, the best on the validation split with all seeds. Reports test accuracy with 95 %
intervals of Student's t over seeds, relative residual and attention entropy by layer
before and after training, and the time of an update as a multiple of softmax's. Texts
are compared with a linear model on their words, too.

Every run is a folder of `train` under --runs, so what was killed continues there with
the same command. On 2 CPU cores digits take 10 minutes, fashion_mnist and imdb an hour
each; `--preset sinkformer_imdb --base.dtype bfloat16` and `--preset vit` are the full
sizes, for a GPU. --timed names the iterations of which the time alone is measured.
"""

import dataclasses
import json
import pathlib
from typing import Any, Final

import numpy as np

from ..evidence import answer
from ..evidence import files as record
from ..evidence.claims import Finding, difference, interval, verdict
from ..figures import compare as compare_figure
from ..networks.measures import DEFINITIONS
from ..training import train
from ..training.bag_of_words import bag_of_words
from ..training.step_times import measure_step_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result, and where it goes."""

    preset: str = "digits"  # Of `train`.
    num_iters: tuple[int, ...] = (0, 10)  # Sinkhorn iterations to train; 0 is softmax.
    timed: tuple[int, ...] = (0, 10, 50)  # Iterations of which the time is measured.
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)  # The grid.
    seeds: tuple[int, ...] = (0, 1, 2)  # Of the runs; the first searches the rate.
    base: train.Config = train.PRESETS["digits"]  # Of every run, but what is above.
    runs: pathlib.Path = train.RESULTS / "train" / "compare"  # Of the single runs.
    output: pathlib.Path = train.RESULTS / "compare"  # Of the JSON and the figure.

    def __post_init__(self):
        for name in ("num_iters", "timed", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be distinct, at least one, got {values}")
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


PRESETS: Final = {
    name: Config(preset=name, base=config) for name, config in train.PRESETS.items()
}
for _name in ("fashion_mnist", "mnist"):
    _rates = (1e-3, 2e-3, 4e-3)
    PRESETS[_name] = dataclasses.replace(PRESETS[_name], learning_rates=_rates)
PRESETS["digits"] = dataclasses.replace(
    PRESETS["digits"], num_iters=(0, 10, 50), learning_rates=(1e-3, 3e-3, 6e-3)
)

QUICK = Config(
    preset="quick",
    num_iters=(0, 2),
    timed=(0, 2),
    learning_rates=(3e-3,),
    seeds=(0, 1),
    base=train.QUICK,
    runs=train.RESULTS / "compare_quick" / "runs",
    output=train.RESULTS / "compare_quick",
)


def choose(preset: str | None, task: str | None) -> Config:
    """The comparison of a preset of `train`.

    Raises:
        ValueError: There is no such preset.
    """
    config = train.choose(preset, task)
    return dataclasses.replace(PRESETS[config.preset], base=config)


def run(config: Config) -> dict[str, Any]:
    """Trains what is not there yet; writes JSON and figure, prints the table.

    Returns:
        What the JSON holds.

    Raises:
        As `train.run`.
    """
    rates, cells = {}, []
    for num_iters in config.num_iters:
        first = config.seeds[0]
        search = [_cell(config, num_iters, r, first) for r in config.learning_rates]
        best = max(
            search, key=lambda c: (c["validation_accuracy"], -c["validation_loss"])
        )
        rates[num_iters] = best["learning_rate"]
        others = [
            _cell(config, num_iters, best["learning_rate"], s) for s in config.seeds[1:]
        ]
        cells += [*search, *others]
    result = {
        "question": "compare",
        "preset": config.preset,
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "environment": record.environment(),
        "definitions": DEFINITIONS
        | {
            "test_accuracy": "Of the parameters best on the validation split.",
            "step_times": (
                "Seconds of an update, median over rounds; ratio: to softmax's in the "
                "same round, median over rounds."
            ),
        },
        "learning_rates": {str(n): rate for n, rate in rates.items()},
        "cells": cells,
        "step_times": _once(
            config.runs
            / config.preset
            / f"step_times_{'_'.join(map(str, config.timed))}.json",
            lambda: _times(config),
        ),
    }
    if config.base.task == "imdb":
        result["bag_of_words"] = _once(
            config.runs / config.preset / "bag_of_words.json",
            lambda: bag_of_words(config.base),
        )
    result["findings"] = findings(result)
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{config.preset}.json"
    record.write_json(path, result)
    compare_figure.draw(result, path.with_suffix(".png"))
    print("\n".join(table(result)), end="\n\n")
    for finding in result["findings"]:
        print(f"{finding['claim']}: {finding['verdict']}. {finding['text']}")
    print(f"\nWrote {path} and {path.with_suffix('.png')}.")
    return result


def _cell(config, num_iters, rate, seed):
    """One run of `train`, continued or read if it is there, as a row of the result."""
    name = f"iters{num_iters}_rate{rate:g}_seed{seed}"
    result = train.run(
        dataclasses.replace(
            config.base,
            num_iters=num_iters,
            learning_rate=rate,
            seed=seed,
            output=config.runs / config.preset / name,
            resume=True,
        )
    )
    kept = ("num_parameters", "num_steps", "best_step", "validation_accuracy")
    kept += ("validation_loss", "test_accuracy", "init", "trained", "wall_time_s")
    return {
        "num_iters": num_iters,
        "learning_rate": rate,
        "seed": seed,
        "commit": result["environment"]["commit"],
        **{name: result[name] for name in kept},
    }


def _times(config):
    data = train.load_data(config.base)
    return measure_step_times(config.base, data, config.timed) | {
        "commit": record.environment()["commit"]
    }


def _once(path, compute):
    """What the JSON file holds, computed and written if it is not there."""
    if not path.exists():
        value = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        record.write_json(path, value)
    return json.loads(path.read_text())


def chosen(result: dict[str, Any], num_iters: int) -> list[dict[str, Any]]:
    """The runs of the rate that was chosen for `num_iters`, one a seed."""
    rate = result["learning_rates"][str(num_iters)]
    return [
        cell
        for cell in result["cells"]
        if (cell["num_iters"], cell["learning_rate"]) == (num_iters, rate)
    ]


def findings(result: dict[str, Any]) -> list[Finding]:
    """What the runs of the chosen rates say of the claims about Sinkhorn attention."""
    values = {
        num_iters: {
            "accuracy": [cell["test_accuracy"] for cell in runs],
            "residual": [cell["trained"]["relative_residual"][-1] for cell in runs],
            "entropy": [np.mean(cell["trained"]["attention_entropy"]) for cell in runs],
        }
        for num_iters in result["config"]["num_iters"]
        for runs in (chosen(result, num_iters),)
    }
    claims = {
        "accuracy": "Sinkhorn attention classifies better than softmax attention",
        "residual": "trained Sinkhorn attention preserves rank better than softmax",
        "entropy": "trained Sinkhorn attention keeps more entropy than softmax",
    }
    quantities = {
        "accuracy": "Test accuracy",
        "residual": "Relative residual of the last layer",
        "entropy": "Mean entropy of the attention, in nats,",
    }
    found = []
    for name, claim in claims.items():
        for num_iters in result["config"]["num_iters"]:
            if num_iters == 0:
                continue
            ours, softmax = values[num_iters][name], values[0][name]
            gain = difference(ours, softmax)
            found.append(
                Finding(
                    claim=f"{claim} ({result['preset']}, {num_iters} iterations)",
                    verdict=verdict(gain),
                    text=(
                        f"{quantities[name]} {interval(ours).text()} against "
                        f"{interval(softmax).text()}: a difference of {gain.text()}."
                    ),
                )
            )
    return found


def table(result: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table: one a normaliser, and one for the baseline."""
    header = (
        "data",
        "attention",
        "learning rate",
        "validation accuracy",
        "test accuracy",
        "relative residual, last layer: before",
        "after training",
        "time of a step",
    )
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    times = result["step_times"]
    for num_iters in result["config"]["num_iters"]:
        runs = chosen(result, num_iters)
        last = lambda phase, runs=runs: np.mean(
            [cell[phase]["relative_residual"][-1] for cell in runs]
        )
        row = (
            result["preset"],
            answer.name_of(num_iters),
            f"{runs[0]['learning_rate']:g}",
            interval([cell["validation_accuracy"] for cell in runs]).text(),
            interval([cell["test_accuracy"] for cell in runs]).text(),
            f"{last('init'):.2f}",
            f"{last('trained'):.2f}",
            _time(times, num_iters),
        )
        lines.append(f"| {' | '.join(row)} |")
    for num_iters in result["config"]["timed"]:
        if num_iters not in result["config"]["num_iters"]:
            cells = (result["preset"], answer.name_of(num_iters), *"-----")
            cells = (*cells, _time(times, num_iters))
            lines.append(f"| {' | '.join(cells)} |")
    if baseline := result.get("bag_of_words"):
        cells = (result["preset"], "none: linear model on words", "-")
        cells += (f"{baseline['validation_accuracy']:.3f}",)
        cells += (f"{baseline['test_accuracy']:.3f}", "-", "-", "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _time(times, num_iters):
    if str(num_iters) not in times:
        return "-"
    time = times[str(num_iters)]
    if num_iters == 0:
        return f"{1000 * time['seconds']:.0f} ms"
    return f"{time['ratio']:.2f} x softmax's"
