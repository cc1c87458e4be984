"""Do the bounds on the residual of pure attention hold, and how tight are they?

    python -m experiments bounds

Compares each bound of `sinkhorn_jax.collapse` with the residual of random networks of
attention alone, 12 layers deep: layer by layer, from the measured residual before a
layer, and over depth, from the input's. Residuals come from the log-scaled recursion of
`pure_attention`, each in the norm of its bound. One violation refutes a bound for these
networks. A bound that holds may still say nothing: over depth its slack triples from
layer to layer, and it may allow the residual to grow.

Two bounds may fail: Dong's has gamma = 1, which its proof gives for nearly equal column
factors only, and the reported one an unknown lambda from 0 to 1, here 1; the least
lambda that the measurements allow is given. "Sinkhorn limit" assumes exact columns.

Takes some ten seconds on a CPU core.

The bounds are those of Dong et al. 2021, https://arxiv.org/abs/2103.03404; of Lapenna
et al. 2026, https://arxiv.org/abs/2604.07925, as reported second-hand; and this
project's own. All sizes are this module's.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkhorn_jax import collapse, sinkhorn

from ..evidence import claims, files
from ..evidence.claims import Finding
from ..figures.bounds import draw
from ..networks.options import Network, require_at_least, require_positive
from ..networks.pure_attention import follow, random_problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Network):
    """Everything that can change the result."""

    depth: int = 12  # Layers.
    num_tokens: int = 32
    token_scales: tuple[float, ...] = (0.1, 1.0)  # Deviation of random tokens.
    num_iters: tuple[int, ...] = (0, 10)  # Sinkhorn iterations; 0 is softmax.
    gamma: float = 1.0  # The gamma of Dong's bound.
    prefactor: float = 1.0  # The lambda of the reported bound, in (0, 1].
    output: pathlib.Path = files.RUNS / "bounds"

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 2, "num_tokens")
        require_at_least(self, 0, "num_iters")
        require_positive(self, "gamma", "prefactor")
        if self.prefactor > 1:
            raise ValueError(f"prefactor must be in (0, 1], got {self.prefactor}.")


QUICK = Config(
    depth=4,
    num_tokens=8,
    width=8,
    token_scales=(1.0,),
    num_iters=(0, 10),
    seeds=(0, 1, 2),
    output=files.RUNS / "bounds_quick",
)

DEFINITIONS = {
    "log10_residual": (
        "[seed][layer], 0 the input; decimal logarithm of the residual in the norm of "
        "each bound."
    ),
    "log10_step": (
        "[seed][layer]; decimal logarithm of the bound after a layer, made from the "
        "residual measured before it, over the residual measured after it. Negative is "
        "a violation. null where the plan is too near to uniform for float64."
    ),
    "log10_depth": (
        "[seed][layer]; the same for the bound made from the residual of the input."
    ),
}

# A bound may be met with equality, and rounding may then violate it by this, in log10.
ROUNDING = 1e-9
# The norms of the residuals.
NORMS = ("spectral", "1inf")
# A smaller deviation of a plan's entries is rounding of float64.
LEAST_DELTA = 1e-8


def run(config: Config) -> dict[str, Any]:
    """Measures all networks; writes JSON and figure, prints the findings."""
    start = time.monotonic()
    cells = []
    for scale in config.token_scales:
        problems = [
            random_problem(seed, config.num_tokens, config, scale)
            for seed in config.seeds
        ]
        source = f"random, tokens of deviation {scale:g}"
        cells += [_cell(config, source, problems, n) for n in config.num_iters]
    measured = {"definitions": DEFINITIONS, "cells": cells}
    return files.write_result("bounds", config, measured, findings, draw, start)


def _cell(config, source, problems, num_iters):
    """How far every bound is above the residuals of networks, one for each seed."""
    states = [zip(*follow(*problem, num_iters), strict=True) for problem in problems]
    mean, direction, log_scale = (
        np.stack(x) for x in zip(*(map(np.stack, s) for s in states), strict=True)
    )  # [S, L + 1, ...]
    weights = zip(*(weights for _, weights in problems), strict=True)
    query, key, value, out = (np.stack(w).astype(np.float64) for w in weights)
    qk = np.einsum("sldnh,slenh->slnde", query, key)
    vo = np.einsum("sldnh,slnhe->slnde", value, out)
    head_dim, num_tokens = query.shape[-1], direction.shape[-2]
    sizes = (head_dim, num_tokens)
    mean_norm = np.linalg.norm(mean, axis=-1)
    residual, residual_1inf = (log_scale + np.log(_norm(direction, n)) for n in NORMS)
    spectral = _norm(qk, "spectral"), _norm(vo, "spectral")
    tokens = mean[..., None, :] + np.exp(log_scale)[..., None, None] * direction
    logits = tokens[:, :-1, None] @ qk @ tokens[:, :-1, None].swapaxes(-1, -2)
    logits = logits / head_dim**0.5  # [S, L, N, T, T]
    found = {
        "column sums": {
            "log10_residual": residual / np.log(10),
            "log10_step": _column_sums(logits, residual, spectral[1], num_iters),
        }
    }
    # Each bound is a function of log residual and norms of queries and keys, values and
    # the mean token.
    own = {"own, sinkhorn": "sinkhorn", "own, Sinkhorn limit": "sinkhorn limit"}
    for name, normaliser in (own if num_iters else {"own, softmax": "softmax"}).items():
        bound = lambda *norms, mean, normaliser=normaliser: (
            collapse.pure_attention_log_bound(*norms, *sizes, normaliser, mean)
        )
        found[name] = _excess(bound, residual, *spectral, mean_norm)
    bound = lambda *norms, mean: collapse.dong_log_bound(*norms, head_dim, config.gamma)
    norms = np.linalg.norm(qk, 1, axis=(-2, -1)), _norm(vo, "1inf")
    found["Dong"] = _excess(bound, residual_1inf, *norms, mean_norm)
    bound = lambda *norms, mean: collapse.reported_log_bound(
        *norms, *sizes, config.prefactor
    )
    found["reported"] = _excess(bound, residual, *spectral, mean_norm)
    return {
        "source": source,
        "num_iters": num_iters,
        "normaliser": claims.normaliser_name(num_iters),
        "bounds": [_counted(name, values) for name, values in found.items()],
    }


def _counted(name, values):
    """The values of a bound as JSON holds them, and how many of them violate it."""
    bound = {"name": name}
    for key, each in values.items():
        is_seen = np.isfinite(each)
        bound[key] = files.or_null(each, ~np.isnan(each))
        if (mode := key.removeprefix("log10_")) != "residual":
            bound[f"num_{mode}"] = int(is_seen.sum())
            bound[f"violations_{mode}"] = int((is_seen & (each < -ROUNDING)).sum())
    return bound


def _excess(bound, log_residual, qk_norm, value_norm, mean_norm):
    """How far a bound is above the measured residuals, as decimal logarithms."""

    def after(*norms, mean):
        norms = map(jnp.asarray, norms)
        return np.asarray(bound(*norms, mean=jnp.asarray(mean)))[..., 1:]

    with jax.enable_x64(True):
        # For the steps, every layer is a network of one layer, in a batch.
        layers = log_residual[:, :-1], qk_norm[:, :, None], value_norm[:, :, None]
        step = after(*layers, mean=mean_norm[:, :-1])[..., 0]
        depth = after(log_residual[:, 0], qk_norm, value_norm, mean=mean_norm[:, 0])
    return {
        "log10_residual": log_residual / np.log(10),
        "log10_step": (step - log_residual[:, 1:]) / np.log(10),
        "log10_depth": (depth - log_residual[:, 1:]) / np.log(10),
    }


@functools.partial(jax.jit, static_argnums=3)
def _column_sum_bound(logits, residual, value_norm, num_iters):
    plan = sinkhorn(logits, num_iters)
    residual = jnp.broadcast_to(residual[..., None], value_norm.shape)
    bound = collapse.column_sum_bound(plan, residual, value_norm)
    return collapse.log_deviation(plan), bound


def _column_sums(logits, log_residual, value_norm, num_iters):
    """The excess of the column-sum bound of each layer; NaN where it is not seen."""
    with jax.enable_x64(True):
        arrays = (logits, np.exp(log_residual[:, :-1]), value_norm)
        delta, bound = _column_sum_bound(*map(jnp.asarray, arrays), num_iters)
    with np.errstate(divide="ignore"):  # Far below float64 the bound is 0, unseen.
        excess = np.log(np.sum(bound, axis=-1)) - log_residual[:, 1:]
    return np.where(np.min(delta, axis=-1) > LEAST_DELTA, excess / np.log(10), np.nan)


def _norm(x, name):
    if name == "spectral":
        return np.linalg.norm(x, 2, axis=(-2, -1))
    one, inf = (np.linalg.norm(x, order, axis=(-2, -1)) for order in (1, np.inf))
    return np.sqrt(one * inf)


def findings(result: dict[str, Any]) -> list[Finding]:
    """Returns how tight each bound is for each kind of network."""
    return [
        finding
        for cell in result["cells"]
        for bound in cell["bounds"]
        for finding in _findings(cell, bound, result["config"]["prefactor"])
    ]


def _findings(cell, bound, prefactor):
    """Yields whether a bound holds, and whether it says anything over depth."""
    name, where = bound["name"], f"({cell['normaliser']}, {cell['source']})"
    steps = [_seen(row) for row in bound["log10_step"]]
    claim = f"The bound {name!r} holds from layer to layer {where}."
    if not all(map(len, steps)):
        text = "The plans cannot be told from uniform ones in float64."
        yield Finding(claim=claim, verdict="untested", text=text)
        return
    # One violation refutes a bound, whatever the mean.
    violations = bound["violations_step"]
    slack = claims.interval([row.mean() for row in steps])
    text = (
        f"{violations} of {bound['num_step']} layers violate it; decades between bound "
        f"and residual in a layer: {slack.text(2)}."
    )
    if name == "reported":
        least = min(row.min() for row in steps)
        text += f" It holds for every lambda from {prefactor * 10**-least:.2g} on."
    verdict = "not supported" if violations else "supported"
    yield Finding(claim=claim, verdict=verdict, text=text)
    if "log10_depth" in bound:
        claim = f"The bound {name!r} says over depth that residuals fall {where}."
        residual = np.array(bound["log10_residual"], np.float64)
        excess = np.array(bound["log10_depth"], np.float64)
        fall = residual[:, -1] - residual[:, 0]
        bounded = claims.interval(excess[:, -1] + fall)
        text = (
            "Decades from the input to the last layer: the bound allows "
            f"{bounded.text(0)}, measured {claims.interval(fall).text(0)}."
        )
        yield claims.finding(claim, text, bounded, low=-np.inf, high=0.0)


def _seen(values):
    values = np.array(values, np.float64)
    return values[np.isfinite(values)]
