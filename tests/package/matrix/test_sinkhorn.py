"""The matrix functions: values, gradients, transforms, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from support import reference
from support.hostile import hostile_logits

from sinkhorn_jax import Exact, Implicit, Truncated, sinkhorn, sinkhorn_potentials
from sinkhorn_jax._core.domain import Linear
from sinkhorn_jax._core.iteration import is_representable, iterate
from sinkhorn_jax.matrix import IMPLEMENTATIONS

# Largest error of a plan, whose entries are at most about 1. Sums are in float32 at
# least; the 16-bit types round the result, with 8 and 11 bits of mantissa, and logits.
ATOL = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
FLOAT64_GRADIENT_ATOL = 1e-10  # Sums of some hundred terms of order 1.

T, S = 5, 7
SHAPE = (2, 3, T, S)

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
KERNELS = [name for name in IMPLEMENTATIONS if "mosaic" in name]


def random(seed, shape, dtype="float64", scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def marginals(batch=()):
    """Two positive marginals of equal total, different for each matrix."""
    a = 0.2 + jax.random.uniform(jax.random.key(1), (*batch, T))
    b = 0.2 + jax.random.uniform(jax.random.key(2), (*batch, S))
    return a, b * (a.sum(-1) / b.sum(-1))[..., None]


def sparse_with_padding():
    """A sparse support with a padded row and a padded column."""
    allowed = np.random.default_rng(0).uniform(size=(T, S)) < 0.8
    allowed[:, 0] = allowed[0] = True
    allowed[2], allowed[:, 4] = False, False
    return jnp.asarray(allowed)


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


@implementations
@pytest.mark.parametrize("finish", ["rows", "columns"])
@pytest.mark.parametrize("given", ["", "rows", "columns", "rows and columns"])
@pytest.mark.parametrize("masked", [False, True])
def test_marginals_masks_and_finishes(implementation, finish, given, masked):
    logits = random(0, SHAPE, scale=2.0)
    where = sparse_with_padding() if masked else None
    a, b = marginals()
    if masked:  # The totals of what is valid must agree.
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


@implementations
def test_padding_equals_cropping(implementation):
    logits = random(0, (4, 6, 8))
    rows, cols = jnp.arange(6)[:, None] < 4, jnp.arange(8)[None] < 5
    weights = random(1, (4, 4, 5))

    def padded(logits):
        where = rows & cols
        # What is excluded may be anything.
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


@pytest.mark.parametrize(
    ("implementation", "num_iters"),
    [
        # The interpreter takes long for as many as 400.
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
    # A float32 potential as large as the logits has half an eps of them as its error.
    limit = 3e-5 if implementation == "scaling" else 1e-4
    assert max(error.values()) < limit, error


@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_hostile_gradients_of_scaling_in_float32(finish):
    named = hostile_logits(16)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    weights = random(1, logits.shape, "float32")

    def loss(logits, weights, implementation):
        plan = sinkhorn(logits, 50, finish=finish, implementation=implementation)
        return (plan * weights).sum()

    gradient = jax.grad(loss)(logits, weights, "scaling")
    exact = jax.grad(loss)(
        logits.astype("float64"), weights.astype("float64"), "reference"
    )
    error = abs(gradient.astype("float64") - exact).max((1, 2))
    error = dict(zip(named, error, strict=True))
    assert max(error.values()) < 1e-5, error


def test_logits_outside_the_linear_domain_are_noticed():
    named = hostile_logits(16)

    def fits(logits, num_iters):
        domain, ones = Linear.of(jnp.asarray(logits)), jnp.ones(16, "float32")
        history = iterate(domain, domain.start(), ones, ones, num_iters)
        return bool(is_representable(domain, history, ones, ones))

    assert fits(named["standard deviation 1"], 50)
    assert fits(named["standard deviation 100"], 10)
    assert not fits(named["0 on a cross, -120 elsewhere"], 50)


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


def test_log_space_stays_a_branch_under_vmap():
    logits = random(0, (3, T, S))
    jaxpr = str(jax.make_jaxpr(jax.vmap(sinkhorn))(logits))
    assert "cond[" in jaxpr
    jaxpr = str(jax.make_jaxpr(jax.vmap(jax.grad(lambda z: sinkhorn(z).sum())))(logits))
    assert jaxpr.count("cond[") >= 2


GRADIENT_CASES = {
    "rows": {},
    "columns": {"finish": "columns"},
    "no iterations": {"num_iters": 0},
    "one iteration": {"num_iters": 1, "finish": "columns"},
    "marginals": {"marginals": True},
    "marginals, columns": {"marginals": True, "finish": "columns"},
    "sparse with padding": {"masked": True},
    "truncated": {"gradient": Truncated(2), "marginals": True},
    "truncated, columns": {"gradient": Truncated(1), "finish": "columns"},
    "truncated to the last row step": {"gradient": Truncated(0)},
    "implicit": {"gradient": Implicit(1e-12), "num_iters": 300, "marginals": True},
    "implicit, masked": {"gradient": Implicit(1e-12), "num_iters": 200, "masked": True},
    "tolerance": {"tolerance": 0.03, "num_iters": 20},
    "tolerance, columns": {"tolerance": 0.03, "num_iters": 20, "finish": "columns"},
    "tolerance, truncated": {
        "tolerance": 0.01,
        "num_iters": 20,
        "gradient": Truncated(1),
    },
}


def gradients(implementation, logits, a, b, options):
    """Of a function of the plan and of one of the potentials."""
    options = {"num_iters": 4, "implementation": implementation} | options
    where = sparse_with_padding() if options.pop("masked", False) else None
    with_marginals = options.pop("marginals", False)
    w = random(9, logits.shape)

    def loss(logits, a, b):
        given = {"row_marginal": a, "col_marginal": b} if with_marginals else {}
        given |= {"where": where}
        f, g, *_ = sinkhorn_potentials(logits, **options, **given)
        loss = (jnp.sin(f) * w[..., 0]).sum() + (jnp.cos(g) * w[..., 0, :]).sum()
        if "tolerance" not in options:
            loss += (sinkhorn(logits, **options, **given) ** 2 * w).sum()
        return loss

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(logits, a, b)


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_agree_with_autodiff_of_the_reference(case):
    logits, (a, b) = random(0, (2, T, S), scale=2.0), marginals((2,))
    options = GRADIENT_CASES[case]
    chex.assert_trees_all_close(
        gradients("scaling", logits, a, b, options),
        gradients("reference", logits, a, b, options),
        atol=FLOAT64_GRADIENT_ATOL,
    )


@implementations
def test_gradients_agree_with_finite_differences(implementation):
    logits, (a, b) = random(0, (T, S)), marginals()
    w = random(1, (T, S))

    def loss(logits, a, b):
        # Scaled to one total, so that every perturbation is a pair of marginals.
        a, b = a / a.sum(), b / b.sum()
        plan = sinkhorn(
            logits, 3, row_marginal=a, col_marginal=b, implementation=implementation
        )
        return (plan * w).sum()

    modes = ["rev"] if implementation == "scaling" else ["rev", "fwd"]
    order = 1 if implementation == "scaling" else 2
    check_grads(jax.jit(loss), (logits, a, b), order, modes)


def test_large_cotangents_stay_in_range():
    logits = jnp.stack([jnp.asarray(x) for x in hostile_logits(16).values()])
    weights = random(1, logits.shape, "float32")

    def gradient(size):
        loss = lambda z: (sinkhorn(z, 50) * weights * size).sum()
        return jax.grad(loss)(logits) / size

    sizes = jnp.float32(1), jnp.float32(1e20)
    chex.assert_trees_all_close(*map(gradient, sizes), atol=1e-6)


def test_truncated_to_all_iterations_is_exact():
    logits = random(0, (T, S))

    def gradient(method):
        return jax.grad(lambda z: (sinkhorn(z, 3, gradient=method) ** 2).sum())(logits)

    chex.assert_trees_all_equal(gradient(Truncated(3)), gradient(Exact()))
    chex.assert_trees_all_equal(gradient(Truncated(9)), gradient(Exact()))


def test_implicit_is_the_limit_of_exact():
    logits = random(0, (T, S))

    def gradient(method):
        return jax.grad(lambda z: (sinkhorn(z, 200, gradient=method) ** 2).sum())(
            logits
        )

    chex.assert_trees_all_close(
        gradient(Implicit(1e-12)), gradient(Exact()), atol=FLOAT64_GRADIENT_ATOL
    )


@implementations
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_tolerance_stops_each_matrix_by_itself(implementation, finish):
    scales = jnp.array([0.1, 1.0, 3.0])[:, None, None]
    logits = random(0, (3, T, S)) * scales
    options = {"finish": finish, "implementation": implementation}
    stopped = sinkhorn_potentials(logits, 30, tolerance=1e-3, **options)
    assert (stopped.marginal_error <= 1e-3).all()
    assert stopped.num_iters[0] < stopped.num_iters[1] < stopped.num_iters[2]
    for z, n, f, g, error in zip(
        logits,
        stopped.num_iters,
        stopped.f,
        stopped.g,
        stopped.marginal_error,
        strict=True,
    ):
        fixed = reference.potentials(z, int(n), finish=finish)
        chex.assert_trees_all_close((f, g, error), fixed, atol=1e-12)
        if n > 1:
            assert reference.potentials(z, int(n) - 1, finish=finish)[2] > 1e-3


@implementations
def test_tolerance_can_be_met_by_the_softmax_and_missed_at_the_limit(implementation):
    solve = functools.partial(sinkhorn_potentials, implementation=implementation)
    flat = solve(jnp.zeros((T, S)), 5, tolerance=1e-6)
    assert flat.num_iters == 0
    sharp = solve(random(0, (T, S), scale=9.0), 2, tolerance=1e-9)
    assert sharp.num_iters == 2
    assert sharp.marginal_error > 1e-9


@implementations
@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_transforms_agree(implementation, tolerance):
    logits = random(0, (3, T, S))

    def loss(z):
        potentials = sinkhorn_potentials(
            z, 3, tolerance=tolerance, implementation=implementation
        )
        return jnp.sin(potentials.f).sum() + (potentials.g**2).sum()

    gradient = jax.grad(loss)
    expected = jnp.stack([gradient(z) for z in logits])
    for transformed in (
        jax.vmap(gradient),
        jax.jit(jax.vmap(gradient)),
        jax.vmap(jax.grad(jax.checkpoint(loss))),
        gradient,  # Of the whole batch.
    ):
        chex.assert_trees_all_close(transformed(logits), expected, atol=1e-12)

    def layers(z):
        return jax.lax.scan(lambda z, _: (z + gradient(z), None), z, None, length=2)[0]

    looped = logits + gradient(logits)
    chex.assert_trees_all_close(layers(logits), looped + gradient(looped), atol=1e-12)


def test_the_reference_has_forward_mode_and_hessians():
    logits = random(0, (3, 4))

    def loss(z, gradient=Exact()):  # noqa: B008
        plan = sinkhorn(z, 2, gradient=gradient, implementation="reference")
        return (plan**3).sum()

    chex.assert_trees_all_close(
        jax.jacfwd(loss)(logits), jax.jacrev(loss)(logits), atol=1e-14
    )
    hessian = jax.hessian(loss)(logits).reshape(12, 12)
    chex.assert_trees_all_close(hessian, hessian.T, atol=1e-14)
    implicit = functools.partial(loss, gradient=Implicit(1e-12))
    chex.assert_trees_all_close(
        jax.jacfwd(implicit)(logits), jax.jacrev(implicit)(logits), atol=1e-12
    )
    converged = functools.partial(sinkhorn, num_iters=100, implementation="reference")
    second = [
        jax.hessian(lambda z, m=m: (converged(z, gradient=m) ** 3).sum())(logits)
        for m in (Implicit(1e-12), Exact())
    ]
    chex.assert_trees_all_close(*second, atol=1e-10)


def test_scaling_says_that_it_has_no_forward_mode():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(sinkhorn)(random(0, (T, S)))


def test_scaling_differentiates_twice_in_reverse():
    logits = random(0, (3, 4))

    def second(implementation):
        loss = lambda z: (sinkhorn(z, 2, implementation=implementation) ** 3).sum()
        return jax.grad(lambda z: (jax.grad(loss)(z) ** 2).sum())(logits)

    chex.assert_trees_all_close(second("scaling"), second("reference"), atol=1e-12)


@implementations
def test_equal_shapes_do_not_compile_again(implementation):
    table = IMPLEMENTATIONS[implementation].load()
    logits = random(0, (2, 3, 11))  # A shape that no other test uses.
    before = table.plan._cache_size()
    for seed in range(3):
        sinkhorn(random(seed, logits.shape), 3, implementation=implementation)
    assert table.plan._cache_size() == before + 1

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def solve(logits):
        return sinkhorn(logits, 3, implementation=implementation)

    for seed in range(3):
        solve(random(seed, logits.shape))


def test_converged_plans_agree_with_pot():
    cost = jax.random.uniform(jax.random.key(0), (T, S), "float64")
    a, b = (x / x.sum() for x in marginals())
    expected = pytest.importorskip("ot").sinkhorn(
        *(np.asarray(x) for x in (a, b, cost)),
        reg=0.3,
        method="sinkhorn_log",
        stopThr=1e-14,
    )
    plan = sinkhorn(-cost / 0.3, 500, row_marginal=a, col_marginal=b)
    np.testing.assert_allclose(plan, expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_converged_plans_and_implicit_gradients_agree_with_ott():
    pytest.importorskip("ott")
    cost = jax.random.uniform(jax.random.key(0), (T, S), "float64")
    a, b = (x / x.sum() for x in marginals())
    w = random(1, (T, S))

    def ours(cost):
        plan = sinkhorn(
            -cost / 0.3,
            500,
            row_marginal=a,
            col_marginal=b,
            gradient=Implicit(1e-12),
        )
        return (plan * w).sum(), plan

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn as ott_sinkhorn

        def theirs(cost):
            geometry_ = geometry.Geometry(cost_matrix=cost, epsilon=0.3)
            problem = linear_problem.LinearProblem(geometry_, a, b)
            solver = ott_sinkhorn.Sinkhorn(threshold=1e-12, max_iterations=5000)
            plan = solver(problem).matrix
            return (plan * w).sum(), plan

        expected = jax.jit(jax.grad(theirs, has_aux=True))(cost)
    chex.assert_trees_all_close(jax.grad(ours, has_aux=True)(cost), expected, atol=1e-8)


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    logits = np.zeros((T, S))

    @pytest.mark.parametrize(
        ("options", "error", "says"),
        [
            ({"num_iters": -1}, ValueError, "negative, got -1"),
            ({"num_iters": 2.0}, TypeError, "integer.*got 2.0"),
            ({"num_iters": True}, TypeError, "integer.*got True"),
            ({"finish": "cols"}, ValueError, "rows.*columns.*got 'cols'"),
            ({"finish": "columns", "num_iters": 0}, ValueError, "at least 1"),
            (
                {"finish": "columns", "gradient": Truncated(0)},
                ValueError,
                r"Truncated\(0\)",
            ),
            ({"gradient": Exact}, TypeError, "instance of Exact"),
            ({"implementation": "fast"}, ValueError, "scaling.*reference"),
            ({"where": jnp.ones((T, S))}, TypeError, "boolean, got float"),
            ({"where": jnp.ones((S, T), bool)}, ValueError, r"broadcast to \(5, 7\)"),
            ({"where": jnp.ones((2, T, S), bool)}, ValueError, r"got \(2, 5, 7\)"),
            ({"row_marginal": jnp.ones(S)}, ValueError, r"broadcast to \(5,\)"),
            ({"row_marginal": jnp.ones(T, int)}, TypeError, "floating, got int"),
            ({"row_marginal": -jnp.ones(T)}, ValueError, "positive.*-1"),
            ({"col_marginal": jnp.zeros(S)}, ValueError, "positive"),
            (
                {"row_marginal": jnp.ones(T), "col_marginal": jnp.ones(S)},
                ValueError,
                "same total, got 5.0 and 7.0",
            ),
        ],
    )
    @pytest.mark.parametrize("function", [sinkhorn, sinkhorn_potentials])
    def test_options(self, function, options, error, says):
        with pytest.raises(error, match=says):
            function(jnp.asarray(self.logits), **options)

    @pytest.mark.parametrize(
        ("logits", "error", "says"),
        [
            (jnp.ones((T, S), int), TypeError, "floating, got int"),
            (jnp.ones(T), ValueError, "two axes"),
            (jnp.ones((T, 0)), ValueError, "at least one row"),
        ],
    )
    def test_logits(self, logits, error, says):
        with pytest.raises(error, match=says):
            sinkhorn(logits)

    def test_tolerance(self):
        logits = jnp.asarray(self.logits)
        for tolerance in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="tolerance"):
                sinkhorn_potentials(logits, tolerance=tolerance)
        with pytest.raises(TypeError, match="tolerance must be a number"):
            sinkhorn_potentials(logits, tolerance="small")
        sinkhorn_potentials(logits, tolerance=np.float32(0.1))

    def test_gradients(self):
        with pytest.raises(ValueError, match="negative, got -1"):
            Truncated(-1)
        with pytest.raises(ValueError, match="positive and finite"):
            Implicit(0.0)
        with pytest.raises(ValueError, match="at least 1"):
            Implicit(max_iters=0)
        with pytest.raises(TypeError, match="integer"):
            Truncated(True)
