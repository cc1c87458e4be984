"""Arrays of tokens before and after the layers of an encoder."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

Pooling = Literal["mean", "max", "class_token"]


def patches(
    images: UInt8[Array, "B H W C"], size: int
) -> UInt8[Array, "B (H*W)/(size*size) size*size*C"]:
    """Square patches of images row by row, each as one vector.

    Raises:
        ValueError: `size` does not divide a side of the images.
    """
    b, h, w, c = images.shape
    if h % size or w % size:
        raise ValueError(
            f"patch_size must divide the image's sides, got {size} and {h} x {w}."
        )
    x = images.reshape(b, h // size, size, w // size, size, c)
    return x.swapaxes(2, 3).reshape(b, (h // size) * (w // size), size * size * c)


def sinusoids(num: int, width: int) -> Float[np.ndarray, "num width"]:
    """Positions as sines and cosines, after Vaswani et al. 2017, arXiv:1706.03762."""
    rate = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angle = np.arange(num)[:, None] * rate
    both = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(num, -1)
    return both[:, :width].astype(np.float32)


def is_valid(lengths: Int[Array, " B"], seq_len: int) -> Bool[Array, "B T"]:
    """True where a token is not padding."""
    return jnp.arange(seq_len, dtype=lengths.dtype)[None, :] < lengths[:, None]


def pool(
    x: Float[Array, "B T D"], where: Bool[Array, "B T"], pooling: Pooling
) -> Float[Array, "B D"]:
    """One vector for all valid tokens: their mean, their maximum or the first token."""
    if pooling == "class_token":
        return x[:, 0]
    if pooling == "max":
        # The maximum of a text without valid tokens is that of its first padding.
        where = where.at[:, 0].set(True)
        # By index, because the derivative of `max` divides by the number of entries
        # equal to the maximum. XLA may compute an entry twice with different roundings,
        # and then that number is 0.
        index = jnp.where(where[..., None], x, -jnp.inf).argmax(axis=1, keepdims=True)
        return jnp.take_along_axis(x, index, axis=1)[:, 0]
    count = jnp.maximum(where.sum(axis=1).astype(x.dtype), 1.0)[:, None]
    return jnp.where(where[..., None], x, 0.0).sum(axis=1) / count
