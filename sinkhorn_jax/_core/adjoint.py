"""The correction: by the reverse sweep, or at the fixed point."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
) -> Correction:
    """The correction for cotangents `df` and `dg` of the potentials of the result."""
    if not isinstance(options.gradient, Implicit):
        return reverse_sweep(domain, history, df, dg, a, b, options.finish)
    r, c = history.end(options.finish)
    x, y = solve_marginals(domain, r, c, df, dg, options.gradient)
    r, c = r[None], c[None]
    return Correction(r, c, x[None], r, c, y[None])


def reverse_sweep(
    domain: Domain,
    history: ScalingHistory,
    df: Float[Array, " T"],
    dg: Float[Array, " S"],
    a: Float[Array, " T"],
    b: Float[Array, " S"],
    finish: Finish,
) -> Correction:
    """The correction, by docs/architecture.md (4) and (5) over the whole history.

    `df` and `dg` are λ and μ there. The weights of iterations that did not run are 0.
    """
    r, c, num_iters = history.r, history.c, history.num_iters
    row_weight, col_weight = jnp.zeros_like(r), jnp.zeros_like(c)

    def weight_of_row_step(k, df):
        sums = domain.row_sums(r[k], c[k], a)
        return jnp.where(domain.rows, df / jnp.where(domain.rows, sums, 1), 0)

    def weight_of_col_step(k, dg):
        sums = domain.col_sums(r[k - 1], c[k], b)
        return jnp.where(domain.cols, dg / jnp.where(domain.cols, sums, 1), 0)

    if finish == "rows":
        row_weight = row_weight.at[num_iters].set(weight_of_row_step(num_iters, df))
        df = jnp.zeros_like(df)

    def undo_full_iteration(i, carry):
        k = num_iters - i
        row_weight, col_weight, df, dg = carry
        dg = dg - domain.apply_left(row_weight[k], r[k], c[k])
        col_weight = col_weight.at[k].set(weight_of_col_step(k, dg))
        df = df - domain.apply(r[k - 1], c[k], col_weight[k])
        row_weight = row_weight.at[k - 1].set(weight_of_row_step(k - 1, df))
        # The cotangents from outside reach only the potentials of the result.
        return row_weight, col_weight, jnp.zeros_like(df), jnp.zeros_like(dg)

    row_weight, col_weight, *_ = jax.lax.fori_loop(
        0, num_iters, undo_full_iteration, (row_weight, col_weight, df, dg)
    )
    return Correction(r, c, row_weight, r[:-1], c[1:], col_weight[1:])


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
