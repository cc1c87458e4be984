"""Which of skips, MLPs, LayerNorm and Sinkhorn iterations keep trained networks apart?

    python -m experiments ablations

The networks of `rank_decay` over a whole grid: skip connections and MLPs on and off,
LayerNorm before, after and nowhere, softmax and Sinkhorn attention of 1 to 50
iterations, each of 5 seeds, at initialisation and after training on IMDb reviews; the
relative residual of every layer in three norms. Tests that skip connections are what
preserves rank, whatever surrounds them, that Sinkhorn preserves it better than the
softmax where there are skip connections, and more so with more iterations than one, and
asks what the place of LayerNorm does. All networks have the same learning rate.

Takes 80 minutes on 2 CPU cores, with --quick a minute. Each network is written to a
file of its own when it ends: the same command goes on where it was interrupted. As
measured, in the last of 6 layers after training:

* Skip connections decide, with and without MLPs, wherever LayerNorm is and under every
  normaliser: without them rounding of float32 is left.
* Sinkhorn preserves more than the softmax in one place of six, with LayerNorm after the
  sum and without MLPs; by 0.1 of the decimal logarithm, of which the first iteration
  has all. With LayerNorm elsewhere the two do not differ beyond the seeds.
* Without LayerNorm they cannot differ: attention stays uniform, to 0.001 nats, and both
  normalisers leave that as it is. Nor is it far from it elsewhere, by at most 0.5 nats.
* LayerNorm before attention and MLP loses rank against none, under every normaliser.

After Dong et al. 2021, https://arxiv.org/abs/2103.03404, and Lapenna et al. 2026,
https://arxiv.org/abs/2604.07925.
"""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..evidence import answer
from ..evidence.claims import Finding, Interval, interval, paired, verdict
from ..figures import ablations as ablations_figure
from ..figures.ablations import PLACES
from ..networks.encoder import LayerNorm
from ..networks.measures import DEFINITIONS, NORMS
from ..networks.reviews import Case, Setting, last_log10, trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Setting):
    """Everything that can change the result."""

    num_iters: tuple[int, ...] = (1, 5, 10, 50)  # Of Sinkhorn, beside the softmax.
    layer_norms: tuple[LayerNorm, ...] = ("none", "pre", "post")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # Initialisation, order of the reviews.
    output: pathlib.Path = answer.RESULTS / "ablations"  # Of the JSON and the figure.

    def __post_init__(self):
        super().__post_init__()
        answer.require_at_least(self, {"num_iters": 1})
        if not self.layer_norms or len(set(self.layer_norms)) < len(self.layer_norms):
            raise ValueError(
                f"layer_norms must be distinct, at least one, got {self.layer_norms}."
            )


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
    output=answer.RESULTS / "ablations_quick",
)


def cases(config: Config) -> Iterator[Case]:
    """The whole grid; the iterations of a network in a row."""
    switches = itertools.product((True, False), (True, False), config.layer_norms)
    for has_skip, has_mlp, layer_norm in switches:
        for num_iters in (0, *config.num_iters):
            yield Case(
                num_iters=num_iters,
                has_skip=has_skip,
                has_mlp=has_mlp,
                layer_norm=layer_norm,
            )


def run(config: Config) -> dict[str, Any]:
    """Trains and measures what is not there; writes JSON and figure, prints findings.

    Returns:
        What the JSON holds.

    Raises:
        ValueError: The options do not fit together or the data.
        ModuleNotFoundError: The reviews are not installed.
        BlockingIOError: Another run writes to the same folder.
    """
    start = time.monotonic()
    with trained(list(cases(config)), config, config.output) as (dataset, runs):
        total = sum(run["wall_time_s"] for run in runs)
        result = {
            "definitions": DEFINITIONS,
            "data": {"max_entropy": config.max_entropy(dataset)},
            "runs": runs,
            "runs_wall_time_s": round(total, 1),
        }
        result["findings"] = findings(result)
        return answer.write("ablations", config, result, ablations_figure.draw, start)


def findings(result: dict[str, Any]) -> list[Finding]:
    """What the last layers of the trained networks say of the claims."""
    last = {_key(run): last_log10(run) for run in result["runs"]}
    runs = {_key(run): run for run in result["runs"]}
    places = list(dict.fromkeys(run["layer_norm"] for run in result["runs"]))
    normalisers = list(dict.fromkeys(run["num_iters"] for run in result["runs"]))
    settings = list(itertools.product((True, False), places))
    found = []
    for mlp, place in settings:
        gains = {
            n: paired(last[True, mlp, place, n], last[False, mlp, place, n])
            for n in normalisers
        }
        claim = (
            "skip connections preserve rank, whatever the normaliser "
            f"({_of(mlp, place)})"
        )
        found.append(_every(claim, gains, "with them less without"))
    for mlp, place in settings:
        softmax = runs[True, mlp, place, 0]
        for n in normalisers[1:]:
            ours = runs[True, mlp, place, n]
            gains = {
                norm: paired(last_log10(ours, norm), last_log10(softmax, norm))
                for norm in NORMS
            }
            others = ", ".join(f"{m} {gains[m].text(2)}" for m in NORMS[1:])
            claim = (
                f"{answer.name_of(n)}, preserves rank better than softmax "
                f"(skip, {_of(mlp, place)})"
            )
            text = (
                f"{RESIDUAL}: {interval(last_log10(ours)).text(2)} against "
                f"{interval(last_log10(softmax)).text(2)}, a difference by seed of "
                f"{gains['fro'].text(2)}; in the other norms {others}."
            )
            found.append(Finding(claim=claim, verdict=verdict(gains["fro"]), text=text))
    # Without the softmax: what one iteration does is no effect of more of them.
    if len(iterations := normalisers[1:]) > 1:
        x = np.log2(np.array(iterations))
        for mlp, place in settings:
            y = [last[True, mlp, place, n] for n in iterations]  # [X][S]
            slope = interval(np.polyfit(x, np.array(y), 1)[0])
            claim = (
                "more Sinkhorn iterations preserve rank better than fewer "
                f"(skip, {_of(mlp, place)})"
            )
            text = f"{RESIDUAL}: {slope.text(3)} for each doubling of the iterations."
            found.append(Finding(claim=claim, verdict=verdict(slope), text=text))
    for first, second in itertools.pairwise(places):
        for mlp in (True, False):
            gains = {
                n: paired(last[True, mlp, second, n], last[True, mlp, first, n])
                for n in normalisers
            }
            claim = (
                f"{PLACES[second]} preserves rank better than {PLACES[first]}, "
                f"whatever the normaliser (skip, {'MLP' if mlp else 'no MLP'})"
            )
            found.append(_every(claim, gains, "the first's less the second's"))
    return found


RESIDUAL = "Decimal logarithm of the relative residual, last layer, trained"


def _key(run):
    return run["has_skip"], run["has_mlp"], run["layer_norm"], run["num_iters"]


def _of(mlp, place):
    return f"{'MLP' if mlp else 'no MLP'}, {PLACES[place]}"


def _every(claim: str, gains: dict[int, Interval], what: str) -> Finding:
    """Of a claim about every normaliser: the least and the greatest mean are shown."""
    verdicts: Sequence[str] = [verdict(gain) for gain in gains.values()]
    if "not supported" in verdicts:
        total = "not supported"
    else:
        total = "undecided" if "undecided" in verdicts else "supported"
    worst = min(gains, key=lambda n: gains[n].mean)
    best = max(gains, key=lambda n: gains[n].mean)
    return Finding(
        claim=claim,
        verdict=total,
        text=(
            f"{RESIDUAL}, {what}: from {gains[worst].text(2)} "
            f"({answer.name_of(worst)}) to {gains[best].text(2)} "
            f"({answer.name_of(best)}); supported for {verdicts.count('supported')} of "
            f"{len(verdicts)} normalisers, not supported for "
            f"{verdicts.count('not supported')}."
        ),
    )
