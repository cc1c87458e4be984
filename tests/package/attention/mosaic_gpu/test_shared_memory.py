"""What the kernels allocate of shared memory, and that it fits."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from support.kernel_steps import problem

from sinkhorn_jax._core.options import Options
from sinkhorn_jax.attention._mosaic_gpu.attend import attend_in
from sinkhorn_jax.attention._mosaic_gpu.blocks import MAX_ITERS
from sinkhorn_jax.attention._mosaic_gpu.heuristics import default_blocks
from sinkhorn_jax.attention._mosaic_gpu.resident import logits_cotangent
from sinkhorn_jax.attention._mosaic_gpu.shared_memory import (
    SHARED_MEMORY,
    num_bytes,
    resident_logits_cotangent_stages,
    streamed_logits_cotangent_stages,
)
from sinkhorn_jax.attention._problem import Operands


@pytest.fixture
def allocations(monkeypatch):
    """`allocations(problem, blocks)`: bytes of each kernel's shared memory, by name."""
    found = {}

    def kernel(body, *, out_type, scratch_types, kernel_name, **params):
        name = kernel_name.removeprefix("sinkhorn_attention_")
        found[name] = num_bytes({"all": scratch_types})
        return lambda *arrays: [jnp.zeros(x.shape, x.dtype) for x in out_type]

    def of(problem, blocks):
        found.clear()
        n, k = problem.num_heads, problem.num_key_heads
        shapes = (
            (1, problem.t, n, problem.head_dim),
            (1, problem.s, k, problem.head_dim),
            (1, problem.s, k, problem.value_dim),
        )

        def attend(*arrays):
            operands = Operands(*arrays, *[None] * (len(Operands._fields) - 3))
            return attend_in(problem, blocks, operands)[0].astype("float32").sum()

        arrays = [jax.ShapeDtypeStruct(shape, problem.dtype) for shape in shapes]
        jax.eval_shape(jax.grad(attend, (0, 1, 2)), *arrays)
        return dict(found)

    monkeypatch.setattr(plgpu, "kernel", kernel)
    return of


@pytest.mark.few(12)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("value_dim", [64, 128])
@pytest.mark.parametrize(
    ("t", "s"), [(128, 128), (192, 448), (512, 512), (1024, 1024), (70, 8192)]
)
def test_all_kernels_fit(allocations, t, s, head_dim, value_dim, dtype):
    dims = {"head_dim": head_dim, "value_dim": value_dim, "dtype": jnp.dtype(dtype)}
    of_head = problem(t=t, s=s, **dims)
    assert max(allocations(of_head, default_blocks(of_head)).values()) <= SHARED_MEMORY


def test_bytes_of_a_resident_head(allocations):
    """A kernel matrix of 512 x 512 in bfloat16, shared by four thread blocks."""
    head = problem(t=512, s=512, head_dim=64, value_dim=64)
    blocks = dataclasses.replace(
        default_blocks(head), kernel_dtype="bfloat16", cluster=4, max_warpgroups=1
    )
    got = allocations(head, blocks)
    kernel, tile, vector = 2 * 128 * 512, 2 * 64 * 64, 4 * 512
    # A row block and two stages of keys; f, u and what E was computed from, g, v, what
    # E was computed from and b; partial sums of the columns, twice.
    assert got["resident"] == kernel + 3 * tile + (3 + 4 + 2) * vector
    # The same of dO and values. df, f and the left factor, g, dg and the right factor;
    # two stages of u, v' and v; partial sums of the rows, twice.
    assert got["resident_reverse"] == kernel + 6 * tile + (6 + 6 + 2) * vector


def test_bytes_of_a_query_block(allocations):
    """Of 1024 keys, shared by four thread blocks."""
    long = problem(t=1024, s=1024, head_dim=64, value_dim=64)
    got = allocations(long, dataclasses.replace(default_blocks(long), cluster=4))
    # A tile of queries and two of keys; f, g and weights, the weights of the rows, and
    # partial sums, each of which occupies 1 KiB; four tiles of the kernel matrix.
    assert got["sweep"] == 3 * 2 * 64 * 64 + 5 * 2**10 + 4 * 4 * 64 * 64
    twice = dataclasses.replace(default_blocks(long), keeps_query_block=False)
    assert allocations(long, twice)["sweep"] == 3 * 2 * 64 * 64 + 3 * 2**10


@pytest.mark.parametrize(
    ("t", "head_dim", "num_iters", "stages"),
    [
        (256, 64, 10, 2),
        (128, 128, 10, 1),
        (192, 128, 10, 0),
        (256, 128, 10, 0),
        (256, 64, MAX_ITERS, 1),
        (256, 64, 0, 0),
        (320, 64, 10, 2),
        (512, 64, 10, 1),
        (576, 64, 10, 0),
    ],
)
def test_short_heads_have_one_launch_for_the_logits_cotangent(
    allocations, monkeypatch, t, head_dim, num_iters, stages
):
    dims = {"head_dim": head_dim, "value_dim": head_dim}
    short = problem(t=t, s=t, **dims, options=Options(num_iters))
    blocks = default_blocks(short)
    assert resident_logits_cotangent_stages(short, blocks) == stages
    got = allocations(short, blocks)
    assert ("resident_pull_back" in got) == (stages > 0)
    assert max(got.values()) <= SHARED_MEMORY
    if 0 < stages < 2:
        name = "resident_logits_cotangent_stages"
        monkeypatch.setattr(logits_cotangent, name, lambda *_: stages + 1)
        assert allocations(short, blocks)["resident_pull_back"] > SHARED_MEMORY


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_iters", [10, MAX_ITERS])
def test_the_streamed_logits_cotangent_fits(allocations, head_dim, num_iters):
    dims = {"head_dim": head_dim, "value_dim": head_dim}
    largest = problem(t=4096, s=4096, **dims, options=Options(num_iters))
    got = allocations(largest, default_blocks(largest))
    assert got["pull_back"] <= SHARED_MEMORY
    has_room = num_iters == 10 or head_dim == 64
    of_tile = problem(**dims, options=Options(num_iters))
    assert streamed_logits_cotangent_stages(of_tile) == (2 if has_room else 1)


def test_a_cluster_has_less_in_each_thread_block(allocations):
    head = problem(t=512, s=512)
    blocks = default_blocks(head)
    fewer = dataclasses.replace(blocks, cluster=8)
    assert allocations(head, fewer)["resident"] < allocations(head, blocks)["resident"]
