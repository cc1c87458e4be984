"""The matrix functions on logits that are divided over eight devices."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.matrices import random

from benchmarks.harness.compiled_text import collectives, count
from sinkhorn_jax import sinkhorn, sinkhorn_potentials, traced_checks

SHAPE = 8, 4, 12, 10
DIVISIONS = {
    "first": ({"x": 8}, ("x",)),
    "second": ({"x": 2, "y": 4}, (None, "y")),
    "both": ({"x": 2, "y": 4}, ("x", "y")),
}


def solve(logits, marginal, implementation):
    """Plan and potentials, and their gradients by logits and marginal."""

    def loss(logits, marginal):
        arguments = {"row_marginal": marginal, "implementation": implementation}
        plan = sinkhorn(logits, 3, **arguments)
        potentials = sinkhorn_potentials(logits, 3, **arguments)
        total = jnp.sin(plan).sum() + jnp.sin(potentials.f).sum()
        return total, (plan, potentials)

    return jax.grad(loss, (0, 1), has_aux=True)(logits, marginal)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("implementation", ["scaling", "reference"])
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.few(2)
def test_every_device_computes_its_part(kind, implementation, division):
    logits, marginal = random(0, SHAPE), jnp.abs(random(1, SHAPE[:-1])) + 0.1
    sizes, spec = DIVISIONS[division]
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    divided = jax.device_put((logits, marginal), sharding)
    lower = lambda arrays: jax.jit(solve, static_argnums=2).lower(
        *arrays, implementation
    )
    whole, program = lower((logits, marginal)).compile(), lower(divided).compile()
    results = program(*divided)
    chex.assert_trees_all_close(results, whole(logits, marginal), atol=1e-12)
    for x in jax.tree.leaves(results):  # The number of iterations is a constant.
        assert x.dtype == jnp.int32 or x.sharding.is_equivalent_to(sharding, x.ndim)
    assert collectives(program) == {}
    parts = 8 if None not in spec else 4
    whole, part = count(whole), count(program)
    assert whole["exponential"] > 1e4
    for name, number in whole.items():
        assert part[name] <= 0.14 * 8 / parts * number, name


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["scaling", "reference"])
@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_shard_map_with_its_checks(implementation, tolerance):
    logits = random(0, SHAPE)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def potentials(logits):
        options = {"tolerance": tolerance, "implementation": implementation}
        return sinkhorn_potentials(logits, 20, **options)

    parts = PartitionSpec("x")
    sharded = jax.shard_map(
        potentials, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=True
    )
    chex.assert_trees_all_close(
        jax.jit(sharded)(logits), potentials(logits), atol=1e-12
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["scaling", "reference"])
def test_parts_that_no_axis_of_the_mesh_makes(implementation):
    """A batch over eight devices, in parts of four as in gradient accumulation."""
    logits = random(0, (8, 6, 5))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def in_parts(logits):
        def add(total, part):
            plan = sinkhorn(part, 3, implementation=implementation)
            return total + jnp.sin(plan).sum(), plan

        start = jnp.zeros((), logits.dtype)
        return jax.lax.scan(add, start, logits.reshape(2, 4, 6, 5))

    divided = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("x")))
    chex.assert_trees_all_close(
        jax.jit(in_parts)(divided), in_parts(logits), atol=1e-12
    )


def test_arguments_that_are_divided_otherwise():
    """`sinkhorn` takes Explicit axes that JAX's own operations would not combine."""
    logits = random(0, SHAPE)
    arguments = {
        "where": random(1, SHAPE) > -1.5,
        "row_marginal": jnp.ones(SHAPE[:-1]),
        "column_tau": jnp.full(SHAPE[:2], 0.5),
    }
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    expected = sinkhorn(logits, 3, **arguments)
    divided = {
        "where": put(arguments["where"], "y", "x"),
        "row_marginal": put(arguments["row_marginal"], "y"),
        "column_tau": put(arguments["column_tau"], ("x", "y")),
    }
    solve = jax.jit(lambda z, given: sinkhorn(z, 3, **given))
    got = solve(put(logits, "x", "y"), divided)
    chex.assert_trees_all_close(got, expected, atol=1e-12)


def test_traced_checks_are_refused():
    mesh = jax.make_mesh((8,), ("x",))
    logits = jax.device_put(random(0, SHAPE), NamedSharding(mesh, PartitionSpec("x")))
    with traced_checks(), pytest.raises(NotImplementedError, match="one device"):
        sinkhorn(logits)


def test_rows_and_columns_stay_whole():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    logits = jax.device_put(
        random(0, SHAPE), NamedSharding(mesh, PartitionSpec(None, None, "x"))
    )
    with pytest.raises(ValueError, match=r"mesh axis 'x'.*reshard"):
        sinkhorn(logits)
