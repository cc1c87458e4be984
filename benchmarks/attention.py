"""Times Sinkhorn attention against softmax attention and other libraries.

Programs: every entry of IMPLEMENTATIONS that can run here; `softmax`
(`jax.nn.dot_product_attention`); JAX's softmax attention in cuDNN and PyTorch's fused
one; Sinkhorn attention in plain PyTorch, by OTT-JAX's solver (gradient unrolled or
implicit) and by POT's. Peers get the same numbers and as many threads as JAX and do the
same half steps. PyTorch and POT are eager. Half precision is widened to float32 for
OTT, POT and the PyTorch iteration, as Sinkhorn does here. Programs that are not
installed, cannot run, need more than half of the memory or would take over 300 s are
skipped, and the reasons are kept beside the rows.

Times: all programs of a case take turns on inputs that are on the device. A time runs
from the call until the result is ready. Reported are the median and the interquartile
range of at least `repeats` calls (3 above 2 s, 1 above 20 s), and the ratio to softmax
in the same rounds. Forward and backward means the output and the gradients with respect
to query, key and value for a random cotangent.

Memory of a JAX program is what the executable declares as temporary, without inputs
and outputs. The memory of PyTorch and POT, measured on CPUs only, is the growth of the
process's peak resident set over a call, results included; small differences between the
two kinds mean nothing. Errors are against `reference` in float64. The
implicit gradient of OTT is that of the fixed point, and its error shows the difference.

Limits: the logits have standard deviation 1, which the linear domain represents; a head
that needs the fallback takes longer, which is not timed here. There is no mask, bias,
dropout or grouped head. Other work makes times noisy, those of PyTorch most. Sinkhorn
multiplies at highest precision, softmax at JAX's default, which may be lower.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from . import programs
from .harness import accuracy, cases, limits, machine, process_memory, record, timing
from .harness.cases import Case
from .harness.program import MODES, Mode, Program
from .programs import SOFTMAX
from .report import table

# Otherwise XLA allocates three quarters of a GPU's memory and PyTorch gets the rest.
# JAX reads the variable when it first looks at its devices, which is later.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Cases and programs to measure."""

    quick: bool = False  # One tiny case; rows are kept only if `output` is given.
    # The sweep "gpu" runs only if it is named.
    sweeps: tuple[str, ...] = tuple(x for x in cases.SWEEPS if x != cases.GPU)
    cases: tuple[str, ...] = ()  # Heads x tokens, such as 2x4096; empty means all.
    dtypes: tuple[str, ...] = ()  # Empty means all.
    # Softmax is measured in any case.
    implementations: tuple[str, ...] = programs.NAMES
    repeats: int = 5  # Timed calls of each program, at least.
    budget_s: float = 4.0  # Calls go on until a case and mode has taken these seconds.
    output: Path | None = None  # Rows are appended here; None: the device's folder.

    def __post_init__(self):
        cases.check_names("implementations", self.implementations, programs.NAMES)
        cases.check_names("sweeps", self.sweeps, cases.SWEEPS)
        cases.select(self.sweeps, self.cases, self.dtypes)
        if self.quick and (self.cases or self.dtypes):
            raise ValueError("--quick has its own case; leave out cases and dtypes.")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}.")


def run(config: Config) -> list[record.Row]:
    """Measures every case in both modes, appends the rows and prints a table.

    Raises:
        RuntimeError: The sweep "gpu" is named and JAX does not compute on a GPU.
    """
    if cases.GPU in config.sweeps:
        machine.require(cases.GPU, f"The sweep {cases.GPU!r}")
    facts = machine.facts()
    output = config.output or (None if config.quick else record.path(facts))
    selected = cases.select(config.sweeps, config.cases, config.dtypes)
    if config.quick:
        config = dataclasses.replace(config, budget_s=0.0)
        selected = list(cases.SMOKE)
    process_memory.keep_freed_memory()
    rows: list[record.Row] = []
    for case in tqdm.tqdm(selected, unit="case"):
        for mode in MODES:
            with jax.enable_x64(case.dtype == "float64"):
                new, skips = measure(case, mode, config, facts, rows)
            rows += new
            if output is not None:
                record.append(output, new)
                record.append(record.skips_path(output), skips)
    print(table.narrow(rows))
    print(f"Rows appended to {output}." if output else "No rows kept.")
    return rows


def measure(
    case: Case,
    mode: Mode,
    config: Config,
    facts: dict[str, Any],
    earlier: Sequence[record.Row],
) -> tuple[list[record.Row], list[record.Skip]]:
    """A row for each program that was measured, and a skip for each other one.

    `facts` are the fields that all rows share; `earlier` are the rows of this run, by
    which programs that would take too long are skipped.
    """
    built: dict[str, Program] = {}
    skips = []

    def skip(name, reason):
        tqdm.tqdm.write(f"Skipped {name}, {case}, {mode}: {reason}")
        shared = {x: facts[x] for x in ("device", "platform", "num_cpus", "date")}
        line = {"implementation": name, "mode": mode, **case.fields, **shared}
        skips.append(record.Skip(**line, reason=str(reason)))

    for name in (SOFTMAX, *config.implementations):
        try:
            check_time(name, case, mode, earlier)
            built[name] = programs.build(name, case, mode)
        except NotImplementedError as reason:
            skip(name, reason)
        except RuntimeError as error:  # XLA runs kernels while it compiles for a GPU.
            if not limits.is_out_of_memory(error):
                raise
            skip(name, "it ran out of memory")
    process_memory.give_freed_memory_back()
    inputs = cases.inputs(case)
    calls = {
        name: functools.partial(program.call, *program.prepare(inputs))
        for name, program in built.items()
    }
    errors = {}

    def check(name, result):
        num_iters = case.num_iters if programs.is_sinkhorn(name) else 0
        want = accuracy.expected(dataclasses.replace(case, num_iters=num_iters))
        errors[name] = accuracy.error(case, mode, built[name].to_numpy(result), want)

    times = timing.time_in_turns(calls, config.repeats, config.budget_s, SOFTMAX, check)
    for name, reason in times.failures.items():
        skip(name, reason)
    rows = []
    for name, milliseconds in times.by_name.items():
        program = built[name]
        row = record.Row(
            implementation=name,
            mode=mode,
            **case.fields,
            **timing.summary(milliseconds),
            ratio_to_softmax=timing.ratio(milliseconds, times.by_name.get(SOFTMAX)),
            compile_ms=program.compile_ms,
            version=program.version,
            is_default=programs.is_default(name, case),
            max_abs_error=errors[name],
            **_memory_fields(case, program, calls[name]),
            **facts,
        )
        rows.append(row)
    return rows, skips


def check_time(
    name: str, case: Case, mode: Mode, earlier: Sequence[record.Row]
) -> None:
    """Raises NotImplementedError, with a reason, if a call would take too long.

    It is estimated, at a cost that is quadratic in tokens, from the earlier row with
    the most tokens that is otherwise of this case.
    """
    took = {
        row.case.tokens: row.median_ms / 1e3
        for row in earlier
        if (row.implementation, row.mode) == (name, mode)
        and row.case.tokens < case.tokens
        and row.case == dataclasses.replace(case, tokens=row.case.tokens)
    }
    tokens = max(took, default=case.tokens)
    seconds = took.get(tokens, 0.0) * (case.tokens / tokens) ** 2
    if seconds > limits.LONGEST_CALL_S:
        raise NotImplementedError(
            f"a call would take about {seconds:.0f} s: it took {took[tokens]:.3g} s "
            f"for {tokens} tokens"
        )


def _memory_fields(case, program, call):
    peak, per_head = program.temp_bytes, program.ts_bytes_per_head
    if program.measure_peak is not None:
        peak = program.measure_peak(call)
    ts_array = case.tokens**2 * max(4, jnp.dtype(case.dtype).itemsize)
    return {
        "peak_mib": None if peak is None else peak / 2**20,
        "ts_arrays_per_head": None if per_head is None else per_head / ts_array,
        "memory_source": program.memory_source,
    }
