"""Plans and potentials against a float64 oracle, and their invariances."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.hostile import hostile_logits, large_offsets
from support.matrices import S, T, marginals, random, sparse_with_padding

from sinkhorn_jax import sinkhorn, sinkhorn_potentials
from sinkhorn_jax._core.domain import Linear
from sinkhorn_jax._core.iteration import is_representable, iterate
from sinkhorn_jax._core.marginals import Marginals
from sinkhorn_jax._core.options import Options
from sinkhorn_jax.matrix import IMPLEMENTATIONS

# Largest error of a plan, whose entries are at most about 1. Sums are in float32 at
# least; the 16-bit types round the result, with 8 and 11 bits of mantissa, and logits.
ATOL = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}

SHAPE = (2, 3, T, S)

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
KERNELS = [name for name in IMPLEMENTATIONS if "mosaic" in name]


@pytest.mark.few(4)
@implementations
@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("shape", [(T, S), SHAPE, (1, 6), (4, 1), (0, 3, 3)])
def test_agrees_with_the_oracle(implementation, dtype, shape):
    logits = random(0, shape, dtype, 2.0)
    plan = sinkhorn(logits, 3, implementation=implementation)
    chex.assert_equal_shape([plan, logits])
    assert plan.dtype == logits.dtype
    expected = reference.sinkhorn(logits, 3)
    np.testing.assert_allclose(plan.astype("float64"), expected, atol=ATOL[dtype])


@pytest.mark.few(8)
@implementations
@pytest.mark.parametrize("finish", ["rows", "columns"])
@pytest.mark.parametrize("given", ["", "rows", "columns", "rows and columns"])
@pytest.mark.parametrize("masked", [False, True])
def test_marginals_masks_and_finishes(implementation, finish, given, masked):
    logits = random(0, SHAPE, scale=2.0)
    where = sparse_with_padding() if masked else None
    a, b = marginals()
    if masked:  # The totals without padding must agree.
        b = b * a[where.any(1)].sum() / b[where.any(0)].sum()
    a, b = a if "rows" in given else None, b if "columns" in given else None
    options = {"finish": finish, "implementation": implementation}
    options |= {"row_marginal": a, "col_marginal": b, "where": where}
    plan = sinkhorn(logits, 4, **options)
    potentials = sinkhorn_potentials(logits, 4, **options)
    z = np.where(masked and ~where, -np.inf, logits)
    expected = reference.potentials(z, 4, a, b, finish)
    chex.assert_trees_all_close(
        (plan, *potentials[:3]),
        (reference.sinkhorn(z, 4, a, b, finish), *expected),
        atol=ATOL["float64"],
    )
    assert (potentials.num_iters == 4).all()
    exact, target = (-1, 0) if finish == "rows" else (-2, 1)
    target = reference.marginals(z, a, b)[target]
    np.testing.assert_allclose(plan.sum(exact), target, atol=ATOL["float64"])
    if masked:
        assert not plan[..., ~where].any()


@implementations
def test_no_iterations_is_softmax(implementation):
    logits = random(0, SHAPE)
    softmax = jax.nn.softmax(logits)
    np.testing.assert_allclose(
        sinkhorn(logits, 0, implementation=implementation), softmax, atol=1e-15
    )


@pytest.mark.few(2)
@implementations
def test_padding_equals_cropping(implementation):
    logits = random(0, (4, 6, 8))
    rows, cols = jnp.arange(6)[:, None] < 4, jnp.arange(8)[None] < 5
    weights = random(1, (4, 4, 5))

    def padded(logits):
        where = rows & cols
        # Excluded entries may be anything.
        logits = jnp.where(where, logits, jnp.nan)
        plan = sinkhorn(logits, 3, where=where, implementation=implementation)
        return (plan[:, :4, :5] * weights).sum(), plan

    def cropped(logits):
        plan = sinkhorn(logits[:, :4, :5], 3, implementation=implementation)
        return (plan * weights).sum(), jnp.zeros_like(logits).at[:, :4, :5].set(plan)

    expected = jax.value_and_grad(cropped, has_aux=True)(logits)
    chex.assert_trees_all_close(
        jax.value_and_grad(padded, has_aux=True)(logits), expected, atol=1e-13
    )


@implementations
def test_minus_infinity_means_excluded_and_nan_stays_in_its_matrix(implementation):
    logits = random(0, (3, T, S))
    where = sparse_with_padding()
    excluded = jnp.where(where, logits, -jnp.inf).at[1, 0, 0].set(jnp.nan)
    plan = sinkhorn(excluded, implementation=implementation)
    expected = sinkhorn(logits, where=where, implementation=implementation)
    assert jnp.isnan(plan[1]).any()
    chex.assert_trees_all_close(plan[::2], expected[::2], atol=1e-14)


@implementations
def test_plans_are_equivariant_and_shift_invariant(implementation):
    logits = random(0, (T, S))
    solve = functools.partial(sinkhorn, num_iters=3, implementation=implementation)
    plan = solve(logits)
    rows = jnp.array([3, 1, 0, 4, 2])
    chex.assert_trees_all_close(solve(logits[rows]), plan[rows], atol=1e-14)
    cols = jnp.array([6, 5, 0, 1, 2, 4, 3])
    chex.assert_trees_all_close(solve(logits[:, cols]), plan[:, cols], atol=1e-14)
    shift = random(1, (T, 1), scale=50.0)
    chex.assert_trees_all_close(solve(logits + shift), plan, atol=1e-12)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("implementation", "num_iters"),
    [
        # 400 iterations take the interpreter long.
        pytest.param(
            name, num, marks=[pytest.mark.slow] * (num == 400 and name in KERNELS)
        )
        for name in IMPLEMENTATIONS
        for num in (10, 400)
    ],
)
def test_hostile_logits_in_float32(implementation, num_iters):
    named = hostile_logits(16)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    plan = sinkhorn(logits, num_iters, implementation=implementation)
    expected = reference.sinkhorn(logits, num_iters)
    error = dict(
        zip(named, abs(np.asarray(plan) - expected).max(axis=(1, 2)), strict=True)
    )
    # A potential as large as the logits has a rounding error of half an eps of them.
    limit = 3e-5 if implementation == "scaling" else 1e-4
    assert max(error.values()) < limit, error


@pytest.mark.few(2)
@implementations
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_large_offsets_leave_the_error_of_the_differences(implementation, finish):
    named = large_offsets(8)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    options = {"finish": finish, "implementation": implementation}
    plan = sinkhorn(logits, 10, **options)
    expected = reference.sinkhorn(logits, 10, finish=finish)
    error = abs(np.asarray(plan) - expected).max(axis=(1, 2))
    error = dict(zip(named, error, strict=True))
    assert max(error.values()) < ATOL["float32"], error
    np.testing.assert_allclose(plan.sum(-1 if finish == "rows" else -2), 1, atol=2e-6)
    got = sinkhorn_potentials(logits, 10, **options).marginal_error
    expected = reference.potentials(logits, 10, finish=finish)[2]
    np.testing.assert_allclose(got, expected, atol=2e-6)


@implementations
@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_column_potential_of_a_softmax_is_0(implementation, dtype):
    hot = jnp.zeros((4, 4), dtype).at[:, 0].set(1000.0)
    for logits in (hot, hot.at[1, 2].set(-jnp.inf), hot.at[:, 0].set(100)):
        solve = functools.partial(
            sinkhorn_potentials, logits, implementation=implementation
        )
        expected = reference.potentials(logits, 0)
        chex.assert_trees_all_close(solve(0)[:3], expected, rtol=1e-6)
        assert not solve(0).g.any()
        if "mosaic" not in implementation:
            # The softmax of equal rows has equal rows: an error of 1.5.
            stopped = solve(9, tolerance=1.9)
            assert stopped.num_iters == 0
            chex.assert_trees_all_close(stopped[:3], expected, rtol=1e-6)


def test_logits_outside_the_linear_domain_are_noticed():
    named = hostile_logits(16)

    def fits(logits, num_iters, marginal=1.0):
        domain = Linear.of(jnp.asarray(logits, "float32"))
        total = jnp.full(16, marginal, "float32")
        marginals = Marginals(*(jnp.where(x, total, 0) for x in domain[1:3]))
        history = iterate(domain, marginals, Options(num_iters))
        return bool(is_representable(domain, history, marginals))

    assert fits(named["standard deviation 1"], 50)
    assert fits(named["standard deviation 100"], 10)
    assert not fits(named["0 on a cross, -120 elsewhere"], 50)
    # Padding decides nothing, and only what is lost relative to a marginal counts.
    padded = np.asarray(named["standard deviation 1"]).copy()
    padded[-3:], padded[:, -2:] = -np.inf, -np.inf
    assert fits(padded, 50)
    assert fits(named["standard deviation 1"], 10, marginal=1e-20)
    assert fits(named["standard deviation 1"], 10, marginal=1e20)


def test_a_batch_takes_log_space_matrix_by_matrix():
    named = hostile_logits(16)
    easy = named["standard deviation 1"]
    mixed = jnp.stack([easy, named["0 on a cross, -120 elsewhere"]])
    gradient = jax.grad(lambda z: (sinkhorn(z, 50) ** 2).sum())
    chex.assert_trees_all_close(
        (sinkhorn(mixed, 50)[0], gradient(mixed)[0]),
        (sinkhorn(mixed[:1], 50)[0], gradient(mixed[:1])[0]),
        atol=1e-6,
    )


@pytest.mark.parametrize("size", [1e9, 1e21])
def test_large_marginals_and_excluded_entries(size):
    """Products of scalings may be infinite where the kernel matrix is 0."""
    where = jnp.array([[False, True], [True, False]])
    marginal = size * jnp.array([1, 10], jnp.float32)
    for num_iters in (20, 29):
        got = sinkhorn(jnp.zeros((2, 2)), num_iters, row_marginal=marginal, where=where)
        expected = np.diag(marginal)[:, ::-1]
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradients_of_potentials_for_marginals_near_the_end_of_float32():
    logits = jnp.asarray(random(0, (4, 5)), jnp.float32)
    marginal = jnp.arange(1, 5, dtype=jnp.float32)

    def gradient(size):
        def loss(logits, marginal):
            found = sinkhorn_potentials(logits, row_marginal=marginal)
            return found.f[:3].sum() - found.f[3] + found.g[0]

        dlogits, da = jax.grad(loss, (0, 1))(logits, marginal * size)
        return dlogits, da * size

    chex.assert_trees_all_close(gradient(1e37), gradient(1.0), atol=1e-4)
