"""`sinkhorn_attention` under transforms of JAX, compiled once, in bounded memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.attention_cases import (
    ATOL,
    PLAIN,
    H,
    N,
    T,
    implementations,
    inputs,
    random,
)

from sinkhorn_jax import Truncated, sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("short_query_blocks")


@pytest.mark.few(2)
@implementations
def test_transforms_agree(implementation):
    operands = inputs(b=3)

    def loss(query, key, value):
        out = sinkhorn_attention(
            query, key, value, num_iters=2, implementation=implementation
        )
        return jnp.sin(out).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    expected = gradient(*operands)
    chex.assert_trees_all_close(
        jax.jit(jax.vmap(gradient))(*operands), expected, atol=1e-12
    )
    remat = jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2))
    chex.assert_trees_all_close(remat(*operands), expected, atol=1e-12)


@pytest.mark.few(2)
@implementations
def test_shard_map_over_the_batch(implementation):
    """With its checks of what varies; the bias is the same for all shards."""
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    batch, whole = jax.sharding.PartitionSpec("b"), jax.sharding.PartitionSpec()
    bias = random(5, (N, T, 1))

    def attend(query, key, value, bias):
        return sinkhorn_attention(
            query, key, value, bias, num_iters=2, implementation=implementation
        )

    def gradients(attend):
        loss = lambda *operands: jnp.sin(attend(*operands)).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*inputs(), bias)

    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(batch, batch, batch, whole), out_specs=batch
    )
    chex.assert_trees_all_close(gradients(sharded), gradients(attend), atol=1e-12)


@pytest.mark.few(2)
@implementations
def test_scan_over_layers(implementation):
    query, key, _ = inputs(s=T, k=N, d=H)

    def layer(x, key):
        out = sinkhorn_attention(x, key, x, num_iters=2, implementation=implementation)
        return x + out, None

    keys = jnp.stack([key, -key])

    def scanned(x):
        return jax.lax.scan(layer, x, keys)[0].sum()

    def looped(x):
        return layer(layer(x, keys[0])[0], keys[1])[0].sum()

    chex.assert_trees_all_close(
        jax.grad(scanned)(query), jax.grad(looped)(query), atol=1e-12
    )


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "streaming"))
        for name in PLAIN
    ],
)
def test_second_derivatives(implementation):
    """Of `Exact` by every way, and of `Truncated` as docs/choosing.md says."""
    query, key, value = (x[:1] for x in inputs(t=3, s=4, n=1, k=1))

    def gradient(query, **options):
        def loss(query):
            options_ = {"num_iters": 2, "implementation": implementation} | options
            return (sinkhorn_attention(query, key, value, **options_) ** 3).sum()

        return jax.grad(loss)(query)

    def differences(gradient):
        step = 1e-5
        units = np.eye(query.size).reshape(-1, *query.shape)
        columns = [
            (gradient(query + step * x) - gradient(query - step * x)) / (2 * step)
            for x in units
        ]
        return np.stack(columns, axis=-1).reshape(query.size, query.size)

    def both(**options):
        first = jax.jit(functools.partial(gradient, **options))
        second = jax.jit(jax.jacrev(first))(query)
        return second.reshape(query.size, query.size), differences(first)

    exact, expected = both()
    np.testing.assert_allclose(exact, expected, atol=1e-8)
    np.testing.assert_allclose(exact, exact.T, atol=1e-14)
    truncated, expected = both(gradient=Truncated(1))
    is_symmetric = np.allclose(truncated, truncated.T, atol=1e-12)
    assert is_symmetric == (implementation == "reference")
    follows = np.allclose(truncated, expected, atol=1e-7)
    assert follows == (implementation != "reference")


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_jit_changes_nothing(self):
        operands = inputs("float32")
        expected = reference.sinkhorn_attention(*operands, num_iters=2)
        solve = self.variant(functools.partial(sinkhorn_attention, num_iters=2))
        np.testing.assert_allclose(solve(*operands), expected, atol=ATOL["float32"])


@implementations
def test_equal_shapes_do_not_compile_again(implementation):
    attend = IMPLEMENTATIONS[implementation].load().attend
    before = attend._cache_size()
    for seed in range(3):
        query, key, value = inputs(t=11)  # A length that no other test uses.
        query = query + random(seed, query.shape)
        sinkhorn_attention(query, key, value, implementation=implementation)
    assert attend._cache_size() == before + 1


@pytest.mark.parametrize("heads", [1, 4])
def test_memory_is_one_head_in_flight(heads):
    t = 1024
    shape = jax.ShapeDtypeStruct((1, t, heads, 16), "float32")

    def step(query, key, value):
        out, pull_back = jax.vjp(sinkhorn_attention, query, key, value)
        return pull_back(out)

    compiled = jax.jit(step).lower(shape, shape, shape).compile()
    beside = (
        4 * 12 * t * heads * (16 + 11)
    )  # Inputs, outputs and scalings of each head.
    temp = compiled.memory_analysis().temp_size_in_bytes
    # Of the head in flight: the logits, the plan, and three matrices of a step.
    assert temp < 6 * 4 * t * t + beside


def test_a_broadcast_bias_gets_its_gradient_without_one_for_each_head():
    t, heads = 512, 16
    shape = jax.ShapeDtypeStruct((2, t, heads, 16), "float32")
    bias = jax.ShapeDtypeStruct((1, 1, t, t), "float32")

    def step(query, bias):
        loss = lambda query, bias: sinkhorn_attention(query, query, query, bias).sum()
        return jax.grad(loss, argnums=(0, 1))(query, bias)

    compiled = jax.jit(step).lower(shape, bias).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < 4 * t * t * heads
