"""Sinkhorn in log space on a tile: many small matrices, one in each lane.

Plain functions of arrays, which the kernels for TPUs and GPUs share. A vector over rows
is a tuple of T arrays (*lanes). One over columns is an array (S, *lanes), whose sums
over the first axis add registers, or, for GPUs, where registers have no such axis, a
tuple of S arrays (*lanes). A matrix is a tuple of T vectors over columns. So a sum over
rows or columns never goes across lanes, and the work passes the registers row by row.

A half step is a log-sum-exp: nothing leaves the range of float32, whatever the logits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.iteration import Finish

Rows = tuple[Float[Array, "..."], ...]
Cols = Float[Array, "S ..."] | tuple[Float[Array, "..."], ...]
Matrix = tuple[Cols, ...]


class Tile(NamedTuple):
    """Logits less their row maxima, then less the column maxima of what remains.

    As for one matrix: smaller numbers have smaller errors. A row or column whose
    marginal is 0 is padding, and its potential is 0.
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
        """The tile of these logits and marginals."""
        m = tuple(_bounded(over_cols(jnp.maximum, row)) for row in logits)
        logits = tuple(map(_minus_row_value, logits, m))
        n = each(_bounded, over_rows(jnp.maximum, logits))
        logits = tuple(each(jnp.subtract, row, n) for row in logits)
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
        """The row step on `g`, and the plan after it with rows that sum to 1."""
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
        """The column step on `f`, and the plan after it with columns that sum to 1."""
        x = [_minus_row_value(row, -y) for row, y in zip(self.logits, f, strict=True)]
        top = each(_bounded, over_rows(jnp.maximum, x))
        x = [each(lambda x, top: jnp.exp(x - top), row, top) for row in x]
        total = each(_not_zero, over_rows(jnp.add, x))
        g = each(lambda x, top, total: x - top - jnp.log(total), self.log_b, top, total)
        inverse = each(lambda x: 1 / x, total)
        plan = tuple(each(jnp.multiply, row, inverse) for row in x)
        return each(_where_positive, self.b, g), plan

    def potentials(self, f: Rows, g: Cols) -> tuple[Rows, Cols]:
        """Those of the logits as they were given."""
        f, g = each(jnp.subtract, f, self.m), each(jnp.subtract, g, self.n)
        return each(_where_positive, self.a, f), each(_where_positive, self.b, g)

    def with_rows_of_a(self, unit: Matrix) -> Matrix:
        """Rows that sum to `a`, of rows that sum to 1."""
        return tuple(map(times_row_value, unit, self.a))

    def with_cols_of_b(self, unit: Matrix) -> Matrix:
        """Columns that sum to `b`, of columns that sum to 1."""
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
    defect = lambda total, target: jnp.abs(total - target)
    if finish == "rows":
        error = over_cols(jnp.add, each(defect, over_rows(jnp.add, plan), tile.b))
    else:
        sums = tuple(over_cols(jnp.add, row) for row in plan)
        error = functools.reduce(jnp.add, each(defect, sums, tile.a))
    return error / _not_zero(functools.reduce(jnp.add, tile.a))


class Cotangents(NamedTuple):
    """What is left to pull back, and the weights of the steps that have been."""

    df: Rows  # Of the row potential before the last step that was pulled back.
    dg: Cols
    da: Rows  # Times a: the sum of the cotangents of all row steps.
    db: Cols


def undo_last_row_step(
    tile: Tile, unit: Matrix, df: Rows, dg: Cols
) -> tuple[Matrix, Cotangents]:
    """Go back over the row step that a result ends on.

    Args:
        tile: Logits and marginals.
        unit: The plan, with rows that sum to 1.
        df: Cotangent of the row potential.
        dg: Cotangent of the column potential.

    Returns:
        What the step takes from the cotangent of the logits, and the rest.
    """
    moved = tuple(map(times_row_value, unit, df))
    dg = each(jnp.subtract, dg, over_rows(jnp.add, moved))
    return moved, Cotangents(zeros(tile.a), dg, df, zeros(tile.b))


def undo_full_iteration(
    tile: Tile, g: Cols, cotangents: Cotangents
) -> tuple[Matrix, Cotangents]:
    """Go back over a column step and the row step before it, which started from `g`.

    Returns:
        What the two take from the cotangent of the logits, and the rest.
    """
    f, of_rows = tile.softmax_of_rows(g)
    _, of_cols = tile.softmax_of_cols(f)
    df, dg, da, db = cotangents
    by_cols = tuple(each(jnp.multiply, row, dg) for row in of_cols)
    df = tuple(x - over_cols(jnp.add, row) for x, row in zip(df, by_cols, strict=True))
    by_rows = tuple(map(times_row_value, of_rows, df))
    return each_row(jnp.add, by_cols, by_rows), Cotangents(
        # What is given from outside reaches only the potentials of the result.
        zeros(tile.a),
        each(jnp.negative, over_rows(jnp.add, by_rows)),
        each(jnp.add, da, df),
        each(jnp.add, db, dg),
    )


def of_marginals(tile: Tile, cotangents: Cotangents) -> tuple[Rows, Cols]:
    """Cotangents of the marginals: f = log a - ..., and so for columns."""
    over = lambda x, total: _where_positive(x, total / jnp.where(x > 0, x, 1))
    return each(over, tile.a, cotangents.da), each(over, tile.b, cotangents.db)


def of_valid(marginal: Any, x: Any) -> Any:
    """A vector, 0 for padding."""
    return each(_where_positive, marginal, x)


def zeros(vector: Any) -> Any:
    """As many as there are numbers, which must be finite, in the vector.

    Not constants: a GPU holds them in another layout than what is added to them, and a
    loop has to stay in one.
    """
    return each(lambda x: 0 * x, vector)


def each(fn: Callable[..., Array], *vectors: Any) -> Any:
    """`fn` of the entries of vectors, whichever way they are held."""
    if isinstance(vectors[0], tuple):
        return tuple(map(fn, *vectors))
    return fn(*vectors)


def each_row(fn: Callable[..., Array], *matrices: Matrix) -> Matrix:
    """`fn` of the entries of matrices."""
    return tuple(each(fn, *rows) for rows in zip(*matrices, strict=True))


def over_cols(fn: Callable[..., Array], row: Cols) -> Array:
    """The sum, for `jnp.add`, or maximum, for `jnp.maximum`, of one row."""
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


def _where_positive(marginal, x):
    return jnp.where(marginal > 0, x, 0)


def _bounded(top):
    # Where all is -inf, for padding: -inf less the least number is still -inf.
    return jnp.maximum(top, jnp.finfo(top.dtype).min)


def _not_zero(total):
    # A sum of padding is 0, and no other.
    return jnp.where(total == 0, 1, total)
