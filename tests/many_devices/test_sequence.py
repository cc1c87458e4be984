"""`sinkhorn_attention` of sequences whose tokens are divided over devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support.attention_cases import PLAIN, inputs, random
from support.compiled import collectives

from sinkhorn_jax import Implicit, Truncated, sinkhorn_attention

B, T, S, N, K = 2, 16, 24, 8, 4
DATA, TOKENS = "data", "tokens"
# How the axes of each argument, of the whole sequence, are divided.
SPECS = {
    "query": (DATA, TOKENS),
    "key": (DATA, TOKENS),
    "value": (DATA, TOKENS),
    "bias": (None, None, TOKENS),
    "mask": (DATA, None, TOKENS),
    "query_seq_lengths": (DATA,),
    "key_value_seq_lengths": (DATA,),
    "query_segment_ids": (DATA, TOKENS),
    "key_segment_ids": (DATA, TOKENS),
    "query_marginal": (DATA, None, TOKENS),
    "key_marginal": (TOKENS,),
    "column_tau": (None,),
    "scale": (),
    "dropout_rng": (),
}
UNIFORM = np.random.default_rng(0).random
CASES = {
    "plain": ({}, {}),
    "bias": ({"bias": random(1, (1, N, T, S))}, {}),
    "bias of all heads": ({"bias": random(1, (1, 1, T, 1))}, {}),
    "mask": ({"mask": jnp.asarray(UNIFORM((B, 1, T, S)) < 0.8)}, {}),
    "lengths": (
        {
            "query_seq_lengths": jnp.array([11, 3]),
            "key_value_seq_lengths": jnp.array([5, 24]),
        },
        {},
    ),
    "segments": (
        {
            "query_segment_ids": jnp.asarray(np.arange(B * T).reshape(B, T) // 6 % 3),
            "key_segment_ids": jnp.asarray(np.arange(B * S).reshape(B, S) // 8 % 3),
        },
        {},
    ),
    "window": ({}, {"local_window_size": (3, 9)}),
    "marginals": (
        {
            "query_marginal": jnp.asarray(np.full((B, N, T), 1.5)),
            "key_marginal": jnp.asarray(np.arange(1.0, S + 1) / (S * (S + 1)) * 48),
        },
        {},
    ),
    "tau": ({"column_tau": jnp.asarray(UNIFORM(N))}, {}),
    "scale": ({"scale": jnp.float64(0.7)}, {}),
    "dropout": ({"dropout_rng": jax.random.key(7)}, {"dropout_rate": 0.4}),
    "columns": ({}, {"finish": "columns"}),
    "truncated": ({}, {"gradient": Truncated(1)}),
    "implicit": ({}, {"gradient": Implicit(), "num_iters": 200}),
    "tolerance": ({}, {"tolerance": 1e-3, "num_iters": 50}),
}


def over_tokens(mesh, arrays, **options):
    """The call in a `jax.shard_map`, as a function of its arrays."""

    def attend(arrays):
        return sinkhorn_attention(**arrays, sequence_axis=TOKENS, **options)

    specs = {name: PartitionSpec(*SPECS[name]) for name in arrays}
    if arrays["query"].ndim == 3:
        specs |= dict.fromkeys(("query", "key", "value"), PartitionSpec(TOKENS))
    outs = PartitionSpec(*specs["query"]), PartitionSpec(*specs["query"][:-1])
    if not options.get("return_marginal_error"):
        outs = outs[0]
    return jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=outs)


def value_and_gradients(attend):
    def run(arrays):
        floating = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, "float")}
        rest = {n: x for n, x in arrays.items() if n not in floating}

        def loss(floating):
            out, error = attend(floating | rest)
            return jnp.sin(out).sum(), (out, error)

        return jax.grad(loss, has_aux=True)(floating)

    return jax.jit(run)


def make_mesh(data, tokens):
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((data, tokens), (DATA, TOKENS), axis_types=kinds)


@pytest.mark.few(3)
@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("num_devices", [4, 2])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_one_device(case, num_devices, implementation):
    arrays, options = CASES[case]
    if implementation == "streaming" and case in ("implicit", "tolerance"):
        pytest.skip("it takes neither")
    operands = inputs(b=B, t=T, s=S, n=N, k=K)
    arrays = dict(zip(("query", "key", "value"), operands, strict=True)) | arrays
    options = {
        "num_iters": 3,
        "implementation": implementation,
        "return_marginal_error": True,
    } | options
    expected = value_and_gradients(lambda x: sinkhorn_attention(**x, **options))(arrays)
    attend = over_tokens(make_mesh(2, num_devices), arrays, **options)
    got = value_and_gradients(attend)(arrays)
    atol = 1e-6 if case == "implicit" else 1e-10
    chex.assert_trees_all_close(got, expected, atol=atol)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["scaling", "streaming"])
def test_hostile_logits_in_float32(implementation):
    """Also without an axis for the batch, and the same bits each time."""
    query, key, value = (x[0] for x in inputs("float32", b=1, t=T, s=T, n=8, k=8))
    key = key.at[3].add(40.0)
    arrays = {"query": 20 * query, "key": key, "value": value}
    options = {"num_iters": 5, "implementation": implementation}
    attend = jax.jit(over_tokens(make_mesh(1, 8), arrays, **options))
    expected = sinkhorn_attention(**arrays, **options)
    got = attend(arrays)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(got, attend(arrays))


def test_tokens_are_exchanged_for_heads_once():
    """Each of queries, keys, values and output, forward and backward."""
    operands = inputs(b=B, t=T, s=S, n=N, k=K)
    arrays = dict(zip(("query", "key", "value"), operands, strict=True))
    attend = over_tokens(make_mesh(2, 4), arrays, num_iters=7)
    loss = lambda arrays: jnp.sin(attend(arrays)).sum()
    program = jax.jit(jax.grad(loss)).lower(arrays).compile()
    assert collectives(program) == {"all-to-all": 8}


@pytest.mark.parametrize(
    ("axis", "error", "message"),
    [
        ("other", ValueError, r"'other' must be an axis of the jax.shard_map"),
        (("tokens",), TypeError, "the name of one mesh axis"),
        ("tokens", ValueError, r"8 devices, which must divide the heads, got 4 key"),
    ],
)
def test_bad_axes(axis, error, message, unchecked):
    operands = inputs(b=B, t=T, s=S, n=N, k=K)
    attend = functools.partial(sinkhorn_attention, sequence_axis=axis)
    parts = PartitionSpec(None, "tokens")
    mesh = make_mesh(1, 8)
    with pytest.raises(error, match=message):
        jax.shard_map(attend, mesh=mesh, in_specs=parts, out_specs=parts)(*operands)


def test_without_shard_map():
    with pytest.raises(ValueError, match=r"jax.shard_map around the call"):
        sinkhorn_attention(*inputs(), sequence_axis="tokens")
