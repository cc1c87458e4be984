"""How a head is divided by default: regime, cluster, dtype and warpgroups."""

import dataclasses
import itertools

import jax.numpy as jnp
import pytest
from support.kernel_steps import problem

from sinkhorn_jax._core.options import Options
from sinkhorn_jax.attention._mosaic_gpu.blocks import TILE, Blocks, WarpgroupConfig
from sinkhorn_jax.attention._mosaic_gpu.heuristics import (
    default_blocks,
    resident_forward_warpgroups,
    resident_reverse_warpgroups,
)
from sinkhorn_jax.attention._mosaic_gpu.shared_memory import (
    SHARED_MEMORY,
    num_bytes,
    resident_forward_scratch,
    resident_reverse_scratch,
    sweep_scratch,
)


def test_blocks_are_checked(unchecked):
    blocks = default_blocks(problem())
    with pytest.raises(ValueError, match="refresh_every must be at least 1, got 0"):
        dataclasses.replace(blocks, refresh_every=0)
    with pytest.raises(ValueError, match="max_warpgroups must be at least 1, got 0"):
        dataclasses.replace(blocks, max_warpgroups=0)
    with pytest.raises(ValueError, match="cluster must be at most 8, got 9"):
        dataclasses.replace(blocks, cluster=9)
    with pytest.raises(ValueError, match="num_col_tiles must be at least 1, got 0"):
        Blocks(num_row_tiles=1, num_col_tiles=0, regime="streamed")
    with pytest.raises(ValueError, match=r"kernel_dtype must be one of .*'float16'"):
        dataclasses.replace(blocks, kernel_dtype="float16")


@pytest.mark.parametrize("t", [1, 64, 197, 30_000])
@pytest.mark.parametrize("s", [1, 1024])
def test_blocks_cover_every_query_and_key(t, s):
    blocks = default_blocks(problem(t=t, s=s))
    assert blocks.rows - TILE < t <= blocks.rows
    assert blocks.cols - TILE < s <= blocks.cols


@pytest.mark.parametrize(
    ("s", "head_dim", "cluster", "at_once"),
    [
        (320, 64, 1, 2),
        (384, 64, 2, 2),
        (768, 64, 4, 2),
        (1024, 64, 4, 2),
        (2048, 64, 8, 2),
        (2560, 64, 8, 2),
        (2624, 64, 4, 1),
        (6144, 64, 8, 1),
        (192, 65, 1, 2),
        (1536, 65, 8, 2),
        (5120, 65, 8, 1),
    ],
)
def test_query_blocks_that_fit_are_kept(s, head_dim, cluster, at_once):
    """By a cluster of which two thread blocks fit on a multiprocessor, or else one."""
    long = problem(t=4096, s=s, head_dim=head_dim)
    blocks = default_blocks(long)
    assert (blocks.regime, blocks.keeps_query_block) == ("streamed", True)
    assert blocks.cluster == cluster
    assert min(2, SHARED_MEMORY // num_bytes(sweep_scratch(long, blocks))) == at_once


@pytest.mark.parametrize(("s", "head_dim"), [(6145, 64), (5121, 65)])
def test_longer_query_blocks_are_computed_twice(s, head_dim):
    blocks = default_blocks(problem(t=4096, s=s, head_dim=head_dim))
    assert (blocks.regime, blocks.keeps_query_block) == ("streamed", False)
    assert blocks.cluster == 1


@pytest.mark.parametrize(
    ("t", "s", "head_dim", "dtype", "kernel_dtype", "cluster", "num_stages"),
    [
        (128, 128, 64, "bfloat16", "float32", 1, 2),
        (192, 192, 64, "bfloat16", "bfloat16", 1, 2),
        (192, 192, 64, "float16", "float32", 1, 2),
        (192, 192, 128, "bfloat16", "bfloat16", 1, 2),
        (192, 192, 128, "float16", "float32", 3, 2),
        (193, 192, 64, "bfloat16", "bfloat16", 1, 2),
        (128, 256, 128, "bfloat16", "bfloat16", 1, 2),
        (256, 128, 128, "bfloat16", "bfloat16", 1, 2),
        (256, 256, 64, "bfloat16", "bfloat16", 1, 2),
        (256, 256, 128, "bfloat16", "bfloat16", 2, 2),
        (256, 256, 64, "float16", "float32", 2, 2),
        (257, 256, 128, "bfloat16", "bfloat16", 4, 2),
        (320, 320, 64, "float16", "float32", 5, 2),
        (512, 512, 64, "bfloat16", "bfloat16", 4, 2),
        (512, 512, 64, "float16", "float32", 8, 2),
        (512, 512, 128, "bfloat16", "bfloat16", 8, 2),
        (512, 512, 128, "float16", "float32", 8, 1),
        # The keys are one key block of the reverse sweep, whatever the cluster.
        (1024, 64, 128, "bfloat16", "bfloat16", 1, 1),
    ],
)
def test_short_heads_are_resident(
    t, s, head_dim, dtype, kernel_dtype, cluster, num_stages
):
    dims = {"head_dim": head_dim, "value_dim": head_dim, "dtype": jnp.dtype(dtype)}
    short = problem(t=t, s=s, **dims)
    blocks = default_blocks(short)
    assert blocks.regime == "resident"
    assert (blocks.kernel_dtype, blocks.cluster) == (kernel_dtype, cluster)
    for stages in range(1, 3):
        config = WarpgroupConfig(1, stages)
        needed = num_bytes(resident_forward_scratch(short, blocks, config))
        assert (needed <= SHARED_MEMORY) == (stages <= num_stages)
    softmax = default_blocks(problem(t=t, s=s, **dims, options=Options(0)))
    assert softmax.regime == "streamed"


@pytest.mark.parametrize(
    ("t", "s", "head_dim", "dtype"),
    [
        (576, 576, 128, "bfloat16"),
        (640, 640, 64, "bfloat16"),
        (576, 576, 64, "float16"),
        (2048, 64, 64, "bfloat16"),
        (64, 1000, 128, "float16"),
    ],
)
def test_long_heads_are_streamed(t, s, head_dim, dtype):
    dims = {"head_dim": head_dim, "value_dim": head_dim, "dtype": jnp.dtype(dtype)}
    assert default_blocks(problem(t=t, s=s, **dims)).regime == "streamed"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("value_dim", [64, 128])
def test_resident_heads_fit_forward_and_in_reverse(head_dim, value_dim):
    dims = {"head_dim": head_dim, "value_dim": value_dim}
    resident, num_stages = set(), set()
    for t, s in itertools.product((64, 192, 256, 384, 512, 640, 960), repeat=2):
        short = problem(t=t, s=s, **dims)
        blocks = default_blocks(short)
        if blocks.regime == "resident":
            config = resident_forward_warpgroups(short, blocks)
            scratch = resident_forward_scratch(short, blocks, config)
            assert num_bytes(scratch) <= SHARED_MEMORY
            config = resident_reverse_warpgroups(short, blocks)
            scratch = resident_reverse_scratch(short, blocks, config)
            assert num_bytes(scratch) <= SHARED_MEMORY
            assert config.num_warpgroups <= min(blocks.max_warpgroups, max(t, s) // 64)
            resident.add((t, s))
            num_stages.add(config.num_stages)
    assert (512, 512) in resident
    assert num_stages == {1, 2}


@pytest.mark.parametrize(
    ("t", "s", "head_dim", "forward", "reverse"),
    [
        (64, 64, 64, (1, 2), (1, 2)),
        (128, 128, 64, (2, 2), (2, 2)),
        (192, 192, 64, (3, 2), (3, 1)),
        # Three would take as many rounds as two.
        (197, 197, 64, (4, 1), (2, 1)),
        (197, 197, 128, (2, 1), (2, 1)),
        (64, 256, 64, (4, 2), (4, 1)),
    ],
)
def test_as_many_warpgroups_as_fit_and_help(t, s, head_dim, forward, reverse):
    short = problem(t=t, s=s, head_dim=head_dim, value_dim=head_dim)
    blocks = default_blocks(short)
    assert resident_forward_warpgroups(short, blocks) == forward
    assert resident_reverse_warpgroups(short, blocks) == reverse
    alone = dataclasses.replace(blocks, max_warpgroups=1)
    assert resident_forward_warpgroups(short, alone).num_warpgroups == 1
    assert resident_reverse_warpgroups(short, alone).num_warpgroups == 1
