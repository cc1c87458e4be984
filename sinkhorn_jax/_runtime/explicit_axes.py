"""Operations on arrays whose types say how a mesh with Explicit axes divides them."""

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped


def padded(spec: Iterable[Any], ndim: int) -> tuple[Any, ...]:
    """The spec, with None for the axes of an array that it does not reach."""
    return (*spec, *[None] * ndim)[:ndim]


def like(
    x: Array, other: Array, axes: tuple[int, ...] | None = None
) -> Shaped[Array, "..."]:
    """`x`, divided like the last of these axes of `other` where axes are Explicit.

    An axis of size 1 stays whole. Without this, an operation on both is an error where
    they are divided differently.
    """
    sharding = jax.typeof(other).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    spec, shape = padded(sharding.spec, other.ndim), other.shape
    if axes is not None:
        spec, shape = [spec[i] for i in axes], [shape[i] for i in axes]
    first = len(spec) - x.ndim
    pairs = zip(x.shape, shape[first:], spec[first:], strict=True)
    wanted = [axis if size == length else None for size, length, axis in pairs]
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*wanted)))


def merge_axes(x: Array, num_axes: int) -> Shaped[Array, "..."]:
    """`x` with its first axes as one.

    Where axes of the mesh are Explicit, no axis behind a whole one stays divided: the
    one axis could not be.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        spec = list(padded(sharding.spec, x.ndim))
        sizes = enumerate(x.shape[:num_axes])
        whole = [i for i, size in sizes if spec[i] is None and size != 1]
        if whole:
            spec[whole[0] : num_axes] = [None] * (num_axes - whole[0])
        x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    # Not -1, which no array without entries determines.
    return x.reshape(math.prod(x.shape[:num_axes]), *x.shape[num_axes:])
