"""Exchange between the devices of an axis of `jax.shard_map`.

Each function takes the name of the axis. Where it is None there is one device, and the
function returns its array as it is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from .shard_map import varying_like


def total(axis: str | None, x: Num[Array, "..."]) -> Num[Array, "..."]:
    """The sum over the devices of an axis."""
    return x if axis is None else varying_like(jax.lax.psum(x, axis), x)


def largest(axis: str | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The largest over the devices of an axis."""
    return x if axis is None else varying_like(jax.lax.pmax(x, axis), x)


def anywhere(axis: str | None, x: Bool[Array, "..."]) -> Bool[Array, "..."]:
    """Whether it is true on a device of an axis."""
    return x if axis is None else total(axis, x.astype(jnp.int32)) > 0


def gathered(axis: str | None, x: Array, dim: int) -> Array:
    """The parts that the devices of an axis have, next to each other along `dim`."""
    if axis is None:
        return x
    x = varying_like(x, (x, jax.lax.axis_index(axis)))
    return jax.lax.all_gather(x, axis, axis=dim % x.ndim, tiled=True)


def ring(axis: str) -> list[tuple[int, int]]:
    """The permutation that hands each device's array to the device before it."""
    size = jax.lax.axis_size(axis)
    return [(i, (i - 1) % size) for i in range(size)]


def gathered_by_ring(axis: str, x: Array) -> Array:
    """The result of `gathered` along the last axis, made without a second copy of it.

    XLA gathers into another order of memory and copies the whole for each loop that
    reads it.
    """
    num_parts, size = jax.lax.axis_size(axis), x.shape[-1]
    index = jax.lax.axis_index(axis)

    def put(i, state):
        whole, part = state
        start = (index + i) % num_parts * size
        whole = jax.lax.dynamic_update_slice_in_dim(whole, part, start, x.ndim - 1)
        return whole, jax.lax.ppermute(part, axis, ring(axis))

    x = varying_like(x, (x, index))
    whole = jnp.tile(x, num_parts)  # Zeros would be kept for the next call.
    return jax.lax.fori_loop(0, num_parts, put, (whole, x))[0]


def own_part(axis: str | None, x: Array, dim: int) -> Array:
    """This device's part of what `gathered` returns."""
    if axis is None:
        return x
    size = x.shape[dim] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, dim)


def among_parts(axis: str | None, x: Num[Array, "... t"]) -> Num[Array, "... T"]:
    """The array with zeros beside it for the parts of other devices.

    The sum over the devices then has all parts, along the last axis.
    """
    if axis is None:
        return x
    size = x.shape[-1]
    zeros = jnp.zeros((*x.shape[:-1], size * jax.lax.axis_size(axis)), x.dtype)
    start = jax.lax.axis_index(axis) * size
    zeros = varying_like(zeros, (x, start))
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, start, x.ndim - 1)


def on_first(axis: str | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array `x` on the first device of an axis, zeros on the other devices.

    A cotangent that all devices compute counts once, not once for each.
    """
    return x if axis is None else jnp.where(jax.lax.axis_index(axis) == 0, x, 0)
