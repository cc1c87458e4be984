"""How many iterations does Sinkhorn attention need, and can one tell beforehand?

    python -m experiments convergence

Follows the column defect of random attention logits over iterations, for growing
deviation of the logits and number of tokens, in float64. Compares the linear rate at
which it falls with its prediction, the squared second singular value of the normalised
plan (`collapse.convergence_rate`), and asks where 50 iterations leave more than 0.1 %.
Beside it, the processor time of the iterations as a multiple of the softmax's.

Takes one minute on an idle CPU core, with --quick 10 seconds. As measured, 50
iterations leave less than 0.1 % up to deviations of 4, at any of 32 to 256 tokens, and
0.09 to 0.23 % at 10. The predicted rate is met, but where 500 iterations end before the
linear regime begins: from deviation 8 on the defect may fall faster than predicted.
All sizes are this module's own.
The rate is that of Knight 2008, The Sinkhorn-Knopp algorithm.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax

from sinkhorn_jax import collapse, sinkhorn

from . import answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can change the result."""

    deviations: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)  # Of the logits.
    num_tokens: tuple[int, ...] = (32, 64, 128, 256)
    head_dim: int = 32  # Of queries and keys, whose products are the logits.
    num_iters: int = 500  # Iterations to follow.
    enough: int = 50  # Iterations of which is asked whether they are enough.
    tolerance: float = 1e-3  # Column defect that counts as small.
    timed_iters: tuple[int, ...] = (0, 1, 5, 10, 50)  # 0 is softmax.
    num_repeats: int = 15  # Timings of each.
    seeds: tuple[int, ...] = tuple(range(6))
    output: pathlib.Path = answer.RESULTS / "convergence"

    def __post_init__(self):
        least = {"num_tokens": 2, "head_dim": 1, "timed_iters": 0, "num_repeats": 1}
        answer.require_at_least(self, {**least, "enough": 1, "seeds": 0})
        if self.num_iters <= self.enough:
            raise ValueError(
                f"num_iters must exceed enough = {self.enough}, got {self.num_iters}: "
                "what these leave is told by those that follow."
            )
        if min(self.deviations) <= 0 or 0 not in self.timed_iters:
            raise ValueError(
                "deviations must be > 0, and timed_iters hold 0, the softmax to "
                f"compare with, got {self.deviations} and {self.timed_iters}."
            )


QUICK = Config(
    deviations=(1.0, 6.0),
    num_tokens=(16, 32),
    num_iters=200,
    timed_iters=(0, 10),
    num_repeats=3,
    seeds=(0, 1, 2),
    output=answer.RESULTS / "convergence_quick",
)

DEFINITIONS = {
    "defect": (
        "[seed][iteration of config.num_iters], 0 the softmax: mean over columns of "
        "|column sum - 1|, rows summing to 1. At the iterations of `iterations`."
    ),
    "measured_rate": (
        "[seed]; factor of the defect per iteration, over the last quarter of the "
        "iterations whose defect exceeds 1e-11. null if these are fewer than four."
    ),
    "predicted_rate": (
        "[seed]; squared second singular value of the normalised plan after "
        "config.num_iters iterations."
    ),
    "needed": "[seed]; first iteration with a defect within config.tolerance, or null.",
    "predicted_needed": (
        "[seed]; the number that the rate predicts from the defect of the softmax."
    ),
    "milliseconds": "[repeat]; processor, all threads; one float32 matrix, compiled.",
}

# Below it a defect in float64 is rounding.
LEAST = 1e-11


def run(config: Config) -> dict[str, Any]:
    """Follows all iterations; writes JSON and figure, prints the findings.

    Returns:
        What the JSON holds.
    """
    start = time.monotonic()
    cells = [
        _cell(config, n, deviation)
        for n in config.num_tokens
        for deviation in config.deviations
    ]
    findings = [f for cell in cells for f in _findings(config, cell)]
    times = [
        {"num_tokens": n, "num_iters": k, "milliseconds": _milliseconds(config, n, k)}
        for n in config.num_tokens
        for k in config.timed_iters
    ]
    result = {
        "definitions": DEFINITIONS,
        "iterations": _shown(config).tolist(),
        "cells": cells,
        "times": times,
        "findings": findings,
    }
    return answer.write("convergence", config, result, _draw, start)


def logits_of(seed: int, num_tokens: int, head_dim: int, deviation: float):
    """Products of normal queries and keys, scaled to a standard deviation."""
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, num_tokens, head_dim))
    logits = query @ key.T
    return logits * deviation / logits.std()


@functools.partial(jax.jit, static_argnums=1)
def follow(logits, num_iters):
    """The column defect of the softmax and after each iteration, and the last plan."""
    # Potentials, not plans, are carried: rounding does not add up.
    rows = lambda g: -jax.nn.logsumexp(logits + g[..., None, :], axis=-1)
    columns = lambda f: -jax.nn.logsumexp(logits + f[..., :, None], axis=-2)
    plan = lambda f, g: jnp.exp(logits + f[..., :, None] + g[..., None, :])

    def step(g, _):
        # The columns' next step undoes exp(g - next g), the column sum.
        f = rows(g)
        after = columns(f)
        defect = jnp.abs(jnp.expm1(g - after)).mean(axis=-1)
        return after, defect

    g = jnp.zeros_like(logits[..., 0, :])
    g, defects = lax.scan(step, g, length=num_iters + 1)
    return jnp.moveaxis(defects, 0, -1), plan(rows(g), g)


def _cell(config, num_tokens, deviation):
    logits = np.stack(
        [logits_of(s, num_tokens, config.head_dim, deviation) for s in config.seeds]
    )
    with jax.enable_x64(True):
        defects, plans = follow(jnp.asarray(logits), config.num_iters)
        rates = jax.jit(collapse.convergence_rate)(plans)
        fraction = jnp.asarray(config.tolerance / np.asarray(defects)[:, 0])
        predicted = np.asarray(collapse.iterations_to_reduce(rates, fraction))
    defects = np.asarray(defects)
    is_small = defects <= config.tolerance
    needed = np.where(is_small.any(axis=1), is_small.argmax(axis=1), -1)
    return {
        "num_tokens": num_tokens,
        "deviation": deviation,
        "defect": defects[:, _shown(config)].tolist(),
        "defect_at_enough": defects[:, config.enough].tolist(),
        "measured_rate": [_rate(row) for row in defects],
        "predicted_rate": np.asarray(rates).tolist(),
        "needed": [int(k) if k >= 0 else None for k in needed],
        "predicted_needed": [float(k) if np.isfinite(k) else None for k in predicted],
    }


def _shown(config):
    """Some iterations, evenly on a logarithmic axis, with `enough` among them."""
    some = np.geomspace(1, config.num_iters + 1, 60).round().astype(int) - 1
    return np.unique([*some, config.enough])


def _rate(defect):
    num = len(defect) if (defect > LEAST).all() else int((defect <= LEAST).argmax())
    first = num - num // 4 - 1
    if num - 1 - first < 3:
        first = num - 4
    if first < 1:
        return None
    return float((defect[num - 1] / defect[first]) ** (1 / (num - 1 - first)))


def _milliseconds(config, num_tokens, num_iters):
    logits = logits_of(0, num_tokens, config.head_dim, 2.0).astype(np.float32)
    logits = jnp.asarray(logits)
    compiled = jax.jit(lambda x: sinkhorn(x, num_iters))
    compiled(logits).block_until_ready()
    # Time of the processor, all threads: waiting for a busy machine is not counted. So
    # many calls that one timing takes some milliseconds.
    begin = time.process_time()
    compiled(logits).block_until_ready()
    num_calls = max(1, int(1e-2 / (time.process_time() - begin)))
    times = []
    for _ in range(config.num_repeats):
        begin = time.process_time()
        for _ in range(num_calls):
            compiled(logits).block_until_ready()
        times.append(1000 * (time.process_time() - begin) / num_calls)
    return times


def _findings(config, cell):
    where = f"{cell['num_tokens']} tokens, logits of deviation {cell['deviation']:g}"
    yield answer.finding(
        f"{config.enough} iterations are enough for a column defect of "
        f"{100 * config.tolerance:g} % ({where}).",
        f"column defect after {config.enough} iterations",
        cell["defect_at_enough"],
        high=config.tolerance,
    )
    pairs = zip(cell["measured_rate"], cell["predicted_rate"], strict=True)
    pairs = [(m, p) for m, p in pairs if m is not None]
    if len(pairs) > 1:
        # Of the iterations that a given reduction takes, which rates near 1 hide.
        ratios = [np.log(m) / np.log(p) for m, p in pairs if p < 1]
        yield answer.finding(
            "The defect falls at the rate of the squared second singular value "
            f"({where}).",
            "log of the measured over log of the predicted rate (5 % allowed)",
            ratios,
            low=0.95,
            high=1.05,
        )


def _draw(result):
    config = result["config"]
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.6))
    figure.set_layout_engine("constrained")
    (curves, rates), (enough, cost) = axes
    iterations = np.array(result["iterations"])
    least = 1.0
    longest = max(config["num_tokens"])
    for i, deviation in enumerate(config["deviations"]):
        color = answer.COLORS[i % len(answer.COLORS)]
        cells = [c for c in result["cells"] if c["deviation"] == deviation]
        for cell in cells:
            if cell["num_tokens"] == longest:
                values = np.maximum(cell["defect"], 1e-16)
                label = f"{deviation:g}"
                curves.plot(
                    iterations + 1, np.median(values, axis=0), color=color, label=label
                )
                curves.fill_between(
                    iterations + 1,
                    values.min(axis=0),
                    values.max(axis=0),
                    color=color,
                    alpha=0.15,
                    lw=0,
                )
            pairs = zip(cell["measured_rate"], cell["predicted_rate"], strict=True)
            both = np.array([p for p in pairs if p[0] is not None]).reshape(-1, 2)
            # Where blocks fall apart the rate is 1 to rounding.
            both = both[(both < 1 - 1e-9).all(axis=1)]
            least = min(least, (-np.log(both)).min(initial=1.0))
            rates.plot(-np.log(both[:, 1]), -np.log(both[:, 0]), ".", color=color)
    curves.axvline(config["enough"] + 1, color="0.35", linestyle=":")
    curves.set(xscale="log", yscale="log", ylim=(1e-14, 2))
    curves.set(xlabel="iterations + 1", ylabel="column defect")
    curves.set_title(f"{longest} tokens; median and range of seeds")
    curves.legend(
        title="deviation of logits", frameon=False, fontsize=9, loc="lower left"
    )
    limits = np.array([least, 10.0])
    rates.plot(limits, limits, color="0.35", linestyle=":")
    rates.set(xscale="log", yscale="log")
    rates.set(xlabel="predicted $-$log rate, per iteration")
    rates.set(ylabel="measured $-$log rate, per iteration")
    rates.set_title("all tokens and seeds, colours as left")
    for i, n in enumerate(config["num_tokens"]):
        style = {
            "color": answer.COLORS[i % len(answer.COLORS)],
            "marker": "os^Dv<>"[i % 7],
        }
        cells = [c for c in result["cells"] if c["num_tokens"] == n]
        values = np.array([c["defect_at_enough"] for c in cells])
        enough.plot(
            config["deviations"],
            np.maximum(np.median(values, axis=1), 1e-16),
            label=f"{n} tokens",
            markersize=4,
            **style,
        )
        times = {
            t["num_iters"]: np.median(t["milliseconds"])
            for t in result["times"]
            if t["num_tokens"] == n
        }
        ratio = [times[k] / times[0] for k in times]
        cost.plot(list(times), ratio, label=f"{n} tokens", markersize=4, **style)
    enough.axhline(config["tolerance"], color="0.35", linestyle=":")
    enough.set(yscale="log", xlabel="standard deviation of logits")
    enough.set_ylabel(f"column defect after {config['enough']} iterations")
    enough.set_title("median of seeds; dotted: tolerance")
    enough.legend(frameon=False, fontsize=9)
    cost.set(xlabel="iterations", ylabel="processor time / softmax's")
    cost.set_title("cost on this machine, float32")
    cost.legend(frameon=False, fontsize=9)
    return figure
