"""The input and the result of the implementations of the matrix functions."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._core.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Everything static about a call: shapes, dtype and options."""

    batch: tuple[int, ...]  # The leading axes.
    t: int
    s: int
    dtype: jnp.dtype  # Of the result; computation is in float32 at least.
    options: Options
    has_marginals: bool = False  # That the caller gave.
    has_tau: bool = False

    @property
    def axes(self) -> str:
        """Names of the leading axes, for `_runtime.partition`."""
        return "abcdefh"[: len(self.batch)]

    def part_of(self, matrices: "Matrices") -> "Problem":
        """The problem of those matrices."""
        return dataclasses.replace(self, batch=matrices.logits.shape[:-2])

    def flatten(self, x: Any) -> Any:
        """Arrays with one leading axis M in place of those of the batch."""
        num, num_axes = math.prod(self.batch), len(self.batch)
        return jax.tree.map(lambda x: x.reshape(num, *x.shape[num_axes:]), x)

    def unflatten(self, x: Any) -> Any:
        """The inverse of `flatten`."""
        return jax.tree.map(lambda x: x.reshape(*self.batch, *x.shape[1:]), x)


class Matrices(NamedTuple):
    """The operands: matrices of logits with their marginals."""

    logits: Float[
        Array, "*batch T S"
    ]  # In the dtype of computation; -inf where excluded.
    a: Float[Array, "*batch T"]  # Row marginals, 0 for padding.
    b: Float[Array, "*batch S"]  # Column marginals, likewise.
    tau: Float[Array, "*batch"] | None = None  # Part of each column step; None for all.


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
