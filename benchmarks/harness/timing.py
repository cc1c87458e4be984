"""Timing of several programs against each other."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from . import limits

MAX_ROUNDS: Final = 1000


class Times(NamedTuple):
    """Timed calls of the programs of one case."""

    # Milliseconds by round. Every program starts with the first round and skips none,
    # so that equal positions belong to the same round.
    by_name: dict[str, list[float]]
    failures: dict[str, str]  # Programs that ran out of memory, with the reason.


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    budget_s: float,
    baseline: str,
    first_result: Callable[[str, Any], None],
) -> Times:
    """Times each program, over rounds in which all of them take turns.

    A drift of the machine then affects all programs alike, and ratios hardly at all.
    Every other round runs backwards, so that no program always follows the same one.
    Each program is called once untimed, and `first_result` receives its name and
    result. Then it has at least `repeats` timed calls (fewer if it is slow, see
    `limits`), and continues until it has used its equal share of the budget in seconds.
    The program `baseline`, by whose time the others are divided, takes part in every
    round, and the rounds end when it has used the whole budget.
    """
    times = Times({}, {})
    last_ms: dict[str, float] = {}
    for name, call in calls.items():
        try:
            last_ms[name], out = _timed(call)
        except (RuntimeError, MemoryError) as error:
            if not limits.is_out_of_memory(error):
                raise
            times.failures[name] = "it ran out of memory"
            continue
        first_result(name, out)
        del out
        is_last = last_ms[name] > 1e3 * limits.CALL_LIMIT_S
        times.by_name[name] = [last_ms[name]] if is_last else []
    used_ms = dict.fromkeys(times.by_name, 0.0)
    names = [name for name, past in times.by_name.items() if not past]
    budget_ms = 1e3 * budget_s
    share_ms = budget_ms / max(1, len(names))

    def continues(name):
        past = times.by_name[name]
        is_slow = bool(past) and past[0] > 1e3 * limits.SLOW_CALL_S
        least = min(repeats, limits.FEWEST_REPEATS) if is_slow else repeats
        has_time = used_ms[name] < share_ms and used_ms.get(baseline, 0) < budget_ms
        return len(past) < least or has_time

    for round_ in range(max(repeats, MAX_ROUNDS)):
        active = [name for name in names if continues(name)]
        if not active:
            break
        turns = [name for name in names if name in active or name == baseline]
        for name in reversed(turns) if round_ % 2 else turns:
            if last_ms[name] < 1e3 * limits.WARM_CALL_S:
                used_ms[name] += _timed(calls[name])[0]
            last_ms[name] = _timed(calls[name])[0]
            used_ms[name] += last_ms[name]
            times.by_name[name].append(last_ms[name])
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, interquartile range and number of times, as fields of a row."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {
        "median_ms": float(median),
        "iqr_ms": float(high - low),
        "repeats": len(times),
    }


def ratio(times: Sequence[float], baseline: Sequence[float] | None) -> float | None:
    """Median over that of the baseline in the same rounds; None without a baseline."""
    if not baseline:
        return None
    rounds = min(len(times), len(baseline))
    return float(np.median(times[:rounds]) / np.median(baseline[:rounds]))


def _timed(call):
    start = time.perf_counter()
    out = call()
    # The caller frees the result, outside the timed span.
    return 1e3 * (time.perf_counter() - start), out
