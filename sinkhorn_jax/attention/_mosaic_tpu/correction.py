"""The factors of the correction in VMEM, for the iterations that share a base."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .blocks import LANES, Blocks
from .head import Ref, col_sums, product


@dataclasses.dataclass(frozen=True)
class Correction:
    """The factors A and B of the correction E (A B^T) of docs/architecture.md (8).

    Their columns 0 to half - 1 are those of column steps 2 to L, the next `half` those
    of row steps 1 to L - 1, with half = L - 1. Both are stored transposed: rows of A on
    lanes, where they take no padding, as many query blocks side by side as fit.
    """

    blocks: Blocks
    half: int
    left_ref: Ref  # [groups of query blocks, R, LANES], R = 2 half, rounded up.
    right_ref: Ref  # [R, S]

    def clear(self) -> None:
        """Sets both factors to zero."""
        self.left_ref[...] = jnp.zeros_like(self.left_ref)
        self.right_ref[...] = jnp.zeros_like(self.right_ref)

    def put(self, i, k, r: Float[Array, "I 1"], row_weight: Float[Array, "I 1"]):
        """Stores query block i of A's columns for column step k + 1 and row step k."""
        group, place = self._place(i)
        self.left_ref[group, pl.ds(k - 1, 1), :] += col_sums(place * r)
        at_row_step = group, pl.ds(self.half + k - 1, 1), slice(None)
        self.left_ref[at_row_step] += col_sums(place * (r * row_weight))

    def left(self, i) -> Float[Array, "I R"]:
        """Query block i of the rows of A."""
        group, place = self._place(i)
        return product(place, self.left_ref[group], (1, 1))

    def _place(self, i):
        """The group of query block i, and a matrix [I, LANES] that moves rows there."""
        count = LANES // self.blocks.rows
        shape = self.blocks.rows, LANES
        position = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        group = jax.lax.div(jnp.int32(i), jnp.int32(count))
        start = (jnp.int32(i) - group * count) * self.blocks.rows
        return group, (lane == position + start).astype(jnp.float32)
