"""How the partitioner divides arrays, on a mesh whose axes it cannot split."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh, Sharding


def prime_mesh(
    arrays: Iterable[tuple[Sharding, tuple[int, ...]]],
) -> tuple[Mesh, list[tuple[Any, ...]]]:
    """A mesh of all devices, and how its axes divide each array; None for undivided.

    The partitioner may split an axis of the user's mesh, so that no axis divides an
    array any more: a batch over 8 devices becomes 2 x 4 where it is reshaped so. The
    axes of this mesh cannot be split: their sizes are the primes in the number of
    devices.
    """
    devices, parts = zip(*(_parts(*array) for array in arrays), strict=True)
    devices = np.asarray(devices[0])
    factors = primes(len(devices))
    for sizes in sorted(set(itertools.permutations(factors))):
        specs = [spec_of(x.reshape(-1, *sizes)) for x in parts]
        if all(spec is not None for spec in specs):
            break
    else:  # Each array on every device.
        sizes, specs = factors, [(None,) * len(x) for x in parts]
    names = [f"axis_{i}" for i in range(len(sizes))]
    named = [
        tuple(
            None if not axes else tuple(names[i] for i in axes) for axes in spec or ()
        )
        for spec in specs
    ]
    return Mesh(devices.reshape(sizes), names), named


def _parts(sharding, shape):
    """The devices, and the number of each one's part: [axes of the array, devices]."""
    indices = sharding.devices_indices_map(shape)
    parts = np.zeros((len(shape), len(indices)), int)
    for axis, part in enumerate(parts):
        starts = [index[axis].start or 0 for index in indices.values()]
        part[:] = np.unique(starts, return_inverse=True)[1]
    return list(indices), parts


def spec_of(places: np.ndarray) -> tuple[tuple[int, ...], ...] | None:
    """The axes of a mesh that divide each axis of an array, the slowest first.

    `places` [axes of the array, *sizes of the mesh] says which part of each axis a
    device has. None where it is not divided by whole axes of the mesh.
    """
    spec = []
    for place in places:
        steps = {}
        for i, size in enumerate(place.shape):
            at = [0] * place.ndim
            at[i] = 1
            if size > 1 and place[tuple(at)]:
                steps[i] = int(place[tuple(at)])
        grid = np.indices(place.shape)
        made_of = sum(
            (step * grid[i] for i, step in steps.items()), np.zeros_like(place)
        )
        axes = sorted(steps, key=lambda i: -steps[i])
        num_parts = math.prod(place.shape[i] for i in axes)
        if (made_of != place).any() or num_parts != place.max() + 1:
            return None
        spec.append(tuple(axes))
    return tuple(spec)


def primes(number: int) -> list[int]:
    """The prime factors of a number, the least first."""
    factors = []
    for factor in range(2, number + 1):
        while number % factor == 0:
            factors.append(factor)
            number //= factor
    return factors
