"""Sinkhorn in log space on a tile: many small matrices, one in each lane.

These are functions of arrays, for the kernels of TPUs and GPUs alike. A vector over
rows is a tuple of T arrays (*lanes). A vector over columns is an array (S, *lanes), or
on GPUs, where registers have no such axis, a tuple of S arrays (*lanes). A matrix is a
tuple of T vectors over columns. So sums over rows and columns add registers and never
cross lanes.

A half step is a logsumexp: nothing leaves the range of float32, whatever the logits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.domain import minus_both
from ..._core.options import Finish
from ..._core.precision import in_range

Rows = tuple[Float[Array, "..."], ...]
Cols = Float[Array, "S ..."] | tuple[Float[Array, "..."], ...]
Matrix = tuple[Cols, ...]


class Tile(NamedTuple):
    """Shifted logits and marginals. A marginal of 0 is padding; its potential is 0.

    The logits are less their row maxima m, then less the column maxima n of what
    remains: smaller numbers have smaller errors.
    """

    logits: Matrix  # -inf where excluded.
    a: Rows
    b: Cols
    log_a: Rows  # 0 for padding.
    log_b: Cols
    m: Rows
    n: Cols

    @classmethod
    def of(cls, logits: Matrix, a: Rows, b: Cols) -> "Tile":
        """Shifts the logits."""
        m = tuple(_bounded(over_cols(jnp.maximum, row)) for row in logits)
        n = each(_bounded, over_rows(jnp.maximum, map(_minus_row_value, logits, m)))
        logits = tuple(
            each(minus_both, row, _along_row(row, x), n)
            for row, x in zip(logits, m, strict=True)
        )
        log = lambda x: jnp.log(jnp.where(x > 0, x, 1))
        return cls(logits, a, b, each(log, a), each(log, b), m, n)

    def start(self) -> Cols:
        """The column potential that makes the first row step the softmax."""
        return each(_where_positive, self.b, self.n)

    def row_step(self, g: Cols) -> Rows:
        """The row potential with which the rows sum to `a`."""
        return self.softmax_of_rows(g)[0]

    def col_step(self, f: Rows) -> Cols:
        """The column potential with which the columns sum to `b`."""
        return self.softmax_of_cols(f)[0]

    def softmax_of_rows(self, g: Cols) -> tuple[Rows, Matrix]:
        """The row step on `g`, and the plan after it, scaled to row sums of 1."""
        f, plan = [], []
        for row, a, log_a in zip(self.logits, self.a, self.log_a, strict=True):
            x = each(jnp.add, row, g)
            top = _bounded(over_cols(jnp.maximum, x))
            x = each(jnp.exp, _minus_row_value(x, top))
            total = _not_zero(over_cols(jnp.add, x))
            f.append(_where_positive(a, log_a - top - jnp.log(total)))
            plan.append(times_row_value(x, 1 / total))
        return tuple(f), tuple(plan)

    def softmax_of_cols(self, f: Rows) -> tuple[Cols, Matrix]:
        """The column step on `f`, and the plan after it, scaled to column sums of 1."""
        x = [_minus_row_value(row, -y) for row, y in zip(self.logits, f, strict=True)]
        top = each(_bounded, over_rows(jnp.maximum, x))
        x = [each(lambda x, top: jnp.exp(x - top), row, top) for row in x]
        total = each(_not_zero, over_rows(jnp.add, x))
        g = each(lambda x, top, total: x - top - jnp.log(total), self.log_b, top, total)
        inverse = each(lambda x: 1 / x, total)
        plan = tuple(each(jnp.multiply, row, inverse) for row in x)
        return each(_where_positive, self.b, g), plan

    def potentials(self, f: Rows, g: Cols) -> tuple[Rows, Cols]:
        """The potentials of the logits before the shift."""
        f, g = each(jnp.subtract, f, self.m), each(jnp.subtract, g, self.n)
        return each(_where_positive, self.a, f), each(_where_positive, self.b, g)

    def with_rows_of_a(self, unit: Matrix) -> Matrix:
        """Scales rows that sum to 1 to the row marginal."""
        return tuple(map(times_row_value, unit, self.a))

    def with_cols_of_b(self, unit: Matrix) -> Matrix:
        """Scales columns that sum to 1 to the column marginal."""
        return tuple(each(jnp.multiply, row, self.b) for row in unit)


def solve(tile: Tile, num_iters: int, finish: Finish) -> tuple[Rows, Cols, Matrix]:
    """Potentials of the shifted logits, and the plan."""
    full_iteration = lambda _, g: tile.col_step(tile.row_step(g))
    if finish == "rows":
        g = loop(num_iters, full_iteration, tile.start())
        f, unit = tile.softmax_of_rows(g)
        return f, g, tile.with_rows_of_a(unit)
    f = tile.row_step(loop(num_iters - 1, full_iteration, tile.start()))
    g, unit = tile.softmax_of_cols(f)
    return f, g, tile.with_cols_of_b(unit)


def marginal_error(tile: Tile, plan: Matrix, finish: Finish) -> Float[Array, "..."]:
    """Total absolute defect of the marginal that is not exact, relative to sum(a)."""
    scale = in_range(functools.reduce(jnp.maximum, tile.a))
    defect = lambda total, target: jnp.abs(total - target)
    if finish == "rows":
        defects = each(defect, over_rows(jnp.add, plan), tile.b)
        error = over_cols(jnp.add, times_row_value(defects, scale))
    else:
        sums = (over_cols(jnp.add, row) for row in plan)
        defects = (defect(*pair) * scale for pair in zip(sums, tile.a, strict=True))
        error = functools.reduce(jnp.add, defects)
    return error / _not_zero(functools.reduce(jnp.add, (x * scale for x in tile.a)))


class SweepState(NamedTuple):
    """The state of the reverse sweep between two steps."""

    df: Rows  # Seed of the row potential before the next column step to undo.
    dg: Cols
    da: Rows  # Sum of λ over the undone row steps: a times the cotangent of a.
    db: Cols


def undo_last_row_step(
    tile: Tile, unit: Matrix, df: Rows, dg: Cols
) -> tuple[Matrix, SweepState]:
    """Undoes the row step that a result ends on: docs/architecture.md (4).

    `unit` is the plan, scaled to row sums of 1. Returns the part of the step in the
    correction, and the state.
    """
    correction = tuple(map(times_row_value, unit, df))
    dg = each(jnp.subtract, dg, over_rows(jnp.add, correction))
    return correction, SweepState(zeros(tile.a), dg, df, zeros(tile.b))


def undo_full_iteration(
    tile: Tile, g: Cols, state: SweepState
) -> tuple[Matrix, SweepState]:
    """Undoes a column step and the row step before it: docs/architecture.md (5), (4).

    `g` is the column potential that the row step started from. Returns the part of both
    steps in the correction, and the state.
    """
    f, of_rows = tile.softmax_of_rows(g)
    _, of_cols = tile.softmax_of_cols(f)
    df, dg, da, db = state
    by_cols = tuple(each(jnp.multiply, row, dg) for row in of_cols)
    df = tuple(x - over_cols(jnp.add, row) for x, row in zip(df, by_cols, strict=True))
    by_rows = tuple(map(times_row_value, of_rows, df))
    return each_row(jnp.add, by_cols, by_rows), SweepState(
        # The cotangents from outside reach only the potentials of the result.
        zeros(tile.a),
        each(jnp.negative, over_rows(jnp.add, by_rows)),
        each(jnp.add, da, df),
        each(jnp.add, db, dg),
    )


def marginal_cotangents(tile: Tile, state: SweepState) -> tuple[Rows, Cols]:
    """Cotangents of the marginals: the weights of all steps, added up."""
    over = lambda x, total: _where_positive(x, total / jnp.where(x > 0, x, 1))
    return each(over, tile.a, state.da), each(over, tile.b, state.db)


def only_valid(marginal: Any, x: Any) -> Any:
    """The vector x, set to 0 for padding."""
    return each(_where_positive, marginal, x)


def zeros(vector: Any) -> Any:
    """Zeros like the vector, whose numbers must be finite.

    A GPU would keep constants in another layout than what a loop adds to them.
    """
    return each(lambda x: 0 * x, vector)


def each(fn: Callable[..., Array], *vectors: Any) -> Any:
    """Applies `fn` to the entries of vectors."""
    if isinstance(vectors[0], tuple):
        return tuple(map(fn, *vectors))
    return fn(*vectors)


def each_row(fn: Callable[..., Array], *matrices: Matrix) -> Matrix:
    """Applies `fn` to the entries of matrices."""
    return tuple(each(fn, *rows) for rows in zip(*matrices, strict=True))


def over_cols(fn: Callable[..., Array], row: Cols) -> Array:
    """The sum of a row, for `jnp.add`, or its maximum, for `jnp.maximum`."""
    return functools.reduce(fn, row if isinstance(row, tuple) else tuple(row))


def over_rows(fn: Callable[..., Array], rows: Any) -> Any:
    """The sum or maximum of each column."""
    return functools.reduce(functools.partial(each, fn), rows)


def times_row_value(row: Cols, x: Array) -> Any:
    """A row times a number."""
    return tuple(y * x for y in row) if isinstance(row, tuple) else row * x[None]


def loop(num_steps: int | Array, body, init):
    """A `fori_loop` from 0 with 32-bit counters, the only ones that a TPU has."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), body, init)


def _minus_row_value(row, x):
    return tuple(y - x for y in row) if isinstance(row, tuple) else row - x[None]


def _along_row(row, x):
    return (x,) * len(row) if isinstance(row, tuple) else x[None]


def _where_positive(marginal, x):
    return jnp.where(marginal > 0, x, 0)


def _bounded(top):
    # The least number for padding, where all is -inf: -inf less that is still -inf.
    return jnp.maximum(top, jnp.finfo(top.dtype).min)


def _not_zero(total):
    # Only a sum over padding is 0.
    return jnp.where(total == 0, 1, total)
