"""Random splits with every class in each of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def stratified_split(
    labels: Int[np.ndarray, " N"], sizes: Sequence[int], seed: int
) -> list[Int[np.ndarray, " M"]]:
    """Disjoint random index arrays of the given sizes, each with the classes even.

    Args:
        labels: Class of each item, in any order.
        sizes: Items of each split. Where a size is no multiple of the classes, the
            first classes get one more.
        seed: Decides everything.

    Returns:
        One shuffled index array a size.

    Raises:
        ValueError: A class has too few items.
    """
    num_classes = len(np.unique(labels))
    counts = [
        [(size + num_classes - 1 - k) // num_classes for size in sizes]
        for k in range(num_classes)
    ]
    for label, wanted in zip(np.unique(labels), counts, strict=True):
        num = int((labels == label).sum())
        if sum(wanted) > num:
            raise ValueError(
                f"Splits of {list(sizes)} need {sum(wanted)} items of class {label}, "
                f"but there are {num}. Ask for smaller splits."
            )
    return _split(labels, counts, seed)


def proportional_split(
    labels: Int[np.ndarray, " N"], fractions: Sequence[float], seed: int
) -> list[Int[np.ndarray, " M"]]:
    """Disjoint random index arrays, each with the classes in the shares of `labels`.

    Args:
        labels: Class of each item, in any order.
        fractions: What each split takes of every class, rounded to whole items.
        seed: Decides everything.

    Returns:
        One shuffled index array a fraction, and the rest.
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
