"""Kernels for many small matrices: interpreted numbers and races, and lowering.

The interpreter of GPU kernels takes long, so the bodies that all kernels share are
tested in NumPy's memory too.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Not public: the switch of the GPU's interpreter, and what it saw.
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_interpreter
from jax.experimental.pallas import tpu as pltpu
from support import reference
from support.hostile import hostile_logits

from sinkhorn_jax import Truncated, sinkhorn, sinkhorn_potentials
from sinkhorn_jax._core.options import Options
from sinkhorn_jax._runtime.dispatch import preferred
from sinkhorn_jax.matrix import IMPLEMENTATIONS
from sinkhorn_jax.matrix._problem import Problem
from sinkhorn_jax.matrix._small import mosaic_gpu as _mosaic_gpu
from sinkhorn_jax.matrix._small import mosaic_tpu as _mosaic_tpu
from sinkhorn_jax.matrix._small import vjp as _small

# Of values and gradients of order 1, and of potentials of order 5, in float32.
ATOL = 3e-6

M, T, S = 2, 3, 4


@pytest.fixture
def interpreted(capfd):
    """Calls a function in the TPU interpreter, and sees that it reports no race."""
    if jax.default_backend() == "gpu":
        pytest.skip("a TPU's kernels are interpreted on a CPU")

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
            monkeypatch.setattr(_mosaic_tpu, name, value)
        jax.clear_caches()

    yield set_constants
    jax.clear_caches()


def random(seed, shape, dtype="float32", scale=1.0):
    x = jax.random.normal(jax.random.key(seed), shape, dtype)
    return x * jnp.asarray(scale, dtype)


def marginals():
    """Positive, of equal total where not padded; see `where`."""
    a = 0.5 + jax.random.uniform(jax.random.key(1), (M, T), "float32")
    b = 0.5 + jax.random.uniform(jax.random.key(2), (M, S), "float32")
    total = jnp.where(where().any(-1), a, 0).sum(-1, keepdims=True)
    return a, b * total / jnp.where(where().any(-2), b, 0).sum(-1, keepdims=True)


def where():
    """The second matrix is sparse and has a padded row and a padded column."""
    allowed = np.ones((M, T, S), bool)
    allowed[1, 1], allowed[1, :, 2], allowed[1, 0, 1] = False, False, False
    return jnp.asarray(allowed)


CASES = {
    "columns": {"num_iters": 1, "finish": "columns"},
    "softmax": {"num_iters": 0, "where": where()},
    "marginals, segments": {"num_iters": 5, "where": where(), "marginals": True},
    "columns, segments": {"num_iters": 4, "where": where(), "finish": "columns"},
}


def both(implementation, logits, a, b, **options):
    """Plan, potentials, and gradients of a function of each."""
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


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64_and_its_gradient(interpreted, constants, case):
    options = CASES[case]
    constants(HISTORY_BYTES=0 if "segments" in case else _mosaic_tpu.HISTORY_BYTES)
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
    """A kernel's reference, which is read and written at once."""

    def __init__(self, array):
        self.array, self.shape = np.array(array), array.shape

    def __getitem__(self, index):
        return jnp.array(self.array[index])

    def __setitem__(self, index, value):
        self.array[index] = value


@pytest.mark.parametrize(
    ("module", "length", "finish"),
    [
        (_mosaic_gpu, 2, "rows"),
        (_mosaic_gpu, 5, "columns"),
        (_mosaic_tpu, 5, "rows"),
        (_mosaic_tpu, 2, "columns"),
    ],
)
def test_bodies_are_exact_in_float64(module, length, finish):
    """Outside any kernel: rounding hides nothing there."""
    memory, num_iters, at = module._MEMORY, 5, (slice(None),)
    allowed = np.asarray(where())
    logits = np.where(allowed, random(0, (M, T, S), "float64", 2.0), -np.inf)
    a, b = (np.asarray(x, "float64") for x in marginals())
    a, b = np.where(allowed.any(2), a, 0), np.where(allowed.any(1), b, 0)
    arrays = logits, a, b * (a.sum(1) / b.sum(1))[:, None]
    problem = Problem(
        batch=M,
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
    history = _small.History(*empty((length, S)), *starts, starts_at=at)

    def check(fn, *shapes):
        out, pull_back = jax.vjp(fn, *arrays)
        cotangent = jax.tree.map(jnp.cos, out)
        operands, results = list(map(Ref, in_lanes(*arrays))), empty(*shapes)
        given = list(map(Ref, in_lanes(*cotangent)))[:2]
        grads = empty((T, S), (T,), (S,))
        with jax.disable_jit():
            _small.solve_tile(memory, problem, operands, results, at)
            _small.pull_back_tile(memory, problem, operands, given, grads, history, at)
        got = [x.array for x in results]
        chex.assert_trees_all_close(got, in_lanes(*out), atol=1e-13)
        cotangent = *cotangent[:2], *map(jnp.zeros_like, cotangent[2:])
        expected = in_lanes(*pull_back(cotangent))
        chex.assert_trees_all_close([x.array for x in grads], expected, atol=1e-12)

    check(lambda *x: (solver.plan(problem, *x),), (T, S))
    # Without the number of iterations.
    check(lambda *x: tuple(solver.potentials(problem, *x)[:3]), (T,), (S,), ())


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
    logits = random(0, (5, n, 430, n), scale=2.0)  # An axis of `vmap` in the middle.
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


@pytest.mark.parametrize(
    ("kernel", "platform"), [("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")]
)
def test_shard_map_lowers_with_its_checks_of_what_varies(kernel, platform):
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    many = jax.sharding.PartitionSpec("m")
    sharded = jax.shard_map(
        functools.partial(step, implementation=kernel, num_iters=2),
        mesh=mesh,
        in_specs=many,
        out_specs=many,
    )
    arrays = [jax.ShapeDtypeStruct((M, T, S), "float32")] * 2
    program = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=(platform,))
    assert "custom_call" in program.as_text()


def step(logits, cotangent, **options):
    """Plan and gradient, potentials and theirs."""
    plan, pull_back = jax.vjp(lambda z: sinkhorn(z, **options), logits)
    potentials, pull_back_potentials = jax.vjp(
        lambda z: sinkhorn_potentials(z, **options)[:2], logits
    )
    return plan, pull_back(cotangent), pull_back_potentials(potentials)


def assert_lowers(implementation, n, batch, dtype, **options):
    platform, target = {
        "mosaic_gpu": ("cuda", "mosaic_gpu_v2"),
        "mosaic_tpu": ("tpu", "tpu_custom_call"),
    }[implementation]
    options |= {"implementation": implementation}
    arrays = [jax.ShapeDtypeStruct((batch, n, n), dtype)] * 2
    program = jax.jit(functools.partial(step, **options)).trace(*arrays)
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f"@{target}") == 4, "Two kernels forward and two backward."
    chex.assert_trees_all_equal_shapes_and_dtypes(
        program.out_info[:2], (arrays[0], (arrays[0],))
    )


@pytest.mark.parametrize(
    ("n", "batch", "dtype"),
    [
        (2, 1, "float32"),
        (4, 65536, "bfloat16"),
        (8, 1000, "bfloat16"),
        (16, 65536, "float32"),
    ],
)
def test_lowers_for_tpu(n, batch, dtype):
    assert_lowers("mosaic_tpu", n, batch, dtype, num_iters=20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 1000, 65536, 10_000_000])
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_lowers_for_tpu_in_every_size(dtype, n, batch, finish):
    assert_lowers("mosaic_tpu", n, batch, dtype, num_iters=100, finish=finish)


@pytest.fixture
def on_gpu(monkeypatch, capfd):
    """Calls a function on a GPU, or in the interpreter, which must see no race."""
    # Segments of a single iteration.
    monkeypatch.setattr(_mosaic_gpu, "HISTORY_BYTES", 0)
    jax.clear_caches()
    if jax.default_backend() == "gpu":
        yield lambda fn, *args: jax.tree.map(np.asarray, fn(*args))
        jax.clear_caches()
        return

    def call(fn, *args):
        params = gpu_interpreter.InterpretGPUParams(detect_races=True)
        with gpu_interpreter.force_gpu_interpret_mode(params):
            result = jax.tree.map(np.asarray, fn(*args))
        # What the interpreter can be asked for is of the last kernel alone.
        assert "RACE" not in capfd.readouterr().out
        return result

    yield call
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    jax.clear_caches()


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


@pytest.mark.parametrize(
    ("n", "batch", "dtype"), [(2, 1, "bfloat16"), (4, 1000, "float32")]
)
def test_lowers_for_gpu(n, batch, dtype):
    assert_lowers("mosaic_gpu", n, batch, dtype, num_iters=20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_lowers_for_gpu_in_every_size(dtype, n, finish):
    assert_lowers("mosaic_gpu", n, 10_000_000, dtype, num_iters=400, finish=finish)


def problem(**changed):
    fields = {
        "batch": 10,
        "t": 4,
        "s": 16,
        "dtype": jnp.dtype("bfloat16"),
        "options": Options(20, "columns"),
    }
    return Problem(**fields | changed)


kernels = pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])


@kernels
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dtype": jnp.dtype("float64")}, "float32 and bfloat16, got float64"),
        ({"dtype": jnp.dtype("float16")}, "float32 and bfloat16, got float16"),
        ({"t": 17}, "at most 16 rows and columns, got 17 x 16"),
        ({"s": 17}, "at most 16 rows and columns, got 4 x 17"),
        ({"options": Options(2, tolerance=0.1)}, "no tolerance, got 0.1"),
        ({"options": Options(2, gradient=Truncated(1))}, "Exact.*Truncated"),
    ],
    ids=str,
)
def test_why_not(name, changed, says):
    why_not = IMPLEMENTATIONS[name].load().why_not
    assert why_not(problem()) is None
    assert re.search(says, why_not(problem(**changed)))


@kernels
def test_refuses_second_derivatives(name):
    def loss(logits):
        return (sinkhorn(logits, 1, implementation=name) ** 2).sum()

    with pytest.raises(NotImplementedError, match=r"second derivatives .*'reference'"):
        jax.eval_shape(jax.hessian(loss), random(0, (T, S)))


@kernels
def test_is_not_taken_unasked(name):
    for platform in ("cpu", "gpu", "tpu"):
        assert preferred(IMPLEMENTATIONS, problem(), platform) != name


@pytest.mark.parametrize("num_iters", [0, 1, 2, 7, 20, 63, 64, 65, 1000])
@pytest.mark.parametrize("most", [0, 1, 64])
def test_segments_cover_all_iterations(num_iters, most):
    length, *more = _mosaic_tpu.segment_lengths(num_iters, most)
    (num_segments,) = more or [1]
    assert length * (num_segments - 1) < max(1, num_iters) <= length * num_segments
    assert bool(more) == (num_iters > max(1, most))
    assert not more or length + num_segments < 2 * num_iters**0.5 + 2
