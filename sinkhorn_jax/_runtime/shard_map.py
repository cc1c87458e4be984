"""Arrays that vary over the axes of `jax.shard_map`, as its loops and kernels need."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def varying_like(xs: Any, others: Any) -> Any:
    """Returns `xs`, made to vary over the `jax.shard_map` axes that `others` vary over.

    The carry of a loop must vary from the start like what is added to it, and an
    operand like its cotangent. Outside a `jax.shard_map`, `xs` is returned as it is.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return xs
    # A result varies like its operands; XLA removes a choice between equal arrays.
    firsts = [jnp.ravel(x)[0] for x in jax.tree.leaves(others)]
    flag = functools.reduce(jnp.logical_or, [x != x for x in firsts])
    return jax.tree.map(lambda x: jnp.where(flag, x, x), xs)


def varying_axes(x: Array) -> tuple[str, ...]:
    """The `jax.shard_map` axes that an array varies over, in the order of the mesh.

    With `check_vma=False` JAX does not know them, and there are none.
    """
    varying = jax.typeof(x).manual_axis_type.varying
    axes = jax.sharding.get_abstract_mesh().axis_names
    return tuple(axis for axis in axes if axis in varying)


def kernel_result(
    operand: Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which varies over the axes of the operand."""

    def make(x):
        return jnp.broadcast_to(jnp.ravel(x)[0].astype(dtype), shape)

    return jax.eval_shape(make, operand)
