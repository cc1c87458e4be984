"""Times all measures of collapse together against the decompositions that they need.

    python -m benchmarks.collapse_measures   # Writes benchmarks/results/measures/.
    python -m benchmarks.collapse_measures --quick   # Small, and keeps nothing.

One call of `collapse.measures_over_depth` on the hidden states and plans of 64 layers,
beside a program that does the least that any such call must: in one compiled loop over
layers, the singular values of the tokens and of their residual (which it is given) in
one batch each, the Frobenius norms and the absolute row and column sums of both, and
the sum of p log p of the plans. The two take turns, each round in the other order, so
that other work on the machine hits both alike. Both times are kept: the wall clock's,
and the processor's in all threads of the process, to which waiting is nothing.

The ratio of a round is the call's time over the least's. Memory is what the compiled
programs declare as temporary; inputs and outputs are not in it.

Takes a minute on 2 CPU cores, nearly all of it in the SVD.
"""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sinkhorn_jax import collapse

from .harness import command as _command
from .harness import machine as _machine
from .harness import record as _record

RESULTS: Final = _record.RESULTS / "measures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure. Hidden states and plans are as large as one another."""

    quick: bool = False  # A smoke run: small, and no file unless `output`.
    num_layers: int = 64
    batch_size: int = 8
    num_tokens: int = 256
    num_features: int = 256
    repeats: int = 3  # Rounds.
    output: Path | None = None  # A JSON file; None is the machine's own.

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(
                f"repeats must be at least 1, got {self.repeats}: there is no median "
                "of no calls."
            )


def run(config: Config) -> dict[str, Any]:
    """Measures, prints the ratios and writes them."""
    if config.quick:
        small = {"num_layers": 2, "batch_size": 2, "num_tokens": 16, "num_features": 8}
        config = dataclasses.replace(config, **small)
    facts = _machine.facts()
    arguments = inputs(config)
    programs = {
        "measures": (collapse.measures_over_depth, arguments[:2]),
        "least": (jax.jit(least), arguments),
    }
    calls, temp_mib = {}, {}
    for name, (function, args) in programs.items():
        compiled = function.lower(*args).compile()
        stats = compiled.memory_analysis()
        temp_mib[name] = stats and stats.temp_size_in_bytes / 2**20
        calls[name] = lambda f=compiled, a=args: jax.block_until_ready(f(*a))
    times = _in_turns(calls, config.repeats)
    row = {
        "num_layers": config.num_layers,
        "batch_size": config.batch_size,
        "num_tokens": config.num_tokens,
        "num_features": config.num_features,
        "dtype": "float32",
        **{f"{clock}_ms": by_name for clock, by_name in times.items()},
        **{
            f"{clock}_ratio": float(
                np.median(np.divide(by_name["measures"], by_name["least"]))
            )
            for clock, by_name in times.items()
        },
        "temp_mib": temp_mib,
        "input_mib": sum(x.nbytes for x in arguments[:2]) / 2**20,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts,
    }
    print(
        f"All measures over the least that they need: {row['processor_ratio']:.2f} in "
        f"processor time, {row['wall_ratio']:.2f} by the clock "
        f"(median of {config.repeats} rounds)."
    )
    output = config.output
    if output is None and not config.quick:
        output = RESULTS / f"{_machine.folder(facts, RESULTS).name}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(row, indent=1) + "\n")
    print(f"Wrote {output}." if output else "Nothing kept.")
    return row


def inputs(config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normal hidden states, softmax plans, and the residual of the hidden states."""
    keys = jax.random.split(jax.random.key(0))
    lead = (config.num_layers, config.batch_size, config.num_tokens)
    hidden_states = jax.random.normal(keys[0], (*lead, config.num_features))
    logits = jax.random.normal(keys[1], (*lead, config.num_tokens))
    residual = jax.jit(collapse.residual)(hidden_states)
    return jax.block_until_ready((hidden_states, jax.nn.softmax(logits), residual))


def least(hidden_states, plans, residual):
    """What every way to all measures computes, and nothing more."""

    def of_layer(layer):
        x, plan, res = layer
        return [
            *map(jnp.linalg.svdvals, (x, res)),
            *(jnp.sqrt(jnp.square(y).sum(axis=(-2, -1))) for y in (x, res)),
            *(jnp.abs(y).sum(a).max(-1) for y in (x, res) for a in (-2, -1)),
            -(plan * jnp.log(plan)).sum(axis=-1).mean(axis=-1),
        ]

    return lax.map(of_layer, (hidden_states, plans, residual))


def _in_turns(
    calls: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by clock, name and round."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    times = {clock: {name: [] for name in calls} for clock in clocks}
    for call in calls.values():
        call()
    for round_ in range(repeats):
        for name in reversed(calls) if round_ % 2 else calls:
            before = {clock: now() for clock, now in clocks.items()}
            calls[name]()
            for clock, now in clocks.items():
                times[clock][name].append(1e3 * (now() - before[clock]))
    return times


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    run(_command.parse(Config, __doc__, args))


if __name__ == "__main__":
    main()
