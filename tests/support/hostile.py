"""Logits that break careless Sinkhorn code, by name."""

import numpy as np


def hostile_logits(n, seed=0):
    """Finite (n, n) float32 matrices of logits by name."""
    rng = np.random.default_rng(seed)

    def noise(std=1.0):
        return rng.normal(size=(n, n)) * std

    index = np.arange(n)
    hot_column = noise()
    hot_column[:, 3] += 300
    block = noise()
    block[: n // 2, : n // 2] += 150
    cross = np.full((n, n), -120.0)
    cross[0] = cross[:, 0] = 0
    spike = np.zeros((n, n))
    spike[0, 0] = 300
    cases = {
        "standard deviation 1": noise(),
        "standard deviation 20": noise(20),
        "standard deviation 100": noise(100),
        "a column at +300": hot_column,
        "a block at +150": block,
        "a chain of steps of 40": noise() - 40 * abs(index[:, None] - index),
        "rank one": 10 * np.outer(rng.normal(size=n), rng.normal(size=n)),
        "column offsets of 400": noise() + rng.uniform(-400, 400, size=(1, n)),
        "row offsets of 400": noise() + rng.uniform(-400, 400, size=(n, 1)),
        # The mass must cross entries that the linear domain cannot represent.
        "0 on a cross, -120 elsewhere": cross,
        "lower triangle, -90 above": np.where(np.tri(n) > 0, noise(), -90.0),
        "one entry at +300": spike,
    }
    return {name: logits.astype(np.float32) for name, logits in cases.items()}


def large_offsets(n, seed=0):
    """Finite (n, n) float32 matrices of logits by name, large but for what matters.

    Rows and columns have large offsets, which change no converged plan. The numbers are
    those that float32 has, so that a float64 oracle gets the same.
    """
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(n, n))
    cases = {}
    for offset in (-1e4, 1e4, -1e6, 1e6, -1e9):
        cases[f"a column at {offset:g}"] = noise.copy()
        cases[f"a column at {offset:g}"][:, 2] += offset
        cases[f"a row at {offset:g}"] = noise.copy()
        cases[f"a row at {offset:g}"][1] += offset
        crossed = noise.copy()
        crossed[1] += offset
        crossed[:, 2] -= offset
        cases[f"a row at {offset:g} and a column that cancels it"] = crossed
    for size in (1e4, 1e6):
        hot = noise.copy()
        hot[1, 2] = size
        cases[f"one logit of {size:g}"] = hot
    cases["all at 1e6"] = noise + 1e6
    cases["offsets of 1e6 everywhere"] = (
        noise + rng.normal(size=(n, 1)) * 1e6 + rng.normal(size=(1, n)) * 1e6
    )
    return {name: logits.astype(np.float32) for name, logits in cases.items()}
