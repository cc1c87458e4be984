"""One matrix of logits in the linear domain and in log space.

Both classes offer the same operations, so the iteration and its reverse sweep are
written once. `r` and `c` are the row and column scalings: factors of the kernel matrix
in `Linear`, their logarithms in `Log`. A padded row or column has no allowed entry and
its marginal must be zero; its scaling is 0 in both and its plan entries are zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .precision import dot


def _two_sided_shift(logits):
    """Subtract the row maxima, then the column maxima of what remains.

    A row shift alone lets a column underflow as a whole. After both, every row and
    every column has a 0, so that no sum of the first iteration can vanish.
    """
    # Where all is -inf, for padding, the least number instead: a `where`, or any other
    # use of the maxima, would make XLA write logits - m to memory for their sake.
    lowest = jnp.finfo(logits.dtype).min
    m = jnp.maximum(logits.max(axis=1), lowest)
    n = jnp.maximum((logits - m[:, None]).max(axis=0), lowest)
    return (logits - m[:, None]) - n[None, :], m, n


class Correction(NamedTuple):
    """What a solver's adjoint adds to the cotangent of the logits, as factors.

    The half step that ended in the scalings (r, c) contributes
    `-plan(r, c) * row_weight` where it set the rows, `-plan(r, c) * col_weight` where
    it set the columns. The weights' sums are the cotangents of the marginals.
    """

    row_r: Float[Array, "K T"]
    row_c: Float[Array, "K S"]
    row_weight: Float[Array, "K T"]
    col_r: Float[Array, "M T"]
    col_c: Float[Array, "M S"]
    col_weight: Float[Array, "M S"]


class Product(NamedTuple):
    """The matrix left_t^T right, not multiplied out."""

    left_t: Float[Array, "D T"]
    right: Float[Array, "D S"]


class Frame(NamedTuple):
    """What `Linear` found out about logits before it took their exponential."""

    rows: Bool[Array, " T"]
    cols: Bool[Array, " S"]
    m: Float[Array, " T"]
    n: Float[Array, " S"]


class Linear(NamedTuple):
    """Plan = r * kernel * c: a half step is a matrix-vector product."""

    kernel: Float[Array, "T S"]  # exp(logits - m - n): a 1 in every row and column.
    rows: Bool[Array, " T"]  # False for padding.
    cols: Bool[Array, " S"]
    m: Float[Array, " T"]
    n: Float[Array, " S"]

    @classmethod
    def of(cls, logits: Float[Array, "T S"]) -> "Linear":
        """The kernel matrix of the logits, -inf where excluded."""
        shifted, m, n = _two_sided_shift(logits)
        kernel = jnp.exp(shifted)
        # Empty, not "not positive": a NaN has to be seen. Against c = exp(n) instead of
        # ones the first sum is that of the first row step.
        rows = dot(kernel, jnp.exp(n)) != 0
        cols = dot(jnp.ones_like(m), kernel) != 0
        return cls(kernel, rows, cols, m, n)

    @classmethod
    def again(cls, logits: Float[Array, "T S"], frame: "Frame") -> "Linear":
        """The same as before from the same logits, in one pass over them."""
        kernel = jnp.exp((logits - frame.m[:, None]) - frame.n[None, :])
        return cls(kernel, *frame)

    @property
    def frame(self) -> "Frame":
        """All but the kernel matrix."""
        return Frame(self.rows, self.cols, self.m, self.n)

    def start(self) -> Float[Array, " S"]:
        """The column scaling that makes the first row step the softmax."""
        return jnp.exp(self.n)

    def row_step(self, c, a):
        """The row scaling with which the rows sum to `a`."""
        return a / jnp.where(self.rows, dot(self.kernel, c), 1)

    def col_step(self, r, b):
        """The column scaling with which the columns sum to `b`."""
        return b / jnp.where(self.cols, dot(r, self.kernel), 1)

    def ratio(self, scaling, after):
        """What a scaling is of the one after it; anything finite for padding."""
        return scaling / jnp.where(after == 0, 1, after)

    def plan(self, r, c):
        """The plan with these scalings."""
        return self.kernel * (r[:, None] * c[None, :])

    def row_sums(self, r, c, a):
        """Of the plan after a row step towards `a`: exact here."""
        del r, c
        return a

    def col_sums(self, r, c, b):
        """Of the plan after a column step towards `b`: exact here."""
        del r, c
        return b

    def apply(self, r, c, x):
        """Plan times a vector (S,) or matrix (S, D)."""
        return _col(r, x) * dot(self.kernel, _col(c, x) * x)

    def apply_left(self, x, r, c):
        """A vector (T,) or matrix (D, T) times plan."""
        # A transposed kernel times x would be the same, 20 times slower on a CPU.
        return dot(x * _row(r, x), self.kernel) * _row(c, x)

    def pull_back(self, r, c, direct, correction: Correction):
        """Cotangent of the logits: plan * direct, and the correction, at rank K + M.

        `direct` is a matrix, a scalar, or a `Product`: then one product makes both.
        """
        left = [-correction.row_weight * correction.row_r, -correction.col_r]
        right = [correction.row_c, correction.col_weight * correction.col_c]
        if isinstance(direct, Product):
            left.append(direct.left_t * r[None, :])
            right.append(direct.right * c[None, :])
        low_rank = dot(jnp.concatenate(left).T, jnp.concatenate(right))  # [T, S]
        if isinstance(direct, Product):
            return self.kernel * low_rank
        return self.kernel * ((r[:, None] * c[None, :]) * direct + low_rank)

    def potentials(self, r, c):
        """Potentials f and g, plan = exp(logits + f + g); 0 for padding."""
        f = jnp.where(self.rows, jnp.log(jnp.where(self.rows, r, 1)) - self.m, 0)
        g = jnp.where(self.cols, jnp.log(jnp.where(self.cols, c, 1)) - self.n, 0)
        return f, g


class Log(NamedTuple):
    """Plan = exp(logits + r + c): a half step is a logsumexp, and nothing overflows."""

    logits: Float[Array, "T S"]  # Less m and n: smaller numbers, smaller errors.
    rows: Bool[Array, " T"]  # False for padding.
    cols: Bool[Array, " S"]
    m: Float[Array, " T"]
    n: Float[Array, " S"]

    @classmethod
    def of(cls, logits: Float[Array, "T S"]) -> "Log":
        """Log space on the shifted logits."""
        shifted, m, n = _two_sided_shift(logits)
        allowed = logits != -jnp.inf
        return cls(shifted, allowed.any(axis=1), allowed.any(axis=0), m, n)

    def start(self) -> Float[Array, " S"]:
        """The column scaling that makes the first row step the softmax."""
        return jnp.where(self.cols, self.n, 0)

    def row_step(self, c, a):
        """The row scaling with which the rows sum to `a`."""
        log_a = jnp.log(jnp.where(self.rows, a, 1))
        return jnp.where(self.rows, log_a - _logsumexp(self.logits + c[None, :], 1), 0)

    def col_step(self, r, b):
        """The column scaling with which the columns sum to `b`."""
        log_b = jnp.log(jnp.where(self.cols, b, 1))
        return jnp.where(self.cols, log_b - _logsumexp(self.logits + r[:, None], 0), 0)

    def ratio(self, scaling, after):
        """What a scaling is of the one after it."""
        return jnp.exp(scaling - after)

    def plan(self, r, c):
        """The plan with these scalings."""
        return jnp.exp(self.logits + r[:, None] + c[None, :])

    def row_sums(self, r, c, a):
        """Of the plan after a row step towards `a`.

        Off from it by as much as the scalings are rounded, always to the same side:
        over many steps of a reverse sweep that adds up.
        """
        del a
        return self.plan(r, c).sum(axis=1)

    def col_sums(self, r, c, b):
        """Of the plan after a column step towards `b`; see `row_sums`."""
        del b
        return self.plan(r, c).sum(axis=0)

    def apply(self, r, c, x):
        """Plan times a vector (S,) or matrix (S, D)."""
        return dot(self.plan(r, c), x)

    def apply_left(self, x, r, c):
        """A vector (T,) or matrix (D, T) times plan."""
        return dot(x, self.plan(r, c))

    def pull_back(self, r, c, direct, correction: Correction):
        """Cotangent of the logits: plan * direct, and the correction, step by step.

        The scalings of the steps differ too much to share one kernel matrix here.
        """
        if isinstance(direct, Product):
            direct = dot(direct.left_t.T, direct.right)
        row_terms, col_terms = correction[:3], correction[3:]

        def row_term(dz, term):
            r, c, weight = term
            return dz - self.plan(r, c) * weight[:, None], None

        def col_term(dz, term):
            r, c, weight = term
            return dz - self.plan(r, c) * weight[None, :], None

        dz, _ = jax.lax.scan(row_term, self.plan(r, c) * direct, row_terms)
        dz, _ = jax.lax.scan(col_term, dz, col_terms)
        return dz

    def potentials(self, r, c):
        """Potentials f and g, plan = exp(logits + f + g); 0 for padding."""
        f = jnp.where(self.rows, r - self.m, 0)
        return f, jnp.where(self.cols, c - self.n, 0)


Domain = Linear | Log


def _col(scaling, x):
    return scaling if x.ndim == 1 else scaling[:, None]


def _row(scaling, x):
    return scaling if x.ndim == 1 else scaling[None, :]


def _logsumexp(x, axis):
    # jax.nn.logsumexp has a NaN gradient where every entry is -inf, as for padding.
    top = jax.lax.stop_gradient(x.max(axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.exp(x - top).sum(axis=axis)
    return jnp.log(jnp.where(total == 0, 1, total)) + jnp.squeeze(top, axis)
