"""How many iterations does Sinkhorn attention need, and can one tell beforehand?

    python -m experiments convergence

Follows the column defect over iterations, in float64: of random attention logits, for
growing deviation of the logits and number of tokens, and of the logits of encoders
before and after their training on IMDb reviews. Compares the linear rate at which it
falls with its prediction, the squared second singular value of the normalised plan
(`collapse.convergence_rate`), and asks where 50 iterations leave more than 0.1 %.
It also measures the processor time of the iterations as a multiple of the softmax's.
Other load made the committed times rough, and no finding rests on them.

Takes 2 minutes of processor time, with --quick, which trains nothing, less. As
measured, 50 iterations leave less than 0.1 % up to deviations of 4, at any of 32 to 256
tokens, and 0.09 to 0.23 % at 10. The predicted rate is met, except where 500 iterations
end before the linear regime begins: from deviation 8 on the defect may fall faster than
predicted. In the encoders it is met before and after training, which increases the
deviation of the logits from 0.9 to between 1.2 and 7, by seed. After
training, 50 iterations leave up to 5 % in their worst heads; before it, only rounding.

The rate is that of Knight 2008, The Sinkhorn-Knopp algorithm. All sizes are this
module's own.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sinkhorn_jax import collapse, sinkhorn

from ..evidence import files
from ..evidence.claims import Finding, within
from ..figures.convergence import draw
from ..networks import ensemble, reviews
from ..networks.measures import attention_logits
from ..networks.options import require_at_least, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(reviews.Setup):
    """Everything that can change the result."""

    deviations: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)  # Spread of logits.
    num_tokens: tuple[int, ...] = (32, 64, 128, 256)
    head_dim: int = 32  # Features of queries and keys; their products are the logits.
    num_iters: int = 500  # Iterations to follow.
    enough: int = 50  # The number of iterations that is claimed to be enough.
    tolerance: float = 1e-3  # Column defect that counts as small.
    timed_iters: tuple[int, ...] = (0, 1, 5, 10, 50)  # 0 is softmax.
    num_repeats: int = 15  # Timings of each number of iterations.
    num_steps: int = 150  # Updates of the trained networks; 0 leaves these out.
    learning_rates: tuple[float, ...] = (1e-2,)  # Peaks of Adam's rate.
    trained_iters: int = 10  # Sinkhorn iterations of the trained networks.
    trained_tokens: tuple[int, ...] = (16, 32)  # Tokens of a review.
    depth: int = 2  # Layers.
    num_measured: int = 4  # Validation reviews whose logits are followed.
    seeds: tuple[int, ...] = tuple(range(6))
    output: pathlib.Path = files.RUNS / "convergence"

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 2, "num_tokens", "trained_tokens")
        names = ("head_dim", "num_repeats", "enough", "trained_iters", "num_measured")
        require_at_least(self, 1, *names)
        require_at_least(self, 0, "timed_iters")
        require_positive(self, "learning_rates", "deviations")
        if self.num_iters <= self.enough:
            raise ValueError(
                f"num_iters must exceed enough = {self.enough}, got {self.num_iters}: "
                "the iterations after `enough` show what it leaves."
            )
        if 0 not in self.timed_iters:
            raise ValueError(
                "timed_iters must hold 0, the softmax to compare with, got "
                f"{self.timed_iters}."
            )


QUICK = Config(
    deviations=(1.0, 6.0),
    num_tokens=(16, 32),
    num_iters=200,
    timed_iters=(0, 10),
    num_repeats=3,
    num_steps=0,
    seeds=(0, 1, 2),
    output=files.RUNS / "convergence_quick",
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

# A smaller defect in float64 is rounding.
LEAST = 1e-11


def run(config: Config) -> dict[str, Any]:
    """Follows all iterations; writes JSON and figure, prints the findings."""
    start = time.monotonic()
    cells = [
        _cell(config, n, deviation)
        for n in config.num_tokens
        for deviation in config.deviations
    ]
    networks = list(_networks(config)) if config.num_steps else []
    times = [
        {"num_tokens": n, "num_iters": k, "milliseconds": _milliseconds(config, n, k)}
        for n in config.num_tokens
        for k in config.timed_iters
    ]
    measured = {
        "definitions": DEFINITIONS,
        "iterations": _shown(config).tolist(),
        "cells": cells,
        "networks": networks,
        "times": times,
    }
    return files.write_result("convergence", config, measured, findings, draw, start)


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
    """Yields the cells of encoders before and after training, for some text lengths.

    They are trained on reviews of the largest number of `trained_tokens`, and measured
    on the first tokens of validation reviews that are at least that long.
    """
    data, words = config.long_reviews(max(config.trained_tokens), config.num_measured)
    model = config.encoder(data, config.trained_iters)
    initial = ensemble.init(model, config.seeds, data.train)
    for rate in (None, *config.learning_rates):
        params, source, train_loss = initial, "before training", None
        if rate is not None:
            source = f"trained at rate {rate:g}"
            params, losses = ensemble.train(
                model, initial, data.train, config, learning_rate=rate
            )
            train_loss = ensemble.last_loss(losses)
        for num_tokens in config.trained_tokens:
            logits = attention_logits(model, params, words[:, :num_tokens])
            logits = logits.reshape(len(logits), -1, num_tokens, num_tokens)
            defects, measured = _measure(config, logits)  # [S, M, K]
            worst = defects.max(axis=1)
            yield {
                "source": source,
                "learning_rate": rate,
                "train_loss": train_loss,
                "num_tokens": num_tokens,
                "deviation": np.sqrt(logits.var(axis=(-2, -1)).mean(axis=1)).tolist(),
                "defect": defects[..., _shown(config)].mean(axis=1).tolist(),
                "worst_at_enough": worst[:, config.enough].tolist(),
                "worst_at_trained": worst[:, config.trained_iters].tolist(),
                **measured,
            }


def _measure(config, logits):
    """Defects of all iterations, [..., K], and what the JSON says of each matrix."""
    with jax.enable_x64(True):
        defects, plans = follow(jnp.asarray(logits), config.num_iters)
        rates = jax.jit(collapse.convergence_rate)(plans)
        predicted = collapse.iterations_to_reduce(
            rates, config.tolerance / defects[..., 0]
        )
    defects, predicted = np.asarray(defects), np.asarray(predicted)
    is_small = defects <= config.tolerance
    measured = [_rate(row) for row in defects.reshape(-1, defects.shape[-1])]
    return defects, {
        "defect_at_enough": defects[..., config.enough].tolist(),
        "measured_rate": np.reshape(measured, defects.shape[:-1]).tolist(),
        "predicted_rate": np.asarray(rates).tolist(),
        "needed": files.or_null(is_small.argmax(axis=-1), is_small.any(axis=-1)),
        "predicted_needed": files.or_null(predicted, np.isfinite(predicted)),
    }


def _shown(config):
    """Some iterations, evenly on a logarithmic axis, with `enough` among them."""
    some = np.geomspace(1, config.num_iters + 1, 60).round().astype(int) - 1
    return np.unique([*some, config.enough])


def _rate(defect):
    """The factor of the defect per iteration, late but above rounding, or None."""
    num = int(np.argmax([*(defect <= LEAST), True]))  # Those before rounding.
    first = min(num - num // 4 - 1, num - 4)
    if first < 1:
        return None
    return float((defect[num - 1] / defect[first]) ** (1 / (num - 1 - first)))


def _milliseconds(config, num_tokens, num_iters):
    """Times of the processor, all threads, in which waiting for it does not count."""
    logits = logits_of(0, num_tokens, config.head_dim, 2.0).astype(np.float32)
    logits = jnp.asarray(logits)
    compiled = jax.jit(lambda x: sinkhorn(x, num_iters))
    compiled(logits).block_until_ready()

    def seconds(num_calls):
        begin = time.process_time()
        for _ in range(num_calls):
            compiled(logits).block_until_ready()
        return time.process_time() - begin

    # One timing has enough calls to take some milliseconds.
    num_calls = max(1, int(1e-2 / seconds(1)))
    return [1000 * seconds(num_calls) / num_calls for _ in range(config.num_repeats)]


def findings(result: dict[str, Any]) -> Iterator[Finding]:
    """Yields what the seeds say of the number of iterations and of its prediction."""
    config, networks = result["config"], result["networks"]
    enough, tolerance = config["enough"], config["tolerance"]
    claim = (
        f"{enough} iterations are enough for a column defect of {100 * tolerance:g} %"
    )
    for cell in result["cells"]:
        tokens, deviation = cell["num_tokens"], cell["deviation"]
        where = f"{tokens} tokens, logits of deviation {deviation:g}"
        what = f"column defect after {enough} iterations"
        defects = cell["defect_at_enough"]
        yield within(f"{claim} ({where}).", what, defects, high=tolerance)
        # One matrix a seed.
        rates = (
            [[r] for r in cell[f"{how}_rate"]] for how in ("measured", "predicted")
        )
        yield from _rate_is_predicted(where, "", *rates)
    for cell in networks:
        where = f"reviews, {cell['num_tokens']} tokens, {cell['source']}"
        what = f"largest column defect of a seed after {enough} iterations"
        defects = cell["worst_at_enough"]
        yield within(f"{claim} in every head ({where}).", what, defects, high=tolerance)
        rates = cell["measured_rate"], cell["predicted_rate"]
        yield from _rate_is_predicted(where, ", mean over heads", *rates)
    yield from _harder_by_training(config, networks)


def _rate_is_predicted(where, how, measured, predicted):
    """Compares rates [seed][matrix]; logarithms, as rates near 1 hide differences."""
    ratios = []
    for seed in zip(measured, predicted, strict=True):
        pairs = zip(*seed, strict=True)
        logs = [np.log(m) / np.log(p) for m, p in pairs if m is not None and p < 1]
        if logs:
            ratios.append(np.mean(logs))
    if len(ratios) > 1:
        claim = "The defect falls at the rate of the squared second singular value"
        what = f"log of the measured over log of the predicted rate{how} (5 % allowed)"
        yield within(f"{claim} ({where}).", what, ratios, low=0.95, high=1.05)


def _harder_by_training(config, networks):
    """Compares trained networks, by seed, with the same networks before training."""
    before = {c["num_tokens"]: c for c in networks if c["learning_rate"] is None}
    for cell in (c for c in networks if c["learning_rate"] is not None):
        first = before[cell["num_tokens"]]
        worst, at_first = (
            np.log10(np.maximum(c["worst_at_trained"], 1e-16)) for c in (cell, first)
        )
        claim = (
            "Training makes the limit harder to reach (reviews, "
            f"{cell['num_tokens']} tokens, {cell['source']})."
        )
        what = (
            f"log10 of the largest column defect after {config['trained_iters']} "
            "iterations, less that before training"
        )
        yield within(claim, what, worst - at_first, low=0.0)
