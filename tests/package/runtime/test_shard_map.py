"""The matrix functions in `jax.shard_map`, with its checks of what varies."""

import chex
import jax
import jax.numpy as jnp
import pytest
from support.matrices import S, T, random

from sinkhorn_jax import sinkhorn, sinkhorn_potentials

BATCH, WHOLE = jax.sharding.PartitionSpec("b"), jax.sharding.PartitionSpec()


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", ["scaling", "reference"])
@pytest.mark.parametrize("finish", ["rows", "columns"])
@pytest.mark.parametrize(
    "tolerance", [0.05, pytest.param(None, marks=pytest.mark.slow)]
)
def test_shards_of_the_batch(implementation, finish, tolerance):
    """With a marginal that is the same for all shards."""
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"tolerance": tolerance, "implementation": implementation}

    def solve(logits, marginal):
        arguments = {"row_marginal": marginal, "finish": finish} | options
        plan = sinkhorn(logits, 3, **arguments)
        return plan, sinkhorn_potentials(logits, 3, **arguments)

    def gradients(solve):
        def loss(*arguments):
            plan, potentials = solve(*arguments)
            return jnp.sin(plan).sum() + jnp.sin(potentials.f).sum(), potentials

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    sharded = jax.shard_map(
        solve, mesh=mesh, in_specs=(BATCH, WHOLE), out_specs=BATCH, check_vma=True
    )
    arguments = random(0, (2, T, S)), jnp.abs(random(1, (T,))) + 0.1
    got, expected = (gradients(f)(*arguments) for f in (sharded, solve))
    chex.assert_trees_all_close(got, expected, atol=1e-12)
