"""Does Sinkhorn preserve rank better than softmax that attends as broadly?

    python -m experiments temperature

Sinkhorn attention keeps more entropy, and broad attention might be all that it takes.
So encoders are trained on the digits with softmax whose logits are multiplied by a
factor from the first update on, one network a factor, and with Sinkhorn at factor 1.
For each seed the residual of softmax is interpolated linearly in the entropy, between
the two networks whose entropies enclose that of Sinkhorn, and compared with Sinkhorn's.
The same is done with the softmax network of factor 1, its logits multiplied after
training alone. Entropies are means over the layers: single layers may differ. All
networks have two layers and one learning rate: what happens in deeper ones is the
subject of `study`.

Takes 5 minutes of one CPU core, with --quick one. As measured, entropy does not explain
the gain: at the 2.1 nats of Sinkhorn softmax has a residual of 0.59, or 0.56 if scaled
after training, against 0.82, and at 1.5 nats, its own, 0.62. Lapenna et al. 2026,
https://arxiv.org/abs/2604.07925, do not ask this question.
"""

import dataclasses
import fractions
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ..evidence import files
from ..evidence.claims import Finding, by_seed
from ..figures.temperature import draw
from ..networks import digits, options
from ..networks.digits import ACCURACY, ENTROPY, RESIDUAL, Quantity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(digits.Setup):
    """Everything that can change the result."""

    num_iters: int = 10  # Sinkhorn iterations of the Sinkhorn network.
    factors: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # Scale the logits.
    output: pathlib.Path = files.RUNS / "temperature"

    def __post_init__(self):
        super().__post_init__()
        options.require_at_least(self, 1, "num_iters")
        options.require_positive(self, "factors")
        options.require_increasing(self, "factors")
        if 1.0 not in self.factors or len(self.factors) < 2:
            raise ValueError(
                f"factors must hold 1, plain softmax, and another, got {self.factors}."
            )


QUICK = Config(
    **digits.SMALL,
    num_iters=2,
    factors=(0.25, 1.0),
    output=files.RUNS / "temperature_quick",
)

DEFINITIONS = digits.DEFINITIONS | {
    "softmax_trained": "Trained and evaluated with the factor.",
    "softmax_scaled": "Trained with factor 1, evaluated with the factor.",
    "sinkhorn": "Trained and evaluated with factor 1.",
}


def run(config: Config) -> dict[str, Any]:
    """Trains and measures; writes JSON and figure, prints the findings."""
    start = time.monotonic()
    encoders = digits.Encoders(config)
    softmax = {
        factor: encoders.encoder(num_iters=0, logit_scale=factor)
        for factor in config.factors
    }
    trained, scaled = [], []
    for factor, model in tqdm(softmax.items(), unit="factor"):
        params, loss = encoders.train(model)
        row = {"factor": factor, "train_loss": loss}
        trained.append(row | encoders.evaluate(model, params))
        if factor == 1.0:
            scaled = [
                {"factor": other} | encoders.evaluate(softmax[other], params)
                for other in config.factors
            ]
    sinkhorn = encoders.encoder(num_iters=config.num_iters)
    params, loss = encoders.train(sinkhorn)
    measured = {
        "definitions": DEFINITIONS,
        "softmax_trained": trained,
        "softmax_scaled": scaled,
        "sinkhorn": {"train_loss": loss} | encoders.evaluate(sinkhorn, params),
    }
    return files.write_result("temperature", config, measured, findings, draw, start)


def findings(result: dict[str, Any]) -> Iterator[Finding]:
    """Yields what the seeds say of Sinkhorn and of softmax with scaled logits."""
    sinkhorn = result["sinkhorn"]
    by_factor = {row["factor"]: row for row in result["softmax_trained"]}
    plain = by_factor.pop(1.0)
    claim = "Sinkhorn preserves rank better than softmax (factor 1)"
    yield RESIDUAL.compare(claim, sinkhorn, plain)
    claim = "Sinkhorn attention keeps more entropy than softmax (factor 1)"
    yield ENTROPY.compare(claim, sinkhorn, plain)
    for factor, row in by_factor.items():
        name = str(fractions.Fraction(factor).limit_denominator(1000))
        claim = f"softmax with {name} of the logits preserves rank better than with all"
        names = (f"with {name}", "with the whole")
        yield RESIDUAL.compare(claim, row, plain, names)
        claim = "Sinkhorn preserves rank better than softmax trained with"
        yield RESIDUAL.compare(f"{claim} {name} of the logits", sinkhorn, row)
    for rows, how in (
        (result["softmax_trained"], "trained to the same entropy"),
        (result["softmax_scaled"], "scaled to the same entropy after training"),
    ):
        for quantity, what in ((RESIDUAL, "preserves rank"), (ACCURACY, "classifies")):
            claim = f"Sinkhorn {what} better than softmax {how}"
            yield _at_equal_entropy(claim, quantity, sinkhorn, rows)


def _at_equal_entropy(claim, quantity: Quantity, sinkhorn, rows):
    entropy = ENTROPY.of(sinkhorn)
    entropies, values = (np.stack([q.of(r) for r in rows]) for q in (ENTROPY, quantity))
    softmax = interpolate(entropy, entropies, values)
    known = np.isfinite(softmax)
    enclosed = f"{known.sum()} of {len(known)} seeds enclosed"
    if not known.any():
        text = f"{quantity.name}: {enclosed} by the entropies of softmax."
        return Finding(claim=claim, verdict="undecided", text=text)
    name = f"{quantity.name} at {entropy[known].mean():.2f} nats ({enclosed})"
    return by_seed(claim, name, quantity.of(sinkhorn)[known], softmax[known])


def interpolate(at, x, y) -> np.ndarray:
    """Interpolates between K points (x, y) [K, S], in any order, at `at` [S].

    Each seed is interpolated linearly by itself; NaN beyond its points.
    """
    result = []
    for target, xs, ys in zip(at, x.T, y.T, strict=True):
        i = np.argsort(xs)
        result.append(np.interp(target, xs[i], ys[i], left=np.nan, right=np.nan))
    return np.array(result)
