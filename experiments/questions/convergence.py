"""How many iterations does Sinkhorn attention need, and can one tell beforehand?

    python -m experiments convergence

Follows the column defect over iterations, in float64: of random attention logits, for
growing deviation of the logits and number of tokens, and of the logits of encoders
before and after their training on IMDb reviews. Compares the linear rate at which it
falls with its prediction, the squared second singular value of the normalised plan
(`collapse.convergence_rate`), and asks where 50 iterations leave more than 0.1 %.
Beside it, the processor time of the iterations as a multiple of the softmax's.

The machine was busy: the committed times are rough, and no finding rests on them.

Takes 2 minutes of processor time, with --quick, which trains nothing, less. As
measured, 50 iterations leave less than 0.1 % up to deviations of 4, at any of 32 to 256
tokens, and 0.09 to 0.23 % at 10. The predicted rate is met, but where 500 iterations
end before the linear regime begins: from deviation 8 on the defect may fall faster than
predicted. In the encoders it is met before and after training, which takes the logits
from a deviation of 0.9 to one of 1.2 to 7, by seed. Their worst heads are then left
with up to 5 % after 50 iterations, before training with roundings.

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
import numpy as np
from jax import lax
from tqdm import tqdm

from sinkhorn_jax import collapse, sinkhorn

from ..evidence import answer
from ..figures import convergence as convergence_figure
from ..networks import attention_logits as convergence_trained


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
    num_steps: int = 150  # Updates of the trained networks; 0 leaves these out.
    learning_rates: tuple[float, ...] = (1e-2,)  # Of Adam, at the peak.
    trained_iters: int = 10  # Sinkhorn iterations with which they are trained.
    trained_tokens: tuple[int, ...] = (16, 32)  # Tokens of a review.
    depth: int = 2  # Layers.
    width: int = 32  # Features of a token.
    num_heads: int = 2  # A divisor of the width.
    vocab_size: int = 4000
    num_train: int = 10_000  # Training reviews.
    num_measured: int = 4  # Validation reviews whose logits are followed.
    batch_size: int = 32
    data_seed: int = 0  # Split of the reviews.
    seeds: tuple[int, ...] = tuple(range(6))
    output: pathlib.Path = answer.RESULTS / "convergence"

    def __post_init__(self):
        least = {"num_tokens": 2, "head_dim": 1, "timed_iters": 0, "num_repeats": 1}
        least |= {"enough": 1, "seeds": 0, "num_steps": 0, "trained_tokens": 2}
        one = ("trained_iters", "depth", "num_heads", "num_measured", "batch_size")
        answer.require_at_least(self, {**least, **dict.fromkeys(one, 1)})
        if min(self.learning_rates, default=0.0) <= 0:
            raise ValueError(
                f"learning_rates must be > 0 and some, got {self.learning_rates}: to "
                "leave the trained networks out, give num_steps=0."
            )
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
    num_steps=0,
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
    "networks": (
        "The same of encoders, whose every layer, measured review and head is a "
        "matrix: [seed][matrix] where it says [seed] above; `defect` is the mean over "
        "matrices, `worst_at_enough` and `worst_at_trained` are the largest of a "
        "seed's, after config.enough and config.trained_iters iterations. `deviation` "
        "is the logits' standard deviation; [seed], root of the mean over matrices. "
        "`train_loss` is the cross-entropy of the last tenth of the updates; [seed]."
    ),
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
    networks = _networks(config) if config.num_steps else []
    findings += [f for cell in networks for f in _network_findings(config, cell)]
    findings += _training_findings(config, networks)
    times = [
        {"num_tokens": n, "num_iters": k, "milliseconds": _milliseconds(config, n, k)}
        for n in config.num_tokens
        for k in config.timed_iters
    ]
    result = {
        "definitions": DEFINITIONS,
        "iterations": _shown(config).tolist(),
        "cells": cells,
        "networks": networks,
        "times": times,
        "findings": findings,
    }
    return answer.write("convergence", config, result, convergence_figure.draw, start)


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
    defects, measured = _measure(config, logits)
    return {
        "num_tokens": num_tokens,
        "deviation": deviation,
        "defect": defects[:, _shown(config)].tolist(),
        **measured,
    }


def _networks(config):
    with tqdm(
        total=len(config.learning_rates) * config.num_steps, unit="step", mininterval=1
    ) as progress:
        return [
            _network(config, each)
            for each in convergence_trained.networks(config, progress.update)
        ]


def _network(config, network):
    logits = network.logits  # [S, M, T, T]
    defects, measured = _measure(config, logits)
    return {
        "source": network.source,
        "learning_rate": network.learning_rate,
        "train_loss": network.train_loss,
        "num_tokens": logits.shape[-1],
        "deviation": np.sqrt(logits.var(axis=(-2, -1)).mean(axis=1)).tolist(),
        "defect": defects[..., _shown(config)].mean(axis=1).tolist(),
        "worst_at_enough": defects[..., config.enough].max(axis=1).tolist(),
        "worst_at_trained": defects[..., config.trained_iters].max(axis=1).tolist(),
        **measured,
    }


def _measure(config, logits):
    """Defects of all iterations, [..., K], and what the JSON says of each matrix."""
    with jax.enable_x64(True):
        defects, plans = follow(jnp.asarray(logits), config.num_iters)
        rates = jax.jit(collapse.convergence_rate)(plans)
        fraction = jnp.asarray(config.tolerance / np.asarray(defects)[..., 0])
        predicted = np.asarray(collapse.iterations_to_reduce(rates, fraction))
    defects = np.asarray(defects)
    is_small = defects <= config.tolerance
    needed = np.where(is_small.any(axis=-1), is_small.argmax(axis=-1), -1)
    measured = np.array([_rate(row) for row in defects.reshape(-1, defects.shape[-1])])
    return defects, {
        "defect_at_enough": defects[..., config.enough].tolist(),
        "measured_rate": measured.reshape(needed.shape).tolist(),
        "predicted_rate": np.asarray(rates).tolist(),
        "needed": np.where(needed >= 0, needed.astype(object), None).tolist(),
        "predicted_needed": np.where(
            np.isfinite(predicted), predicted.astype(object), None
        ).tolist(),
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


def _network_findings(config, cell):
    where = f"reviews, {cell['num_tokens']} tokens, {cell['source']}"
    yield answer.finding(
        f"{config.enough} iterations are enough for a column defect of "
        f"{100 * config.tolerance:g} % in every head ({where}).",
        f"largest column defect of a seed after {config.enough} iterations",
        cell["worst_at_enough"],
        high=config.tolerance,
    )
    ratios = []
    for measured, predicted in zip(
        cell["measured_rate"], cell["predicted_rate"], strict=True
    ):
        pairs = zip(measured, predicted, strict=True)
        logs = [np.log(m) / np.log(p) for m, p in pairs if m is not None and p < 1]
        if logs:
            ratios.append(np.mean(logs))
    if len(ratios) > 1:
        yield answer.finding(
            "The defect falls at the rate of the squared second singular value "
            f"({where}).",
            "log of the measured over log of the predicted rate, mean over heads (5 % "
            "allowed)",
            ratios,
            low=0.95,
            high=1.05,
        )


def _training_findings(config, networks):
    """By seed, against the same networks before training."""
    before = {c["num_tokens"]: c for c in networks if c["learning_rate"] is None}
    for cell in networks:
        if cell["learning_rate"] is None:
            continue
        first = before[cell["num_tokens"]]
        worst = [np.maximum(c["worst_at_trained"], 1e-16) for c in (cell, first)]
        yield answer.finding(
            "Training makes the limit harder to reach (reviews, "
            f"{cell['num_tokens']} tokens, {cell['source']}).",
            f"log10 of the largest column defect after {config.trained_iters} "
            "iterations, less that before training",
            np.log10(worst[0]) - np.log10(worst[1]),
            low=np.nextafter(0, 1),
        )
