import functools
import importlib.util
import math
import time

import jax
import numpy as np
import pytest
from support import reference

from benchmarks import programs as _programs
from benchmarks.harness import accuracy as _accuracy
from benchmarks.harness import cases as _cases
from benchmarks.harness import limits as _limits
from benchmarks.harness import oracle as _oracle
from benchmarks.harness import process_memory as _process
from benchmarks.harness import program as _program
from benchmarks.harness import timing as _turns
from benchmarks.peers import PEERS
from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax._runtime import dispatch as _dispatch
from sinkhorn_jax.attention import IMPLEMENTATIONS, _api


@pytest.mark.parametrize("strip", [18, 10**6], ids=["strips", "whole"])
@pytest.mark.parametrize("num_iters", [0, 3])
def test_oracle_agrees_with_the_reference_of_the_tests(num_iters, strip, monkeypatch):
    monkeypatch.setattr(_oracle, "STRIP_ENTRIES", strip)
    rng = np.random.default_rng(1)
    q, k, v, do = (rng.standard_normal(x) for x in ((6, 4), (9, 4), (9, 3), (6, 3)))

    def out(q, k, v):
        one_head = (x[None, :, None] for x in (q, k, v))
        return reference.sinkhorn_attention(*one_head, num_iters=num_iters)[0, :, 0]

    got = _oracle.attention(q, k, v, do, num_iters)
    np.testing.assert_allclose(got.out, out(q, k, v), rtol=0, atol=1e-14)
    step = 1e-5  # Central differences are then good to about 1e-10.
    for i, gradient in enumerate((got.dq, got.dk, got.dv)):
        direction = rng.standard_normal(gradient.shape)
        moved = [
            [
                x + sign * step * direction if j == i else x
                for j, x in enumerate((q, k, v))
            ]
            for sign in (1, -1)
        ]
        slope = np.vdot(do, out(*moved[0]) - out(*moved[1])) / (2 * step)
        assert np.vdot(gradient, direction) == pytest.approx(slope, abs=1e-8)


def test_oracle_is_the_same_in_every_run(monkeypatch):
    monkeypatch.setattr(_oracle, "STRIP_ENTRIES", 64)
    arrays = np.random.default_rng(1).standard_normal((4, 16, 4))
    first, second = (_oracle.attention(*arrays, 2) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_oracle_does_not_overflow():
    x = np.full((4, 1), 40.0)  # Logits 1600.
    out = _oracle.attention(x, x, np.eye(4), np.eye(4), 2).out
    np.testing.assert_allclose(out, 0.25, atol=1e-12)


def test_error_sees_a_wrong_head_and_a_nan():
    case = _cases.Case(3, 8, head_dim=4, num_iters=2)
    want = _accuracy.expected(case)
    out = np.stack([x.out for x in want], axis=1)[None]
    assert _accuracy.error(case, "forward", (out,), want) == 0
    out[0, 5, 1, 2] += 0.5
    assert _accuracy.error(case, "forward", (out,), want) == pytest.approx(0.5)
    gradients = [np.stack(x, axis=1)[None] for x in zip(*want, strict=True)][1:]
    assert _accuracy.error(case, "forward_backward", (out, gradients), want) == 0
    gradients[1] = 1.25 * gradients[1]
    found = _accuracy.error(case, "forward_backward", (out, gradients), want)
    assert found == pytest.approx(0.25)
    gradients[0][0, 0, 0, 0] = np.nan
    found = _accuracy.error(case, "forward_backward", (out, gradients), want)
    assert math.isnan(found)


@pytest.mark.parametrize("case", _cases.select(_cases.SWEEPS), ids=str)
def test_checked_heads_are_distinct_and_few_where_tokens_are_many(case):
    heads = _accuracy.checked_heads(case)
    assert len(set(heads)) == len(heads)
    assert heads[-1] == case.heads - 1
    assert heads.min() >= 0
    assert len(heads) == 1 or len(heads) * case.tokens**2 <= _accuracy.CHECKED_ENTRIES


def turns(calls, repeats=2, budget_s=0, reference="a"):
    results = {}
    times = _turns.time_in_turns(
        calls, repeats, budget_s, reference, results.__setitem__
    )
    return times, results


def test_calls_take_turns(monkeypatch):
    monkeypatch.setattr(_limits, "WARM_CALL_S", 0)
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


def test_calls_go_on_for_their_share_and_the_reference_in_every_round():
    times, _ = turns(
        {"a": lambda: time.sleep(0.02), "b": lambda: time.sleep(0.005)}, budget_s=0.1
    )
    num_a, num_b = (len(times.by_name[name]) for name in "ab")
    assert num_b > 2
    assert num_a == num_b


def test_the_reference_does_not_use_more_than_the_budget():
    calls = {"a": lambda: time.sleep(0.05), "b": lambda: None}
    times, _ = turns(calls, repeats=1, budget_s=0.15)
    assert len(times.by_name["a"]) < 5


def test_a_slow_call_leaves_the_rounds_to_the_others(monkeypatch):
    monkeypatch.setattr(_limits, "SLOW_CALL_S", 0.02)
    monkeypatch.setattr(_limits, "FEWEST_REPEATS", 1)
    times, _ = turns({"a": lambda: None, "b": lambda: time.sleep(0.03)}, repeats=3)
    assert [len(x) for x in times.by_name.values()] == [3, 1]


def test_a_very_slow_call_is_not_repeated(monkeypatch):
    monkeypatch.setattr(_limits, "CALL_LIMIT_S", 0.02)
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


@pytest.mark.parametrize("name", ["softmax", "torch_sinkhorn", "pot"])
def test_what_needs_too_much_memory_is_refused(name, monkeypatch):
    if name in PEERS and importlib.util.find_spec(PEERS[name].imported) is None:
        pytest.skip(f"{PEERS[name].package} is not installed")
    monkeypatch.setattr(_limits, "memory_bytes", lambda: 4096)
    case = _cases.Case(1, 64, head_dim=4)
    with pytest.raises(NotImplementedError, match=r"needs about 0.0 GiB, limit 0.0"):
        _programs.build(name, case, "forward")


def test_memory_limits(monkeypatch):
    monkeypatch.setattr(_limits, "memory_bytes", lambda: 24 * 2**30)
    _limits.check_memory(12 * 2**30)
    with pytest.raises(NotImplementedError, match=r"about 52.0 GiB, limit 12.0"):
        _limits.check_memory(52 * 2**30)
    with pytest.raises(NotImplementedError, match=r"limit 3\.0"):
        _limits.check_memory(4 * 2**30, free=3 * 2**30)
    monkeypatch.setattr(_limits, "memory_bytes", lambda: None)
    _limits.check_memory(2**60)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_kernels_of_another_platform_are_refused(platform):
    if jax.default_backend() == platform:
        pytest.skip("They run here.")
    reason = f"kernels are for a {platform.upper()}, and JAX computes on a"
    with pytest.raises(NotImplementedError, match=reason):
        _programs.build(f"mosaic_{platform}", _cases.SMOKE[0], "forward")


def test_what_would_take_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(_limits, "LONGEST_CALL_S", 1.0)
    _limits.check_time(0.2, 64, 32)
    with pytest.raises(NotImplementedError, match=r"about 2 s.*0.45 s for 32 tokens"):
        _limits.check_time(0.45, 64, 32)


def test_growth_of_the_resident_set():
    size = 2**26
    growth = _process.peak_growth(lambda: np.ones(size, np.uint8))
    if growth is None:
        pytest.skip("the system does not tell")
    assert size <= growth < 2 * size


def test_default_is_what_the_selection_takes(monkeypatch):
    asked = []

    def select(table, name, problem):
        asked.append((name, problem, _dispatch.select(table, name, problem)))
        return asked[-1][-1]

    monkeypatch.setattr(_api, "select", select)
    for case in (*_cases.SMOKE, _cases.Case(2, 1024, num_iters=0)):
        array = jax.ShapeDtypeStruct(case.shape_btnh, case.dtype)
        jax.eval_shape(
            functools.partial(sinkhorn_attention, num_iters=case.num_iters),
            *[array] * 3,
        )
        name, problem, module = asked.pop()
        assert name is None
        assert problem == _programs.problem(case)
        defaults = [x for x in _programs.names() if _programs.is_default(x, case)]
        assert [IMPLEMENTATIONS[x].load() for x in defaults] == [module]


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_program_of_several_calls(calls):
    """Its first result is checked; the others depend on one another."""
    program = _program.repeated(
        lambda x, y: x * y, lambda result, x, y: (result, y + 1), calls
    )
    first, *rest = jax.jit(program)(np.float64(2), np.float64(3))
    assert first == 6
    # 6 = 2 * 3, then 6 * 4 and so on, with what a next call would be given.
    given = [(6 * math.prod(range(4, 3 + calls)), 3 + calls)] if calls > 1 else []
    assert [tuple(map(float, x)) for x in rest] == given


def test_memory_of_a_head_is_that_of_its_arrays():
    case = _cases.Case(3, 128, head_dim=16)
    program = _program.compiled(
        lambda q, k, v: jax.numpy.einsum("btnh,bsnh->btns", q, k).sum(-1)[..., None],
        case,
        "forward",
    )
    assert program.one_head_ts_bytes <= program.one_head_bytes < program.temp_bytes
