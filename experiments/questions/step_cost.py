"""How much longer does an update of a Sinkhorn network take than one of softmax?

    taskset -c 0 python -m experiments step_cost

Times updates of the networks of `study` on text and images, of one seed, with softmax
and with several numbers of Sinkhorn iterations. The normalisers take turns, so that a
change of the machine's speed meets all of them, and each round gives one ratio. The
machine must be idle otherwise. It takes 4 minutes, with --quick half a minute.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..evidence import files
from ..evidence.claims import Finding, finding, interval, normaliser_name
from ..figures.step_cost import draw
from ..networks import ensemble
from ..networks.options import require_at_least, require_increasing
from ..study import plan
from ..study.cell import Cell, Sizes
from ..study.train import load_data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result."""

    sizes: tuple[Sizes, ...] = (plan.TEXT, plan.IMAGES)  # Of the networks.
    num_iters: tuple[int, ...] = (0, 1, 10, 50)  # Sinkhorn iterations; 0 is softmax.
    num_updates: int = 8  # In a round, of each normaliser.
    num_rounds: int = 9
    output: pathlib.Path = files.RUNS / "step_cost"

    def __post_init__(self):
        require_at_least(self, 1, "num_updates", "num_rounds")
        require_increasing(self, "num_iters", start=0)


QUICK = Config(
    sizes=(
        Sizes(
            width=8,
            num_heads=1,
            mlp_width=8,
            seq_len=12,
            num_train=64,
            num_validation=32,
            num_measured=8,
            batch_size=8,
        ),
    ),
    num_iters=(0, 2),
    num_updates=1,
    num_rounds=2,
    output=files.RUNS / "step_cost_quick",
)

DEFINITIONS = {
    "seconds": "[round]; of one update, by number of iterations.",
    "ratio": "[round]; the same over softmax's in the round.",
}


def run(config: Config) -> dict[str, Any]:
    """Times all networks; writes JSON and figure, prints the findings."""
    start = time.monotonic()
    cells = [_cell(config, sizes) for sizes in config.sizes]
    measured = {"definitions": DEFINITIONS, "cells": cells}
    return files.write_result("step_cost", config, measured, findings, draw, start)


def _cell(config, sizes):
    sizes = dataclasses.replace(
        sizes, seeds=sizes.seeds[:1], num_steps=config.num_updates, num_observations=1
    )
    rounds = {n: _round(sizes, n) for n in config.num_iters}
    for run_round in rounds.values():
        run_round()  # Compiles.
    seconds = {str(n): [] for n in rounds}
    for _ in range(config.num_rounds):
        for n, run_round in rounds.items():
            begin = time.perf_counter()
            run_round()
            taken = (time.perf_counter() - begin) / config.num_updates
            seconds[str(n)].append(round(taken, 6))
    ratio = {
        n: np.round(np.array(values) / seconds["0"], 4).tolist()
        for n, values in seconds.items()
    }
    return {"task": sizes.task, "seconds": seconds, "ratio": ratio}


def _round(sizes, num_iters):
    """A function that makes the updates of one round."""
    data = load_data(sizes)
    cell = Cell(sizes=sizes, num_iters=num_iters, learning_rate=1e-3)
    model = cell.encoder(data.vocab_size)
    params = ensemble.init(model, sizes.seeds, data.train)
    train = functools.partial(
        ensemble.train, model, params, data.train, sizes, learning_rate=1e-3
    )
    return lambda: jax.block_until_ready(train()[0])


def findings(result: dict[str, Any]) -> Iterator[Finding]:
    """Yields how much longer an update takes."""
    for cell in result["cells"]:
        for n, ratio in cell["ratio"].items():
            if n != "0":
                name = normaliser_name(int(n))
                claim = (
                    f"an update with {name}, takes at most 1.3 times softmax's "
                    f"({cell['task']})"
                )
                measured = interval(ratio)
                rounds = f"(95 % over {len(ratio)} rounds)"
                text = f"Ratio of the times: {measured.text(2)} {rounds}."
                yield finding(claim, text, measured, low=0.0, high=1.3)
