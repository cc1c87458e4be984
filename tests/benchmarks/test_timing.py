"""Programs take turns; slow ones and those without memory leave them to the others."""

import time

import pytest

from benchmarks.harness import limits, timing


def turns(calls, repeats=2, budget_s=0):
    """Times with the baseline "a", and the first results."""
    results = {}
    times = timing.time_in_turns(calls, repeats, budget_s, "a", results.__setitem__)
    return times, results


def test_calls_take_turns(monkeypatch):
    monkeypatch.setattr(limits, "WARM_CALL_S", 0)
    calls = []
    fns = {name: lambda name=name: calls.append(name) or name for name in "abc"}
    times, results = turns(fns)
    assert calls == [*"abc", *"abc", *"cba"]  # Untimed, then back and forth.
    assert [len(x) for x in times.by_name.values()] == [2, 2, 2]
    assert results == {name: name for name in "abc"}


def test_a_turn_of_a_fast_call_begins_with_an_untimed_one():
    calls = []
    times, _ = turns({"a": lambda: calls.append("a")})
    assert len(calls) == 1 + 2 * len(times.by_name["a"])


def test_calls_continue_for_their_share_and_the_baseline_in_every_round():
    times, _ = turns(
        {"a": lambda: time.sleep(0.02), "b": lambda: time.sleep(0.005)}, budget_s=0.1
    )
    num_a, num_b = (len(times.by_name[name]) for name in "ab")
    assert num_b > 2
    assert num_a == num_b


def test_the_baseline_does_not_use_more_than_the_budget():
    calls = {"a": lambda: time.sleep(0.05), "b": lambda: None}
    times, _ = turns(calls, repeats=1, budget_s=0.15)
    assert len(times.by_name["a"]) < 5


def test_a_slow_call_leaves_the_rounds_to_the_others(monkeypatch):
    monkeypatch.setattr(limits, "SLOW_CALL_S", 0.02)
    monkeypatch.setattr(limits, "FEWEST_REPEATS", 1)
    times, _ = turns({"a": lambda: None, "b": lambda: time.sleep(0.03)}, repeats=3)
    assert [len(x) for x in times.by_name.values()] == [3, 1]


def test_a_very_slow_call_is_not_repeated(monkeypatch):
    monkeypatch.setattr(limits, "CALL_LIMIT_S", 0.02)
    times, results = turns({"a": lambda: None, "b": lambda: time.sleep(0.03)})
    assert len(times.by_name["b"]) == 1
    assert times.by_name["b"][0] > 30
    assert set(results) == {"a", "b"}


def test_a_call_that_runs_out_of_memory_is_left_out():
    def fail(message):
        raise RuntimeError(message)

    times, results = turns(
        {"a": lambda: 1, "b": lambda: fail("RESOURCE_EXHAUSTED: Out of memory")}
    )
    assert times.failures == {"b": "it ran out of memory"}
    assert set(times.by_name) == set(results) == {"a"}
    with pytest.raises(RuntimeError, match="a real bug"):
        turns({"a": lambda: fail("a real bug")})


def test_a_ratio_is_over_the_same_rounds():
    assert timing.ratio([2.0, 4.0], [1.0, 2.0, 90.0, 90.0]) == 2
    assert timing.ratio([2.0], None) is None
    summary = {"median_ms": 2.0, "iqr_ms": 1.0, "repeats": 3}
    assert timing.summary([1.0, 2.0, 3.0]) == summary
