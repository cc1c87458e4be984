"""How the kernels of attention are divided, with other functions in their place.

An interpreted kernel runs on one device only.
"""

import importlib

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.attention_cases import inputs

from benchmarks.harness.compiled_text import collectives
from sinkhorn_jax import sinkhorn_attention

B, T, S, N, H = 4, 8, 16, 8, 8


def of_query_heads(x, query):
    return jnp.repeat(x, query.shape[0] // x.shape[0], axis=0)


def tpu_forward(problem, blocks, rows, cols, query, key_t, value_t):
    value = of_query_heads(value_t, query).sum(-1)
    key = of_query_heads(key_t, query).sum((1, 2), keepdims=True)
    out = (query.sum(-1)[..., None] * value[:, None] + key).astype(query.dtype)
    rows = of_query_heads(rows, query).astype(jnp.float32)
    error = jnp.broadcast_to(rows[:, None, None], (rows.shape[0], 8, 128))
    return out, (error,), (query * 2, of_query_heads(cols, query))


def tpu_backward(
    problem, blocks, rows, cols, query, key_t, value_t, dout, twice, cols_
):
    total = dout.sum((1, 2), keepdims=True) + cols_[:, None, None].astype(dout.dtype)
    key, value = of_query_heads(key_t, query), of_query_heads(value_t, query)
    return (query + twice) * total, key * total, value * total


def gpu_forward(problem, blocks, query, key, value, rows, cols):
    out = query.sum(-1)[..., None] * of_query_heads(value, query).sum(1)[:, None]
    out = (out + of_query_heads(key, query).sum((1, 2), keepdims=True)) / 64
    error = rows.sum(1).astype(jnp.float32)
    return out.astype(jnp.float32), error, (query * 2, cols.astype(jnp.float32))


def gpu_backward(problem, blocks, query, key, value, rows, cols, twice, cols_, out, d):
    query, key, value, d = (x.astype("float32") for x in (query, key, value, d))
    total = d.sum((1, 2), keepdims=True) + cols_.sum(1)[:, None, None]
    key, value = of_query_heads(key, query), of_query_heads(value, query)
    return (query + twice.astype("float32")) * total, key * total, value * total


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("num_key_heads", [8, 4, 1])
@pytest.mark.parametrize(
    ("name", "module", "forward", "backward", "dtype"),
    [
        ("mosaic_tpu", "_mosaic_tpu.attend", tpu_forward, tpu_backward, "float32"),
        ("mosaic_gpu", "_mosaic_gpu.passes", gpu_forward, gpu_backward, "bfloat16"),
    ],
    ids=["tpu", "gpu"],
)
def test_kernels_compute_their_part(
    name, module, forward, backward, dtype, num_key_heads, kind, monkeypatch
):
    module = importlib.import_module(f"sinkhorn_jax.attention.{module}")
    monkeypatch.setattr(module, "forward", forward)
    monkeypatch.setattr(module, "backward", backward)
    operands = inputs(dtype, b=B, t=T, s=S, n=N, k=num_key_heads, h=H, d=H)
    lengths = jnp.arange(1, B + 1)

    def run(operands, lengths):
        def loss(operands):
            out, error = sinkhorn_attention(
                *operands,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                num_iters=2,
                implementation=name,
                return_marginal_error=True,
            )
            return out.astype("float32").sum(), (out, error)

        return jax.grad(loss, has_aux=True)(operands)

    jax.clear_caches()
    expected = jax.jit(run)(operands, lengths)
    assert all(abs(x.astype("float32")).max() > 0 for x in jax.tree.leaves(expected))
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    heads = "y" if num_key_heads > 1 else None
    query, key, value = operands
    operands = (
        put(query, "x", None, "y"),
        *(put(x, "x", None, heads) for x in (key, value)),
    )
    program = jax.jit(run).lower(operands, put(lengths, "x")).compile()
    results = program(operands, put(lengths, "x"))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    widened = lambda tree: jax.tree.map(lambda x: x.astype("float32"), tree)
    chex.assert_trees_all_close(
        widened(results), widened(expected), rtol=tolerance, atol=tolerance
    )
    out = results[1][0]
    assert out.sharding.is_equivalent_to(operands[0].sharding, 4)
    # The gradients of a key that all devices have are added up.
    assert set(collectives(program)) <= ({"all-reduce"} if heads is None else set())
    jax.clear_caches()
