"""Which of skips, MLPs, LayerNorm and Sinkhorn iterations keep trained networks apart?

    python -m experiments ablations

Trains the networks of `rank_decay` over a whole grid: skip connections and MLPs on and
off, LayerNorm before, after and nowhere, softmax and Sinkhorn attention of 1 to 50
iterations, 5 seeds each. Measures the relative residual of every layer in three norms,
at initialisation and after training on IMDb reviews. Tests three claims: skip
connections preserve rank, whatever surrounds them; Sinkhorn preserves it better than
softmax where there are skip connections; and more Sinkhorn iterations preserve it
better than one. Asks besides what the place of LayerNorm does. All networks have the
same learning rate.

Takes 80 minutes on 2 CPU cores, with --quick a minute. Each network is written to a
file of its own when it ends, so the same command continues an interrupted run. As
measured, in the last of 6 layers after training:

* Skip connections decide, with and without MLPs, wherever LayerNorm is and under every
  normaliser: without them rounding of float32 is left.
* Sinkhorn preserves more than the softmax in one place of six, with LayerNorm after the
  sum and without MLPs, by 0.1 of the decimal logarithm; the first iteration has all of
  this effect. With LayerNorm elsewhere the two do not differ beyond the seeds.
* Without LayerNorm they cannot differ: attention stays uniform, to 0.001 nats, and both
  normalisers leave uniform attention as it is. With LayerNorm, attention is at most 0.5
  nats from uniform.
* LayerNorm before attention and MLP loses rank against none, under every normaliser.

After Dong et al. 2021, https://arxiv.org/abs/2103.03404, and Lapenna et al. 2026,
https://arxiv.org/abs/2604.07925.
"""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..evidence import claims, files
from ..evidence.claims import Finding, Interval, finding, interval, paired
from ..figures.ablations import draw
from ..networks.encoder import LayerNorm
from ..networks.measures import DEFINITIONS, NORMS
from ..networks.options import require_at_least, require_distinct
from ..networks.reviews import RESIDUAL, Case, Grid, last_log10, max_entropy, trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Grid):
    """Everything that can change the result."""

    num_iters: tuple[int, ...] = (1, 5, 10, 50)  # Beside 0, the softmax.
    layer_norms: tuple[LayerNorm, ...] = ("none", "pre", "post")
    output: pathlib.Path = files.RUNS / "ablations"  # Folder of the JSON and figure.

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "num_iters")
        require_distinct(self, "layer_norms")


QUICK = Config(
    depth=2,
    width=16,
    seq_len=32,
    num_train=1000,
    num_validation=64,
    num_measured=8,
    num_steps=10,
    batch_size=8,
    num_iters=(1, 5),
    layer_norms=("none", "pre"),
    seeds=(0, 1),
    output=files.RUNS / "ablations_quick",
)


def cases(config: Config) -> Iterator[Case]:
    """Yields the whole grid, all normalisers of a network in a row."""
    switches, num_iters = (True, False), (0, *config.num_iters)
    grid = itertools.product(switches, switches, config.layer_norms, num_iters)
    yield from itertools.starmap(Case, grid)


def run(config: Config) -> dict[str, Any]:
    """Trains and measures; writes JSON and figure, prints the findings."""
    start = time.monotonic()
    with trained(list(cases(config)), config, config.output) as (reviews, runs):
        total = sum(run["wall_time_s"] for run in runs)
        measured = {
            "definitions": DEFINITIONS,
            "data": {"max_entropy": max_entropy(config.measured(reviews))},
            "runs": runs,
            "runs_wall_time_s": round(total, 1),
        }
        return files.write_result("ablations", config, measured, findings, draw, start)


def findings(result: dict[str, Any]) -> Iterator[Finding]:
    """Yields what the last layers of the trained networks say of the claims."""
    runs = {
        (run["has_skip"], run["has_mlp"], run["layer_norm"], run["num_iters"]): run
        for run in result["runs"]
    }
    last = {key: last_log10(run) for key, run in runs.items()}
    places = list(dict.fromkeys(run["layer_norm"] for run in result["runs"]))
    normalisers = list(dict.fromkeys(run["num_iters"] for run in result["runs"]))
    settings = list(itertools.product((True, False), places))

    gains = lambda first, second: {
        n: paired(last[*first, n], last[*second, n]) for n in normalisers
    }
    for mlp, place in settings:
        claim = "skip connections preserve rank, whatever the normaliser"
        claim = f"{claim} ({_where(mlp, place)})"
        gain = gains((True, mlp, place), (False, mlp, place))
        yield _for_every_normaliser(claim, gain, "with them less without")
    for mlp, place in settings:
        for n in normalisers[1:]:
            claim = f"{claims.normaliser_name(n)}, preserves rank better than softmax"
            claim = f"{claim} (skip, {_where(mlp, place)})"
            sinkhorn, softmax = (runs[True, mlp, place, i] for i in (n, 0))
            yield _against_softmax(claim, sinkhorn, softmax)
    # The softmax is left out: the effect of one iteration is not that of more of them.
    if len(iterations := normalisers[1:]) > 1:
        for mlp, place in settings:
            y = [last[True, mlp, place, n] for n in iterations]  # [X][S]
            slope = interval(np.polyfit(np.log2(iterations), y, 1)[0])
            claim = "more Sinkhorn iterations preserve rank better than fewer"
            claim = f"{claim} (skip, {_where(mlp, place)})"
            text = f"{RESIDUAL}: {slope.text(3)} for each doubling of the iterations."
            yield finding(claim, text, slope)
    for first, second in itertools.pairwise(places):
        for mlp in (True, False):
            names = (claims.LAYER_NORM_NAMES[place] for place in (second, first))
            claim = (
                f"{' preserves rank better than '.join(names)}, whatever the "
                f"normaliser (skip, {'MLP' if mlp else 'no MLP'})"
            )
            gain = gains((True, mlp, second), (True, mlp, first))
            yield _for_every_normaliser(claim, gain, "the first's less the second's")


def _where(mlp, place):
    return f"{'MLP' if mlp else 'no MLP'}, {claims.LAYER_NORM_NAMES[place]}"


def _against_softmax(claim, sinkhorn, softmax):
    gains = {
        norm: paired(last_log10(sinkhorn, norm), last_log10(softmax, norm))
        for norm in NORMS
    }
    others = ", ".join(f"{norm} {gains[norm].text(2)}" for norm in NORMS[1:])
    text = (
        f"{RESIDUAL}: {interval(last_log10(sinkhorn)).text(2)} against "
        f"{interval(last_log10(softmax)).text(2)}, a difference by seed of "
        f"{gains['fro'].text(2)}; in the other norms {others}."
    )
    return finding(claim, text, gains["fro"])


def _for_every_normaliser(claim: str, gains: dict[int, Interval], what: str) -> Finding:
    """The verdict on a claim about all normalisers: one of them can refute it."""
    verdicts = [claims.verdict(gain) for gain in gains.values()]
    worst = min(gains, key=lambda n: gains[n].mean)
    best = max(gains, key=lambda n: gains[n].mean)
    text = (
        f"{RESIDUAL}, {what}: from {gains[worst].text(2)} "
        f"({claims.normaliser_name(worst)}) to {gains[best].text(2)} "
        f"({claims.normaliser_name(best)}); supported for "
        f"{verdicts.count('supported')} of {len(verdicts)} normalisers, not supported "
        f"for {verdicts.count('not supported')}."
    )
    order = ("not supported", "undecided", "supported")
    return Finding(claim=claim, verdict=min(verdicts, key=order.index), text=text)
