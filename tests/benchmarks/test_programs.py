"""Programs of a case: what builds them, what refuses them, and their memory."""

import functools
import importlib.util
import math

import jax
import numpy as np
import pytest

from benchmarks import programs
from benchmarks.harness import cases, limits, process_memory, program
from benchmarks.peers import PEERS
from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax._runtime import dispatch
from sinkhorn_jax.attention import IMPLEMENTATIONS, _call


@pytest.mark.parametrize("name", ["softmax", "torch_sinkhorn", "pot"])
def test_what_needs_too_much_memory_is_refused(name, monkeypatch):
    if name in PEERS and importlib.util.find_spec(PEERS[name].imported) is None:
        pytest.skip(f"{PEERS[name].package} is not installed")
    monkeypatch.setattr(limits, "memory_bytes", lambda: 4096)
    case = cases.Case(1, 64, head_dim=4)
    with pytest.raises(NotImplementedError, match=r"needs about 0.0 GiB, limit 0.0"):
        programs.build(name, case, "forward")


def test_memory_limits(monkeypatch):
    monkeypatch.setattr(limits, "memory_bytes", lambda: 24 * 2**30)
    limits.check_memory(12 * 2**30)
    with pytest.raises(NotImplementedError, match=r"about 52.0 GiB, limit 12.0"):
        limits.check_memory(52 * 2**30)
    monkeypatch.setattr(limits, "memory_bytes", lambda: None)
    limits.check_memory(2**60)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_kernels_of_another_platform_are_refused(platform):
    if jax.default_backend() == platform:
        pytest.skip("They run here.")
    reason = f"kernels are for a {platform.upper()}, and JAX computes on a"
    with pytest.raises(NotImplementedError, match=reason):
        programs.build(f"mosaic_{platform}", cases.SMOKE[0], "forward")


def test_growth_of_the_resident_set():
    size = 2**26
    growth = process_memory.peak_growth(lambda: np.ones(size, np.uint8))
    if growth is None:
        pytest.skip("the system does not tell")
    # The kernel's counters lag behind by a few pages.
    assert 0.99 * size <= growth < 2 * size


def test_default_is_what_the_selection_takes(monkeypatch):
    asked = []

    def select(table, name, problem):
        asked.append((name, problem, dispatch.select(table, name, problem)))
        return asked[-1][-1]

    monkeypatch.setattr(_call, "select", select)
    for case in (*cases.SMOKE, cases.Case(2, 1024, num_iters=0)):
        array = jax.ShapeDtypeStruct(case.shape_btnh, case.dtype)
        jax.eval_shape(
            functools.partial(sinkhorn_attention, num_iters=case.num_iters),
            *[array] * 3,
        )
        name, problem, module = asked.pop()
        assert name is None
        assert problem == programs.problem(case)
        defaults = [x for x in programs.NAMES if programs.is_default(x, case)]
        assert [IMPLEMENTATIONS[x].load() for x in defaults] == [module]


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_program_of_several_calls(calls):
    """Its first result is checked; each other call gets the result of the last one."""
    several = program.repeated(
        lambda x, y: x * y, lambda result, x, y: (result, y + 1), calls
    )
    first, *rest = jax.jit(several)(np.float64(2), np.float64(3))
    assert first == 6
    # 6 = 2 * 3, then 6 * 4 and so on, with the arguments of a next call.
    given = [(6 * math.prod(range(4, 3 + calls)), 3 + calls)] if calls > 1 else []
    assert [tuple(map(float, x)) for x in rest] == given


def test_memory_of_a_head_is_that_of_its_arrays():
    case = cases.Case(3, 128, head_dim=16)

    def attend(query, key, value):
        weights = jax.nn.softmax(jax.numpy.einsum("btnh,bsnh->bnts", query, key))
        return jax.numpy.einsum("bnts,bsnd->btnd", weights, value)

    found = program.compiled(attend, case, "forward", single_head=True)
    ts_array = 128 * 128 * 4
    assert ts_array <= found.ts_bytes_per_head < 4 * ts_array
    assert found.temp_bytes >= 3 * ts_array
