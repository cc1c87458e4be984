"""How to differentiate: the choices, and the adjoints that the solvers share."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .checks import integer, number
from .domain import Correction, Domain
from .iteration import Finish, ScalingHistory


@dataclasses.dataclass(frozen=True)
class Exact:
    """Through all iterations: the gradient of exactly what was computed.

    The only choice that is right for any number of iterations, converged or not. Costs
    one reverse sweep, about as long as the iteration, and keeps the potentials of every
    iteration: (T + S) numbers each.
    """


@dataclasses.dataclass(frozen=True)
class Truncated:
    """Through the last iterations only; what came before them is a constant.

    The sweep stops after `num_iters` full iterations and the row step before them. With
    at least as many as the iteration ran this is `Exact`; 0 differentiates the last row
    step alone, as if the column potential were given. What is dropped shrinks like
    s^(2 num_iters), s the second singular value of the plan with unit marginals:
    close for flat plans, wrong by its own size for sharp ones, converged or not.

    Attributes:
        num_iters: Full iterations to differentiate, not negative.

    Raises:
        TypeError: `num_iters` is not an integer.
        ValueError: `num_iters` is negative.
    """

    num_iters: int

    def __post_init__(self):
        object.__setattr__(self, "num_iters", integer("num_iters", self.num_iters))
        if self.num_iters < 0:
            raise ValueError(
                f"Truncated.num_iters must not be negative, got {self.num_iters}: it "
                "counts the iterations to differentiate."
            )


@dataclasses.dataclass(frozen=True)
class Implicit:
    """At the fixed point, by the implicit function theorem, whatever path led there.

    Solves one linear system with the plan by conjugate gradients, the direction
    (f + t, g - t) that leaves the plan alone removed. Keeps no history. It takes the
    returned plan for the converged one: with an iteration stopped early it is the
    gradient of something that was not computed, and the error is of the order of the
    marginal error. Where the plan falls apart into blocks that hardly exchange mass, or
    is nearly a permutation, the system is nearly singular and the answer inaccurate, in
    float32 even NaN.

    Attributes:
        tolerance: Relative residual at which the solver stops, positive. In float32
            it cannot fall much below the default.
        max_iters: Most steps of the solver, at least 1.

    Raises:
        TypeError: `max_iters` is not an integer or `tolerance` not a number.
        ValueError: `tolerance` is not positive and finite, or `max_iters` is below 1.
    """

    tolerance: float = 1e-6
    max_iters: int = 1000

    def __post_init__(self):
        object.__setattr__(self, "tolerance", number("tolerance", self.tolerance))
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(
                "Implicit.tolerance must be positive and finite, got "
                f"{self.tolerance}: it is the relative residual to stop at."
            )
        object.__setattr__(self, "max_iters", integer("max_iters", self.max_iters))
        if self.max_iters < 1:
            raise ValueError(
                f"Implicit.max_iters must be at least 1, got {self.max_iters}."
            )


Gradient = Exact | Truncated | Implicit


def kept_iterations(gradient: Gradient, num_iters: int) -> int:
    """How many full iterations' potentials the backward pass needs."""
    match gradient:
        case Exact():
            return num_iters
        case Truncated(num_iters=depth):
            return min(depth, num_iters)
        case Implicit():
            # A result that ends on columns is made of two successive states.
            return min(1, num_iters)


def adjoint(
    gradient: Gradient,
    domain: Domain,
    history: ScalingHistory,
    df: Float[Array, " T"],
    dg: Float[Array, " S"],
    a: Float[Array, " T"],
    b: Float[Array, " S"],
    finish: Finish,
) -> Correction:
    """The correction to the logits' cotangent, from the end potentials' cotangents."""
    if not isinstance(gradient, Implicit):
        return _reverse_sweep(domain, history, df, dg, a, b, finish)
    r, c = history.end(finish)
    x, y = solve_marginals(domain, r, c, df, dg, gradient)
    r, c = r[None], c[None]
    return Correction(r, c, x[None], r, c, y[None])


def _reverse_sweep(domain, history, df, dg, a, b, finish):
    """Undo the half steps from the last to the first row step of the history.

    With P(f, g) = exp(Z + f + g) and diag omitted, the half steps and their transposes
    acting on the cotangents (lambda of f, mu of g) are

        row step k:     f_k = log a - logsumexp_j(Z + g_k)
                        mu     -=  P(f_k, g_k)^T (lambda_k / a)
        column step k:  g_k = log b - logsumexp_i(Z + f_{k-1})
                        lambda -=  P(f_{k-1}, g_k) (mu_k / b)

    and each adds minus its plan times its weight, lambda_k / a in rows or mu_k / b in
    columns, to the cotangent of Z. g_0 is a constant, so mu_0 is never formed. Weights
    of iterations that a tolerance left out stay zero.
    """
    r, c, num_iters = history.r, history.c, history.num_iters
    row_weight, col_weight = jnp.zeros_like(r), jnp.zeros_like(c)

    def of_row_step(k, df):
        sums = domain.row_sums(r[k], c[k], a)
        return jnp.where(domain.rows, df / jnp.where(domain.rows, sums, 1), 0)

    def of_col_step(k, dg):
        sums = domain.col_sums(r[k - 1], c[k], b)
        return jnp.where(domain.cols, dg / jnp.where(domain.cols, sums, 1), 0)

    if finish == "rows":
        row_weight = row_weight.at[num_iters].set(of_row_step(num_iters, df))
        df = jnp.zeros_like(df)

    def undo_full_iteration(i, carry):
        k = num_iters - i
        row_weight, col_weight, df, dg = carry
        dg = dg - domain.apply_left(row_weight[k], r[k], c[k])
        col_weight = col_weight.at[k].set(of_col_step(k, dg))
        df = df - domain.apply(r[k - 1], c[k], col_weight[k])
        row_weight = row_weight.at[k - 1].set(of_row_step(k - 1, df))
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
    """Solve a x + P y = rows, P^T x + b y = cols, with a and b the sums of the plan P.

    The Jacobian of a plan's marginals in its potentials, which is symmetric: it gives
    the tangents of the potentials as well as the adjoint.
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

    # cg alone cannot be transposed when it is a tangent that it solves for.
    y = jax.lax.custom_linear_solve(
        schur_complement, rhs, conjugate_gradients, symmetric=True
    )
    return jnp.where(domain.rows, (rows - domain.apply(r, c, y)) / a, 0), y
