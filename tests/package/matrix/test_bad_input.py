"""Errors for bad arguments: they say what was expected and what was given."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import S, T

from sinkhorn_jax import Exact, Implicit, Truncated, sinkhorn, sinkhorn_potentials


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
