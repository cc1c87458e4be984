"""The correction: by the reverse sweep, or at the fixed point."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._runtime.vmap import max_in_batch
from .domain import Correction, Domain
from .gradient import Implicit
from .iteration import Finish, ScalingHistory
from .options import Options


def adjoint(
    options: Options,
    domain: Domain,
    history: ScalingHistory,
    df: Float[Array, " T"],
    dg: Float[Array, " S"],
    a: Float[Array, " T"],
    b: Float[Array, " S"],
    *,
    of_plan: bool,
) -> Correction:
    """The correction for cotangents `df` and `dg` of the potentials of the result.

    `of_plan` says that they come from a cotangent of the plan: see `reverse_sweep`.
    """
    if not isinstance(options.gradient, Implicit):
        return reverse_sweep(
            domain, history, df, dg, a, b, options.finish, of_plan=of_plan
        )
    r, c = history.end(options.finish)
    x, y = solve_marginals(domain, r, c, df, dg, options.gradient)
    r, c = r[None], c[None]
    return Correction(r, c, x[None], r, c, y[None], x, y)


def reverse_sweep(
    domain: Domain,
    history: ScalingHistory,
    df: Float[Array, " T"],
    dg: Float[Array, " S"],
    a: Float[Array, " T"],
    b: Float[Array, " S"],
    finish: Finish,
    *,
    of_plan: bool,
) -> Correction:
    """The correction, by docs/architecture.md (4) and (5) over the whole history.

    `df` and `dg` are λ and μ there. The weights of iterations that did not run are 0.

    No step changes the excess Σμ - Σλ, since the rows of its plan sum to `a` or its
    columns to `b`. It is 0 for a cotangent of the plan (`of_plan`): a number added to f
    and taken off g changes no plan. Nor does a step shrink the rounding error of the
    excess, so that is taken off in each iteration.

    Row weights contain a common number t = -excess / Σa, column weights -t. In the
    correction the two cancel but for the change of the scalings: with c' before the
    column step and c after it, t r E c' - t r E c = t (c' / c - 1) times the plan of
    the column step. So the sweep is over weights without t, and that takes its place.
    """
    r, c, num_iters = history.r, history.c, history.num_iters
    row_weight, col_weight = jnp.zeros_like(r), jnp.zeros_like(c)
    df, dg = jnp.where(domain.rows, df, 0), jnp.where(domain.cols, dg, 0)
    zero = jnp.zeros_like(df.sum())
    excess = zero if of_plan else dg.sum() - df.sum()
    total = jnp.where(a.sum() == 0, 1, a.sum())
    share = a / total

    def weight_of_row_step(k, df):
        sums = domain.row_sums(r[k], c[k], a)
        return jnp.where(domain.rows, df / jnp.where(domain.rows, sums, 1), 0)

    def weight_of_col_step(k, dg):
        sums = domain.col_sums(r[k - 1], c[k], b)
        return jnp.where(domain.cols, dg / jnp.where(domain.cols, sums, 1), 0)

    def changes(k):
        """Those of the scalings, relative; 0 and False if not all are small."""
        if of_plan:  # Then t is 0.
            return zero, zero, True
        rows = jnp.where(domain.rows, domain.ratio(r[k - 1], r[k]) - 1, 0)
        cols = jnp.where(domain.cols, domain.ratio(c[k - 1], c[k]) - 1, 0)
        are_small = (jnp.abs(rows) < 0.5).all() & (jnp.abs(cols) < 0.5).all()
        rows, cols = (jnp.where(are_small, x, 0) for x in (rows, cols))
        return rows, cols, are_small

    if finish == "rows":
        row_weight = row_weight.at[num_iters].set(weight_of_row_step(num_iters, df))
        df = jnp.zeros_like(df)

    def undo_full_iteration(k, weight_of_row, df, dg, before, sums):
        row_changes, col_changes, are_small = changes(k)
        common = jnp.where(are_small, -excess / total, 0)
        dg = dg - domain.apply_left(weight_of_row, r[k], c[k])
        weight = weight_of_col_step(k, dg)
        weight = jnp.where(domain.cols, weight + (common - before), 0)
        sums = sums[0] + common, sums[1] + weight - common
        weight_of_col = weight + common * col_changes
        df = df - domain.apply(r[k - 1], c[k], weight) + a * common * row_changes
        df = df - share * (df.sum() + jnp.where(are_small, 0, excess))
        weight_of_row = weight_of_row_step(k - 1, df)
        # The cotangents from outside reach only the potentials of the result.
        dg = -b * common * col_changes
        rest = jnp.zeros_like(df), dg, common, sums
        return weight_of_row, weight_of_col, *rest

    has_stop = history.stopped is not None
    # All matrices that `vmap` maps over write to the same place.
    last = max_in_batch(num_iters) if has_stop else num_iters

    def undo(i, carry):
        k = last - i
        row_weight, col_weight, *rest = carry
        old = row_weight[k - 1], col_weight[k], *rest
        new = undo_full_iteration(k, row_weight[k], *rest)
        if has_stop:  # An iteration that did not run leaves everything as it is.
            ran = k <= num_iters
            new = jax.tree.map(lambda n, o: jnp.where(ran, n, o), new, old)
        row, col, *rest = new
        return row_weight.at[k - 1].set(row), col_weight.at[k].set(col), *rest

    init = row_weight, col_weight, df, dg, zero, (zero, jnp.zeros_like(dg))
    row_weight, col_weight, *_, (common, db) = jax.lax.fori_loop(0, last, undo, init)
    da = jnp.where(domain.rows, row_weight.sum(axis=0) + common, 0)
    db = jnp.where(domain.cols, db, 0)
    col_factors = r[:-1], c[1:], col_weight[1:]
    return Correction(r, c, row_weight, *col_factors, da, db)


def solve_marginals(
    domain: Domain,
    r: Float[Array, " T"],
    c: Float[Array, " S"],
    rows: Float[Array, " T"],
    cols: Float[Array, " S"],
    gradient: Implicit,
) -> tuple[Float[Array, " T"], Float[Array, " S"]]:
    """Solves a x + P y = rows, P^T x + b y = cols, with a and b the sums of the plan P.

    The matrix of this system is the Jacobian of a plan's marginals with respect to its
    potentials. It is symmetric, so it gives their tangents as well as the adjoint.
    """
    a = domain.apply(r, c, jnp.ones_like(c))
    b = domain.apply_left(jnp.ones_like(r), r, c)
    a, b = jnp.where(a > 0, a, 1), jnp.where(b > 0, b, 1)
    total = jnp.where(domain.cols, b, 0).sum()
    total = jnp.where(total == 0, 1, total)

    # With x eliminated, (b - P^T a^-1 P) y = rhs has the null vector 1. Adding the
    # projection b b^T / sum(b) makes it regular and fixes <b, y> = 0.
    def schur_complement(y):
        inner = domain.apply_left(domain.apply(r, c, y) / a, r, c)
        return b * y - inner + b * (jnp.vdot(b, y) / total)

    rhs = cols - domain.apply_left(rows / a, r, c)
    rhs = jnp.where(domain.cols, rhs - b * (rhs.sum() / total), 0)

    def conjugate_gradients(matvec, rhs):
        return jax.scipy.sparse.linalg.cg(
            matvec,
            rhs,
            tol=gradient.tolerance,
            maxiter=gradient.max_iters,
            M=lambda residual: residual / b,
        )[0]

    # In `matrix._reference` the right-hand side is a tangent, and JAX cannot transpose
    # `cg` alone there.
    y = jax.lax.custom_linear_solve(
        schur_complement, rhs, conjugate_gradients, symmetric=True
    )
    return jnp.where(domain.rows, (rows - domain.apply(r, c, y)) / a, 0), y
