"""Times Sinkhorn attention against softmax attention.

    python -m benchmarks           # All cases; rows go to benchmarks/results/<device>/.
    python -m benchmarks --quick   # One tiny case; prints its rows and keeps none.
    python -m benchmarks --readme  # Makes the README's table from the kept rows.

How it measures. Each program is compiled ahead of time for its shape and called once
untimed. Then all implementations of a case take turns, at least `repeats` rounds and
for `budget_s` seconds; a time runs from the call until the result is ready, on inputs
that are on the device already. Median and interquartile range are reported, and the
ratio to `jax.nn.dot_product_attention`, called plainly, is one of medians over the same
rounds. Forward and backward together are the output and the gradients with respect to
query, key and value, for a random cotangent.

Memory is what the compiled executable declares as temporary: inputs and outputs are not
in it. `ts_arrays_per_head` says how many T x S arrays (float32 or wider) live for one
head in flight: the program is compiled for a single head, at two head dimensions, and
what is proportional to H, such as copies of the queries, is taken off. What is left is
whole arrays and, as a fraction, vectors. `peak_mib` leaves nothing out.

Errors are against float64 in NumPy, for as many whole heads as are cheap: at least one,
and all of them where heads x tokens² is at most 2²².

What it does not show. Standard normal inputs give logits of standard deviation 1, and
the linear domain of `scaling` suffices; a head that has to leave it costs about what
`reference` does. There is no mask, bias, dropout or grouped head, one device, and
nothing around the attention. Times on a machine with other work are noisy: compare
ratios of one run, and not where the interquartile range is of the size of the
difference. Sinkhorn multiplies matrices at highest precision; softmax does what JAX
does by default, which on a GPU or TPU may be less (`matmul_precision`).
"""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from sinkhorn_jax.attention import IMPLEMENTATIONS

from . import _cases, _machine, _measure, _readme, _record, _table
from ._measure import SOFTMAX


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run, and where its rows go."""

    quick: bool = False  # A smoke run: one tiny case, and no rows unless `output`.
    readme: bool = False  # Only rewrite the README's table from the kept rows.
    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS)  # Softmax always runs.
    cases: tuple[str, ...] | None = (
        None  # Heads x tokens; None is all but the tiny one.
    )
    num_iters: int = 10  # Sinkhorn iterations.
    repeats: int = 5  # Timed calls of each program, at least.
    budget_s: float = 10.0  # More calls until so many seconds a case and mode.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    output: Path | None = None  # Rows are appended here; None is the device's folder.

    def __post_init__(self):
        if not self.cases:
            tiny = (_cases.SMOKE,)
            full = tuple(name for name in _cases.CASES if name not in tiny)
            object.__setattr__(self, "cases", tiny if self.quick else full)
        if self.quick:
            object.__setattr__(self, "budget_s", 0.0)
        _check_names("implementations", self.implementations, IMPLEMENTATIONS)
        _check_names("cases", self.cases, _cases.CASES)
        if self.repeats < 1:
            raise ValueError(
                f"repeats must be at least 1, got {self.repeats}: there is no median "
                "of no calls. 5 or more give an interquartile range worth reading."
            )


def run(config: Config) -> list[_record.Row]:
    """Measures, prints reasons for what is left out, and appends the rows."""
    now = datetime.datetime.now(datetime.UTC)
    run_facts = {
        "dtype": config.dtype,
        "num_iters": config.num_iters,
        **_machine.facts(),
        "date": now.isoformat(timespec="seconds"),
    }
    output = config.output
    if output is None and not config.quick:
        name = _machine.directory_name(
            *(run_facts[x] for x in ("device", "platform", "num_cpus"))
        )
        output = _record.RESULTS / name / f"{now:%Y-%m-%d}.jsonl"
    rows = []
    with tqdm.tqdm(total=2 * len(config.cases), unit="case") as progress:
        for name in config.cases:
            progress.set_description(f"{name} float64")
            case = _cases.CASES[name]
            inputs = _cases.inputs(case, config.dtype)
            sinkhorn = _measure.expected(case, inputs, config.num_iters)
            softmax = _measure.expected(case, inputs, 0)
            for mode in _measure.MODES:
                progress.set_description(f"{name} {mode}")
                programs = _build(config, name, mode)
                times = _measure.time_in_turns(
                    {which: program.call for which, program in programs.items()},
                    inputs,
                    config.repeats,
                    config.budget_s,
                )
                errors = {
                    which: _measure.error(
                        case,
                        mode,
                        program.call(*inputs),
                        softmax if which == SOFTMAX else sinkhorn,
                    )
                    for which, program in programs.items()
                }
                new = _rows(case, mode, programs, times, errors, run_facts)
                if output is not None:
                    _record.append(output, new)
                rows += new
                progress.update()
    print(_table.aligned(rows))
    print(f"Rows appended to {output}." if output else "No rows kept.")
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__, args=args)
    if config.readme:
        _readme.update()
    else:
        run(config)


def _build(config, name, mode):
    programs = {}
    for implementation in (SOFTMAX, *config.implementations):
        try:
            programs[implementation] = _measure.build(
                implementation, _cases.CASES[name], config.dtype, config.num_iters, mode
            )
        except NotImplementedError as reason:
            # `tqdm.write`, because a line printed over a progress bar is torn.
            tqdm.tqdm.write(f"Skipped {implementation}, {name}, {mode}: {reason}")
    return programs


def _rows(case, mode, programs, times, errors, run_facts):
    batch, t, _, _ = case.shape_btnh
    ts_array = t * t * max(4, jnp.dtype(run_facts["dtype"]).itemsize)
    medians = {name: float(np.median(x)) for name, x in times.items()}

    def in_units(num_bytes, unit):
        return None if num_bytes is None else num_bytes / unit

    rows = []
    for name, program in programs.items():
        low, high = np.percentile(times[name], [25, 75])
        precision = jax.config.jax_default_matmul_precision or "default"
        rows.append(
            _record.Row(
                implementation=name,
                mode=mode,
                shape_btnh=case.shape_btnh,
                kv_len=t,
                matmul_precision=precision if name == SOFTMAX else "highest",
                median_ms=medians[name],
                iqr_ms=float(high - low),
                repeats=len(times[name]),
                compile_ms=program.compile_ms,
                tokens_per_second=batch * t / (medians[name] / 1e3),
                ratio_to_softmax=medians[name] / medians[SOFTMAX],
                peak_mib=in_units(program.temp_bytes, 2**20),
                peak_in_ts_arrays=in_units(program.temp_bytes, ts_array),
                one_head_mib=in_units(program.one_head_bytes, 2**20),
                ts_arrays_per_head=in_units(program.one_head_ts_bytes, ts_array),
                max_abs_error=errors[name],
                **run_facts,
            )
        )
    return rows


def _check_names(what, names, table):
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(
            f"Unknown {what} {unknown}; expected some of {list(table)}. "
            f"{SOFTMAX!r} is always measured and not to be named."
        )


if __name__ == "__main__":
    main()
