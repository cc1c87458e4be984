"""The correction: by the reverse sweep, or at the fixed point."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._runtime.vmap import max_in_batch
from .domain import Correction, Domain
from .gradient import Implicit
from .iteration import Finish, ScalingHistory
from .marginals import Marginals
from .options import Options


def adjoint(
    options: Options,
    domain: Domain,
    history: ScalingHistory,
    df: Float[Array, " T"],
    dg: Float[Array, " S"],
    marginals: Marginals,
    *,
    of_plan: bool,
) -> Correction:
    """The correction for cotangents `df` and `dg` of the potentials of the result.

    `of_plan` says that they come from a cotangent of the plan: see `reverse_sweep`.
    """
    if isinstance(options.gradient, Implicit):
        r, c = history.end(options.finish)
        return at_the_fixed_point(
            domain, r, c, df, dg, marginals, options.gradient, of_plan=of_plan
        )
    return reverse_sweep(
        domain, history, df, dg, marginals, options.finish, of_plan=of_plan
    )


def reverse_sweep(
    domain: Domain,
    history: ScalingHistory,
    df: Float[Array, " T"],
    dg: Float[Array, " S"],
    marginals: Marginals,
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

    A column step that goes the part τ of the way multiplies the excess by τ.
    """
    a, b, tau = marginals
    r, c, num_iters = history.r, history.c, history.num_iters
    full_c = history.full_c
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
        sums = domain.col_sums(r[k - 1], full_c[k], b)
        dg = dg if tau is None else tau * dg
        return jnp.where(domain.cols, dg / jnp.where(domain.cols, sums, 1), 0)

    def changes(k):
        """Relative changes of both scalings; 0 and False if not all are small."""
        if tau is not None:  # Then t becomes smaller by itself.
            return zero, zero, False
        if of_plan:  # Then t is 0.
            return zero, zero, True
        rows = jnp.where(domain.rows, domain.ratio(r[k - 1], r[k]) - 1, 0)
        cols = jnp.where(domain.cols, domain.ratio(c[k - 1], c[k]) - 1, 0)
        are_small = (jnp.abs(rows) < 0.5).all() & (jnp.abs(cols) < 0.5).all()
        rows, cols = (jnp.where(are_small, x, 0) for x in (rows, cols))
        return rows, cols, are_small

    if tau is not None:
        # What the next column step leaves of it.
        ends_on_columns = finish == "columns"
        excess = tau * dg.sum() - df.sum() if ends_on_columns else tau * excess
    if finish == "rows":
        row_weight = row_weight.at[num_iters].set(weight_of_row_step(num_iters, df))
        df = jnp.zeros_like(df)

    def undo_full_iteration(k, weight_of_row, df, dg, before, sums, excess):
        row_changes, col_changes, are_small = changes(k)
        common = jnp.where(are_small, -excess / total, 0)
        dg = dg - domain.apply_left(weight_of_row, r[k], c[k])
        weight = weight_of_col_step(k, dg)
        weight = jnp.where(domain.cols, weight + (common - before), 0)
        da, db, dtau = sums
        if tau is not None:
            _, g = domain.potentials(r[k - 1], full_c[k])
            dtau = dtau + jnp.vdot(dg, g)
        sums = Marginals(da + common, db + weight - common, dtau)
        weight_of_col = weight + common * col_changes
        df = df - domain.apply(r[k - 1], full_c[k], weight) + a * common * row_changes
        df = df - share * (df.sum() + jnp.where(are_small, 0, excess))
        weight_of_row = weight_of_row_step(k - 1, df)
        # The cotangents from outside reach only the potentials of the result.
        dg = -b * common * col_changes
        excess = excess if tau is None else tau * excess
        rest = jnp.zeros_like(df), dg, common, sums, excess
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

    sums = Marginals(zero, jnp.zeros_like(dg), None if tau is None else zero)
    init = row_weight, col_weight, df, dg, zero, sums, excess
    row_weight, col_weight, *_, sums, _ = jax.lax.fori_loop(0, last, undo, init)
    da = jnp.where(domain.rows, row_weight.sum(axis=0) + sums.a, 0)
    db = jnp.where(domain.cols, sums.b, 0)
    col_factors = r[:-1], full_c[1:], col_weight[1:]
    return Correction(r, c, row_weight, *col_factors, Marginals(da, db, sums.tau))


def at_the_fixed_point(
    domain: Domain,
    r: Float[Array, " T"],
    c: Float[Array, " S"],
    df: Float[Array, " T"],
    dg: Float[Array, " S"],
    marginals: Marginals,
    gradient: Implicit,
    *,
    of_plan: bool,
) -> Correction:
    """The correction by the implicit function theorem, for converged scalings."""
    tau = marginals.tau
    a, b = plan_sums(domain, r, c)
    rhs = dg - domain.apply_left(df / a, r, c)
    if tau is not None and of_plan:  # As its sum is without rounding.
        rhs = rhs - b * (rhs.sum() / jnp.where(domain.cols, b, 0).sum())
    y = solve_columns(domain, r, c, rhs, tau, gradient)
    cotangents = y, None
    if tau is not None:
        # The columns of the fixed point have their own sums; g is the part tau of h.
        _, h = domain.potentials(r, domain.col_step(r, marginals.b))
        db = y * tau * b / jnp.where(marginals.b == 0, 1, marginals.b)
        cotangents = jnp.where(domain.cols, db, 0), jnp.vdot(y * b, h)
        y = tau * y
    x = jnp.where(domain.rows, (df - domain.apply(r, c, y)) / a, 0)
    r, c = r[None], c[None]
    return Correction(r, c, x[None], r, c, y[None], Marginals(x, *cotangents))


def plan_sums(
    domain: Domain, r: Float[Array, " T"], c: Float[Array, " S"]
) -> tuple[Float[Array, " T"], Float[Array, " S"]]:
    """Row and column sums of a plan; 1 in place of 0."""
    a = domain.apply(r, c, jnp.ones_like(c))
    b = domain.apply_left(jnp.ones_like(r), r, c)
    return jnp.where(a > 0, a, 1), jnp.where(b > 0, b, 1)


def solve_columns(
    domain: Domain,
    r: Float[Array, " T"],
    c: Float[Array, " S"],
    rhs: Float[Array, " S"],
    tau: Float[Array, ""] | None,
    gradient: Implicit,
) -> Float[Array, " S"]:
    """Solves (b - tau P^T a^-1 P) y = rhs, with a and b the sums of the plan P.

    With tau = 1 that is a x + P y = rows, P^T x + b y = cols without x, and its matrix
    the Jacobian of a plan's marginals with respect to its potentials. It is symmetric,
    so it gives their tangents as well as the adjoint.
    """
    a, b = plan_sums(domain, r, c)
    total = jnp.where(domain.cols, b, 0).sum()
    total = jnp.where(total == 0, 1, total)

    # With tau = 1 the vector 1 is a null vector. Adding tau times the projection
    # b b^T / sum(b) makes the matrix regular, and changes no y with <b, y> = 0. What
    # the right-hand side has along b belongs to the vector 1.
    def schur_complement(y):
        inner = domain.apply_left(domain.apply(r, c, y) / a, r, c)
        projected = b * (jnp.vdot(b, y) / total)
        if tau is None:
            return b * y - inner + projected
        return b * y - tau * (inner - projected)

    mean = rhs.sum() / total
    rhs = jnp.where(domain.cols, rhs - b * mean, 0)

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
    if tau is None:
        return y
    along_1 = jnp.where(tau < 1, mean / jnp.where(tau < 1, 1 - tau, 1), 0)
    return jnp.where(domain.cols, y + along_1, 0)
