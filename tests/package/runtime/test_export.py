"""Exported programs whose batch, or lengths, are not known yet."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import export
from support.attention_cases import PLAIN, D, H, K, N, random

from sinkhorn_jax import sinkhorn, sinkhorn_attention, sinkhorn_potentials

pytestmark = pytest.mark.usefixtures("unchecked")
MATRICES = pytest.mark.parametrize("implementation", ["scaling", "reference", None])
# Up to 32 x 32 all matrices are in flight on a CPU, larger ones one by one.
SIZES = pytest.mark.parametrize("size", [8, 40])


def shapes(text, *arrays, dtypes=None):
    """Abstract arrays, with symbols where `text` has one."""
    symbols = export.symbolic_shape(text)
    names = dict(zip(text.split(","), symbols, strict=True))
    return [
        jax.ShapeDtypeStruct(tuple(names.get(n, n) for n in shape), dtype)
        for shape, dtype in zip(
            arrays, dtypes or ["float64"] * len(arrays), strict=True
        )
    ]


def check(function, abstract, arrays):
    exported = export.export(jax.jit(function))(*abstract)
    got, expected = exported.call(*arrays), function(*arrays)
    chex.assert_trees_all_close(got, expected, atol=1e-12)


@pytest.mark.few(1)
@MATRICES
@SIZES
@pytest.mark.parametrize(
    "tolerance", [1e-3, pytest.param(None, marks=pytest.mark.slow)]
)
def test_matrices_of_a_symbolic_batch(implementation, size, tolerance):
    options = {"tolerance": tolerance, "implementation": implementation}

    def solve(logits):
        loss = lambda z: (sinkhorn(z, 3, **options) ** 2).sum()
        return sinkhorn_potentials(logits, 3, **options), jax.grad(loss)(logits)

    abstract = shapes("b", ("b", 2, size, size))
    check(solve, abstract, [random(0, (3, 2, size, size))])


@MATRICES
def test_matrices_of_symbolic_sizes(implementation):
    solve = lambda logits: sinkhorn(logits, 3, implementation=implementation)
    check(solve, shapes("t,s", (2, "t", "s")), [random(0, (2, 5, 7))])


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", [*PLAIN, None])
@SIZES
def test_attention_of_a_symbolic_batch(implementation, size):
    def gradients(query, key, value, bias, lengths):
        def loss(*operands):
            out = sinkhorn_attention(
                *operands,
                mask=jnp.ones((1, N, size, size), bool),
                num_iters=3,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                implementation=implementation,
            )
            return jnp.sin(out).sum()

        return jax.value_and_grad(loss, (0, 1, 2, 3))(query, key, value, bias)

    sizes = [("b", size, N, H), ("b", size, K, H), ("b", size, K, D)]
    sizes += [("b", 1, size, size), ("b",)]
    abstract = shapes("b", *sizes, dtypes=["float64"] * 4 + ["int32"])
    arrays = [random(i, (3, *shape[1:])) for i, shape in enumerate(sizes[:-1])]
    check(gradients, abstract, [*arrays, jnp.array([3, 5, 8], "int32")])


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", [*PLAIN, None])
def test_attention_of_symbolic_lengths(implementation):
    def gradient(query, key):
        def loss(*operands):
            out = sinkhorn_attention(
                *operands, operands[1], num_iters=3, implementation=implementation
            )
            return jnp.sin(out).sum()

        return jax.value_and_grad(loss, (0, 1))(query, key)

    abstract = shapes("b,t,s", ("b", "t", N, H), ("b", "s", K, H))
    check(gradient, abstract, [random(0, (2, 5, N, H)), random(1, (2, 7, K, H))])
