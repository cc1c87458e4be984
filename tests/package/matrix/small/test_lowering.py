"""Kernels for small matrices lower for their platforms."""

import functools

import chex
import jax
import pytest
from support.lowering import lowered_for
from support.small_matrices import M, S, T

from sinkhorn_jax import sinkhorn, sinkhorn_potentials


def step(logits, cotangent, **options):
    """The plan, its gradient, and the gradient of the potentials."""
    plan, pull_back = jax.vjp(lambda z: sinkhorn(z, **options), logits)
    potentials, pull_back_potentials = jax.vjp(
        lambda z: sinkhorn_potentials(z, **options)[:2], logits
    )
    return plan, pull_back(cotangent), pull_back_potentials(potentials)


def assert_lowers(implementation, n, batch, dtype, **options):
    platform, target = {
        "mosaic_gpu": ("cuda", "mosaic_gpu_v2"),
        "mosaic_tpu": ("tpu", "tpu_custom_call"),
    }[implementation]
    options |= {"implementation": implementation}
    arrays = [jax.ShapeDtypeStruct((batch, n, n), dtype)] * 2
    solve = functools.partial(step, **options)
    text = lowered_for(platform, solve, *arrays)
    assert text.count(f"@{target}") == 4, "Two kernels forward and two backward."
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(solve, *arrays)[:2], (arrays[0], (arrays[0],))
    )


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("n", "batch", "dtype"),
    [
        (2, 1, "float32"),
        (4, 65536, "bfloat16"),
        (8, 1000, "bfloat16"),
        pytest.param(16, 65536, "float32", marks=pytest.mark.slow),
    ],
)
def test_lowers_for_tpu(n, batch, dtype):
    assert_lowers("mosaic_tpu", n, batch, dtype, num_iters=20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 1000, 65536, 10_000_000])
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_lowers_for_tpu_in_every_size(dtype, n, batch, finish):
    assert_lowers("mosaic_tpu", n, batch, dtype, num_iters=100, finish=finish)


@pytest.mark.parametrize(
    ("n", "batch", "dtype"), [(2, 1, "bfloat16"), (4, 1000, "float32")]
)
def test_lowers_for_gpu(n, batch, dtype):
    assert_lowers("mosaic_gpu", n, batch, dtype, num_iters=20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("finish", ["rows", "columns"])
def test_lowers_for_gpu_in_every_size(dtype, n, finish):
    assert_lowers("mosaic_gpu", n, 10_000_000, dtype, num_iters=400, finish=finish)


@pytest.mark.parametrize(
    ("kernel", "platform"), [("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu")]
)
def test_shard_map_lowers_with_its_checks_of_what_varies(kernel, platform):
    many = jax.sharding.PartitionSpec("m")
    sharded = jax.shard_map(
        functools.partial(step, implementation=kernel, num_iters=2),
        in_specs=many,
        out_specs=many,
    )
    arrays = [jax.ShapeDtypeStruct((M, T, S), "float32")] * 2
    assert "custom_call" in lowered_for(platform, sharded, *arrays, axis="m")
