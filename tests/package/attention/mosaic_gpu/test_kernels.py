"""Output and gradients of all kernels against float64, with every regime and option."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.gpu_attention import RTOL, lengths, refresh_kernels_every, use_blocks
from support.kernel_steps import assert_close, exact, operands, problem
from support.kernel_steps import step as step_of

from sinkhorn_jax.attention._mosaic_gpu.heuristics import default_blocks

step = functools.partial(step_of, "mosaic_gpu")


SHORT = [17, 33, 0], [20, 5, 20]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("regime", "num_iters", "interval", "valid"),
    [
        ("streamed", 0, 9, None),
        ("streamed", 1, 9, None),
        ("streamed", 3, 9, SHORT),
        # Column step 1 by itself, and iterations on both sides of the one they share.
        pytest.param("streamed", 2, 1, None, marks=pytest.mark.slow),
        ("streamed", 5, 1, None),
        ("resident", 1, 9, None),
        pytest.param("resident", 3, 9, SHORT, marks=pytest.mark.slow),
        pytest.param("resident", 2, 1, None, marks=pytest.mark.slow),
        pytest.param("resident", 5, 1, None, marks=pytest.mark.slow),
        pytest.param("resident", 10, 9, None, marks=pytest.mark.slow),
    ],
)
def test_one_tile_in_float32_agrees_with_float64(
    in_float32, monkeypatch, regime, num_iters, interval, valid
):
    use_blocks(monkeypatch, regime=regime)
    refresh_kernels_every(monkeypatch, interval)
    options = {"num_iters": num_iters} | (lengths(*valid) if valid else {})
    arrays = operands(33, 20, "float32", b=len(valid[0]) if valid else 1, n=1)
    got = in_float32(step(**options), *arrays)
    expected = reference.sinkhorn_attention(
        *arrays[:3], num_iters=num_iters, lengths=valid or (None, None)
    )
    np.testing.assert_allclose(got[0], expected, atol=3e-6)
    expected = step_of("reference", **options)(*exact(arrays))
    assert_close(got, expected, RTOL["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    # Three tiles for two warpgroups, or for two thread blocks: one waits while the
    # other computes the last one.
    [
        {"kernel_dtype": "bfloat16", "max_warpgroups": 2},
        pytest.param({"cluster": 2, "max_warpgroups": 2}, marks=pytest.mark.slow),
        {"regime": "streamed", "keeps_query_block": False},
        pytest.param({"regime": "streamed", "cluster": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_several_tiles_agree_with_float64(on_device, monkeypatch, changed):
    """Also with padding, and with heads that share keys."""
    use_blocks(monkeypatch, **changed)
    refresh_kernels_every(monkeypatch, 1)
    arrays = operands(70, 130, "bfloat16")
    options = {**lengths([69], [100]), "num_iters": 2}
    got = on_device(step(**options), *arrays)
    assert got[0].dtype == got[2][0].dtype == jnp.bfloat16
    assert got[1].dtype == jnp.float32
    expected = step_of("reference", **options)(*exact(arrays))
    assert_close(got, expected, RTOL["bfloat16"])


@pytest.mark.slow
@pytest.mark.on_device
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("changed", "num_iters"),
    [
        *(
            ({"regime": "streamed", "keeps_query_block": keeps}, num_iters)
            for keeps in (True, False)
            for num_iters in (0, 1, 3)
        ),
        # Two of the four thread blocks have no tile of the query block.
        ({"regime": "streamed", "cluster": 4}, 1),
        ({"regime": "streamed", "cluster": 4}, 3),
        # The kernel matrix computed once, and twice.
        ({}, 1),
        ({}, 3),
        ({"refresh_every": 2}, 3),
        ({"refresh_every": 2, "kernel_dtype": "bfloat16"}, 3),
        ({"max_warpgroups": 1}, 3),
        # Two of the four thread blocks have no row block of the head.
        ({"refresh_every": 2, "cluster": 4, "max_warpgroups": 1}, 1),
        ({"refresh_every": 2, "cluster": 4, "max_warpgroups": 1}, 2),
        ({"refresh_every": 2, "cluster": 4, "max_warpgroups": 1}, 3),
    ],
    ids=str,
)
def test_wide_heads_agree_with_float64(
    on_device, monkeypatch, dtype, changed, num_iters
):
    """Two tiles of the head dimension."""
    use_blocks(monkeypatch, **changed)
    arrays = operands(66, 70, dtype, n=1, h=100, d=20, scale=2.0)
    got = on_device(step(num_iters=num_iters), *arrays)
    expected = step_of("reference", num_iters=num_iters)(*exact(arrays))
    rtol = max(RTOL[dtype], RTOL[changed.get("kernel_dtype", dtype)])
    assert_close(got, expected, rtol)


@pytest.mark.on_device
def test_large_values_leave_the_gradient_in_range(on_device):
    """In float16, with a cotangent that makes it representable."""
    query, key, value, cotangent = operands(6, 6, "float16", n=2, h=64, d=128)
    query = query * jnp.float16(0.05)
    sign = jnp.float16(6e4) * (-1.0) ** jnp.arange(6, dtype="float16")
    value = jnp.broadcast_to(sign[None, :, None, None], value.shape)
    arrays = query, key, value, jnp.full_like(cotangent, 1e-5)
    got = on_device(step(num_iters=0), *arrays)
    expected = step_of("reference", num_iters=0)(*exact(arrays))
    # The values cancel in the output, which is not of their size.
    assert_close((None, got[1], got[2]), (None, *expected[1:]), RTOL["float16"])


@pytest.mark.slow
@pytest.mark.on_device
@pytest.mark.parametrize(
    ("tokens", "deviation"), [(256, 1.0), (256, 4.0), (256, 8.0), (512, 4.0)]
)
def test_a_kernel_matrix_in_bfloat16_is_as_exact_as_the_softmax(
    on_device, monkeypatch, tokens, deviation
):
    """The root mean square error of output and gradients is a quarter more at most."""
    # The interpreter has threads for eight warpgroups of a cluster.
    use_blocks(monkeypatch, max_warpgroups=1 if tokens > 256 else 4)
    *logits, value, cotangent = operands(tokens, tokens, "bfloat16", n=1, h=64, d=64)
    query, key = (x * jnp.asarray(deviation**0.5, "bfloat16") for x in logits)
    arrays = query, key, value, cotangent
    blocks = default_blocks(problem(t=tokens, s=tokens))
    assert (blocks.kernel_dtype, blocks.cluster) == ("bfloat16", tokens**2 // 256**2)

    def errors(num_iters):
        out, _, grads = on_device(step(num_iters=num_iters), *arrays)
        expected = step_of("reference", num_iters=num_iters)(*exact(arrays))
        pairs = zip((out, *grads), (expected[0], *expected[2]), strict=True)
        return [
            np.linalg.norm(x.astype("float64") - np.asarray(y)) / np.linalg.norm(y)
            for x, y in pairs
        ]

    softmax, ours = errors(0), errors(10)
    ratios = [x / y for x, y in zip(ours, softmax, strict=True)]
    assert max(ratios) < 1.25, (ratios, ours, softmax)
    # Without what the seeds add to the cotangent of f_L, those of queries and keys
    # would be a third larger at a deviation of 8.
    assert max(ratios[1:3]) < 1.05, (ratios, ours, softmax)


@pytest.mark.slow
@pytest.mark.on_device
@pytest.mark.parametrize("regime", ["resident", "streamed"])
def test_repeats_are_the_same_bits(on_device, monkeypatch, regime):
    use_blocks(monkeypatch, regime=regime)
    arrays = operands(130, 70, "bfloat16")
    first, again = (on_device(step(num_iters=2), *arrays) for _ in range(2))
    chex.assert_trees_all_equal(first, again)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="It needs a GPU.")
@pytest.mark.parametrize("tokens", [128, 197, 512, 1024, 4096])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_repeats_on_a_gpu(tokens, head_dim):
    arrays = operands(tokens, tokens, "bfloat16", n=4, k=2, h=head_dim, d=head_dim)
    solve = jax.jit(step(num_iters=10))
    first, again = solve(*arrays), solve(*arrays)
    chex.assert_trees_all_equal(first, again)
    expected = step_of("streaming", num_iters=10)(
        *(x.astype("float32") for x in arrays)
    )
    assert_close(
        jax.tree.map(np.asarray, first),
        jax.tree.map(lambda x: x.astype("float64"), expected),
        RTOL["bfloat16"],
    )
