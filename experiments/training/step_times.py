"""How long an update takes, as a multiple of softmax attention's."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .devices import Devices
from .fit import Training, train_step
from .presets import Config, load_data


def measure_step_times(
    config: Config,
    num_iters: Sequence[int],
    *,
    num_batches: int = 16,
    num_rounds: int = 7,
) -> dict[str, dict[str, Any]]:
    """Times of the updates of `train`, the normalisers taking turns.

    Each round has the same `num_batches` updates. `num_iters` are the Sinkhorn
    iterations to time, 0 (softmax) among them.

    Returns:
        By number of iterations: seconds of an update, the median over rounds, and
        `ratio`, the median over rounds of its time over softmax's in the same round.

    Raises:
        ValueError: There is no softmax to compare with.
    """
    if 0 not in num_iters:
        raise ValueError(f"num_iters must hold 0, softmax, got {tuple(num_iters)}.")
    data = load_data(config)
    rounds = {n: _round(config, data, n, num_batches) for n in num_iters}
    for run_round in rounds.values():
        run_round()  # Compiles one program for each length of texts.
    seconds = {n: [] for n in num_iters}
    for _ in range(num_rounds):
        for n, run_round in rounds.items():
            start = time.perf_counter()
            run_round()
            seconds[n].append((time.perf_counter() - start) / num_batches)
    return {
        str(n): {
            "seconds": float(np.median(values)),
            "ratio": float(np.median(np.array(values) / seconds[0])),
            "rounds": values,
        }
        for n, values in seconds.items()
    }


def _round(config, data, num_iters, num_batches):
    devices = Devices()
    config = dataclasses.replace(config, num_iters=num_iters)
    training = Training(config, data, devices)
    batches = list(itertools.islice(training.batches(), num_batches))
    batches = [devices.place_part(batch) for batch in batches]
    state = training.init()

    def run_round():
        nonlocal state
        for batch in batches:
            state, loss = train_step(*training.arguments, state, batch)
        loss.block_until_ready()

    return run_round
