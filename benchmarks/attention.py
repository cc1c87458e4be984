"""A run: every case in both modes, rows and skips appended as they come."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from . import programs as _programs
from .harness import accuracy as _accuracy
from .harness import cases as _cases
from .harness import limits as _limits
from .harness import process_memory as _process
from .harness import record as _record
from .harness import timing as _turns
from .harness.cases import Case
from .harness.program import MODES, Mode, Program
from .programs import SOFTMAX


def run(
    cases: Sequence[Case],
    names: Sequence[str],
    repeats: int,
    budget_s: float,
    facts: dict[str, Any],
    output: Path | None,
    single_head: bool = True,
) -> list[_record.Row]:
    """Measures and prints reasons for what is left out.

    Args:
        cases: What to measure.
        names: Implementations and peers; softmax is added.
        repeats: Timed calls of each program, at least.
        budget_s: Seconds a case and mode, if that leaves more.
        facts: Fields that are the same in all rows.
        output: Rows are appended here and skips beside; None keeps none.
        single_head: Whether programs are compiled for a head alone, for its memory.
    """
    build = functools.partial(_programs.build, single_head=single_head)
    time_in_turns = functools.partial(
        _turns.time_in_turns, repeats=repeats, budget_s=budget_s, reference=SOFTMAX
    )
    _process.keep_freed_memory()
    before = [] if output is None else _record.read_file(output)
    rows = []
    with tqdm.tqdm(total=len(MODES) * len(cases), unit="case") as progress:
        for case in cases:
            with _x64(case):
                for mode in MODES:
                    new, reasons = _measure(
                        case,
                        mode,
                        (SOFTMAX, *names),
                        build,
                        time_in_turns,
                        facts,
                        progress,
                        [*before, *rows],
                    )
                    rows += new
                    skips = [_skip(case, mode, facts, *x) for x in reasons.items()]
                    if output is not None:
                        _record.append(output, new)
                        _record.append(_record.skips_path(output), skips)
                    progress.update()
    return rows


def _measure(
    case: Case,
    mode: Mode,
    names: Sequence[str],
    build: Callable[..., Program],
    time_in_turns: Callable[..., _turns.Times],
    facts: dict[str, Any],
    progress: tqdm.tqdm,
    earlier: Sequence[_record.Row],
) -> tuple[list[_record.Row], dict[str, str]]:
    """Rows, and reasons for what has none; `earlier` are rows from before."""
    programs: dict[str, Program] = {}
    reasons: dict[str, str] = {}

    def skip(name, reason):
        reasons[name] = str(reason)
        # `tqdm.write`, because a line printed over a progress bar is torn.
        tqdm.tqdm.write(f"Skipped {name}, {case}, {mode}: {reason}")

    def say(text):
        progress.set_description(f"{case} {mode} {text}")

    for name in names:
        say(f"build {name}")
        try:
            _check_time(name, case, mode, earlier)
            programs[name] = build(name, case, mode)
        except NotImplementedError as reason:
            skip(name, reason)
        except RuntimeError as error:  # XLA tries kernels while it compiles for a GPU.
            if not _limits.is_out_of_memory(error):
                raise
            skip(name, "it ran out of memory")
    _process.give_freed_memory_back()
    inputs = _cases.inputs(case)
    calls = {
        name: functools.partial(program.call, *program.prepare(inputs))
        for name, program in programs.items()
    }
    errors = {}

    def check(name, result):
        say(f"check {name}")
        num_iters = case.num_iters if _programs.is_sinkhorn(name) else 0
        errors[name] = _accuracy.error(
            case,
            mode,
            programs[name].to_numpy(result),
            _accuracy.expected(dataclasses.replace(case, num_iters=num_iters)),
        )
        say("time")

    times = time_in_turns(calls, first_result=check)
    for name, reason in times.failures.items():
        skip(name, reason)
    rows = []
    for name, milliseconds in times.by_name.items():
        rows.append(
            _record.Row(
                implementation=name,
                mode=mode,
                **_case_fields(case),
                kv_len=case.tokens,
                matmul_precision=programs[name].matmul_precision,
                compile_ms=programs[name].compile_ms,
                version=programs[name].version,
                memory_source=programs[name].memory_source,
                is_default=_programs.is_default(name, case),
                max_abs_error=errors[name],
                **_time_fields(case, milliseconds, times.by_name.get(SOFTMAX)),
                **_memory_fields(case, programs[name], calls[name]),
                **facts,
            )
        )
    return rows, reasons


def _check_time(name, case, mode, earlier):
    """Refuses what took too long with the most tokens before, all else the same."""
    took = {
        row.case.tokens: row.median_ms / 1e3
        for row in earlier
        if row.implementation == name
        and row.mode == mode
        and row.case.tokens < case.tokens
        and row.case == dataclasses.replace(case, tokens=row.case.tokens)
    }
    if took:
        _limits.check_time(took[max(took)], case.tokens, max(took))


def _skip(case, mode, facts, name, reason):
    machine = ("device", "platform", "num_cpus", "date")
    return _record.Skip(
        implementation=name,
        mode=mode,
        reason=reason,
        **_case_fields(case),
        **{field: facts[field] for field in machine},
    )


def _case_fields(case):
    return {
        "shape_btnh": case.shape_btnh,
        "dtype": case.dtype,
        "num_iters": case.num_iters,
    }


def _time_fields(case, times, softmax_times):
    low, high = np.percentile(times, [25, 75])
    median = float(np.median(times))
    ratio = None
    if softmax_times:
        rounds = min(len(times), len(softmax_times))
        ratio = float(np.median(times[:rounds]) / np.median(softmax_times[:rounds]))
    return {
        "median_ms": median,
        "iqr_ms": float(high - low),
        "repeats": len(times),
        "tokens_per_second": case.shape_btnh[0] * case.tokens / (median / 1e3),
        "ratio_to_softmax": ratio,
    }


def _memory_fields(case, program, call):
    peak = program.temp_bytes
    if program.measure_peak is not None:
        peak = program.measure_peak(call)
    ts_array = case.tokens**2 * max(4, jnp.dtype(case.dtype).itemsize)

    def in_units(num_bytes, unit):
        return None if num_bytes is None else num_bytes / unit

    return {
        "peak_mib": in_units(peak, 2**20),
        "peak_in_ts_arrays": in_units(peak, ts_array),
        "one_head_mib": in_units(program.one_head_bytes, 2**20),
        "ts_arrays_per_head": in_units(program.one_head_ts_bytes, ts_array),
    }


def _x64(case):
    """JAX has no float64 otherwise."""
    if case.dtype == "float64":
        return jax.enable_x64(True)
    return contextlib.nullcontext()
