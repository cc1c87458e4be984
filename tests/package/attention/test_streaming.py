"""`implementation="streaming"`: memory, query blocks, repeats, agreement."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_cases import with_logits
from support.hostile import hostile_logits

from sinkhorn_jax import Implicit, Truncated, sinkhorn_attention
from sinkhorn_jax._core.options import Options
from sinkhorn_jax._runtime.dispatch import preferred
from sinkhorn_jax.attention import IMPLEMENTATIONS, _heads
from sinkhorn_jax.attention._problem import Problem
from sinkhorn_jax.attention._streaming import attend as streaming
from sinkhorn_jax.attention._streaming import backward, forward, query_blocks

MIB = 2**20


def step(implementation="streaming", **options):
    """A function that returns output, marginal error and all gradients."""

    def attend(query, key, value, bias):
        return sinkhorn_attention(
            query,
            key,
            value,
            bias,
            implementation=implementation,
            return_marginal_error=True,
            **options,
        )

    def call(query, key, value, cotangent, bias=None):
        (out, error), pull_back = jax.vjp(attend, query, key, value, bias)
        return out, error, pull_back((cotangent, jnp.zeros_like(error)))

    return jax.jit(call)


def compiled(t, s=None, bias=None, **options):
    shapes = [(1, x, 1, 64) for x in (t, s or t, s or t, t)]
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    if bias is not None:
        arrays.append(jax.ShapeDtypeStruct(bias, "float32"))
    return step(**options).lower(*arrays).compile()


def arrays(t, s, dtype="float32", b=1, n=2, k=1, h=16, d=8, scale=1.0):
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, d), (b, t, n, d)
    keys = jax.random.split(jax.random.key(0), 4)
    query, *rest = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return query * jnp.asarray(scale, dtype), *rest


def assert_close(got, expected, rtol):
    """Compares arrays relative to their largest magnitude, and marginal errors."""

    def error(x, y):
        x, y = (np.asarray(x).astype("float64") for x in (x, y))
        return abs(x - y).max() / abs(y).max()

    errors = jax.tree.map(error, got[::2], expected[::2])
    assert max(jax.tree.leaves(errors)) < rtol, errors
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-3, atol=5e-6)


def largest_array(program):
    """Elements of the largest array in the optimised program, fused arrays included."""
    shapes = re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", program.as_text())
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in set(shapes))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"finish": "columns", "gradient": Truncated(2), "bias": (1, 1, 1, 4096)},
        {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
    ],
    ids=str,
)
def test_no_array_of_size_t_times_s(options):
    t = 4096
    # The largest are a query block, and the queries: a sixteenth of T * S or less.
    assert largest_array(compiled(t, **options)) <= t * t / 16


def test_memory_grows_linearly():
    temp = {
        t: compiled(t).memory_analysis().temp_size_in_bytes
        for t in (4096, 8192, 16384, 32768)
    }
    assert temp[16384] <= 64 * MIB
    # Query blocks are of constant size; the rest is proportional to T.
    slope = (temp[8192] - temp[4096]) / 4096
    assert temp[32768] <= temp[4096] + 1.2 * slope * (32768 - 4096)
    assert temp[32768] < 2 * temp[16384]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"finish": "columns"},
        {"gradient": Truncated(3)},
        {"num_iters": 0},
        {
            "query_seq_lengths": jnp.array([1100, 30]),
            "key_value_seq_lengths": jnp.array([400, 700]),
        },
        {"dropout_rate": 0.2, "dropout_rng": jax.random.key(1)},
    ],
    ids=str,
)
def test_agrees_with_scaling_in_float32(options):
    operands = arrays(1100, 700, b=2)
    bias = jax.random.normal(jax.random.key(7), (1, 2, 1100, 700), "float32")
    got = step(**options)(*operands, bias)
    expected = step("scaling", **options)(*operands, bias)
    assert_close(got, expected, 1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_large_logits_agree_with_float64(scale):
    # A few hundred keys, so that rows of the plan are far from one-hot at scale 1.
    operands = arrays(520, 390, scale=scale)
    got = step(num_iters=30)(*operands)
    exact = step("reference", num_iters=30)(
        *jax.tree.map(lambda x: x.astype("float64"), operands)
    )
    logits = jnp.einsum("btnh,bskh->bnts", *operands[:2]) / 4
    assert float(logits.std()) > 0.9 * scale
    # Entries of the order of 400 are rounded to 1.5e-5 of the plan they are the log of.
    assert_close(got, exact, 2e-6 if scale == 1 else 1e-4)


@pytest.mark.slow
def test_repeats_are_bit_identical():
    operands = arrays(1100, 700, b=2)
    chex.assert_trees_all_equal(step()(*operands), step()(*operands))
    one = step()(*(x[1:] for x in operands))
    together = step()(*operands)
    chex.assert_trees_all_equal(one[0], together[0][1:])


def every_hostile_case(n):
    """One case for each batch element."""
    logits = jnp.stack([jnp.asarray(x) for x in hostile_logits(n).values()])
    query, key = with_logits(logits)
    value = jax.random.normal(jax.random.key(3), (*logits.shape[:2], 1, 8), "float32")
    return query, key, value, jnp.sin(9 * value)


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("heads_in_flight", [1, 4])
def test_heads_that_need_other_paths_beside_some_that_do_not(
    monkeypatch, heads_in_flight
):
    n = 17 + heads_in_flight
    operands = every_hostile_case(n)
    expected = step("scaling", scale=1.0, num_iters=20)(*operands)
    monkeypatch.setattr(
        streaming, "choose_layout", lambda _: query_blocks.Layout(7, heads_in_flight)
    )
    got = step(scale=1.0, num_iters=20)(*operands)
    # Logits of 400 are rounded to 1.5e-5, and so is what the logarithm of a plan is.
    chex.assert_trees_all_close(got[:2], expected[:2], atol=1e-4)
    chex.assert_tree_all_finite(got)
    solve = step(scale=1.0, num_iters=20)
    for index in (0, 3, 11):
        alone = solve(*(x[index, None] for x in operands))
        beside = jax.tree.map(lambda x, i=index: x[i, None], got)
        chex.assert_trees_all_close(alone, beside, atol=2e-5, rtol=2e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{}, {"finish": "columns"}], ids=str)
def test_paths_for_extreme_logits_agree_on_ordinary_ones(monkeypatch, options):
    operands = arrays(19, 14, dtype="float64")
    expected = step("scaling", num_iters=4, **options)(*operands)
    monkeypatch.setattr(query_blocks, "MAX_BLOCK_ROWS", 5)
    monkeypatch.setattr(forward, "MAX_DRIFT", 0.0)
    for module in (forward, backward):
        monkeypatch.setattr(
            module, "with_fallback", lambda _, is_right, instead: instead()
        )
    got = step(num_iters=4, **options)(*operands)
    chex.assert_trees_all_close(got, expected, atol=1e-13)


def test_products_of_bfloat16(monkeypatch):
    """As on an accelerator, on a CPU that has no such product."""
    operands = arrays(110, 70, dtype="bfloat16")
    monkeypatch.setattr(
        _heads.Heads, "product_dtype", property(lambda self: self.problem.dtype)
    )
    matmul = jnp.matmul

    def exact_products(x, y, **kwargs):
        return matmul(x.astype("float32"), y.astype("float32"), **kwargs)

    got = step("reference")(*jax.tree.map(lambda x: x.astype("float64"), operands))
    exact = jax.tree.map(np.asarray, got)
    monkeypatch.setattr(jnp, "matmul", exact_products)
    got = step()(*operands)
    assert got[0].dtype == got[2][0].dtype == "bfloat16"
    # The marginal error too: sums are not made of rounded entries.
    assert_close(got, exact, 1e-2)


def problem(t, s, dtype="float32", gradient=None):
    return Problem(
        batch=1,
        t=t,
        s=s,
        num_heads=1,
        num_key_heads=1,
        head_dim=8,
        value_dim=8,
        dtype=jnp.dtype(dtype),
        options=Options(10, gradient=gradient or Truncated(1)),
        scale=1.0,
    )


def chosen(problem, platform="cpu"):
    return preferred(IMPLEMENTATIONS, problem, platform)


def test_the_memory_budget_decides():
    assert chosen(problem(7327, 7327)) == "scaling"
    assert chosen(problem(7328, 7328)) == "streaming"
    assert chosen(problem(7328, 7328, "bfloat16"), "gpu") == "streaming"
    assert chosen(problem(7327, 7327, "float64")) == "streaming"
    assert chosen(problem(2**26, 1)) == "streaming"
    assert chosen(problem(2**14, 2**14, gradient=Implicit())) == "scaling"


def test_implicit_is_refused():
    with pytest.raises(NotImplementedError, match=r"streaming.*Truncated\(k\), not Im"):
        step(gradient=Implicit())(*arrays(5, 4))


@pytest.mark.parametrize("on", ["cpu", "gpu"])
@pytest.mark.parametrize("t", [1, 5, 128, 1025, 30_000])
@pytest.mark.parametrize("s", [1, 77, 30_000])
def test_layout(monkeypatch, on, t, s):
    monkeypatch.setattr(jax, "default_backend", lambda: on)
    rows, in_flight = query_blocks.choose_layout(
        dataclasses.replace(problem(t, s), num_heads=12)
    )
    assert 1 <= rows <= min(t, query_blocks.MAX_BLOCK_ROWS)
    assert 12 % in_flight == 0
    limit = {
        "cpu": query_blocks.CPU_BLOCK_BYTES,
        "gpu": query_blocks.ACCELERATOR_BLOCK_BYTES,
    }[on]
    assert rows * s * 4 * in_flight <= max(limit, query_blocks.MIN_BLOCK_ROWS * s * 4)
    assert (in_flight == 1) or on == "gpu"
