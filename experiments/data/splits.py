"""Random splits with every class in each of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def stratified_split(
    labels: Int[np.ndarray, " N"], sizes: Sequence[int], seed: int
) -> list[Int[np.ndarray, " M"]]:
    """Disjoint shuffled index arrays of given sizes, with classes of equal size.

    Where the number of classes does not divide a size, the first classes get one more
    item. `labels` has the class of each item, in any order.

    Raises:
        ValueError: A class has too few items.
    """
    classes, nums = np.unique(labels, return_counts=True)
    counts = [
        [(size + len(classes) - 1 - k) // len(classes) for size in sizes]
        for k in range(len(classes))
    ]
    for label, num, wanted in zip(classes, map(int, nums), counts, strict=True):
        if sum(wanted) > num:
            raise ValueError(
                f"Splits of {list(sizes)} need {sum(wanted)} items of class {label}, "
                f"but there are {num}. Ask for smaller splits."
            )
    return _split(labels, counts, seed)


def proportional_split(
    labels: Int[np.ndarray, " N"], fractions: Sequence[float], seed: int
) -> list[Int[np.ndarray, " M"]]:
    """Disjoint shuffled index arrays, one for each fraction and one for the rest.

    Each has that fraction of the items of every class, rounded to whole items.
    """
    counts = []
    for num in np.unique_counts(labels).counts:
        taken = [round(fraction * num) for fraction in fractions]
        counts.append([*taken, num - sum(taken)])
    return _split(labels, counts, seed)


def _split(labels, counts, seed):
    """Shuffled index arrays with `counts[k][i]` items of class k in array i."""
    rng = np.random.default_rng(seed)
    parts = []
    for label, wanted in zip(np.unique(labels), counts, strict=True):
        items = rng.permutation(np.flatnonzero(labels == label))
        parts.append(np.split(items, np.cumsum(wanted))[:-1])
    return [rng.permutation(np.concatenate(part)) for part in zip(*parts, strict=True)]
