"""One head inside a TPU kernel, and the sums and products of both kernels."""

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
    """One head inside a kernel: operands, and the numbers of valid rows and columns.

    The kernel matrix of a pass is exp(X - rowmax(X)) with X = Z - rowmax(Z) + base, for
    the logits Z. The row maxima are subtracted before the base is added, so that an
    offset of a whole row, however large, costs no precision.
    """

    problem: Problem
    blocks: Blocks
    num_rows: Int[Array, ""]
    num_cols: Int[Array, ""]
    query_ref: Ref  # [1, rows held, H]: all padded rows, or those of a query block.
    key_ref: Ref  # [1, H, cols]: columns on lanes, of which a tile has 128.
    kernel_ref: Ref  # [rows held, cols]: the kernel matrix of a pass.

    @classmethod
    def of(cls, problem, blocks, num_rows_ref, num_cols_ref, *refs: Ref) -> "Head":
        """The head of this step of the grid, with lengths [B] in SMEM."""
        b = jax.lax.div(pl.program_id(0), jnp.int32(problem.num_heads))
        return cls(problem, blocks, num_rows_ref[b], num_cols_ref[b], *refs)

    def rows(self, i) -> Any:
        """The slice of query block i in an array that the kernel holds."""
        if not self.blocks.is_resident:  # Then such an array holds one query block.
            return pl.ds(0, self.blocks.rows)
        # Marked as a multiple, for the compiler to see an aligned address.
        start = pl.multiple_of(jnp.int32(i) * self.blocks.rows, SUBLANES)
        return pl.ds(start, self.blocks.rows)

    def row_of(self, count: Int[Array, ""]) -> Float[Array, "1 S"]:
        """A row filled with `count`, to divide by: the scalar unit cannot divide."""
        return jnp.full((1, self.blocks.cols), count, jnp.int32).astype(jnp.float32)

    def valid_cols(self) -> Bool[Array, "1 S"]:
        """False for padding."""
        position = jax.lax.broadcasted_iota(jnp.int32, (1, self.blocks.cols), 1)
        return position < self.num_cols

    def logits(self, i) -> Float[Array, "I S"]:
        """Logits minus row maxima, -inf for padding; the same bits in every pass."""
        query = self.query_ref[0, self.rows(i)]
        row = jax.lax.broadcasted_iota(jnp.int32, (self.blocks.rows, 1), 0)
        is_valid = row + i * self.blocks.rows < self.num_rows
        # Rows of padding become -inf through their maximum, without work per entry. For
        # that their logits must be finite. Selected in float32, like the mask's layout.
        query = jnp.where(is_valid, query.astype(jnp.float32), 0.0).astype(query.dtype)
        z = product(query, self.key_ref[0], (1, 0)) * jnp.float32(self.problem.scale)
        z = jnp.where(self.valid_cols(), z, -jnp.inf)
        return z - jnp.where(is_valid, _row_maxima(z), jnp.inf)

    def kernel(self, i, base, is_kept, z=None) -> Float[Array, "I S"]:
        """The kernel matrix of query block i, with a base [1, S] added to the logits.

        A resident one is computed again unless it `is_kept` from the last pass; z is
        the result of `logits(i)`, if it is known.
        """

        def compute():
            x = (self.logits(i) if z is None else z) + base
            self.kernel_ref[self.rows(i), :] = jnp.exp(x - _row_maxima(x))

        if is_kept is False or not self.blocks.is_resident:
            compute()
        else:
            pl.when(jnp.logical_not(is_kept))(compute)
        return self.kernel_ref[self.rows(i), :]


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """The product in float32, summed over one axis of each factor.

    Products of bfloat16 are exact before they are summed, those of float32 nearly.
    """
    precision = "highest" if x.dtype == jnp.float32 else "default"
    if 1 in (*x.shape, *y.shape):
        # Pallas multiplies vectors outside the matrix unit, where it cannot widen.
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    dims = ((contract[0],), (contract[1],)), ((), ())
    return jax.lax.dot_general(
        x, y, dims, precision=precision, preferred_element_type=jnp.float32
    )


def row_sums(x: Float[Array, "I S"]) -> Float[Array, "I 1"]:
    """Row sums on the vector unit: a matrix product would round the entries."""
    return jnp.sum(x, axis=1, keepdims=True)


def col_sums(x: Float[Array, "I S"]) -> Float[Array, "1 S"]:
    """Column sums on the vector unit, like `row_sums`."""
    return jnp.sum(x, axis=0, keepdims=True)


def _row_maxima(x):
    # A row of padding has no maximum; -inf minus the least number is still -inf.
    top = jnp.max(x, axis=1, keepdims=True)
    return jnp.maximum(top, jnp.finfo(jnp.float32).min)
