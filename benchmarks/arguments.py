"""Times `sinkhorn_attention` with further arguments against the same call without them.

A window, packed sequences, marginals and a column_tau, in float32 with one head,
forward and backward: the cotangents of query, key and value. All programs of an
implementation take turns, and ratios are over the same rounds.

The window reaches `window` tokens to either side, and segments have as many tokens as
the window in all. The program "plain" is the call without any of them.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from sinkhorn_jax import sinkhorn_attention

from .harness import machine, record, timing
from .harness.program import compile_within_limits
from .report import table

PLAIN: Final = "plain"
COLUMNS: Final = (
    *("implementation", "tokens", "argument", "median_ms", "ratio_to_plain"),
    "repeats",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Calls to measure."""

    quick: bool = False  # 64 tokens; rows are kept only if `output` is given.
    streaming_tokens: int = 32768
    scaling_tokens: int = 1024
    window: int = 256  # To either side.
    head_dim: int = 64
    num_iters: int = 10
    repeats: int = 3  # Timed calls of each program, at least.
    budget_s: float = 10.0  # Calls go on until an implementation has taken so long.
    output: Path | None = None  # Rows are appended here; None: the device's folder.

    def __post_init__(self):
        names = ("streaming_tokens", "scaling_tokens", "window", "head_dim", "repeats")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures both implementations, appends the rows and prints a table."""
    facts = machine.facts()
    output = config.output
    if output is None and not config.quick:
        output = record.path(facts, "arguments")
    if config.quick:
        small = {"streaming_tokens": 64, "scaling_tokens": 64, "window": 4}
        config = dataclasses.replace(config, **small, num_iters=2, budget_s=0.0)
    rows = []
    for name, tokens in (
        ("scaling", config.scaling_tokens),
        ("streaming", config.streaming_tokens),
    ):
        new = [row | facts for row in measure(config, name, tokens)]
        rows += new
        if output is not None:
            record.append(output, new)
    print(table.plain(rows, COLUMNS))
    print(f"Rows appended to {output}." if output else "No rows kept.")
    return rows


def arguments(config: Config, tokens: int) -> dict[str, dict[str, Any]]:
    """The further arguments of each program."""
    ids = jnp.arange(tokens, dtype=jnp.int32) // (2 * config.window + 1) + 1
    mass = jnp.linspace(0.5, 1.5, tokens, dtype=jnp.float32)
    return {
        PLAIN: {},
        "column_tau": {"column_tau": 0.5},
        "marginals": {"query_marginal": mass, "key_marginal": mass[::-1]},
        "segments": {"query_segment_ids": ids, "key_segment_ids": ids},
        "window": {"local_window_size": config.window},
    }


def measure(config: Config, name: str, tokens: int) -> list[dict[str, Any]]:
    """Rows of one implementation."""
    rng = np.random.default_rng(0)
    shape = (1, tokens, 1, config.head_dim)
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(3)]
    calls = {}
    for argument, options in arguments(config, tokens).items():
        program = functools.partial(gradient, config, name, options)
        executable, _ = compile_within_limits(program, *arrays)
        calls[argument] = lambda f=executable: jax.block_until_ready(f(*arrays))

    def check(argument, result):
        if not all(np.isfinite(each).all() for each in result):
            raise RuntimeError(f"{name} with {argument} returned what is no number.")

    times = timing.time_in_turns(calls, config.repeats, config.budget_s, PLAIN, check)
    return [
        {
            "implementation": name,
            "argument": argument,
            "mode": "forward_backward",
            "tokens": tokens,
            "window": config.window,
            "head_dim": config.head_dim,
            "num_iters": config.num_iters,
            "dtype": "float32",
            **timing.summary(milliseconds),
            "ratio_to_plain": timing.ratio(milliseconds, times.by_name.get(PLAIN)),
        }
        for argument, milliseconds in times.by_name.items()
    ]


def gradient(
    config: Config, name: str, options: dict[str, Any], *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """The cotangents of the operands where that of the output is the query."""
    attend = functools.partial(
        sinkhorn_attention,
        num_iters=config.num_iters,
        implementation=name,
        **options,
    )
    _, pull_back = jax.vjp(attend, *arrays)
    return pull_back(arrays[0])
