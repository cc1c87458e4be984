"""`sinkhorn_attention` of sequences whose tokens are divided over devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support.attention_cases import PLAIN, inputs, random

from benchmarks.harness.compiled_text import collectives
from benchmarks.many_devices import Call, compile_step
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
def test_exchange_for_heads_agrees_with_one_device(case, num_devices, implementation):
    check_agreement(case, num_devices, implementation, "auto")


@pytest.mark.few(4)
@pytest.mark.parametrize("num_devices", [4, 2])
@pytest.mark.parametrize("case", [x for x in CASES if x != "window"])
def test_sums_over_devices_agree_with_one_device(case, num_devices):
    check_agreement(case, num_devices, "streaming", "mixed")


def check_agreement(case, num_devices, implementation, strategy):
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
    options["sequence_strategy"] = strategy
    attend = over_tokens(make_mesh(2, num_devices), arrays, **options)
    got = value_and_gradients(attend)(arrays)
    atol = 1e-6 if case == "implicit" else 1e-10
    chex.assert_trees_all_close(got, expected, atol=atol)


@pytest.mark.parametrize(
    ("strategy", "num_heads", "num_devices"),
    [
        ("ulysses", 8, 8),
        ("auto", 3, 8),
        ("mixed", 2, 4),
        ("mixed", 2, 2),
        ("mixed", 2, 1),
    ],
)
def test_hostile_logits_in_float32(strategy, num_heads, num_devices):
    """Also without an axis for the batch, and the same bits each time."""
    operands = inputs("float32", b=1, t=T, s=T, n=num_heads, k=num_heads)
    query, key, value = (x[0] for x in operands)
    key = key.at[3].add(40.0)
    arrays = {"query": 20 * query, "key": key, "value": value}
    options = {"num_iters": 5, "implementation": "streaming"}
    mesh = make_mesh(1, num_devices)
    divided = over_tokens(mesh, arrays, sequence_strategy=strategy, **options)
    run = value_and_gradients(lambda x: (divided(x), None))
    whole = value_and_gradients(lambda x: (sinkhorn_attention(**x, **options), None))
    got = run(arrays)
    chex.assert_trees_all_close(got, whole(arrays), atol=1e-5)
    chex.assert_trees_all_equal(got, run(arrays))


@pytest.mark.parametrize("num_iters", [0, 1])
def test_cotangents_of_any_size(num_iters):
    """The devices bring theirs near 1 by the same factor."""
    arrays = dict(
        zip(
            "query key value".split(),
            inputs("float32", t=T, s=S, n=3, k=1),
            strict=True,
        )
    )
    arrays["value"] = arrays["value"].at[:, 2:].multiply(1e-20)
    options = {"num_iters": num_iters, "sequence_strategy": "mixed"}
    attend = over_tokens(make_mesh(1, 2), arrays, **options)

    def gradient(attend):
        return jax.jit(jax.grad(lambda x: (1e-25 * attend(x)).sum()))(arrays)

    expected = gradient(lambda x: sinkhorn_attention(**x, num_iters=num_iters))
    scaled = lambda x: jax.tree.map(lambda y: 1e25 * y, x)
    got = scaled(gradient(attend))
    chex.assert_trees_all_close(got, scaled(expected), atol=1e-5)


def test_tokens_are_exchanged_for_heads_once():
    """Each of queries, keys, values and output, forward and backward."""
    operands = inputs(b=B, t=T, s=S, n=N, k=K)
    arrays = dict(zip(("query", "key", "value"), operands, strict=True))
    attend = over_tokens(make_mesh(2, 4), arrays, num_iters=7)
    loss = lambda arrays: jnp.sin(attend(arrays)).sum()
    program = jax.jit(jax.grad(loss)).lower(arrays).compile()
    assert collectives(program) == {"all-to-all": 8}


@pytest.mark.parametrize(("num_heads", "num_iters"), [(1, 4), (3, 2)])
def test_column_sums_are_added_up_once_for_all_heads(num_heads, num_iters):
    """In each iteration, forward and backward, and once for the softmax."""
    found = collectives(compile_step(Call("mixed", 8, 64, num_heads, num_iters)))
    assert found.pop("all-reduce") == 2 * num_iters + 1
    # Keys of both passes, values, and the cotangents of values and keys.
    assert found == {"collective-permute": 6 * 8, "all-gather": 1}


@pytest.mark.slow
def test_memory_is_linear_in_the_tokens():
    """One head of 64, forward and backward; docs/scaling.md has the last number."""
    megabytes = [
        compile_step(Call("mixed", 8, length, 1, 10))
        .memory_analysis()
        .temp_size_in_bytes
        / 2**20
        for length in (2**16, 2**17)
    ]
    assert megabytes[1] <= 2.1 * megabytes[0]
    assert megabytes[1] <= 105


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"sequence_strategy": "ring"},
            ValueError,
            "'auto', 'ulysses', 'mixed', got 'r",
        ),
        ({"implementation": "scaling"}, ValueError, "cannot attend to keys of other"),
        ({"local_window_size": 3}, NotImplementedError, "no local_window_size where"),
        ({"tolerance": 1e-3}, NotImplementedError, "takes no tolerance"),
    ],
)
def test_what_sums_over_devices_refuse(options, error, message, unchecked):
    arrays = dict(
        zip("query key value".split(), inputs(t=T, s=S, n=3, k=3), strict=True)
    )
    with pytest.raises(error, match=message):
        over_tokens(make_mesh(1, 2), arrays, **options)(arrays)


@pytest.mark.parametrize(
    ("axis", "error", "message"),
    [
        ("other", ValueError, r"'other' must be an axis of the jax.shard_map"),
        (("tokens",), TypeError, "the name of one mesh axis"),
        ("tokens", ValueError, r"got 8 query heads and 4 key heads for the 8"),
    ],
)
def test_bad_axes(axis, error, message, unchecked):
    operands = inputs(b=B, t=T, s=S, n=N, k=K)
    attend = functools.partial(
        sinkhorn_attention, sequence_axis=axis, sequence_strategy="ulysses"
    )
    parts = PartitionSpec(None, "tokens")
    mesh = make_mesh(1, 8)
    with pytest.raises(error, match=message):
        jax.shard_map(attend, mesh=mesh, in_specs=parts, out_specs=parts)(*operands)


def test_without_shard_map():
    with pytest.raises(ValueError, match=r"jax.shard_map around the call"):
        sinkhorn_attention(*inputs(), sequence_axis="tokens")
