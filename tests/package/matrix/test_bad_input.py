"""Errors for bad arguments: they say what was expected and what was given."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.matrices import S, T, random

from sinkhorn_jax import Exact, Implicit, Truncated, sinkhorn, sinkhorn_potentials
from sinkhorn_jax.matrix import IMPLEMENTATIONS


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
            ({"col_marginal": jnp.full(S, jnp.inf)}, ValueError, "positive.*inf"),
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
            Implicit(tolerance=0.0)
        with pytest.raises(ValueError, match="at least 1"):
            Implicit(max_iters=0)
        for tolerance in ("1e-3", True):
            with pytest.raises(TypeError, match="tolerance must be a number, got"):
                Implicit(tolerance=tolerance)
        with pytest.raises(TypeError, match="integer"):
            Truncated(True)


@pytest.mark.usefixtures("unchecked")
class TestKnownMarginals:
    """Marginals with known values are checked, whatever else is traced."""

    logits = np.zeros((3, T, S))
    a, b = np.full(T, 1 / T), np.full(S, 1 / S)

    @pytest.fixture(params=["jit", "vmap", "jit of vmap", "grad", "shape only"])
    def transform(self, request):
        def shape_only(fn):
            return lambda x: jax.eval_shape(fn, x)

        return {
            "jit": jax.jit,
            "vmap": jax.vmap,
            "jit of vmap": lambda fn: jax.jit(jax.vmap(fn)),
            "grad": lambda fn: jax.grad(lambda x: fn(x).sum()),
            "shape only": shape_only,
        }[request.param]

    @pytest.mark.parametrize(
        ("marginals", "says"),
        [
            ((np.ones(T), 5 * np.ones(S)), "same total, got 5.0 and 35.0"),
            ((np.full(T, -1.0), None), "row_marginal must be positive.*-1"),
            ((None, np.full(S, np.inf)), "col_marginal must be positive.*inf"),
            ((None, np.full(S, np.nan)), "col_marginal must be positive.*nan"),
            # Totals beyond the range of float32.
            ((np.full(T, 3e38), np.full(S, 3e38)), "same total"),
        ],
    )
    def test_wrong_ones_are_refused(self, transform, marginals, says):
        logits = jnp.asarray(self.logits, "float32")
        a, b = (x if x is None else x.astype("float32") for x in marginals)
        solve = lambda z: sinkhorn(z, row_marginal=a, col_marginal=b)
        with pytest.raises(ValueError, match=says):
            transform(solve)(logits)

    def test_right_ones_are_taken(self, transform):
        solve = lambda z: sinkhorn(z, 1, row_marginal=self.a, col_marginal=self.b)
        transform(solve)(jnp.asarray(self.logits))

    def test_a_known_mask_is_taken_into_account(self, transform):
        where = np.arange(T)[:, None] < 2
        a = np.where(where[:, 0], 0.5, np.nan)
        solve = lambda z: sinkhorn(
            z, 1, row_marginal=a, col_marginal=self.b, where=where
        )
        transform(solve)(jnp.asarray(self.logits))
        with pytest.raises(ValueError, match=r"same total, got 4\.0 and"):
            transform(
                lambda z: sinkhorn(
                    z, 1, row_marginal=4 * a, col_marginal=self.b, where=where
                )
            )(jnp.asarray(self.logits))

    def test_an_unknown_mask_may_make_totals_equal(self):
        where = jnp.arange(S)[None] < T
        solve = lambda where: sinkhorn(
            jnp.zeros((T, S)),
            1,
            row_marginal=np.ones(T),
            col_marginal=np.ones(S),
            where=where,
        )
        chex.assert_trees_all_close(jax.jit(solve)(where), solve(where))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_rounding_is_no_difference(self, dtype):
        a, b = jnp.full(7, 1 / 7, dtype), jnp.full(5, 1 / 5, dtype)
        plan = sinkhorn(jnp.zeros((7, 5), dtype), row_marginal=a, col_marginal=b)
        np.testing.assert_allclose(plan.astype("float64"), 1 / 35, rtol=1e-2)
        with pytest.raises(ValueError, match="same total"):
            sinkhorn(jnp.zeros((7, 5), dtype), row_marginal=1.02 * a, col_marginal=b)


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_the_error_is_right_where_a_total_overflows(implementation, finish):
    logits = random(0, (3, 3), "float32", 2.0)
    solve = lambda mass: (
        sinkhorn_potentials(
            logits,
            1,
            row_marginal=mass,
            finish=finish,
            implementation=implementation,
        ).marginal_error
    )
    expected = reference.potentials(logits, 1, finish=finish)[2]
    mass = jnp.full(3, 1.2e38, "float32")
    for got in (solve(mass), jax.jit(solve)(mass)):
        # Potentials near log(1e38) = 88 have an error of half an eps of that.
        np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_lists_are_taken_without_a_warning():
    plan = sinkhorn([[1.0, 2.0], [3.0, 4.0]], row_marginal=[1.0, 2.0])
    np.testing.assert_allclose(plan.sum(axis=1), [1.0, 2.0], rtol=1e-6)
