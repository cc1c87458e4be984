"""The dtype and the matrix product of all passes over the same logits."""

import jax
import jax.numpy as jnp

# Several passes compute the same logits. TF32 or bfloat16 products would differ between
# them, and every iteration magnifies the difference.
PRECISION = jax.lax.Precision.HIGHEST


def accum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of potentials, sums and products for operands of a dtype."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def in_range(largest):
    """A factor for positive numbers, so that the sum of the products is in range.

    It is 1 unless the largest is huge. A quotient by the largest would not do: XLA may
    turn it into a product with a reciprocal, which for the largest numbers is 0.
    """
    one = jnp.ones_like(largest)
    return jnp.where(largest > 2.0**64, 2.0**-64 * one, one)


def dot(x, y):
    """The matrix product x y in the precision of all passes."""
    return jnp.matmul(
        x, y, precision=PRECISION, preferred_element_type=accum_dtype(x.dtype)
    )
