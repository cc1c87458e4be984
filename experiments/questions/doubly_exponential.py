"""Does pure self-attention lose rank doubly exponentially, and how exactly?

    python -m experiments doubly_exponential

Follows the residual of random networks of attention alone through the log-scaled
recursion of `pure_attention`, far below the smallest float. Tests three claims for the
softmax and for Sinkhorn: that the logarithm of the residual triples from layer to
layer; that a layer's factor is the one of the cubic law, the norm of C M R W / n at
|R| = 1; and that both normalisers share it. Large tokens start far from the law.

Takes 15 seconds on a CPU core, with --quick one. As measured, over 10 seeds:

* With tokens of deviation 0.1 and 1 the logarithm triples, to 0.1 %, and from layer 3
  on a layer's factor is the cubic law's, under both normalisers.
* With deviation 3 the softmax takes up to ten layers to get there, Sinkhorn five.
* Sinkhorn keeps no more than the softmax: less with deviations of 1 and 3, where it
  reaches the law earlier; no difference was seen with 0.1.

The claims are of Dong et al. 2021,
https://arxiv.org/abs/2103.03404, and of Lapenna et al. 2026,
https://arxiv.org/abs/2604.07925; all sizes are this module's own.
"""

import dataclasses
import pathlib
import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ..evidence import answer
from ..networks.pure_attention import Tokens, Weights, follow, random_problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result."""

    depth: int = 16  # Layers. Beyond 25 float64 cannot tell a layer's factor.
    num_tokens: int = 32
    width: int = 32  # Features of a token.
    num_heads: int = 2  # A divisor of the width.
    token_scales: tuple[float, ...] = (0.1, 1.0, 3.0)  # Deviation of the tokens.
    num_iters: tuple[int, ...] = (0, 1, 2, 10, 50)  # Of Sinkhorn; 0 is softmax.
    fit_from: int = 6  # First layer of the fit and of the mean factor.
    seeds: tuple[int, ...] = tuple(range(10))  # Tokens and weights.
    output: pathlib.Path = answer.RESULTS / "doubly_exponential"

    def __post_init__(self):
        least = {"num_tokens": 2, "width": 1, "num_heads": 1, "num_iters": 0}
        answer.require_at_least(self, {**least, "fit_from": 1, "seeds": 0})
        if not self.fit_from + 2 <= self.depth <= 25:
            raise ValueError(
                f"depth must be from fit_from + 2 = {self.fit_from + 2} to 25, got "
                f"{self.depth}: a fit needs three layers, and beyond 25 rounding of "
                "the logarithm hides a layer's factor."
            )
        answer.require_even_heads(self)


QUICK = Config(
    depth=8,
    num_tokens=8,
    width=8,
    fit_from=5,
    token_scales=(0.1, 1.0),
    num_iters=(0, 1, 10),
    seeds=(0, 1, 2),
    output=answer.RESULTS / "doubly_exponential_quick",
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
    "ratio": "[seed][layer]; that over the cubic law's prediction, not logarithms.",
}


def run(config: Config) -> dict[str, Any]:
    """Measures all networks; writes JSON and figure, prints the findings.

    Returns:
        What the JSON holds.
    """
    start = time.monotonic()
    cells = [
        _cell(config, token_scale, num_iters)
        for token_scale in config.token_scales
        for num_iters in config.num_iters
    ]
    findings = []
    for cell in cells:
        where = f"{cell['normaliser']}, tokens of deviation {cell['token_scale']:g}"
        findings.append(
            answer.finding(
                f"The logarithm of the residual triples from layer to layer ({where}).",
                "growth per layer of the logarithm (1 % allowed)",
                cell["base"],
                low=2.97,
                high=3.03,
            )
        )
        late = np.array(cell["ratio"])[:, config.fit_from :].mean(axis=1)
        findings.append(
            answer.finding(
                f"A layer's factor is that of the cubic law ({where}).",
                f"measured over predicted factor, layers from {config.fit_from} on "
                "(1 % allowed)",
                late,
                low=0.99,
                high=1.01,
            )
        )
    findings += _shared(config, cells)
    result = {"definitions": DEFINITIONS, "cells": cells, "findings": findings}
    return answer.write("doubly_exponential", config, result, _draw, start)


def _cell(config, token_scale, num_iters):
    logs, bases, factors, ratios = [], [], [], []
    for seed in config.seeds:
        x, weights = random_problem(
            seed,
            depth=config.depth,
            num_tokens=config.num_tokens,
            width=config.width,
            num_heads=config.num_heads,
            token_scale=token_scale,
        )
        states = list(follow(x, weights, num_iters))
        layers = [Weights(*layer) for layer in zip(*weights, strict=True)]
        log10 = np.array([t.log_relative_residual for t in states]) / np.log(10)
        scale = np.array([t.log_scale for t in states])
        factor = scale[1:] - 3 * scale[:-1]
        predicted = np.log([*map(cubic_factor, states[:-1], layers)])
        late = np.arange(config.fit_from, config.depth + 1)
        slope, _ = np.polyfit(late, np.log(-log10[late]), 1)
        logs.append(log10.tolist())
        bases.append(float(np.exp(slope)))
        factors.append(factor.tolist())
        ratios.append(np.exp(factor - predicted).tolist())
    return {
        "token_scale": token_scale,
        "num_iters": num_iters,
        "normaliser": answer.name_of(num_iters),
        "log10_relative_residual": logs,
        "base": bases,
        "factor": factors,
        "ratio": ratios,
    }


def cubic_factor(tokens: Tokens, weights: Weights) -> float:
    """What the cubic law gives for |residual after| / |residual before|^3."""
    query, key, value, out = weights  # [D, N, H] and [N, H, D]
    r = tokens.direction
    q, k, v = (np.einsum("td,dnh->nth", r, w) for w in (query, key, value))
    m = q @ k.swapaxes(1, 2) * query.shape[-1] ** -0.5  # [N, T, T]
    m = m - m.mean(axis=1, keepdims=True)
    after = np.einsum("nth,nhd->td", m @ v, out) / len(r)
    return float(np.linalg.norm(after))


def _shared(config, cells):
    """Whether the normalisers differ in how fast they lose the residual."""
    for token_scale in config.token_scales:
        same = [c for c in cells if c["token_scale"] == token_scale]
        # 3^-depth takes the logarithm back to the unit of the input's.
        unit = {
            c["num_iters"]: np.array(c["log10_relative_residual"])[:, -1]
            / 3.0**config.depth
            for c in same
        }
        if 0 not in unit:
            continue
        for num_iters in unit:
            if num_iters:
                yield answer.finding(
                    f"{answer.name_of(num_iters)}, keeps more of the residual than "
                    f"softmax (tokens of deviation {token_scale:g}).",
                    "its lead in log10 of the relative residual after the last "
                    "layer, over 3^depth, seed by seed",
                    unit[num_iters] - unit[0],
                    low=0.0,
                )


def _draw(result):
    scales = result["config"]["token_scales"]
    figure, axes = plt.subplots(
        2, len(scales), figsize=(3.6 * len(scales), 6.4), squeeze=False, sharex=True
    )
    figure.set_layout_engine("constrained")
    names = result["config"]["num_iters"]
    for (top, bottom), scale in zip(axes.T, scales, strict=True):
        cells = [c for c in result["cells"] if c["token_scale"] == scale]
        for cell in cells:
            number = names.index(cell["num_iters"])
            style = {
                "color": answer.COLORS[number % len(answer.COLORS)],
                "marker": "os^Dv<>"[number % 7],
                "label": cell["normaliser"],
            }
            logs = -np.array(cell["log10_relative_residual"])[:, 1:]
            layers = np.arange(1, logs.shape[1] + 1)
            median = np.median(logs, axis=0)
            top.plot(layers, median, linewidth=1.4, markersize=4, **style)
            top.fill_between(
                layers,
                logs.min(axis=0),
                logs.max(axis=0),
                color=style["color"],
                alpha=0.12,
                lw=0,
            )
            answer.band(bottom, layers, cell["ratio"], **style)
        guide = median[-1] * 3 * 3.0 ** (layers - layers[-1])
        top.plot(layers, guide, ":", color="0.35", label="slope of $3^{layer}$")
        top.set_yscale("log")
        top.invert_yaxis()
        top.set_title(f"tokens of deviation {scale:g}")
        bottom.ticklabel_format(axis="y", useOffset=False)
        bottom.axhline(1, color="0.35", linestyle=":")
        bottom.set_xlabel("layer")
        bottom.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("$-$log$_{10}$ relative residual\n(downwards)")
    axes[1, 0].set_ylabel("factor of a layer,\nmeasured / cubic law")
    seeds = len(result["config"]["seeds"])
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        title=f"Above: median and range of {seeds} seeds; below: mean and 95 %.",
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure
