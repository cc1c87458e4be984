"""`sinkhorn_attention` of arguments that are divided over eight devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.attention_cases import PLAIN, inputs, random

from benchmarks.harness.compiled_text import collectives, count
from sinkhorn_jax import Truncated, sinkhorn_attention
from sinkhorn_jax.linen import MultiHeadSinkhornAttention

B, T, S, N = 8, 12, 10, 8
KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", PLAIN)
# Sizes of the mesh, and the axes that divide (B, T, N).
DIVISIONS = {
    "batch": ({"x": 8}, ("x", None, None)),
    "heads": ({"x": 8}, (None, None, "x")),
    "both": ({"x": 4, "y": 2}, ("x", None, "y")),
    "two axes": ({"x": 4, "y": 2}, (("x", "y"), None, None)),
}


def make_mesh(sizes, kind=AxisType.Auto):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )


def divide(mesh, spec, arrays):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), arrays)


def value_and_gradients(*operands, arrays=None, **options):
    """Output, marginal error and gradients by all that is floating."""
    arrays = arrays or {}
    floating = {
        n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)
    }
    rest = {n: x for n, x in arrays.items() if n not in floating}

    def loss(operands, floating):
        out, error = sinkhorn_attention(
            *operands,
            num_iters=3,
            return_marginal_error=True,
            **floating,
            **rest,
            **options,
        )
        return jnp.sin(out).sum(), (out, error)

    gradient = jax.grad(loss, (0, 1), has_aux=True)
    (operands, floating), results = gradient(operands, floating)
    return results, operands, floating


@KINDS
@IMPLEMENTATIONS
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.few(3)
def test_every_device_computes_its_part(kind, implementation, division):
    operands = inputs(b=B, t=T, s=S, n=N, k=N)
    sizes, spec = DIVISIONS[division]

    def run(*operands):
        results, gradients, _ = value_and_gradients(
            *operands, implementation=implementation
        )
        return *results, *gradients

    whole = jax.jit(run).lower(*operands).compile()
    divided = divide(make_mesh(sizes, kind), spec, operands)
    program = jax.jit(run).lower(*divided).compile()
    results = program(*divided)
    chex.assert_trees_all_close(results, whole(*operands), atol=1e-12)
    assert results[0].sharding.is_equivalent_to(divided[0].sharding, 4)
    assert collectives(program) == {}
    whole, part = count(whole), count(program)
    assert whole["multiply_add"] > 1e5
    assert whole["exponential"] > 1e4
    for name, number in whole.items():
        assert part[name] <= 0.14 * number, name


def named_arguments(name):
    """Arrays, and options that are none, of a call."""
    uniform = np.random.default_rng(0).random
    per_key = jnp.asarray(uniform(S) + 0.1)
    per_query = jnp.asarray(uniform((B, N, T)) + 0.1)
    ids = {
        "query_segment_ids": jnp.asarray(np.arange(B * T).reshape(B, T) % 3),
        "key_segment_ids": jnp.asarray(np.arange(B * S).reshape(B, S) % 3),
    }
    lengths = {
        "query_seq_lengths": jnp.array([3, 5, 12, 0, 1, 2, 12, 7]),
        "key_value_seq_lengths": jnp.array([4, 10, 2, 3, 10, 0, 10, 1]),
    }
    marginals = {
        "query_marginal": per_query * per_key.sum() / per_query.sum(-1, keepdims=True),
        "key_marginal": per_key,
    }
    return {
        "bias": ({"bias": random(1, (1, N, T, S))}, {}),
        "bias of a batch": ({"bias": random(1, (B, 1, T, 1))}, {}),
        "mask": ({"mask": jnp.asarray(uniform((B, 1, T, S)) < 0.8)}, {}),
        "lengths": (lengths, {}),
        "scale": ({"scale": jnp.float64(0.3)}, {}),
        "tau": ({"column_tau": jnp.asarray(uniform((B, N)))}, {}),
        "marginals": (marginals, {}),
        "segments": (ids, {}),
        "window": ({}, {"local_window_size": (3, 2)}),
        "dropout": ({"dropout_rng": jax.random.key(3)}, {"dropout_rate": 0.3}),
        "old key": ({"dropout_rng": jax.random.PRNGKey(3)}, {"dropout_rate": 0.3}),
        "truncated": ({}, {"gradient": Truncated(1)}),
        "columns": ({}, {"finish": "columns"}),
    }[name]


@pytest.mark.few(3)
@KINDS
@IMPLEMENTATIONS
@pytest.mark.parametrize("division", ["both", "heads"])
@pytest.mark.parametrize("num_key_heads", [4, 1])
@pytest.mark.parametrize(
    "arguments",
    "bias/bias of a batch/mask/lengths/scale/tau/marginals/segments/window/dropout/"
    "old key/truncated/columns".split("/"),
)
def test_arguments_agree_with_one_device(
    kind, implementation, division, num_key_heads, arguments
):
    operands = inputs(b=B, t=T, s=S, n=N, k=num_key_heads)
    arrays, options = named_arguments(arguments)
    run = jax.jit(
        functools.partial(value_and_gradients, implementation=implementation, **options)
    )
    expected = run(*operands, arrays=arrays)
    sizes, spec = DIVISIONS[division]
    mesh = make_mesh(sizes, kind)
    can_divide_keys = num_key_heads % sizes[spec[2]] == 0
    of_keys = spec if can_divide_keys else (*spec[:2], None)
    query, key, value = operands
    operands = divide(mesh, spec, query), *divide(mesh, of_keys, (key, value))
    if kind == AxisType.Explicit:
        arrays = divide(mesh, (), arrays)
    chex.assert_trees_all_close(run(*operands, arrays=arrays), expected, atol=1e-12)


def test_fewer_heads_than_devices_divide_a_projection():
    """The partitioner then splits the axis of the mesh."""
    x, weights = random(0, (2, 5, 16)), random(1, (16, 4 * 8))
    divided = divide(make_mesh({"x": 8}), (None, "x"), weights)

    def attend(weights):
        tokens = (x @ weights).reshape(2, 5, 4, 8)
        return jnp.sin(sinkhorn_attention(tokens, tokens, tokens, num_iters=2)).sum()

    gradient = jax.jit(jax.grad(attend))
    chex.assert_trees_all_close(gradient(divided), gradient(weights), atol=1e-12)


@pytest.mark.few(2)
@KINDS
@pytest.mark.parametrize("spec", [(None, "x"), ("y", "x"), (None, None, "x")])
def test_a_bias_may_be_divided_otherwise(kind, spec):
    operands, bias = inputs(b=B, t=8, s=8, n=N, k=N), random(1, (B, N, 8, 8))
    attend = jax.jit(functools.partial(sinkhorn_attention, num_iters=2))
    expected = attend(*operands, bias)
    mesh = make_mesh({"x": 4, "y": 2}, kind)
    divided = divide(mesh, ("x",), operands), divide(mesh, spec, bias)
    if kind == AxisType.Explicit and "x" in spec[2:]:
        with pytest.raises(ValueError, match=r"mesh axis 'x'.*reshard"):
            attend(*divided[0], divided[1])
        return
    got = attend(*divided[0], divided[1])
    chex.assert_trees_all_close(got, expected, atol=1e-12)
    if kind == AxisType.Explicit:  # Where axes are Auto, the partitioner chooses.
        assert got.sharding.is_equivalent_to(divided[0][0].sharding, 4)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["streaming", "scaling"])
def test_other_transforms_are_right(implementation):
    """`vmap`, `remat` and `export` agree, whether the arrays are divided or not."""
    operands = inputs(b=B, t=3, s=4, n=2, k=2)
    divided = divide(make_mesh({"x": 8}), ("x",), operands)

    def loss(*operands):
        out = sinkhorn_attention(*operands, num_iters=2, implementation=implementation)
        return (out**3).sum()

    gradient = jax.jit(jax.grad(loss))
    expected = gradient(*operands)
    by_vmap = jax.jit(jax.vmap(jax.grad(loss)))
    of_one = lambda arrays: [x[:, None] for x in arrays]
    for arrays in (operands, divided):
        chex.assert_trees_all_close(
            by_vmap(*of_one(arrays))[:, 0], expected, atol=1e-12
        )
        remat = jax.jit(jax.grad(jax.checkpoint(loss)))
        chex.assert_trees_all_close(remat(*arrays), expected, atol=1e-12)
    with pytest.raises(TypeError, match="implementation='reference'"):
        jax.jvp(loss, operands, operands)
    exported = export.export(jax.jit(jax.grad(loss)))(*operands)
    chex.assert_trees_all_close(exported.call(*operands), expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scaling", "streaming"])
def test_second_derivatives_are_right(implementation):
    operands = inputs(b=1, t=3, s=4, n=2, k=2)

    def loss(*operands):
        out = sinkhorn_attention(*operands, num_iters=2, implementation=implementation)
        return (out**3).sum()

    gradient = jax.jit(jax.grad(loss))
    second = jax.jit(jax.jacrev(jax.grad(loss)))(*operands)
    step, direction = 1e-5, random(9, operands[0].shape)
    query, *others = operands
    change = gradient(query + step * direction, *others) - gradient(
        query - step * direction, *others
    )
    product = jnp.tensordot(second, direction, axes=4)
    np.testing.assert_allclose(product, change / (2 * step), atol=1e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["scaling", "streaming"])
def test_a_mapped_axis_is_divided_too(implementation):
    operands = inputs(b=B, t=T, s=S, n=2, k=2)
    mapped = jax.vmap(
        functools.partial(
            sinkhorn_attention, num_iters=3, implementation=implementation
        )
    )
    divided = divide(make_mesh({"x": 8}), ("x",), operands)
    program = jax.jit(mapped).lower(*divided).compile()
    chex.assert_trees_all_close(program(*divided), mapped(*operands), atol=1e-12)
    assert collectives(program) == {}
    whole = count(jax.jit(mapped).lower(*operands).compile())
    assert count(program)["exponential"] <= 0.14 * whole["exponential"]


@pytest.mark.few(1)
@IMPLEMENTATIONS
def test_parts_of_shard_map_have_the_dropout_of_one_device(implementation):
    query, key, value = inputs(b=B, t=T, s=S, n=2, k=2)
    same = tuple(jnp.broadcast_to(x[:1], x.shape) for x in (query, key, value))
    rng = jax.random.key(5)

    def attend(query, key, value):
        return sinkhorn_attention(
            *(query, key, value),
            num_iters=2,
            dropout_rate=0.5,
            dropout_rng=rng,
            implementation=implementation,
        )

    mesh, parts = make_mesh({"x": 4, "y": 2}), PartitionSpec(("x", "y"))
    sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=parts, out_specs=parts))
    got = sharded(*same)
    chex.assert_trees_all_close(got, attend(*same), atol=1e-12)
    assert len(np.unique(np.asarray(got[:, 0, 0, 0]))) == B


@pytest.mark.few(1)
@KINDS
def test_layers_need_no_gather(kind):
    """With the parameters on every device and the batch divided."""
    layer = MultiHeadSinkhornAttention(
        num_heads=2, num_iters=2, dtype=jnp.float64, param_dtype=jnp.float64
    )
    x = random(0, (B, T, 6))
    params = layer.init(jax.random.key(0), x)
    mesh = make_mesh({"x": 8}, kind)
    with jax.set_mesh(mesh):
        divided = divide(mesh, ("x",), x)
        whole = divide(mesh, (), params)
        program = jax.jit(layer.apply).lower(whole, divided).compile()
        out = program(whole, divided)
    chex.assert_trees_all_close(out, layer.apply(params, x), atol=1e-12)
    assert collectives(program) == {}


@pytest.mark.parametrize("spec", [(None, "x"), (None, None, None, "x")])
def test_tokens_and_features_stay_whole(spec):
    mesh = make_mesh({"x": 8}, AxisType.Explicit)
    operands = divide(mesh, spec, inputs(b=2, t=16, s=16, n=2, k=2, h=8, d=8))
    with pytest.raises(ValueError, match=r"mesh axis 'x'.*reshard"):
        jax.jit(sinkhorn_attention)(*operands)


def test_a_context_that_changes_precision():
    """The partitioner works in a thread that has not entered it."""
    operands = inputs(b=8, t=4, s=4, n=2, k=2)
    with jax.enable_x64(False):
        narrow = [x.astype(jnp.float32) for x in operands]
        divided = divide(make_mesh({"x": 8}), ("x",), narrow)
        out = jax.jit(sinkhorn_attention)(*divided)
    np.testing.assert_allclose(out, sinkhorn_attention(*operands), atol=1e-5)


def test_vmap_over_a_divided_axis_is_refused_where_axes_are_explicit():
    mesh = make_mesh({"x": 8}, AxisType.Explicit)
    operands = divide(mesh, ("x",), inputs(b=8, t=4, s=4, n=2, k=2))
    with pytest.raises(ValueError, match=r"jax.vmap.*own leading axes"):
        jax.vmap(sinkhorn_attention)(*operands)


def test_auto_axes_over_tokens_are_gathered():
    operands = inputs(b=2, t=16, s=16, n=2, k=2)
    divided = divide(make_mesh({"x": 8}), (None, "x"), operands)
    attend = jax.jit(functools.partial(sinkhorn_attention, num_iters=2))
    chex.assert_trees_all_close(attend(*divided), attend(*operands), atol=1e-12)
