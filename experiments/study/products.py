"""Products of attention matrices along paths through a trained network."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from jaxtyping import Float

from ..networks.paths import log10_residual

# The kinds of products; `observe.DEFINITIONS` says what they are.
KINDS: Final = ("sampled", "shuffled", "independent")


def along_paths(
    logits: Float[np.ndarray, "B L N T T"],
    normalise: Callable[[Float[np.ndarray, "L N T T"]], Float[np.ndarray, "L N T T"]],
    rng: np.random.Generator,
    num_paths: int,
) -> dict[str, list[float]]:
    """The mean of log10 |C P| / |P| over examples and paths, by kind, [length - 1].

    Args:
        logits: Of B examples, L layers, N heads, T tokens.
        normalise: The map from logits to attention matrices.
        rng: Draws paths, orders and permutations. Equal generators draw equally.
        num_paths: Paths of each length and example.
    """
    _, depth, num_heads = logits.shape[:3]
    found = {kind: np.zeros(depth) for kind in KINDS}
    for each in logits:
        plans = normalise(each)
        flat = each.reshape(depth, num_heads, -1)
        independent = normalise(rng.permuted(flat, axis=-1).reshape(each.shape))
        for length in range(1, depth + 1):
            for _ in range(num_paths):
                layers = np.sort(rng.permutation(depth)[:length])
                heads = rng.integers(num_heads, size=length)
                order = rng.permutation(length)
                path = plans[layers, heads]
                products: Sequence = (path, path[order], independent[layers, heads])
                for kind, product in zip(KINDS, products, strict=True):
                    found[kind][length - 1] += log10_residual(product)
    total = len(logits) * num_paths
    return {kind: (values / total).tolist() for kind, values in found.items()}
