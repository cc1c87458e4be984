"""The peers: they compute the same, and say why where they cannot."""

import importlib.util
import types

import jax
import numpy as np
import pytest

from benchmarks import peers, programs
from benchmarks.harness import accuracy, cases, limits
from benchmarks.harness.program import MODES
from benchmarks.peers import PEERS

# float64, and matrices of 24 x 24: what is left is rounding.
ATOL = 1e-12
CASE = cases.Case(2, 24, head_dim=8, dtype="float64", num_iters=3)


def measured(name, case, mode):
    """The error of a program against float64; skips with a peer's reason."""
    reason = PEERS[name].why_not(case, mode)
    if reason is not None:
        pytest.skip(reason)
    program = programs.build(name, case, mode)
    arguments = program.prepare(cases.inputs(case))
    outputs = program.to_numpy(program.call(*arguments))
    exact = case
    if not programs.is_sinkhorn(name):
        exact = cases.Case(case.heads, case.tokens, case.head_dim, case.dtype, 0)
    for x in jax.tree.leaves(outputs):
        assert x.shape == case.shape_btnh
    return accuracy.error(case, mode, outputs, accuracy.expected(exact))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [x for x in PEERS if x != "ott_implicit"])
def test_peers_compute_what_we_compute(name, mode):
    assert measured(name, CASE, mode) < ATOL


def test_implicit_peer_differentiates_the_fixed_point():
    assert measured("ott_implicit", CASE, "forward") < ATOL
    mode = "forward_backward"
    early, late = (
        measured("ott_implicit", cases.Case(2, 24, 8, "float64", num), mode)
        for num in (1, 60)
    )
    assert early > 1e-4
    assert late < 1e-6  # Tolerance of its linear solver.


HALF = "cudnn_softmax", "torch_softmax", "torch_sinkhorn", "pot"


@pytest.mark.parametrize("name", HALF)
def test_peers_take_half_precision(name):
    case = cases.Case(1, 64, 64, "bfloat16", 1)
    # 8 bits of mantissa in the results.
    assert measured(name, case, "forward_backward") < 2e-2


@pytest.mark.parametrize("name", PEERS)
def test_absent_peers_say_so(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = f"{PEERS[name].package} is not installed"
    assert PEERS[name].why_not(CASE, "forward").startswith(reason)
    with pytest.raises(NotImplementedError, match=reason):
        programs.build(name, CASE, "forward")


@pytest.mark.parametrize("name", ["ott_unrolled", "ott_implicit", "pot"])
def test_solvers_without_iterations_say_so(name):
    if importlib.util.find_spec(PEERS[name].imported) is None:
        pytest.skip(f"{PEERS[name].package} is not installed")
    case = cases.Case(1, 16, num_iters=0)
    assert "nothing for its solver to do" in PEERS[name].why_not(case, "forward")


def test_torch_computes_where_jax_does(monkeypatch):
    pytest.importorskip("torch")
    assert PEERS["torch_softmax"].why_not(CASE, "forward") is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "finds no tpu" in PEERS["torch_softmax"].why_not(CASE, "forward")


@pytest.mark.parametrize(
    ("platform", "version", "dtype", "says"),
    [
        ("cpu", "cpu", "bfloat16", "for NVIDIA GPUs, and JAX computes on a CPU here"),
        ("gpu", "rocm 70000", "bfloat16", "for NVIDIA GPUs, and"),
        ("gpu", "cuda 13000", "float32", "bfloat16 and float16, got float32"),
        ("gpu", "cuda 13000", "float16", None),
    ],
)
def test_cudnn_is_for_nvidia_and_half_precision(
    monkeypatch, platform, version, dtype, says
):
    backend = types.SimpleNamespace(
        platform=platform, platform_version=f"PJRT C API\n{version}"
    )
    module = PEERS["cudnn_softmax"].load()
    monkeypatch.setattr(module, "get_backend", lambda: backend)
    case = cases.Case(1, 64, dtype=dtype)
    reason = PEERS["cudnn_softmax"].why_not(case, "forward")
    assert reason is None if says is None else says in reason


def test_a_broken_peer_is_not_taken_for_an_absent_one(monkeypatch):
    peer = peers.Peer("numpy", "numpy", "no_such_module", "softmax")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        peer.why_not(CASE, "forward")


@pytest.mark.parametrize("name", ["torch_sinkhorn", "pot"])
@pytest.mark.parametrize("mode", MODES)
def test_estimates_are_of_the_size_of_what_is_needed(name, mode, monkeypatch):
    if importlib.util.find_spec(PEERS[name].imported) is None:
        pytest.skip(f"{PEERS[name].package} is not installed")
    estimates = []
    monkeypatch.setattr(limits, "check_memory", lambda x, *_: estimates.append(x))
    case = cases.Case(1, 768, head_dim=8, num_iters=2)
    program = PEERS[name].build(case, mode)
    arguments = program.prepare(cases.inputs(case))
    program.call(*arguments)  # Compiles what is compiled.
    peak = program.measure_peak(lambda: program.call(*arguments))
    if peak is None:
        pytest.skip("the system does not tell")
    assert np.log2(peak / estimates[0]) == pytest.approx(0, abs=1.6)
