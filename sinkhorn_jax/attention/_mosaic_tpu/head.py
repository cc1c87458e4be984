"""What the forward and the backward TPU kernels do alike with a strip of rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from .._problem import Problem
from .blocks import SUBLANES, Blocks

# A reference to memory inside a kernel. Pallas has no public type for one.
Ref = Any


@dataclasses.dataclass(frozen=True)
class Head:
    """One head inside a kernel: its operands and how many of them are valid.

    The kernel matrix of a pass is exp(X - rowmax(X)) with X = Z - rowmax(Z) + base, for
    the logits Z. The first maximum comes off before the base goes on: so an offset of a
    whole row, however large, costs no precision.
    """

    problem: Problem
    blocks: Blocks
    num_rows: Int[Array, ""]
    num_cols: Int[Array, ""]
    query_ref: Ref  # [1, padded rows or rows of a strip, H]
    key_ref: Ref  # [1, H, cols]: columns on lanes, of which a tile has 128.
    kernel_ref: Ref  # [padded rows or rows of a strip, cols]: the matrix of a pass.

    def rows(self, i: Int[Array, ""] | int) -> Any:
        """Where the strip is in an array that the kernel holds for it."""
        # Without a resident matrix the grid goes through the strips, and the arrays
        # hold one. A multiple, for the compiler to see an aligned address.
        if not self.blocks.is_resident:
            return pl.ds(0, self.blocks.rows)
        return self.all_rows(i)

    def all_rows(self, i: Int[Array, ""] | int) -> Any:
        """Where the strip is in an array of all rows."""
        return pl.ds(
            pl.multiple_of(jnp.int32(i) * self.blocks.rows, SUBLANES), self.blocks.rows
        )

    def row_of(self, count: Int[Array, ""]) -> Float[Array, "1 S"]:
        """A count in every column, to divide by: the scalar unit has no division."""
        return jnp.full((1, self.blocks.cols), count, jnp.int32).astype(jnp.float32)

    def valid_cols(self) -> Bool[Array, "1 S"]:
        """False for padding."""
        position = jax.lax.broadcasted_iota(jnp.int32, (1, self.blocks.cols), 1)
        return position < self.num_cols

    def logits(self, i: Int[Array, ""] | int) -> Float[Array, "I S"]:
        """Less their row maxima, -inf for padding; the same bits in every pass."""
        query = self.query_ref[0, self.rows(i)]
        row = jax.lax.broadcasted_iota(jnp.int32, (self.blocks.rows, 1), 0)
        is_valid = row + i * self.blocks.rows < self.num_rows
        # Whole rows of padding go by their maximum, which costs nothing an entry; what
        # they hold must be finite for that. Selected in float32, as the mask is.
        query = jnp.where(is_valid, query.astype(jnp.float32), 0.0).astype(query.dtype)
        z = product(query, self.key_ref[0], (1, 0)) * jnp.float32(self.problem.scale)
        z = jnp.where(self.valid_cols(), z, -jnp.inf)
        return z - jnp.where(is_valid, _row_maxima(z), jnp.inf)

    def kernel(
        self,
        i: Int[Array, ""] | int,
        base: Float[Array, "1 S"],
        is_kept: Bool[Array, ""] | bool,
        z: Float[Array, "I S"] | None = None,
    ) -> Float[Array, "I S"]:
        """The strip's kernel matrix.

        Args:
            i: The strip.
            base: What is added to the logits.
            is_kept: Whether a resident matrix still is what the last pass left.
            z: `logits(i)` if they are there already.
        """

        def make():
            x = (self.logits(i) if z is None else z) + base
            self.kernel_ref[self.rows(i), :] = jnp.exp(x - _row_maxima(x))

        if is_kept is False or not self.blocks.is_resident:
            make()
        else:
            pl.when(jnp.logical_not(is_kept))(make)
        return self.kernel_ref[self.rows(i), :]


def product(
    x: Float[Array, "..."], y: Float[Array, "..."], contract: tuple[int, int]
) -> Float[Array, "..."]:
    """Sum over an axis of each, in float32; of bfloat16 exact, as of float32 nearly."""
    precision = (
        jax.lax.Precision.HIGHEST
        if x.dtype == jnp.float32
        else jax.lax.Precision.DEFAULT
    )
    if 1 in (*x.shape, *y.shape):
        # Pallas multiplies vectors outside the matrix unit, and there cannot widen.
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    dims = ((contract[0],), (contract[1],)), ((), ())
    return jax.lax.dot_general(
        x, y, dims, precision=precision, preferred_element_type=jnp.float32
    )


def row_sums(x: Float[Array, "I S"]) -> Float[Array, "I 1"]:
    """On the vector unit: a matrix product would round what it sums."""
    return jnp.sum(x, axis=1, keepdims=True)


def col_sums(x: Float[Array, "I S"]) -> Float[Array, "1 S"]:
    """As `row_sums`."""
    return jnp.sum(x, axis=0, keepdims=True)


def _row_maxima(x):
    # A row of padding has no maximum; -inf less the least number is still -inf.
    top = jnp.max(x, axis=1, keepdims=True)
    return jnp.maximum(top, jnp.finfo(jnp.float32).min)
