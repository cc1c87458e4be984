"""`implementation="mosaic_tpu"`: the interpreter's numbers and races, and lowering."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from support import kernel_steps, reference
from support.attention_cases import with_logits
from support.hostile import hostile_logits
from support.kernel_steps import assert_close, exact, operands, problem
from support.lowering import lowered_for, on_tpu

from sinkhorn_jax import Truncated, sinkhorn_attention
from sinkhorn_jax._core.options import Options
from sinkhorn_jax._runtime.dispatch import preferred
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._mosaic_tpu import attend as mosaic_tpu
from sinkhorn_jax.attention._mosaic_tpu import forward
from sinkhorn_jax.attention._mosaic_tpu.blocks import (
    Blocks,
    default_blocks,
    round_up,
)

# Relative to the largest entry. Float32 as for the other implementations; in bfloat16
# the plan and its gradient are rounded to 8 bits before they are multiplied.
RTOL = {"float32": 5e-6, "bfloat16": 1e-2}

regimes = pytest.mark.parametrize("regime", ["resident", "streamed"])


@pytest.fixture
def in_regime(monkeypatch):
    """Sets the regime, with several query blocks of 16 rows."""

    def set_regime(regime):
        def blocks(problem, direction):
            del direction
            return Blocks(
                rows=16,
                num_blocks=-(-problem.t // 16),
                cols=round_up(problem.s, 128),
                is_resident=regime == "resident",
            )

        monkeypatch.setattr(mosaic_tpu, "default_blocks", blocks)
        jax.clear_caches()

    yield set_regime
    jax.clear_caches()


@pytest.fixture
def interpreted(capfd):
    """Calls a function in the TPU interpreter, and sees that it reports no race."""

    def call(fn, *args):
        params = pltpu.InterpretParams(detect_races=True)
        with pltpu.force_tpu_interpret_mode(params):
            result = jax.tree.map(np.asarray, fn(*args))
        assert "RACE" not in capfd.readouterr().out
        return result

    return call


def step(implementation="mosaic_tpu", **options):
    return kernel_steps.step(implementation, **options)


LENGTHS = {
    "query_seq_lengths": [17, 33, 0],
    "key_value_seq_lengths": [20, 5, 20],
    "num_iters": 3,
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("regime", "options"),
    [
        ("streamed", {"num_iters": 0}),
        ("resident", {"num_iters": 1}),
        ("resident", LENGTHS),
        ("streamed", LENGTHS),
    ],
    ids=str,
)
def test_agrees_with_float64(in_regime, interpreted, regime, options):
    in_regime(regime)
    arrays = operands(33, 20, b=3 if options is LENGTHS else 1)
    options = {
        name: jnp.asarray(value) if name.endswith("lengths") else value
        for name, value in options.items()
    }
    got = interpreted(step(**options), *arrays)
    lengths = tuple(
        options.get(name) for name in ("query_seq_lengths", "key_value_seq_lengths")
    )
    expected = reference.sinkhorn_attention(
        *arrays[:3], num_iters=options["num_iters"], lengths=lengths
    )
    np.testing.assert_allclose(got[0], expected, atol=3e-6)
    assert_close(got, step("reference", **options)(*exact(arrays)), RTOL["float32"])


@pytest.mark.slow
def test_bfloat16(in_regime, interpreted):
    in_regime("resident")
    arrays = operands(24, 140, "bfloat16", b=1, k=2)
    got = interpreted(step(num_iters=3), *arrays)
    assert got[0].dtype == got[2][0].dtype == jnp.bfloat16
    assert got[1].dtype == jnp.float32
    assert_close(got, step("reference", num_iters=3)(*exact(arrays)), RTOL["bfloat16"])


@pytest.mark.slow
def test_hostile_logits(in_regime, interpreted):
    """Some of them make the base absorb the scalings."""
    in_regime("resident")
    n, num_iters = 18, 8
    named = hostile_logits(n)
    logits = jnp.stack([jnp.asarray(x) for x in named.values()])
    query, key = with_logits(logits)
    value = jax.random.normal(jax.random.key(3), (*logits.shape[:2], 1, 4), "float32")
    arrays = query, key, value, jnp.sin(9 * value)
    got = interpreted(step(num_iters=num_iters, scale=1.0), *arrays)
    expected = step("reference", num_iters=num_iters, scale=1.0)(*exact(arrays))
    # Logits of 400 are rounded to 1.5e-5, and so is what the logarithm of a plan is.
    chex.assert_trees_all_close(got[0], expected[0].astype("float32"), atol=1e-4)
    for x, y in zip(got[2][1:], expected[2][1:], strict=True):
        # Where the plan is a permutation the gradient is 0, but for the rounding of
        # terms of order 1.
        size = np.maximum(abs(np.asarray(y)).max(axis=(1, 2, 3)), 1e-2)
        error = abs(x - np.asarray(y)).max(axis=(1, 2, 3)) / size
        assert error.max() < 2e-4, dict(zip(named, error.tolist(), strict=True))
    chex.assert_tree_all_finite(got)


@pytest.mark.slow
def test_a_base_that_moves_in_every_iteration(in_regime, interpreted, monkeypatch):
    in_regime("streamed")
    monkeypatch.setattr(forward, "MAX_DRIFT", 0.0)
    arrays = operands(33, 20, b=1, scale=3.0)
    got = interpreted(step(num_iters=4), *arrays)
    assert_close(got, step("reference", num_iters=4)(*exact(arrays)), RTOL["float32"])


@pytest.mark.slow
def test_vmap_over_lengths_is_more_heads(in_regime, interpreted):
    in_regime("streamed")
    arrays = operands(20, 7, b=1, k=2)
    lengths = jnp.array([[20], [9]])

    def solve(lengths):
        return step(query_seq_lengths=lengths, num_iters=2)(*arrays)

    got = interpreted(jax.vmap(solve), lengths)
    expected = jax.vmap(
        lambda lengths: step("reference", query_seq_lengths=lengths, num_iters=2)(
            *exact(arrays)
        )
    )(lengths)
    assert_close(got, expected, RTOL["float32"])


def test_an_empty_axis_of_vmap(interpreted):
    query, key, value, _ = operands(3, 2, b=1)

    def solve(query):
        def attend(query):
            return sinkhorn_attention(
                query, key, value, implementation="mosaic_tpu", num_iters=2
            )

        out, pull_back = jax.vjp(attend, query)
        return out, *pull_back(out)

    none = jnp.zeros((0, *query.shape), query.dtype)
    out, grad = interpreted(jax.vmap(solve), none)
    assert out.shape == (0, 1, 3, 2, 4)
    assert grad.shape == none.shape


@pytest.mark.parametrize("num_iters", [0, 2])
def test_shard_map_lowers_with_its_checks_of_what_varies(num_iters):
    batch = jax.sharding.PartitionSpec("b")
    sharded = jax.shard_map(
        functools.partial(
            sinkhorn_attention, num_iters=num_iters, implementation="mosaic_tpu"
        ),
        in_specs=batch,
        out_specs=batch,
    )
    *arrays, cotangent = operands(20, 7, b=1)

    def pull_back(*arrays):
        out, pull_back = jax.vjp(sharded, *arrays)
        return out, pull_back(cotangent)

    text = lowered_for("tpu", pull_back, *arrays, axis="b")
    assert text.count("@tpu_custom_call") == 2


def test_shard_map(in_regime, interpreted):
    in_regime("streamed")
    arrays = operands(20, 7, b=1)
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.sharding.PartitionSpec("b")
    sharded = jax.shard_map(
        step(num_iters=1), mesh=mesh, in_specs=batch, out_specs=batch
    )
    got = interpreted(jax.jit(sharded), *arrays)
    assert_close(got, step("reference", num_iters=1)(*exact(arrays)), RTOL["float32"])


@pytest.mark.few(6)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [197, 256, 1024, 4096])
@regimes
def test_lowers_for_tpu(monkeypatch, dtype, tokens, regime):
    monkeypatch.setattr(
        mosaic_tpu, "default_blocks", functools.partial(default_blocks, regime=regime)
    )
    jax.clear_caches()
    shapes = (1, tokens, 2, 64), (1, tokens, 1, 64), (1, tokens, 1, 64)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (*shapes, shapes[0])]
    # The largest resident matrices need more VMEM than a v4 has.
    text = lowered_for("tpu", step(), *arrays, kind="TPU v6 lite")
    assert text.count("@tpu_custom_call") == 2, "One kernel forward and one backward."
    jax.clear_caches()


@pytest.mark.parametrize(("h", "d"), [(1, 8), (8, 1)])
def test_lowers_with_a_dimension_of_one(h, d):
    shapes = (1, 9, 1, h), (1, 5, 1, h), (1, 5, 1, d), (1, 9, 1, d)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = lowered_for("tpu", step(num_iters=2), *arrays)
    assert text.count("@tpu_custom_call") == 2


# 4096 keys of dimension 256 in float32: compiled, the kernels take 18 and 19 MiB.
TOO_LONG = [jax.ShapeDtypeStruct((1, 4096, 2, 256), jnp.float32)] * 4


def test_refuses_what_vmem_cannot_hold():
    with on_tpu("TPU v4"), pytest.raises(NotImplementedError) as error:
        jax.eval_shape(step(), *TOO_LONG)
    for part in (
        "forward kernel holds all keys and values of a head in VMEM",
        r"this TPU has 16 MiB, and needs at least 17\.4 MiB",
        "4096 keys of dimension 256 and values of dimension 256 in float32",
        "num_iters=10.*'streaming'",
    ):
        assert re.search(part, str(error.value))
    with on_tpu("TPU v5 lite"):
        jax.eval_shape(step(), *TOO_LONG)
    jax.eval_shape(step(), *TOO_LONG)  # No TPU is known.


def test_refuses_the_backward_pass_alone():
    arrays = [jax.ShapeDtypeStruct((1, 8192, 2, 128), jnp.bfloat16)] * 4
    attend = functools.partial(sinkhorn_attention, implementation="mosaic_tpu")
    with on_tpu("TPU v4"):
        jax.eval_shape(attend, *arrays[:3])
        with pytest.raises(NotImplementedError, match=r"backward kernel.* 16 MiB"):
            jax.eval_shape(step(), *arrays)


def test_refuses_second_derivatives():
    query, key, value, _ = operands(3, 2, b=1)

    def loss(query):
        options = {"num_iters": 1, "implementation": "mosaic_tpu"}
        return (sinkhorn_attention(query, key, value, **options) ** 2).sum()

    with pytest.raises(NotImplementedError, match=r"second derivatives .*'reference'"):
        jax.eval_shape(jax.hessian(loss), query)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dtype": jnp.dtype("float64")}, "float32 and bfloat16, got float64"),
        ({"dtype": jnp.dtype("float16")}, "float32 and bfloat16, got float16"),
        ({"has_bias": True}, "no bias"),
        ({"has_mask": True}, "no mask"),
        ({"dropout_rate": 0.5}, r"dropout_rate=0\.5"),
        ({"options": Options(2, "columns")}, "finish='rows', got 'columns'"),
        ({"options": Options(2, gradient=Truncated(1))}, "Exact.*Truncated"),
    ],
    ids=str,
)
def test_why_not(changed, says):
    why_not = IMPLEMENTATIONS["mosaic_tpu"].load().why_not
    assert why_not(problem()) is None
    assert re.search(says, why_not(problem(**changed)))


def test_is_not_taken_unasked():
    for platform in ("cpu", "gpu", "tpu"):
        assert preferred(IMPLEMENTATIONS, problem(), platform) != "mosaic_tpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("t", [1, 197, 1024, 4096, 30_000])
@pytest.mark.parametrize("s", [1, 1024, 4096])
def test_blocks_cover_every_query_and_key(dtype, t, s):
    for direction in ("forward", "backward"):
        blocks = default_blocks(problem(t=t, s=s, dtype=jnp.dtype(dtype)), direction)
        assert blocks.padded_rows - blocks.rows < t <= blocks.padded_rows
        assert blocks.cols - 128 < s <= blocks.cols


def test_small_kernel_matrices_stay():
    is_resident = {
        t: default_blocks(problem(t=t, s=t), "backward").is_resident
        for t in (256, 512, 4096)
    }
    assert is_resident == {256: True, 512: True, 4096: False}


def test_blocks_are_whole_tiles():
    blocks = default_blocks(problem(), "forward")
    with pytest.raises(ValueError, match="rows must be a positive multiple of 8"):
        dataclasses.replace(blocks, rows=20)
