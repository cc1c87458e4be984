"""`sinkhorn_attention`: gradients, held against autodiff and differences."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.test_util import check_grads
from support.attention_cases import (
    CASES,
    B,
    D,
    N,
    S,
    T,
    gradients,
    implementations,
    inputs,
    options_of,
    random,
)

from sinkhorn_jax import Implicit, Truncated, sinkhorn_attention

pytestmark = pytest.mark.usefixtures("short_query_blocks")


FLOAT64_GRADIENT_ATOL = 1e-11


@pytest.mark.few(4)
@implementations
@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_autodiff_of_the_reference(implementation, case):
    if implementation == "reference":
        pytest.skip("It is what the others are held against.")
    operands, options = inputs(), options_of(case)
    bias = options.pop("bias", None)
    chex.assert_trees_all_close(
        gradients(implementation, operands, bias, options),
        gradients_of_the_reference(case),
        atol=FLOAT64_GRADIENT_ATOL,
    )


@functools.cache
def gradients_of_the_reference(case):
    options = options_of(case)
    return gradients("reference", inputs(), options.pop("bias", None), options)


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", ["streaming", "scaling"])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient": Truncated(0)},
        {"gradient": Truncated(2), "finish": "columns", "num_iters": 4},
        {"gradient": Implicit(tolerance=1e-12), "num_iters": 300},
        {"num_iters": 0},
        {"num_iters": 2, "dropout_rate": 0.4, "dropout_rng": jax.random.key(3)},
    ],
    ids=str,
)
def test_other_gradients_agree_with_the_reference(implementation, options):
    if implementation == "streaming" and isinstance(options.get("gradient"), Implicit):
        pytest.skip("It does not take this gradient, as another test sees.")
    operands, bias = inputs(), random(5, (N, T, S))
    options |= {
        "query_seq_lengths": jnp.array([3, 5]),
        "key_value_seq_lengths": jnp.array([7, 4]),
    }
    chex.assert_trees_all_close(
        gradients(implementation, operands, bias, options),
        gradients("reference", operands, bias, options),
        atol=1e-9,
    )


@pytest.mark.few(2)
@implementations
def test_gradients_agree_with_finite_differences(implementation):
    bias, w = random(5, (1, N, T, S)), random(9, (B, T, N, D))

    def loss(query, key, value, bias):
        out = sinkhorn_attention(
            query, key, value, bias, num_iters=2, implementation=implementation
        )
        return (out * w).sum()

    modes = ["rev", "fwd"] if implementation == "reference" else ["rev"]
    check_grads(jax.jit(loss), (*inputs(), bias), 1, modes)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", ["streaming", "scaling"])
def test_gradients_in_float32_on_large_logits(implementation):
    operands = inputs("float32", t=64, s=48, n=2, k=1, h=16, d=16, scale=50.0)
    exact = gradients(
        "reference", jax.tree.map(lambda x: x.astype("float64"), operands), None, {}
    )
    got = gradients(implementation, operands, None, {})
    for got_one, expected in zip(got[1], exact[1], strict=True):
        error = abs(got_one.astype("float64") - expected).max() / abs(expected).max()
        assert error < 2e-5


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", ["streaming", "scaling"])
@pytest.mark.parametrize("num_iters", [0, 1, 3])
@pytest.mark.parametrize("offset", [pytest.param(0.0, marks=pytest.mark.slow), 1e4])
def test_gradients_in_float32_do_not_see_row_offsets(implementation, num_iters, offset):
    # With these queries the keys are the logits. What is added to a row of logits is of
    # no effect, but a potential that cancels it can be rounded.
    t, s = 17, 11
    logits = 50 * random(0, (s, t)) + offset * random(1, (1, t))
    operands = jnp.eye(t)[None, :, None], logits[None, :, None], random(2, (1, s, 1, 4))
    operands = jax.tree.map(lambda x: x.astype("float32"), operands)
    options = {"num_iters": num_iters, "scale": 1.0}
    exact = gradients(
        "reference",
        jax.tree.map(lambda x: x.astype("float64"), operands),
        None,
        options,
    )
    # The cotangent of the queries is a product with the logits, so of their precision.
    _, (_, *grads) = gradients(implementation, operands, None, options)
    for got, expected in zip(grads, exact[1][1:], strict=True):
        error = abs(got.astype("float64") - expected).max() / abs(expected).max()
        assert error < 2e-5
