"""What an implementation of the matrix functions is given and what it returns."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._core.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Everything static about a call: shapes, dtype and options, never values."""

    batch: int  # Matrices: the leading axes, flattened.
    t: int
    s: int
    dtype: jnp.dtype  # Of the logits as they were given; computation is in float32+.
    options: Options


class Potentials(NamedTuple):
    """The plan is `exp(logits + f[..., :, None] + g[..., None, :])`.

    Attributes:
        f: Row potentials (..., T), in float32 at least; 0 for padding.
        g: Column potentials (..., S), likewise.
        marginal_error: Σ_j |Σ_i P_ij - b_j| / Σ_i a_i (...), of the rows against `a`
            with finish="columns". Between 0 and 2; not differentiated.
        num_iters: Full iterations behind the potentials (...), int32.
    """

    f: Float[Array, "*batch T"]
    g: Float[Array, "*batch S"]
    marginal_error: Float[Array, "*batch"]
    num_iters: Int[Array, "*batch"]
