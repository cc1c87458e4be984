"""How long an update takes, as a multiple of softmax attention's."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .. import training as trainer
from ..data import Data
from . import train


def measure_step_times(
    config: train.Config,
    data: Data,
    num_iters: Sequence[int],
    *,
    num_batches: int = 16,
    num_rounds: int = 7,
) -> dict[str, dict[str, Any]]:
    """Times of the real update on the real batches, normalisers taking turns.

    Args:
        config: Of everything else.
        data: Of `config`.
        num_iters: Sinkhorn iterations to time, 0 (softmax) among them.
        num_batches: Updates in a round, the same batches in each.
        num_rounds: Of which the medians are reported.

    Returns:
        By number of iterations: seconds of an update, the median over rounds, and
        `ratio`, the median over rounds of its time over softmax's in the same round.

    Raises:
        ValueError: There is no softmax to compare with.
    """
    if 0 not in num_iters:
        raise ValueError(f"num_iters must hold 0, softmax, got {tuple(num_iters)}.")
    devices = trainer.Devices()
    rounds = {n: _round(config, data, devices, n, num_batches) for n in num_iters}
    for run_round in rounds.values():
        run_round()  # Compiles, a program for each length of texts.
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


def _round(config, data, devices, num_iters, num_batches):
    config = dataclasses.replace(config, num_iters=num_iters)
    training = train.Training(config, data, devices)
    batches = list(itertools.islice(training.batches(), num_batches))
    batches = [devices.place_part(batch) for batch in batches]
    key = jax.random.key(0)
    state = training.init()

    def run_round():
        nonlocal state
        for batch in batches:
            state, loss = trainer.train_step(
                training.model, training.optimization, config.skips, key, state, batch
            )
        loss.block_until_ready()

    return run_round
