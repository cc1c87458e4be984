"""Flax layers whose parameters and batch are divided over the same devices (FSDP)."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.attention_cases import random

import sinkhorn_jax.nnx
from sinkhorn_jax.linen import MultiHeadSinkhornAttention, attention_fn

B, T, F, N = 8, 13, 16, 8  # No other axis is as long as the tokens.


def make_mesh():
    return jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))


def linen_layer(make):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("devices", None, None))
    layer = make(num_heads=N, kernel_init=init, param_dtype=jnp.float64)
    boxed = layer.init(jax.random.key(0), jnp.zeros((1, T, F)))
    return nn.meta.unbox(boxed), nn.get_partition_spec(boxed), layer.apply


def nnx_layer(make):
    with jax.set_mesh(make_mesh()):
        layer = make(
            num_heads=N,
            in_features=F,
            kernel_metadata={"out_sharding": ("devices", None, None)},
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    specs = nnx.get_partition_spec(params)
    return params, specs, lambda params, x: nnx.merge(graph, params, rest)(x)


def softmax_layer(**options):
    return nn.MultiHeadDotProductAttention(attention_fn=attention_fn(3), **options)


LAYERS = {
    "linen": lambda: linen_layer(MultiHeadSinkhornAttention),
    "linen, attention_fn": lambda: linen_layer(softmax_layer),
    "nnx": lambda: nnx_layer(sinkhorn_jax.nnx.MultiHeadSinkhornAttention),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("spec", [(None, "y"), ("x", "y"), ("x",)])
def test_two_batch_axes_where_axes_are_explicit(spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    layer = MultiHeadSinkhornAttention(num_heads=2, param_dtype=jnp.float64)
    x = random(0, (4, 2, 5, 6))
    params = layer.init(jax.random.key(0), x)
    expected = layer.apply(params, x)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        got = jax.jit(layer.apply)(jax.tree.map(put, params), put(x, *spec))
    chex.assert_trees_all_close(got, expected, atol=1e-12)


@pytest.mark.few(1)
@pytest.mark.parametrize("layer", LAYERS)
def test_no_token_is_gathered(layer):
    mesh = make_mesh()
    params, specs, apply = LAYERS[layer]()
    x = random(0, (B, T, F))

    def loss(params, x):
        out = apply(params, x)
        return jnp.sin(out).sum(), out

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected = gradient(params, x)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    is_spec = lambda x: isinstance(x, PartitionSpec)
    shardings = jax.tree.leaves(specs, is_leaf=is_spec)
    leaves, tree = jax.tree.flatten(params)
    assert sum("devices" in spec for spec in shardings) >= 3
    divided = tree.unflatten(map(put, leaves, shardings))
    program = gradient.lower(divided, put(x, PartitionSpec("devices"))).compile()
    chex.assert_trees_all_close(
        program(divided, put(x, PartitionSpec("devices"))), expected, atol=1e-12
    )
    text = program.as_text()
    moved = re.findall(r"= \(?(\w+\[[\d,]*\])\S* (all-gather|all-to-all)\(", text)
    assert moved
    for shape, _ in moved:
        sizes = re.search(r"\[([\d,]*)\]", shape).group(1).split(",")
        assert str(T) not in sizes, moved
