"""Does pure self-attention lose rank doubly exponentially, and how exactly?

    python -m experiments doubly_exponential

Follows the residual of random networks of attention alone through the log-scaled
recursion of `pure_attention`, far below the smallest float. Tests three claims for
softmax and for Sinkhorn: the logarithm of the residual triples from layer to layer; a
layer's factor is that of the cubic law, the norm of C M R W / n at |R| = 1; and both
normalisers share it. Networks with large tokens start far from the law.

Takes 15 seconds on a CPU core, with --quick one. As measured, over 10 seeds:

* With tokens of deviation 0.1 and 1 the logarithm triples, to 0.1 %, and from layer 3
  on a layer's factor is the cubic law's, under both normalisers.
* With deviation 3 the softmax takes up to ten layers to get there, Sinkhorn five.
* Sinkhorn keeps no more than the softmax: less with deviations of 1 and 3, where it
  reaches the law earlier; no difference was seen with 0.1.

The claims are from Dong et al. 2021, https://arxiv.org/abs/2103.03404, and Lapenna et
al. 2026, https://arxiv.org/abs/2604.07925; all sizes are this module's own.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..evidence import files
from ..evidence.claims import Finding, normaliser_name, within
from ..figures.doubly_exponential import draw
from ..networks.options import Network, require_at_least
from ..networks.pure_attention import (
    Tokens,
    Weights,
    follow,
    growth,
    random_problem,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Network):
    """Everything that can change the result."""

    depth: int = 16  # Layers. Beyond 25 float64 cannot tell a layer's factor.
    num_tokens: int = 32
    token_scales: tuple[float, ...] = (0.1, 1.0, 3.0)  # Deviation of the tokens.
    num_iters: tuple[int, ...] = (0, 1, 2, 10, 50)  # Sinkhorn iterations; 0 is softmax.
    fit_from: int = 6  # First layer of the fit and of the mean factor.
    seeds: tuple[int, ...] = tuple(range(10))  # Tokens and weights.
    output: pathlib.Path = files.RUNS / "doubly_exponential"

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 2, "num_tokens")
        require_at_least(self, 1, "fit_from")
        require_at_least(self, 0, "num_iters")
        if not self.fit_from + 2 <= self.depth <= 25:
            raise ValueError(
                f"depth must be from fit_from + 2 = {self.fit_from + 2} to 25, got "
                f"{self.depth}: a fit needs three layers, and beyond 25 rounding of "
                "the logarithm hides a layer's factor."
            )


QUICK = Config(
    depth=8,
    num_tokens=8,
    width=8,
    fit_from=5,
    token_scales=(0.1, 1.0),
    num_iters=(0, 1, 10),
    seeds=(0, 1, 2),
    output=files.RUNS / "doubly_exponential_quick",
)

DEFINITIONS = {
    "log10_relative_residual": "[seed][layer], 0 the input; Frobenius norm.",
    "base": (
        "[seed]; exp of the slope of log(-log10 relative residual) against the layer, "
        "from layer config.fit_from on. 3 is decay like 10^(-c 3^layer)."
    ),
    "factor": (
        "[seed][layer]; natural logarithm of residual(layer + 1) / residual(layer)^3, "
        "Frobenius norms, layer 0 the input."
    ),
    "ratio": (
        "[seed][layer]; that factor over the cubic law's prediction, not logarithms."
    ),
}


def run(config: Config) -> dict[str, Any]:
    """Measures all networks; writes JSON and figure, prints the findings."""
    start = time.monotonic()
    cells = [
        {
            "token_scale": token_scale,
            "num_iters": num_iters,
            "normaliser": normaliser_name(num_iters),
        }
        | files.by_key(
            [_network(config, seed, token_scale, num_iters) for seed in config.seeds]
        )
        for token_scale in config.token_scales
        for num_iters in config.num_iters
    ]
    measured = {"definitions": DEFINITIONS, "cells": cells}
    name = "doubly_exponential"
    return files.write_result(name, config, measured, findings, draw, start)


def _network(config, seed, token_scale, num_iters):
    x, weights = random_problem(seed, config.num_tokens, config, token_scale)
    states = list(follow(x, weights, num_iters))
    layers = [Weights(*layer) for layer in zip(*weights, strict=True)]
    log10 = np.array([t.log10_relative_residual for t in states])
    scale = np.array([t.log_scale for t in states])
    factor = scale[1:] - 3 * scale[:-1]
    predicted = np.log([*map(cubic_factor, states[:-1], layers)])
    return {
        "log10_relative_residual": log10.tolist(),
        "base": growth(log10, config.fit_from),
        "factor": factor.tolist(),
        "ratio": np.exp(factor - predicted).tolist(),
    }


def cubic_factor(tokens: Tokens, weights: Weights) -> float:
    """The cubic law's prediction of |residual after| / |residual before|^3."""
    query, key, value, out = weights  # [D, N, H] and [N, H, D]
    r = tokens.direction
    q, k, v = (np.einsum("td,dnh->nth", r, w) for w in (query, key, value))
    m = q @ k.swapaxes(1, 2) * query.shape[-1] ** -0.5  # [N, T, T]
    m = m - m.mean(axis=1, keepdims=True)
    after = np.einsum("nth,nhd->td", m @ v, out) / len(r)
    return float(np.linalg.norm(after))


def findings(result: dict[str, Any]) -> Iterator[Finding]:
    """Yields what the seeds say of the law, and of the normalisers."""
    config, cells = result["config"], result["cells"]
    fit_from = config["fit_from"]
    for cell in cells:
        where = f"{cell['normaliser']}, tokens of deviation {cell['token_scale']:g}"
        claim = "The logarithm of the residual triples from layer to layer"
        what = "growth per layer of the logarithm (1 % allowed)"
        yield within(f"{claim} ({where}).", what, cell["base"], low=2.97, high=3.03)
        claim = f"A layer's factor is that of the cubic law ({where})."
        what = (
            f"measured over predicted factor, layers from {fit_from} on (1 % allowed)"
        )
        ratio = np.array(cell["ratio"])[:, fit_from:].mean(axis=1)
        yield within(claim, what, ratio, low=0.99, high=1.01)
    what = (
        "its lead in log10 of the relative residual after the last layer, over "
        "3^depth, seed by seed"
    )
    for token_scale in config["token_scales"]:
        # Division by 3^depth undoes the growth of the logarithm over the layers.
        logs = {
            c["num_iters"]: np.array(c["log10_relative_residual"])[:, -1]
            / 3.0 ** config["depth"]
            for c in cells
            if c["token_scale"] == token_scale
        }
        for num_iters in logs if 0 in logs else ():
            if num_iters:
                claim = (
                    f"{normaliser_name(num_iters)}, keeps more of the residual than "
                    f"softmax (tokens of deviation {token_scale:g})."
                )
                yield within(claim, what, logs[num_iters] - logs[0], low=0.0)
