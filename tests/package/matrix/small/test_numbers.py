"""Interpreted kernels for small matrices against float64, and their data races.

The interpreter of GPU kernels takes long, so the bodies that all kernels share are
tested in NumPy's memory too.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from support import gpu_interpreter, reference
from support.hostile import hostile_logits
from support.small_matrices import M, S, T, marginals, random, where

from sinkhorn_jax import sinkhorn, sinkhorn_potentials
from sinkhorn_jax._core.options import Options
from sinkhorn_jax.matrix import IMPLEMENTATIONS
from sinkhorn_jax.matrix._problem import Matrices, Problem
from sinkhorn_jax.matrix._small import kernel_bodies, mosaic_gpu, mosaic_tpu

# Values and gradients of order 1 and potentials of order 5, in float32.
ATOL = 3e-6


@pytest.fixture
def interpreted(capfd):
    """Calls a function in the TPU interpreter, which must report no race."""
    if jax.default_backend() == "gpu":
        pytest.skip("kernels for TPUs are interpreted on a CPU")

    def call(fn, *args):
        params = pltpu.InterpretParams(detect_races=True)
        with pltpu.force_tpu_interpret_mode(params):
            result = jax.tree.map(np.asarray, fn(*args))
        assert "RACE" not in capfd.readouterr().out
        return result

    return call


@pytest.fixture
def constants(monkeypatch):
    """Sets constants of the TPU kernels."""

    def set_constants(**values):
        for name, value in values.items():
            monkeypatch.setattr(mosaic_tpu, name, value)
        jax.clear_caches()

    yield set_constants
    jax.clear_caches()


CASES = {
    "columns": {"num_iters": 1, "finish": "columns"},
    "softmax": {"num_iters": 0, "where": where()},
    "marginals, segments": {"num_iters": 5, "where": where(), "marginals": True},
    "columns, segments": {"num_iters": 4, "where": where(), "finish": "columns"},
}


def both(implementation, logits, a, b, **options):
    """The gradient of a function of plan and potentials, and these two."""
    with_marginals = options.pop("marginals", False)
    options |= {"implementation": implementation}
    w = random(9, logits.shape).astype(logits.dtype)

    def loss(logits, a, b):
        given = {"row_marginal": a, "col_marginal": b} if with_marginals else {}
        plan = sinkhorn(logits, **options, **given)
        potentials = sinkhorn_potentials(logits, **options, **given)
        f, g, *_ = potentials
        loss = (jnp.sin(f) * w[..., 0]).sum() + (jnp.cos(g) * w[..., 0, :]).sum()
        return loss + (plan**2 * w).sum(), (plan, potentials)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(logits, a, b)


@pytest.mark.few(1)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64_and_its_gradient(interpreted, constants, case):
    options = CASES[case]
    constants(HISTORY_BYTES=0 if "segments" in case else mosaic_tpu.HISTORY_BYTES)
    arrays = random(0, (M, T, S), scale=2.0), *marginals()
    got = interpreted(functools.partial(both, "mosaic_tpu", **options), *arrays)
    exact = [x.astype("float64") for x in arrays]
    expected = both("reference", *exact, **options)
    expected = jax.tree.map(lambda x, y: y.astype(x.dtype), got, expected)
    chex.assert_trees_all_close(got, expected, atol=ATOL)
    plan, potentials = got[1]
    z = np.where(options.get("where", True), exact[0], -np.inf)
    options = {"finish": options.get("finish", "rows")} | (
        {"a": exact[1], "b": exact[2]} if "marginals" in options else {}
    )
    num_iters = CASES[case]["num_iters"]
    oracle = reference.sinkhorn(z, num_iters, **options)
    np.testing.assert_allclose(plan, oracle, atol=ATOL)
    for x, y in zip(
        potentials, reference.potentials(z, num_iters, **options), strict=False
    ):
        np.testing.assert_allclose(x, y, atol=ATOL)
    assert (potentials.num_iters == num_iters).all()


class Ref:
    """An array that is read and written like a reference of a kernel."""

    def __init__(self, array):
        self.array, self.shape = np.array(array), array.shape

    def __getitem__(self, index):
        return jnp.array(self.array[index])

    def __setitem__(self, index, value):
        self.array[index] = value


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("module", "length", "finish"),
    [
        (mosaic_gpu, 2, "rows"),
        (mosaic_gpu, 5, "columns"),
        (mosaic_tpu, 5, "rows"),
        (mosaic_tpu, 2, "columns"),
    ],
)
def test_bodies_are_exact_in_float64(module, length, finish):
    """They run outside any kernel, in NumPy's memory: rounding hides nothing."""
    memory, num_iters, at = module._MEMORY, 5, (slice(None),)
    allowed = np.asarray(where())
    logits = np.where(allowed, random(0, (M, T, S), "float64", 2.0), -np.inf)
    a, b = (np.asarray(x, "float64") for x in marginals())
    a, b = np.where(allowed.any(2), a, 0), np.where(allowed.any(1), b, 0)
    arrays = logits, a, b * (a.sum(1) / b.sum(1))[:, None]
    problem = Problem(
        batch=(M,),
        t=T,
        s=S,
        dtype=jnp.dtype("float64"),
        options=Options(num_iters, finish),
    )
    solver = IMPLEMENTATIONS["reference"].load()

    def in_lanes(*arrays):
        return [np.moveaxis(np.asarray(x), 0, -1) for x in arrays]

    def empty(*shapes):
        return [Ref(np.full((*shape, M), np.nan)) for shape in shapes]

    num_segments = -(-num_iters // length)
    starts = empty((num_segments, S)) if num_segments > 1 else [None]
    history = kernel_bodies.SegmentedHistory(*empty((length, S)), *starts, starts_at=at)

    def check(fn, *shapes):
        out, pull_back = jax.vjp(fn, *arrays)
        cotangent = jax.tree.map(jnp.cos, out)
        operands, results = list(map(Ref, in_lanes(*arrays))), empty(*shapes)
        given = list(map(Ref, in_lanes(*cotangent)))[:2]
        grads = empty((T, S), (T,), (S,))
        with jax.disable_jit():
            kernel_bodies.forward_tile(memory, problem, operands, results, at)
            kernel_bodies.backward_tile(
                memory, problem, operands, given, grads, history, at
            )
        got = [x.array for x in results]
        chex.assert_trees_all_close(got, in_lanes(*out), atol=1e-13)
        cotangent = *cotangent[:2], *map(jnp.zeros_like, cotangent[2:])
        expected = in_lanes(*pull_back(cotangent))
        chex.assert_trees_all_close([x.array for x in grads], expected, atol=1e-12)

    check(lambda *x: (solver.plan(problem, Matrices(*x)),), (T, S))
    # All but the number of iterations.
    check(
        lambda *x: tuple(solver.potentials(problem, Matrices(*x))[:3]), (T,), (S,), ()
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_hostile_gradients(interpreted, finish):
    named = hostile_logits(4)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    weights = random(1, logits.shape)

    def gradient(implementation):
        def loss(logits, weights):
            options = {"finish": finish, "implementation": implementation}
            return (sinkhorn(logits, 50, **options) * weights).sum()

        return jax.jit(jax.grad(loss))

    got = interpreted(gradient("mosaic_tpu"), logits, weights)
    exact = logits.astype("float64"), weights.astype("float64")
    error = abs(got - np.asarray(gradient("reference")(*exact))).max((1, 2))
    error = dict(zip(named, error.tolist(), strict=True))
    assert max(error.values()) < 1e-5, error


def test_many_matrices_vmap_and_a_last_block_that_is_not_full(interpreted, constants):
    n = 2
    # Three tiles of 1024 matrices in blocks of two.
    constants(BLOCK_BYTES=2 * 4 * 1024 * n**2)
    logits = random(0, (5, n, 430, n), scale=2.0)  # `vmap` maps an axis in the middle.
    w = random(1, (n, n))

    def loss(logits, implementation):
        plan = sinkhorn(logits, 2, implementation=implementation)
        return (plan * w[None]).sum(), plan

    def solve(logits, implementation="mosaic_tpu"):
        fn = jax.grad(functools.partial(loss, implementation=implementation), 0, True)
        return jax.vmap(fn, in_axes=2, out_axes=2)(logits)

    got = interpreted(jax.jit(solve), logits)
    chex.assert_trees_all_close(got, solve(logits, "scaling"), atol=ATOL)


def test_an_empty_axis_of_vmap(interpreted):
    def solve(logits):
        return jax.grad(lambda z: sinkhorn(z, 2, implementation="mosaic_tpu").sum())(
            logits
        )

    none = jnp.zeros((0, M, T, S), "float32")
    assert interpreted(jax.vmap(solve), none).shape == none.shape


@pytest.fixture
def on_gpu(monkeypatch, capfd):
    """Calls a function on a GPU, or in the interpreter, which must report no race."""
    # Segments of a single iteration.
    monkeypatch.setattr(mosaic_gpu, "HISTORY_BYTES", 0)
    jax.clear_caches()
    if jax.default_backend() == "gpu":
        yield lambda fn, *args: jax.tree.map(np.asarray, fn(*args))
        jax.clear_caches()
        return

    with gpu_interpreter.interpreted(detect_races=True):

        def call(fn, *args):
            result = jax.tree.map(np.asarray, fn(*args))
            # The interpreter's own report is about the last kernel only.
            assert "RACE" not in capfd.readouterr().out
            return result

        yield call


def test_gpu_kernels_agree_with_scaling(on_gpu):
    logits = random(0, (130, 2, 2), scale=2.0)  # More than a block has threads.

    def loss(logits, implementation):
        plan = sinkhorn(logits, 2, implementation=implementation)
        return (plan**2).sum(), plan

    def solve(implementation):
        fn = functools.partial(loss, implementation=implementation)
        return jax.jit(jax.grad(fn, has_aux=True))

    got = on_gpu(solve("mosaic_gpu"), logits)
    chex.assert_trees_all_close(got, solve("scaling")(logits), atol=ATOL)


@pytest.mark.slow
@pytest.mark.on_device
@pytest.mark.parametrize("case", CASES)
def test_gpu_kernels_agree_with_float64(on_gpu, case):
    options = CASES[case]
    arrays = random(0, (M, T, S), scale=2.0), *marginals()
    run = functools.partial(both, "mosaic_gpu", **options)
    got = on_gpu(run, *arrays)
    expected = both("reference", *[x.astype("float64") for x in arrays], **options)
    expected = jax.tree.map(lambda x, y: y.astype(x.dtype), got, expected)
    chex.assert_trees_all_close(got, expected, atol=ATOL)
