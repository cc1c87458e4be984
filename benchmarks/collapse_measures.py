"""Times all measures of collapse against the decompositions that they need.

One call of `collapse.measures_over_depth` on the hidden states and plans of 64 layers
takes turns with a program that computes the least that any such call must: the singular
values, Frobenius norms and absolute row and column sums of the tokens and of their
residual (which it is given), and the sum of p log p of the plans. Processor time, in
all threads of the process, does not increase by waiting, as the wall clock's does.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sinkhorn_jax import collapse

from .harness import machine, program, record

RESULTS: Final = record.RESULTS / "measures"
SIZES: Final = dict(num_layers=64, batch_size=8, num_tokens=256, num_features=256)
QUICK: Final = dict(num_layers=2, batch_size=2, num_tokens=16, num_features=8)
ROUNDS: Final = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the measurement."""

    quick: bool = False  # Tiny sizes; a file is written only if `output` is given.
    output: Path | None = None  # A JSON file; None: the machine's own.


def run(config: Config) -> dict[str, Any]:
    """Measures, prints the ratios and writes them."""
    sizes = QUICK if config.quick else SIZES
    facts = machine.facts()
    arguments = inputs(**sizes)
    functions = {
        "measures": (collapse.measures_over_depth, arguments[:2]),
        "least": (jax.jit(least), arguments),
    }
    compiled = {name: f.lower(*args).compile() for name, (f, args) in functions.items()}
    call = lambda name: functools.partial(compiled[name], *functions[name][1])
    times = _in_turns({name: call(name) for name in functions})
    ratio = lambda by_name: np.median(np.divide(by_name["measures"], by_name["least"]))
    row = {
        **sizes,
        "dtype": "float32",
        **{f"{clock}_ms": by_name for clock, by_name in times.items()},
        **{f"{clock}_ratio": float(ratio(times[clock])) for clock in times},
        "temp_mib": {
            name: (program.temp_bytes(executable) or 0) / 2**20
            for name, executable in compiled.items()
        },
        "input_mib": sum(x.nbytes for x in arguments[:2]) / 2**20,
        **facts,
    }
    print(
        f"All measures over the least that they need: {row['processor_ratio']:.2f} in "
        f"processor time, {row['wall_ratio']:.2f} by the clock "
        f"(median of {ROUNDS} rounds)."
    )
    output = config.output
    if output is None and not config.quick:
        output = RESULTS / f"{machine.folder(facts, RESULTS).name}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(row, indent=1) + "\n")
    print(f"Wrote {output}." if output else "Nothing kept.")
    return row


def inputs(
    num_layers: int, batch_size: int, num_tokens: int, num_features: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normal hidden states, softmax plans, and the residual of the hidden states."""
    keys = jax.random.split(jax.random.key(0))
    lead = (num_layers, batch_size, num_tokens)
    hidden_states = jax.random.normal(keys[0], (*lead, num_features))
    logits = jax.random.normal(keys[1], (*lead, num_tokens))
    residual = jax.jit(collapse.residual)(hidden_states)
    return jax.block_until_ready((hidden_states, jax.nn.softmax(logits), residual))


def least(hidden_states, plans, residual):
    """The decompositions that every computation of all measures contains, by layer."""

    def of_layer(layer):
        x, plan, res = layer
        return [
            *map(jnp.linalg.svdvals, (x, res)),
            *(jnp.sqrt(jnp.square(y).sum(axis=(-2, -1))) for y in (x, res)),
            *(jnp.abs(y).sum(a).max(-1) for y in (x, res) for a in (-2, -1)),
            -(plan * jnp.log(plan)).sum(axis=-1).mean(axis=-1),
        ]

    return lax.map(of_layer, (hidden_states, plans, residual))


def _in_turns(calls):
    """Milliseconds by clock, name and round; every other round runs backwards."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    times = {clock: {name: [] for name in calls} for clock in clocks}
    for call in calls.values():
        jax.block_until_ready(call())
    for round_ in range(ROUNDS):
        for name in reversed(calls) if round_ % 2 else calls:
            before = {clock: now() for clock, now in clocks.items()}
            jax.block_until_ready(calls[name]())
            for clock, now in clocks.items():
                times[clock][name].append(1e3 * (now() - before[clock]))
    return times
