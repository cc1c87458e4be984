"""The dtype and the matrix product that all passes over the same logits share."""

import jax
import jax.numpy as jnp

# TF32 or bfloat16 products would differ between the passes that recompute the same
# logits, and every iteration magnifies the difference.
PRECISION = jax.lax.Precision.HIGHEST


def accum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What potentials, sums and products of this dtype are kept in."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def dot(x, y):
    """Matrix product in the one precision that all passes share."""
    return jnp.matmul(
        x, y, precision=PRECISION, preferred_element_type=accum_dtype(x.dtype)
    )
