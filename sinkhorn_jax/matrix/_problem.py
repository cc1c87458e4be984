"""The input and the result of the implementations of the matrix functions."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._core.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Everything static about a call: shapes, dtype and options."""

    batch: int  # The number of matrices: the leading axes, flattened.
    t: int
    s: int
    dtype: jnp.dtype  # Of the result; computation is in float32 at least.
    options: Options
    has_tau: bool = False


class Matrices(NamedTuple):
    """The operands: a batch of M matrices of logits with their marginals."""

    logits: Float[Array, "M T S"]  # In the dtype of computation; -inf where excluded.
    a: Float[Array, "M T"]  # Row marginals, 0 for padding.
    b: Float[Array, "M S"]  # Column marginals, likewise.
    tau: Float[Array, " M"] | None = None  # Part of each column step; None for all.


class Potentials(NamedTuple):
    """Potentials of the plan `exp(logits + f[..., :, None] + g[..., None, :])`.

    Attributes:
        f: Row potentials (..., T), in float32 at least; 0 for padding.
        g: Column potentials (..., S), likewise.
        marginal_error: Σ_j |Σ_i P_ij - b_j| / Σ_i a_i (...); with finish="columns"
            Σ_i |Σ_j P_ij - a_i| / Σ_i a_i. Between 0 and 2; not differentiated.
        num_iters: Full iterations that ran (...), int32.
    """

    f: Float[Array, "*batch T"]
    g: Float[Array, "*batch S"]
    marginal_error: Float[Array, "*batch"]
    num_iters: Int[Array, "*batch"]
