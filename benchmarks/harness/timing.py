"""Timing of several programs against each other."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from . import limits as _limits

MAX_ROUNDS: Final = 1000


class Times(NamedTuple):
    """What came of a case."""

    # Milliseconds by round. All start with the first round and none skips one, so equal
    # positions are of the same round.
    by_name: dict[str, list[float]]
    failures: dict[str, str]  # Reasons, of programs that ran out of memory.


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    budget_s: float,
    reference: str,
    first_result: Callable[[str, Any], None],
) -> Times:
    """Times each call, over rounds in which every one has its turn.

    So a drift of the machine hits all alike, and a ratio within a run hardly at all.
    Every other round goes backwards: nobody always follows the same neighbour, and a
    turn begins with an untimed call unless that is slow, lest a program pay for what
    its neighbour left in the caches. Each has at least `repeats` turns, fewer if it is
    slow (see `_limits`), and then goes on until it has used its equal share of the
    budget. A slow one leaves the rounds to the others; `reference` is in every round,
    which therefore end when it has used the whole budget.

    Args:
        calls: What to time. Each is called once before, untimed.
        repeats: Turns of each, at least.
        budget_s: Seconds for all together, if `repeats` turns take less.
        reference: The name whose times the others are divided by. May be missing.
        first_result: Gets each name and what the untimed call gave, to check it.
    """
    times = Times({}, {})
    last_ms: dict[str, float] = {}
    for name, call in calls.items():
        try:
            last_ms[name], out = _timed(call)
        except (RuntimeError, MemoryError) as error:
            if not _limits.is_out_of_memory(error):
                raise
            times.failures[name] = "it ran out of memory"
            continue
        first_result(name, out)
        del out
        is_last = last_ms[name] > 1e3 * _limits.CALL_LIMIT_S
        times.by_name[name] = [last_ms[name]] if is_last else []
    used_ms = dict.fromkeys(times.by_name, 0.0)
    names = [name for name, past in times.by_name.items() if not past]
    budget_ms = 1e3 * budget_s
    share_ms = budget_ms / max(1, len(names))

    def goes_on(name):
        past = times.by_name[name]
        is_slow = bool(past) and past[0] > 1e3 * _limits.SLOW_CALL_S
        floor = min(repeats, _limits.FEWEST_REPEATS) if is_slow else repeats
        has_time = used_ms[name] < share_ms and used_ms.get(reference, 0) < budget_ms
        return len(past) < floor or has_time

    for round_ in range(max(repeats, MAX_ROUNDS)):
        active = [name for name in names if goes_on(name)]
        if not active:
            break
        turns = [name for name in names if name in active or name == reference]
        for name in reversed(turns) if round_ % 2 else turns:
            if last_ms[name] < 1e3 * _limits.WARM_CALL_S:
                used_ms[name] += _timed(calls[name])[0]
            last_ms[name] = _timed(calls[name])[0]
            used_ms[name] += last_ms[name]
            times.by_name[name].append(last_ms[name])
    return times


def _timed(call):
    start = time.perf_counter()
    out = call()
    # A result that is not kept is freed by the caller, outside the timed span.
    return 1e3 * (time.perf_counter() - start), out
