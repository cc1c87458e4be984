"""`query_marginal`, `key_marginal`, `column_tau` and `tolerance` of attention.

That outputs agree with the oracle is tested with the other options, in test_values.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_cases import (
    ATOL,
    PLAIN,
    B,
    K,
    N,
    S,
    T,
    inputs,
    positive,
    random,
)

from sinkhorn_jax import Implicit, Truncated, sinkhorn_attention
from sinkhorn_jax.attention import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("short_query_blocks")

LENGTHS = {
    "query_seq_lengths": jnp.array([3, 5]),
    "key_value_seq_lengths": jnp.array([7, 4]),
}
WITH_ZEROS = (
    jnp.array([2.0, 0, 1, 1, 1]),
    jnp.array([1.0, 1, 0, 1, 1, 0.5, 0.5]),
)

fast = pytest.mark.parametrize("implementation", ["scaling", "streaming"])
plain = pytest.mark.parametrize("implementation", PLAIN)


def operands():
    marginals = positive(6, (B, N, T)), positive(7, (B, N, S))
    return *inputs(), *marginals, jnp.linspace(0, 1, B * N).reshape(B, N)


def gradients(implementation, arrays, options):
    """Value and gradients by query, key, value, both marginals and tau."""

    def loss(query, key, value, a, b, tau):
        out = sinkhorn_attention(
            query,
            key,
            value,
            query_marginal=a,
            key_marginal=b,
            column_tau=tau,
            implementation=implementation,
            **options,
        )
        return (out * random(9, out.shape)).sum()

    return jax.jit(jax.value_and_grad(loss, tuple(range(6))))(*arrays)


@pytest.mark.few(2)
@fast
@pytest.mark.parametrize(
    "options",
    [
        {"num_iters": 0},
        {"num_iters": 3},
        {"num_iters": 3, "finish": "columns"},
        {"num_iters": 5, "gradient": Truncated(2)},
        {"num_iters": 60, "gradient": Implicit(tolerance=1e-12)},
        {"num_iters": 5, "tolerance": 0.05},
        {"num_iters": 3, "dropout_rate": 0.4, "dropout_rng": jax.random.key(3)},
    ],
    ids=str,
)
def test_gradients_agree_with_autodiff(implementation, options):
    if implementation == "streaming":
        if "tolerance" in options or isinstance(options.get("gradient"), Implicit):
            pytest.skip("It does not take this, as another test sees.")
    chex.assert_trees_all_close(
        gradients(implementation, operands(), options),
        gradients("reference", operands(), options),
        atol=1e-10,
    )


@pytest.mark.few(1)
@fast
def test_gradients_with_padding_agree_with_autodiff(implementation):
    query, key, value, _, _, tau = operands()
    arrays = query, key, value, *WITH_ZEROS, tau[0, 0] + 0.3
    options = LENGTHS | {"num_iters": 3}
    chex.assert_trees_all_close(
        gradients(implementation, arrays, options),
        gradients("reference", arrays, options),
        atol=1e-10,
    )


@pytest.mark.few(1)
@plain
@pytest.mark.parametrize("finish", ["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(implementation, dtype, finish):
    query, key, value, a, _, tau = operands()
    ids = {
        "query_segment_ids": jnp.array([1, 1, 2, 2, 2]),
        "key_segment_ids": jnp.array([1, 1, 1, 1, 2, 2, 0]),
    }
    options = {
        "query_marginal": a,
        "column_tau": tau,
        "local_window_size": (2, 4),
        "finish": finish,
        "implementation": implementation,
        **ids,
    }
    arrays = tuple(x.astype(dtype) for x in (query, key, value))
    out = sinkhorn_attention(*arrays, **options)
    assert out.dtype == dtype
    wide = (x.astype("float64") for x in arrays)
    expected = sinkhorn_attention(*wide, **options | {"implementation": "reference"})
    np.testing.assert_allclose(out.astype("float64"), expected, atol=ATOL[dtype])


@pytest.mark.few(1)
@plain
def test_rows_and_columns_have_their_sums(implementation):
    query, key, _, a, b, _ = operands()
    options = {"query_marginal": a, "key_marginal": b, "num_iters": 300}
    eye = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, K, S))
    plan, error = sinkhorn_attention(
        query,
        key,
        eye,
        return_marginal_error=True,
        implementation=implementation,
        **options,
    )
    np.testing.assert_allclose(plan.sum(axis=3), jnp.swapaxes(a, 1, 2), atol=1e-12)
    np.testing.assert_allclose(plan.sum(axis=1), b, atol=1e-9)
    assert error.max() < 1e-9


@pytest.mark.few(2)
@plain
def test_a_marginal_of_0_is_padding(implementation):
    a, b = WITH_ZEROS
    query, key, value = inputs()
    rows, cols = np.flatnonzero(a), np.flatnonzero(b)
    poisoned = (
        query.at[:, 1].set(jnp.nan),
        key.at[:, 2].set(jnp.inf),
        value.at[:, 2].set(jnp.nan),
    )
    out = sinkhorn_attention(
        *poisoned, query_marginal=a, key_marginal=b, implementation=implementation
    )
    cropped = sinkhorn_attention(
        query[:, rows],
        key[:, cols],
        value[:, cols],
        query_marginal=a[rows],
        key_marginal=b[cols],
        implementation=implementation,
    )
    np.testing.assert_allclose(out[:, rows], cropped, atol=1e-12)
    np.testing.assert_array_equal(out[:, 1], 0)


@pytest.mark.few(2)
@plain
@pytest.mark.parametrize("num_iters", [0, 4])
def test_a_column_tau_of_0_is_softmax_attention(implementation, num_iters):
    arrays = inputs("float32")
    out = sinkhorn_attention(
        *arrays, num_iters=num_iters, column_tau=0.0, implementation=implementation
    )
    softmax = sinkhorn_attention(*arrays, num_iters=0, implementation=implementation)
    chex.assert_trees_all_close(out, softmax, atol=2e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("spread", [1e3, 1e8, 1e12])
@fast
def test_marginals_of_different_magnitude_in_float32(implementation, spread):
    query, key, value = inputs("float32", t=32, s=32, scale=3.0)
    exponents = jnp.linspace(0, np.log(spread), 32)
    a = jnp.exp(-exponents)
    b = jnp.exp(-exponents[::-1])

    def out(dtype, implementation):
        result = sinkhorn_attention(
            *(x.astype(dtype) for x in (query, key, value)),
            query_marginal=a.astype(dtype),
            key_marginal=b.astype(dtype),
            implementation=implementation,
        )
        # Averages of the values: an error of each row relative to its sum.
        return result.astype("float64") / a.astype("float64")[None, :, None, None]

    got, expected = out("float32", implementation), out("float64", "reference")
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [1e-34, 1e20, 1e34])
@fast
def test_very_small_and_large_marginals_in_float32(implementation, size):
    query, key, value = inputs("float32", t=6, s=6)
    bias = jnp.zeros((1, 1, 6, 6), "float32")

    def gradients(size):
        mass = jnp.full(6, size, "float32")

        def loss(query, key, value, bias, a, b):
            out = sinkhorn_attention(
                query,
                key,
                value,
                bias,
                query_marginal=a,
                key_marginal=b,
                implementation=implementation,
            )
            weights = random(9, out.shape).astype("float32")
            return (out / size * weights).sum()

        arrays = query, key, value, bias, mass, mass
        *grads, da, db = jax.jit(jax.grad(loss, tuple(range(6))))(*arrays)
        return *grads, da * size, db * size

    chex.assert_trees_all_close(gradients(size), gradients(1.0), atol=1e-5)


@pytest.mark.few(1)
@fast
@pytest.mark.parametrize("tau", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("offset", [200.0, -200.0])
def test_column_tau_with_offset_columns_in_float32(implementation, tau, offset):
    query, key, value = inputs("float32", t=16, s=24, h=4)
    key = key.at[:, ::5, :, 0].set(offset)
    query = query.at[..., 0].set(2.0)  # Times the scale of 1/2.
    options = {"column_tau": tau, "num_iters": 10}

    def gradients(dtype, implementation):
        def loss(query, key, value):
            out = sinkhorn_attention(
                query, key, value, implementation=implementation, **options
            )
            return (out * random(9, out.shape).astype(dtype)).sum(), out

        arrays = (x.astype(dtype) for x in (query, key, value))
        grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        return out, grads[0][..., 1:], grads[1][..., 1:], grads[2]

    got, expected = (
        gradients("float32", implementation),
        gradients("float64", "reference"),
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype("float64"), got), expected, atol=1e-4
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["scaling", "reference"])
def test_every_head_stops_at_the_tolerance(implementation):
    query, key, value = inputs(scale=2.0)
    options = {"implementation": implementation, "return_marginal_error": True}
    tolerance = 0.02
    _, error = sinkhorn_attention(
        query, key, value, num_iters=100, tolerance=tolerance, **options
    )
    out, _ = sinkhorn_attention(
        query, key, value, num_iters=100, tolerance=tolerance, **options
    )
    assert ((error <= tolerance) & (error > tolerance**2)).all()
    # Each head is that of the first number of iterations within the tolerance.
    waiting = jnp.ones((B, N), bool)
    for num_iters in range(100):
        expected, error = sinkhorn_attention(
            query, key, value, num_iters=num_iters, **options
        )
        stops = waiting & (error <= tolerance)
        np.testing.assert_allclose(
            jnp.where(stops[:, None, :, None], out - expected, 0), 0, atol=1e-12
        )
        waiting &= ~stops
        if not waiting.any():
            break
    assert not waiting.any()


@pytest.mark.few(1)
@plain
def test_arguments_of_a_single_element(implementation):
    query, key, value = (x[0] for x in inputs())
    options = {
        "query_marginal": positive(6, (N, T)),
        "key_marginal": positive(7, (N, S)),
        "column_tau": jnp.linspace(0, 1, N),
        "implementation": implementation,
    }
    out = sinkhorn_attention(query, key, value, **options)
    batched = sinkhorn_attention(query[None], key[None], value[None], **options)
    np.testing.assert_array_equal(out, batched[0])


@pytest.mark.slow
@pytest.mark.few(1)
@plain
def test_transforms(implementation):
    arrays = operands()

    def attend(query, key, value, a, b, tau):
        return sinkhorn_attention(
            query,
            key,
            value,
            query_marginal=a,
            key_marginal=b,
            column_tau=tau,
            num_iters=3,
            implementation=implementation,
        )

    expected = attend(*arrays)
    _, scanned = jax.lax.scan(lambda _, x: (None, attend(*x)), None, arrays)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    for got in (
        jax.jit(attend)(*arrays),
        jax.vmap(attend)(*arrays),
        scanned,
        sharded(*arrays),
    ):
        np.testing.assert_allclose(got, expected, atol=1e-13)
    grads = [
        jax.grad(lambda *x, f=f: (f(*x) * random(9, expected.shape)).sum(), (3, 4, 5))(
            *arrays
        )
        for f in (attend, sharded)
    ]
    chex.assert_trees_all_close(*grads, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"query_marginal": jnp.ones(S)}, ValueError, r"broadcast to \(2, 4, 5\)"),
        ({"key_marginal": jnp.ones((B, S))}, ValueError, r"broadcast to \(2, 4, 7\)"),
        ({"query_marginal": jnp.ones(T, int)}, TypeError, "floating, got int"),
        ({"query_marginal": "abc"}, TypeError, "query_marginal must be an array"),
        ({"query_marginal": -jnp.ones(T)}, ValueError, "query_marginal .* of -1.0"),
        ({"key_marginal": jnp.full(S, jnp.nan)}, ValueError, "key_marginal .* nan"),
        (
            {"query_marginal": jnp.ones(T), "key_marginal": jnp.ones(S)},
            ValueError,
            "query_marginal and key_marginal must .* total, got 5.0 and 7.0",
        ),
        ({"column_tau": 1.5}, ValueError, "column_tau .* got 1.5"),
        ({"column_tau": jnp.ones(3)}, ValueError, r"broadcast to \(2, 4\)"),
        ({"column_tau": True}, TypeError, "column_tau must be a number"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"tolerance": "1"}, TypeError, "tolerance must be a number"),
        (
            {"tolerance": 0.1, "implementation": "streaming"},
            NotImplementedError,
            "no tolerance",
        ),
    ],
    ids=str,
)
def test_bad_input(options, error, says):
    with pytest.raises(error, match=says):
        sinkhorn_attention(*inputs(), **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_known_marginals_are_checked_under_transforms(transform):
    query, key, value = inputs()

    def attend(query, a, b):
        if transform is jax.vmap:
            marginals = {"query_marginal": a, "key_marginal": b}
            return sinkhorn_attention(query, key[0], value[0], **marginals)
        marginals = {"query_marginal": a, "key_marginal": b}
        return sinkhorn_attention(query, key, value, **marginals).sum()

    for a, b, says in (
        (np.array([1.0, 1, -1, 1, 1]), None, "query_marginal must be positive"),
        (np.ones(T), np.ones(S), "total, got 5.0 and 7.0"),
    ):
        with pytest.raises(ValueError, match=says):
            transform(lambda query, a=a, b=b: attend(query, a, b))(query)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"query_marginal": jnp.ones(T)}, "no query_marginal or key_marginal"),
        ({"column_tau": 0.5}, "no column_tau but the number 1"),
        ({"tolerance": 0.1}, "no tolerance"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - set(PLAIN)))
def test_kernels_say_what_they_do_not_take(name, options, says):
    arrays = inputs("bfloat16")
    with pytest.raises(NotImplementedError, match=says):
        jax.eval_shape(
            lambda: sinkhorn_attention(*arrays, implementation=name, **options)
        )


@pytest.mark.parametrize("name", PLAIN)
def test_arguments_that_say_the_default_change_no_program(name):
    arrays = inputs("float32")

    def lowered(**options):
        def loss(*arrays):
            return sinkhorn_attention(*arrays, implementation=name, **options).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).as_text()

    plain = lowered()
    assert "pow" not in plain
    defaults = {"query_marginal": None, "key_marginal": None, "tolerance": None}
    assert lowered(column_tau=1.0, **defaults) == plain


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(("mass", "value"), [(7e4, 0.1), (1e5, 0.0), (1e-8, 1e4)])
def test_float16_outputs_in_range_with_marginals_that_are_not(
    implementation, mass, value
):
    query = jnp.zeros((4, 1, 8), jnp.float16)
    marginal = jnp.full(4, mass, jnp.float32)

    def attend(value):
        options = {"key_marginal": marginal, "implementation": implementation}
        return sinkhorn_attention(query, query, value, **options)

    values = jnp.full((4, 1, 2), value, jnp.float16)
    np.testing.assert_allclose(attend(values), mass * value, rtol=2e-3, atol=1e-7)


def test_gradients_of_float16_with_large_marginals():
    query, key, value = (x[0] for x in inputs("float16"))
    marginal = jnp.full(T, 3e4, jnp.float32)

    def gradient(dtype):
        def loss(query):
            operands = (x.astype(dtype) for x in (query, key, 1e-3 * value))
            out = sinkhorn_attention(*operands, query_marginal=marginal)
            return (4 * jnp.sin(jnp.arange(T, dtype=dtype))[:, None, None] * out).sum()

        return jax.grad(loss)(query.astype(dtype))

    expected = gradient("float32")
    size = jnp.abs(expected).max()
    got = gradient("float16").astype(jnp.float32)
    np.testing.assert_allclose(got / size, expected / size, atol=1e-2)
