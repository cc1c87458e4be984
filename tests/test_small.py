"""Kernels for many small matrices: interpreted numbers and races, and lowering."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hostile import hostile_logits
from jax.experimental.pallas import tpu as pltpu

from sinkhorn_jax import Truncated, sinkhorn, sinkhorn_potentials
from sinkhorn_jax._options import Options
from sinkhorn_jax._sinkhorn import IMPLEMENTATIONS, _mosaic_tpu, _small
from sinkhorn_jax._sinkhorn._problem import Problem

# Of values and gradients of order 1, and of potentials of order 5, in float32.
ATOL = 3e-6

M, T, S = 2, 3, 4


@pytest.fixture
def interpreted(capfd):
    """Calls a function in the TPU interpreter, and sees that it reports no race."""

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


def test_the_kernels_are_exact_in_float64(interpreted):
    """Where rounding hides nothing: the public call refuses it, for a TPU has none."""
    arrays = random(0, (M, T, S), "float64", 2.0), *marginals()
    arrays = [x.astype("float64") for x in arrays]
    arrays[2] *= (arrays[1].sum(-1) / arrays[2].sum(-1))[:, None]
    problem = Problem(batch=M, t=T, s=S, dtype=jnp.dtype("float64"), options=Options(5))
    w = random(9, (M, T, S), "float64")

    def gradients(implementation):
        def loss(*arrays):
            plan = IMPLEMENTATIONS[implementation].run.plan(problem, *arrays)
            return (plan**2 * w).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    got = interpreted(gradients("mosaic_tpu"), *arrays)
    expected = gradients("reference")(*arrays)
    chex.assert_trees_all_close(got, expected, atol=1e-12)


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


def step(logits, cotangent, **options):
    """Plan and gradient, potentials and theirs."""
    options |= {"implementation": "mosaic_tpu"}
    plan, pull_back = jax.vjp(lambda z: sinkhorn(z, **options), logits)
    potentials, pull_back_potentials = jax.vjp(
        lambda z: sinkhorn_potentials(z, **options)[:2], logits
    )
    return plan, pull_back(cotangent), pull_back_potentials(potentials)


def assert_lowers(n, batch, dtype, platform, target, **options):
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
    assert_lowers(n, batch, dtype, "tpu", "tpu_custom_call", num_iters=20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 1000, 65536, 10_000_000])
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_lowers_for_tpu_in_every_size(dtype, n, batch, finish):
    assert_lowers(
        n, batch, dtype, "tpu", "tpu_custom_call", num_iters=100, finish=finish
    )


def problem(**changed):
    fields = {
        "batch": 10,
        "t": 4,
        "s": 16,
        "dtype": jnp.dtype("bfloat16"),
        "options": Options(20, "columns"),
    }
    return Problem(**fields | changed)


kernels = pytest.mark.parametrize("name", ["mosaic_tpu"])


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
    entry = IMPLEMENTATIONS[name]
    assert entry.why_not(problem()) is None
    assert re.search(says, entry.why_not(problem(**changed)))


@kernels
def test_is_not_taken_unasked(name):
    entry = IMPLEMENTATIONS[name]
    assert not any(entry.prefer(problem(), x) for x in ("cpu", "gpu", "tpu"))


@pytest.mark.parametrize("num_iters", [0, 1, 2, 7, 20, 63, 64, 65, 1000])
@pytest.mark.parametrize("most", [0, 1, 64])
def test_segments_cover_all_iterations(num_iters, most):
    length, num_segments = _small.history_shape(num_iters, most)
    assert length * (num_segments - 1) < max(1, num_iters) <= length * num_segments
    assert num_segments == 1 or length + num_segments < 2 * num_iters**0.5 + 2
