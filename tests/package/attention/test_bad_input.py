"""`sinkhorn_attention` says what is wrong with its arguments."""

import jax.numpy as jnp
import pytest
from support.attention_cases import B, D, H, K, N, S, T, inputs

from sinkhorn_jax import Exact, sinkhorn_attention


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    @pytest.mark.parametrize(
        ("changed", "error", "says"),
        [
            ({"query": (B, T, N, H + 1)}, ValueError, "head dimensions H.*differ"),
            ({"key": (B + 1, S, K, H)}, ValueError, "batch sizes B differ"),
            ({"value": (B, S + 1, K, D)}, ValueError, "key lengths S.*differ"),
            ({"value": (B, S, K + 1, D)}, ValueError, "key heads K.*differ"),
            ({"query": (B, T, 3, H)}, ValueError, "3 query heads cannot share 2"),
            ({"query": (T, N, H)}, ValueError, "must all be"),
            ({"query": (B, 0, N, H)}, ValueError, "query must not be empty"),
            ({"key": (B, 0, K, H)}, ValueError, "key must not be empty"),
        ],
    )
    def test_shapes(self, changed, error, says):
        shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, D)}
        arrays = {name: jnp.ones(shape) for name, shape in (shapes | changed).items()}
        with pytest.raises(error, match=says):
            sinkhorn_attention(**arrays)

    @pytest.mark.parametrize(
        ("options", "error", "says"),
        [
            ({"is_causal": True}, ValueError, "identity.*dot_product_attention"),
            ({"num_iters": -1}, ValueError, "negative, got -1"),
            ({"num_iters": 1.5}, TypeError, "integer.*1.5"),
            ({"finish": "columns", "num_iters": 0}, ValueError, "at least 1"),
            ({"gradient": Exact}, TypeError, "instance of Exact"),
            ({"implementation": "fast"}, ValueError, "scaling.*reference"),
            ({"bias": jnp.ones((T, S), bool)}, TypeError, "bias must be floating"),
            ({"bias": jnp.ones((S, T))}, ValueError, r"bias must broadcast.*\(7, 5\)"),
            ({"bias": jnp.ones((1, B, N, T, S))}, ValueError, "bias must broadcast"),
            ({"mask": jnp.ones((T, S))}, TypeError, "mask must be boolean"),
            ({"mask": jnp.ones((B, K, T, S), bool)}, ValueError, "mask must broadcast"),
            ({"query_seq_lengths": jnp.ones(B)}, TypeError, "integer"),
            ({"key_value_seq_lengths": jnp.ones(3, int)}, ValueError, r"shape \(2,\)"),
            ({"dropout_rate": 0.1}, ValueError, "needs dropout_rng"),
            ({"dropout_rate": 1.0}, ValueError, r"\[0, 1\), got 1.0"),
            ({"scale": jnp.ones(N)}, TypeError, "multiply the query"),
            ({"scale": "big"}, TypeError, "multiply the query"),
            ({"scale": float("nan")}, ValueError, "finite"),
        ],
    )
    def test_options(self, options, error, says):
        with pytest.raises(error, match=says):
            sinkhorn_attention(*inputs(), **options)

    def test_dtypes(self):
        query, key, value = inputs()
        with pytest.raises(TypeError, match="floating, got int"):
            sinkhorn_attention(query.astype(int), key, value)
        with pytest.raises(TypeError, match="one dtype"):
            sinkhorn_attention(query, key.astype("float32"), value)
