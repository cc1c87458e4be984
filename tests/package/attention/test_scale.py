"""The scale as a number, and as an array that is not known when a call is compiled."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_cases import ATOL, N, T, implementations, inputs, random

from sinkhorn_jax import sinkhorn_attention


@pytest.mark.few(3)
@implementations
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scalar_array_is_the_number(implementation, dtype):
    query, key, value = inputs(dtype)

    def attend(scale):
        return sinkhorn_attention(
            query, key, value, scale=scale, implementation=implementation
        )

    out = jax.jit(attend)(jnp.float32(0.7))
    expected = attend(0.7)
    chex.assert_trees_all_close(
        *(x.astype("float32") for x in (out, expected)), atol=ATOL[dtype]
    )


@pytest.mark.few(2)
@implementations
def test_its_gradient_is_that_of_the_temperature(implementation):
    query, key, value = inputs()
    options = {"num_iters": 3, "implementation": implementation}
    plain = not implementation.startswith("mosaic")
    if plain:
        options["bias"] = random(5, (1, N, T, 1))

    def loss(scale, query):
        return jnp.sin(
            sinkhorn_attention(query, key, value, scale=scale, **options)
        ).sum()

    def on_queries(scale, query):
        return loss(1.0, query * scale)

    arguments = jnp.asarray(0.7, query.dtype), query
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
    expected = jax.value_and_grad(on_queries, (0, 1))(*arguments)
    chex.assert_trees_all_close(got, expected, atol=1e-12)
    step = 1e-5
    slope = (loss(0.7 + step, query) - loss(0.7 - step, query)) / (2 * step)
    np.testing.assert_allclose(got[1][0], slope, rtol=1e-7)


def test_new_values_do_not_compile_again():
    query, key, value = inputs("float32", t=13)  # A length that no other test uses.

    @jax.jit
    @chex.assert_max_traces(1)
    def attend(scale):
        return sinkhorn_attention(query, key, value, scale=scale)

    outs = [attend(jnp.float32(x)) for x in (0.1, 1.0)]
    assert abs(outs[0] - outs[1]).max() > 1e-3


def test_a_scale_for_each_element_under_vmap():
    operands = inputs("float32")
    scales = jnp.array([0.3, 1.5], "float32")
    attend = lambda scale, *operands: sinkhorn_attention(*operands, scale=scale)
    out = jax.vmap(attend)(scales, *operands)
    for i in range(2):
        one = attend(float(scales[i]), *(x[i] for x in operands))
        chex.assert_trees_all_close(out[i], one, atol=1e-6)
