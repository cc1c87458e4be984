"""What `jax.shard_map` asks of loops and kernels: arrays that vary over its axes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def varying_like(xs: Any, others: Any) -> Any:
    """`xs`, varying over each axis of a `jax.shard_map` that one of `others` does.

    The carry of a loop has to vary from the start like what is added to it, and an
    operand like its cotangent. Elsewhere nothing happens.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return xs
    # A result varies like its operands, and XLA drops a choice between equals.
    firsts = [jnp.ravel(x)[0] for x in jax.tree.leaves(others)]
    flag = functools.reduce(jnp.logical_or, [x != x for x in firsts])
    return jax.tree.map(lambda x: jnp.where(flag, x, x), xs)


def kernel_result(
    operand: Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """Of a kernel, varying over the axes of a `jax.shard_map` as an operand does."""

    def make(x):
        return jnp.broadcast_to(jnp.ravel(x)[0].astype(dtype), shape)

    return jax.eval_shape(make, operand)
