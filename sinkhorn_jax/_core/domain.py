"""One matrix of logits in the linear domain and in log space.

`Linear` and `Log` offer the same operations, so the iteration and its reverse sweep are
written once. `r` and `c` are the scalings of rows and columns: factors of the kernel
matrix in `Linear`, logarithms of factors in `Log`. A padded row or column has no
allowed entry, and its marginal must be 0. Its scaling is stored as 0 in both domains,
and its plan entries are 0, because E is 0 or the logits are -inf there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .marginals import Marginals
from .precision import dot


class Correction(NamedTuple):
    """The correction of docs/architecture.md (7), as factors.

    A row step that ended in the scalings (r, c) takes `plan(r, c) * row_weight` off the
    logits cotangent, a column step `plan(r, c) * col_weight`. What the weights of both
    have in common may be left out of them, but not of the cotangents of the marginals.
    """

    row_r: Float[Array, "K T"]
    row_c: Float[Array, "K S"]
    row_weight: Float[Array, "K T"]
    col_r: Float[Array, "M T"]
    col_c: Float[Array, "M S"]
    col_weight: Float[Array, "M S"]
    marginals: Marginals  # Their cotangents.


class Product(NamedTuple):
    """The matrix left_t^T right, not multiplied out."""

    left_t: Float[Array, "D T"]
    right: Float[Array, "D S"]


class Shift(NamedTuple):
    """The padding and the shift of logits: all of a domain but the matrix itself.

    After a shift of the rows alone a whole column could underflow. After both, every
    row and every column has a 0, up to the rounding of m and n, so no sum of the first
    iteration vanishes.
    """

    rows: Bool[Array, " T"]  # False for padding.
    cols: Bool[Array, " S"]
    m: Float[Array, " T"]  # Row maxima.
    n: Float[Array, " S"]  # Column maxima of what remains.

    @classmethod
    def of(cls, logits: Float[Array, "T S"]) -> "Shift":
        """The shift of logits that are -inf where an entry is excluded."""
        # The least number where a maximum is -inf, for padding. With a `where`, XLA
        # would write logits - m to memory.
        lowest = jnp.finfo(logits.dtype).min
        logits = jax.lax.stop_gradient(logits)  # Any shift gives the same plan.
        row_top = logits.max(axis=1)
        m = jnp.maximum(row_top, lowest)
        col_top = (logits - m[:, None]).max(axis=0)
        n = jnp.maximum(col_top, lowest)
        # A NaN is not taken for padding.
        return cls(row_top != -jnp.inf, col_top != -jnp.inf, m, n)

    def off(self, logits: Float[Array, "T S"]) -> Float[Array, "T S"]:
        """The logits less the shift."""
        return minus_both(logits, self.m[:, None], self.n[None, :])


class Linear(NamedTuple):
    """Plan = r * kernel * c: a half step is a matrix-vector product."""

    kernel: Float[Array, "T S"]  # exp(logits - m - n).
    rows: Bool[Array, " T"]  # False for padding.
    cols: Bool[Array, " S"]
    m: Float[Array, " T"]
    n: Float[Array, " S"]

    @classmethod
    def of(cls, logits: Float[Array, "T S"]) -> "Linear":
        """Exponentiates the logits, which are -inf where an entry is excluded."""
        return cls.shifted_by(Shift.of(logits), logits)

    @classmethod
    def shifted_by(cls, shift: Shift, logits: Float[Array, "T S"]) -> "Linear":
        """`Linear.of` for logits whose shift is known: one pass over them."""
        return cls(jnp.exp(shift.off(logits)), *shift)

    @property
    def shift(self) -> Shift:
        """Padding and shift."""
        return Shift(self.rows, self.cols, self.m, self.n)

    def start(self) -> Float[Array, " S"]:
        """The column scaling that makes the first row step the softmax."""
        return jnp.exp(self.n)

    def row_step(self, c, a):
        """The row scaling with which the rows sum to `a`."""
        return a / jnp.where(self.rows, dot(self.kernel, c), 1)

    def col_step(self, r, b):
        """The column scaling with which the columns sum to `b`."""
        return b / jnp.where(self.cols, dot(r, self.kernel), 1)

    def part_way(self, c, tau):
        """The column scaling with the part `tau` of the potential that `c` has.

        It may underflow, where a column has no weight in the plan.
        """
        part = c**tau * jnp.exp((1 - tau) * self.n)
        return jnp.where(self.cols, part, 0)

    def ratio(self, scaling, after):
        """The quotient of two successive scalings; finite for padding."""
        return scaling / jnp.where(after == 0, 1, after)

    def plan(self, r, c):
        """The plan with these scalings."""
        return self.kernel * (r[:, None] * c[None, :])

    def row_sums(self, r, c, a):
        """Row sums of the plan after a row step towards `a`: exactly `a`."""
        del r, c
        return a

    def col_sums(self, r, c, b):
        """Column sums of the plan after a column step towards `b`: exactly `b`."""
        del r, c
        return b

    def apply(self, r, c, x):
        """The plan times a vector (S,) or matrix (S, D)."""
        return _col(r, x) * dot(self.kernel, _col(c, x) * x)

    def apply_left(self, x, r, c):
        """A vector (T,) or matrix (D, T) times the plan."""
        # x is the left factor: a CPU is slower with the transposed kernel matrix.
        return dot(x * _row(r, x), self.kernel) * _row(c, x)

    def logits_cotangent(self, r, c, direct, correction: Correction):
        """The cotangent plan * direct - correction, with the correction of rank K + M.

        `direct` is a matrix, a scalar, or a `Product` of rank D. A `Product` and the
        correction become one matrix product of rank K + M + D.
        """
        row_left = -correction.row_weight * correction.row_r
        col_right = correction.col_weight * correction.col_c
        left = [_in_order(row_left, -correction.col_r)]
        right = [_in_order(correction.row_c, col_right)]
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
        """Shifts the logits, which are -inf where an entry is excluded."""
        shift = Shift.of(logits)
        return cls(shift.off(logits), *shift)

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

    def part_way(self, c, tau):
        """The column scaling with the part `tau` of the potential that `c` has."""
        # In this order 0 and 1 give the start and c themselves.
        return jnp.where(self.cols, tau * c + (1 - tau) * self.n, 0)

    def ratio(self, scaling, after):
        """The quotient of the factors of two successive scalings."""
        return jnp.exp(scaling - after)

    def plan(self, r, c):
        """The plan with these scalings."""
        return jnp.exp(self.logits + r[:, None] + c[None, :])

    def row_sums(self, r, c, a):
        """Row sums of the plan after a row step towards `a`.

        They differ from `a` by the rounding of the scalings, always to the same side,
        which would add up over the steps of a reverse sweep.
        """
        del a
        return self.plan(r, c).sum(axis=1)

    def col_sums(self, r, c, b):
        """Column sums of the plan after a column step towards `b`; see `row_sums`."""
        del b
        return self.plan(r, c).sum(axis=0)

    def apply(self, r, c, x):
        """The plan times a vector (S,) or matrix (S, D)."""
        return dot(self.plan(r, c), x)

    def apply_left(self, x, r, c):
        """A vector (T,) or matrix (D, T) times the plan."""
        return dot(x, self.plan(r, c))

    def logits_cotangent(self, r, c, direct, correction: Correction):
        """Plan * direct less the correction, step by step.

        The scalings of the steps differ too much for one kernel matrix here.
        """
        row_r, row_c, row_weight, col_r, col_c, col_weight = correction[:6]
        steps = (
            _in_order(row_r, col_r),
            _in_order(row_c, col_c),
            _in_order(row_weight, jnp.zeros_like(col_r)),
            _in_order(jnp.zeros_like(row_c), col_weight),
        )

        def term(step):
            step_r, step_c, row_weight, col_weight = step
            weight = row_weight[:, None] + col_weight[None, :]  # One of them is 0.
            return self.plan(step_r, step_c) * weight

        # From the first step on, not from zeros, which XLA would make and keep before
        # the weights are known.
        total, _ = jax.lax.scan(
            lambda total, step: (total + term(step), None),
            term([x[0] for x in steps]),
            [x[1:] for x in steps],
        )
        if isinstance(direct, Product):
            direct = dot(direct.left_t.T, direct.right)
        return self.plan(r, c) * direct - total

    def potentials(self, r, c):
        """Potentials f and g, plan = exp(logits + f + g); 0 for padding."""
        f = jnp.where(self.rows, r - self.m, 0)
        return f, jnp.where(self.cols, c - self.n, 0)


Domain = Linear | Log


def minus_both(x: Array, row: Array, col: Array) -> Array:
    """The difference x - row - col, with a rounding error relative to itself.

    Logits with a large common part, as from a column at -1e6, would round what is left
    of it: 1e6 has steps of 0.06 in float32. So the two of the three that are largest
    are combined first, which is exact where they cancel.
    """
    row_is_larger = jnp.abs(row) >= jnp.abs(col)
    large = jnp.where(row_is_larger, row, col)
    small = jnp.where(row_is_larger, col, row)
    # The comparison is true for an excluded entry: large + small may overflow.
    return jnp.where(
        jnp.abs(x) >= jnp.abs(small), (x - large) - small, x - (large + small)
    )


def _in_order(rows, cols):
    """Row step 0, column step 1, row step 1, ...: one factor of the steps' terms.

    The weights of a column step and of the row step before it nearly cancel: what they
    have in common changes no plan. Next to each other, and before the larger terms of
    later steps, they cancel within their own rounding. In any other order each of them
    would leave the rounding error of the largest term.
    """
    paired = jnp.stack([rows[: len(cols)], cols], axis=1)
    return jnp.concatenate([paired.reshape(-1, rows.shape[1]), rows[len(cols) :]])


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
