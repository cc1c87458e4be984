"""The counter of work in Pallas kernels, and the TPU kernels' work against theory."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from benchmarks.ahead_of_time import work as _work
from benchmarks.harness import program as _program
from benchmarks.harness.cases import Case
from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax.attention._mosaic_tpu import attend as _mosaic_tpu
from sinkhorn_jax.attention._mosaic_tpu.blocks import default_blocks

NUM_ITERS = 10
HEAD_DIM = 64


def test_counts_branches_loops_and_blocks():
    """On a grid of 3 x 4: products in one branch, exponentials in a loop of i + 1."""

    def kernel(size_ref, x_ref, out_ref, sum_ref):
        i, j = pl.program_id(0), pl.program_id(1)

        @pl.when(j == size_ref[0])
        def _():
            dims = ((1,), (0,)), ((), ())
            out_ref[...] = jax.lax.dot_general(
                x_ref[...], x_ref[...], dims, precision="highest"
            )

        @pl.when(j != size_ref[0])
        def _():
            sum_ref[...] = x_ref[...] + x_ref[...]

        def add(_, carry):
            sum_ref[...] = jnp.exp(x_ref[...])
            return carry

        jax.lax.fori_loop(jnp.int32(0), i + 1, add, jnp.int32(0))

    def call(size, x):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((8, 32), jnp.float32),
            grid=(3, 4),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((8, 8), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((8, 8), lambda i, j: (0, i)),
            scratch_shapes=[pltpu.VMEM((8, 8), jnp.float32)],
            name="some_kernel",
        )(size, x)

    size = jax.ShapeDtypeStruct((1,), "int32")
    x = jax.ShapeDtypeStruct((8, 32), "float32")
    (work,) = _work.count(call, size, x, smem={"some_kernel": [2]})
    assert work.name == "some_kernel"
    assert work.flops == 3 * 2 * 8**3
    assert work.passes == 6 * work.flops
    assert work.vector == 3 * 3 * 64
    assert work.exps == 4 * (1 + 2 + 3) * 64
    assert work.num_bytes == 4 * 64 * (12 + 3)
    assert work.estimate is None


@pytest.fixture
def in_regime(monkeypatch):
    def set_regime(regime):
        blocks = functools.partial(default_blocks, regime=regime)
        monkeypatch.setattr(_mosaic_tpu, "default_blocks", blocks)
        jax.clear_caches()

    yield set_regime
    jax.clear_caches()


def kernels(tokens, dtype="bfloat16", num_iters=NUM_ITERS):
    """What the forward and the backward kernel do for one head."""
    attend = functools.partial(
        sinkhorn_attention, num_iters=num_iters, implementation="mosaic_tpu"
    )
    case = Case(1, tokens, HEAD_DIM, dtype, num_iters)
    array = jax.ShapeDtypeStruct(case.shape_btnh, dtype)
    smem = {
        f"sinkhorn_attention_{direction}": [tokens, tokens, 1]
        for direction in ("forward", "backward")
    }
    fn = _program.in_mode(attend, "forward_backward")
    forward, backward = _work.count(fn, *[array] * 4, smem=smem)
    return {"forward": forward, "backward": backward}


@pytest.mark.parametrize(
    ("dtype", "tokens", "num_iters"),
    [("bfloat16", 256, 4), ("float32", 128, 1), ("float32", 256, 0)],
    ids=str,
)
@pytest.mark.parametrize("regime", ["resident", "strip"])
def test_cost_estimates_say_what_the_kernels_do(
    in_regime, regime, dtype, tokens, num_iters
):
    in_regime(regime)
    for work in kernels(tokens, dtype, num_iters).values():
        assert work.estimate.flops == work.flops
        assert work.estimate.bytes_accessed == work.num_bytes
        # Beside the exponentials of entries there are logarithms and exponentials for
        # rows and columns, of which a matrix of 128 has few entries each.
        extra = work.exps - work.estimate.transcendentals
        assert 0 <= extra <= (5 + 2 * num_iters) * 2 * tokens


def least(regime, direction, num_iters):
    """Products of matrices in units of 2 T S H flops, and exponentials an entry.

    In strips as one pass for each iteration and an extra for the first column step. A
    resident matrix is made once: logits for the softmax and the first column step (two
    exponentials), again for the matrix, and the output; backward logits for the matrix
    and for the first steps' two exponentials, the plan's cotangent for the seed and for
    the end, and three gradients. Either has the correction of rank 2 L.
    """
    correction = 2 * num_iters / HEAD_DIM
    return {
        ("strip", "forward"): (num_iters + 2, num_iters + 2),
        ("strip", "backward"): (num_iters + 6 + correction, num_iters + 3),
        ("resident", "forward"): (3, 3),
        ("resident", "backward"): (7 + correction, 3),
    }[regime, direction]


@pytest.mark.parametrize("regime", ["resident", "strip"])
def test_work_is_near_the_least(in_regime, regime):
    in_regime(regime)
    tokens = 512
    for direction, work in kernels(tokens).items():
        products, exps = least(regime, direction, NUM_ITERS)
        assert (
            products * 0.95 < work.flops / (2 * tokens**2 * HEAD_DIM) < 1.3 * products
        )
        assert exps <= work.exps / tokens**2 < 1.3 * exps


def test_a_resident_matrix_makes_no_more_exps_with_more_iterations(in_regime):
    in_regime("resident")
    few, many = (kernels(256, num_iters=num) for num in (5, 20))
    for direction in few:
        assert few[direction].estimate.transcendentals == (
            many[direction].estimate.transcendentals
        )
        assert many[direction].exps < 1.2 * few[direction].exps


def test_counts_what_a_gpu_does_in_one_and_in_shared_memory():
    """In two warpgroups of 3 programs."""

    def kernel(x_ref, weights_ref, out_ref, x_tile, weights_tile, barrier):
        plgpu.copy_gmem_to_smem(x_ref, x_tile, barrier)
        plgpu.copy_gmem_to_smem(weights_ref, weights_tile, barrier)
        plgpu.barrier_wait(barrier)

        def add_product(acc_ref):
            plgpu.wgmma(acc_ref, x_tile, x_tile)
            return acc_ref[...]

        shape = (64, 64)
        product = pl.run_scoped(
            add_product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
        )
        x = plgpu.layout_cast(x_tile[...], plgpu.Layout.WGMMA).astype(jnp.float32)
        weights = plgpu.layout_cast(weights_tile[...], plgpu.Layout.WGMMA.reduce(0))
        weights = jax.lax.broadcast_in_dim(weights, shape, (1,))
        # A conversion, a product and sum in one, and a sum of what is used again.
        double = product * 2
        out_ref[...] = (product + x * weights) + (double + double)

    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[
            plgpu.SMEM((64, 64), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((64,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(3,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="some_kernel",
    )
    x = jax.ShapeDtypeStruct((64, 64), "bfloat16")
    weights = jax.ShapeDtypeStruct((64,), "float32")
    (work,) = _work.count_gpu(run, x, weights)
    assert (work.name, work.exps) == ("some_kernel", 0)
    assert work.flops == 6 * 2 * 64**3
    assert work.vector == 6 * 5 * 64**2
    # The copy, both operands of the tensor cores, and what is read. Of the weights the
    # copy, and 8 loads of each warp, of two numbers a thread.
    assert work.shared == 6 * (4 * 2 * 64**2 + 4 * 64 + 8 * 4 * 128)


@pytest.mark.parametrize("tokens", [64, 192, 256, 1024, 4096])
@pytest.mark.parametrize("num_iters", [0, 1, 10])
def test_gpu_kernels_make_entries_so_often(tokens, num_iters):
    """Backwards, where a sweep is a launch for each iteration unless heads are held."""
    array = jax.ShapeDtypeStruct((1, tokens, 1, HEAD_DIM), "bfloat16")
    attend = functools.partial(
        sinkhorn_attention, num_iters=num_iters, implementation="mosaic_gpu"
    )
    step = _program.in_mode(attend, "forward_backward")
    found, launches, products = {}, {}, {}
    for work in _work.count_gpu(step, *[array] * 4):
        name = work.name.removeprefix("sinkhorn_attention_")
        found.setdefault(name, []).append(work.exps / tokens**2)
        launches.setdefault(name, []).append(work.times)
        flops = work.flops / (2 * tokens**2 * HEAD_DIM)
        products.setdefault(name, []).append(flops)
    # Once for a group of iterations; in the sweep in one launch for the seeds of rows,
    # and in the last pass for row step 0.
    groups = {0: 0, 1: 1, 10: 2}[num_iters]
    if num_iters and tokens <= 256:
        assert found["resident_reverse"] == [groups + 1]
        assert found["resident_pull_back"] == [groups + 1]
        # Logits and the plan's cotangent, then dq, dk and dv.
        assert products["resident_pull_back"] == [5]
        assert not {"seed", "sweep", "pull_back"} & found.keys()
        return
    # For dq, and again for dk and dv.
    assert found["pull_back"] == [groups + 1] * 2
    assert products["pull_back"] == [3, 4]
    if num_iters:
        assert found["seed"] == [1]
        assert set(found["sweep"]) == {1}
        # Forward, where another kernel makes the first column step, and backward.
        expected = [num_iters - 1, num_iters]
        assert [x for x in launches["sweep"] if x] == [x for x in expected if x]
