"""What the modules of the GPU kernels pass to each other."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A reference to memory inside a kernel. Pallas has no public type for one.
Ref = Any


class PaddedOperands(NamedTuple):
    """Operands with heads first, padded to whole tiles.

    Attributes:
        query: Queries; zeros where `rows` is False.
        key: Keys of all key heads; zeros where `cols` is False.
        value: Values, likewise.
        rows: Which queries are valid.
        cols: Which keys are valid.
    """

    query: Float[Array, "BN T H"]
    key: Float[Array, "BK S H"]
    value: Float[Array, "BK S D"]
    rows: Bool[Array, "BN T"]
    cols: Bool[Array, "BN S"]

    @property
    def col_marginal(self) -> Float[Array, "BN 1"]:
        """What each valid column of the plan sums to: b of docs/architecture.md."""
        rows = self.rows.sum(axis=1, dtype=jnp.float32, keepdims=True)
        cols = self.cols.sum(axis=1, dtype=jnp.float32, keepdims=True)
        return jnp.where(cols == 0, 1.0, rows / jnp.where(cols == 0, 1.0, cols))


class PotentialHistory(NamedTuple):
    """Potentials after 0, 1, ..., L full iterations; -inf for padding. K is L + 1."""

    f: Float[Array, "K BN T"]
    g: Float[Array, "K BN S"]


class ForwardResult(NamedTuple):
    """The output P V in float32, and what else a regime's forward pass returns.

    `col_sums` of the plan are None unless the marginal error is returned.
    """

    out: Float[Array, "BN T D"]
    history: PotentialHistory
    col_sums: Float[Array, "BN S"] | None


class PotentialCotangents(NamedTuple):
    """Row weights λ_0 to λ_L (a is 1), and column weights μ_1 / b to μ_L / b."""

    f: Float[Array, "K BN T"]
    g: Float[Array, "L BN S"]


class CorrectionTerms(NamedTuple):
    """The correction as kernel matrices exp(Z + f + g) times sums of outer products.

    `refresh_groups.terms_per_matrix` says which terms belong to which of the M
    matrices. The first matrix is the plan of the result.

    Attributes:
        f: Row potentials of each kernel matrix.
        g: Column potentials of each kernel matrix.
        left: Left factors of the R outer products, with a number for each query.
        right: Right factors, with a number for each key.
    """

    f: Float[Array, "BN M T"]
    g: Float[Array, "BN M S"]
    left: Float[Array, "BN R T"]
    right: Float[Array, "BN R S"]

    def transposed(self) -> "CorrectionTerms":
        """The terms with keys as rows and queries as columns."""
        return CorrectionTerms(self.g, self.f, self.right, self.left)
