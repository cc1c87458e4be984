"""The kernels of every regime lower for CUDA, on any machine."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from support.gpu_attention import lowered
from support.kernel_steps import problem
from support.kernel_steps import step as step_of

from sinkhorn_jax.attention._mosaic_gpu import tiles
from sinkhorn_jax.attention._mosaic_gpu.heuristics import (
    default_blocks,
    resident_forward_warpgroups,
    resident_reverse_warpgroups,
)
from sinkhorn_jax.attention._mosaic_gpu.launch import call_kernel, vector
from sinkhorn_jax.attention._mosaic_gpu.loops import load
from sinkhorn_jax.attention._mosaic_gpu.shared_memory import (
    SHARED_MEMORY,
    num_bytes,
    resident_forward_scratch,
    resident_reverse_scratch,
)

step = functools.partial(step_of, "mosaic_gpu")


def assert_lowers(dtype, t, s, head_dim, value_dim, *, is_resident):
    shapes = (1, t, 2, head_dim), (1, s, 1, head_dim), (1, s, 1, value_dim)
    text = lowered(step(), *shapes, (1, t, 2, value_dim), dtype=dtype)
    names = {"resident", "resident_reverse"}
    if not is_resident:
        names = {"log_row_sums", "sweep", "apply", "seed"}
    # What a tile of queries and of keys needs beside the cotangents of all queries.
    fits = t * head_dim <= 128 * 128 or (t <= 512 and head_dim <= 64)
    names.add("resident_pull_back" if is_resident and fits else "pull_back")
    assert set(re.findall(r"sinkhorn_attention_([a-z_]+)\b", text)) >= names
    others = {"apply", "seed", "resident", "resident_pull_back", "pull_back"} - names
    assert not re.search(rf"sinkhorn_attention_({'|'.join(others)})\b", text)


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("t", "s", "regime", "keeps_query_block", "has_cluster"),
    [
        (128, 128, "resident", True, False),
        (512, 512, "resident", True, True),
        (2048, 64, "streamed", True, False),
        (1024, 1024, "streamed", True, True),
        (8192, 8192, "streamed", False, False),
    ],
)
def test_every_regime(dtype, head_dim, t, s, regime, keeps_query_block, has_cluster):
    dims = {"head_dim": head_dim, "value_dim": head_dim, "dtype": jnp.dtype(dtype)}
    blocks = default_blocks(problem(t=t, s=s, **dims))
    assert (blocks.regime, blocks.keeps_query_block) == (regime, keeps_query_block)
    assert (blocks.cluster > 1) == has_cluster
    assert_lowers(dtype, t, s, head_dim, head_dim, is_resident=regime == "resident")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("dtype", "t", "s", "head_dim", "value_dim", "is_resident"),
    [
        ("bfloat16", 197, 197, 64, 128, True),
        ("float16", 512, 500, 64, 64, True),
        ("float16", 1024, 197, 64, 64, False),
        ("float16", 64, 1000, 128, 32, False),
        ("bfloat16", 128, 130, 128, 64, True),
    ],
)
def test_edges_and_values_of_another_width(
    dtype, t, s, head_dim, value_dim, is_resident
):
    assert_lowers(dtype, t, s, head_dim, value_dim, is_resident=is_resident)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("t", "s"), [(128, 256), *((n, n) for n in (1, 197, 256, 4096))]
)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_more_shapes(dtype, t, s, head_dim):
    assert_lowers(dtype, t, s, head_dim, head_dim, is_resident=t <= 512)


# Each uses all of shared memory but 1 KiB at most, in clusters of 1, 1, 2, 6, 2, 8, 3.
@pytest.mark.parametrize(
    ("t", "s", "head_dim", "value_dim"),
    [
        (64, 1216, 64, 64),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in [
                (192, 192, 128, 128),
                (192, 448, 64, 64),
                (384, 640, 64, 128),
                (128, 512, 128, 128),
                (512, 640, 128, 64),
                (576, 384, 64, 64),
            ]
        ),
    ],
)
def test_heads_that_just_fit(t, s, head_dim, value_dim):
    full = problem(t=t, s=s, head_dim=head_dim, value_dim=value_dim)
    blocks = default_blocks(full)
    forward, reverse = (
        num_bytes(scratch(full, blocks, warpgroups(full, blocks)))
        for scratch, warpgroups in (
            (resident_forward_scratch, resident_forward_warpgroups),
            (resident_reverse_scratch, resident_reverse_warpgroups),
        )
    )
    assert SHARED_MEMORY - max(forward, reverse) < 2**10
    shapes = (1, t, 2, head_dim), (1, s, 1, head_dim), (1, s, 1, value_dim)
    text = lowered(step(), *shapes, (1, t, 2, value_dim), dtype="bfloat16")
    assert "sinkhorn_attention_resident" in text


@pytest.mark.few(1)
@pytest.mark.parametrize("tokens", [64, 1024])
def test_shard_map_with_its_checks_of_what_varies(tokens):
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.sharding.PartitionSpec("b")
    sharded = jax.shard_map(
        step(num_iters=2), mesh=mesh, in_specs=batch, out_specs=batch
    )
    shape = 1, tokens, 1, 64
    assert "sinkhorn_attention_" in lowered(sharded, *[shape] * 4, dtype="bfloat16")


def test_warpgroups_cannot_sum_across_warps():
    """They would share one place in shared memory, and no interpreter sees that."""

    def sums(num_warpgroups):
        def body(inputs, results, smem):
            load(smem.barrier, [(inputs.x, smem.tile)])
            tile = plgpu.layout_cast(smem.tile[...], tiles.TILE_LAYOUT)
            results.sums[...] = tile.sum(axis=0)

        tile = tiles.operand(64, 64, dtype=jnp.dtype("float32"))
        return lambda x: (
            call_kernel(
                body,
                "sums",
                1,
                dict(x=x),
                dict(sums=vector(64)),
                dict(tile=tile, barrier=plgpu.Barrier()),
                num_warpgroups=num_warpgroups,
            ).sums
        )

    assert "sums" in lowered(sums(1), (64, 64), dtype="float32")
    with pytest.raises(Exception, match="reduction scratch size"):
        lowered(sums(2), (64, 64), dtype="float32")
