"""The rate at which Sinkhorn's iteration approaches its limit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._runtime.arguments import as_array
from ._measures import prepare, scale_near


def convergence_rate(
    plan: Float[Array, "*B T S"], where: Bool[Array, "*#B T"] | None = None
) -> Float[Array, "*B"]:
    r"""The factor by which a full iteration reduces the error, near the fixed point.

    With marginals $a = P\mathbf{1}$ and $b = P^\top\mathbf{1}$ it is the square of the
    second singular value of $A = \mathrm{diag}(a)^{-1/2} P \mathrm{diag}(b)^{-1/2}$.

    By docs/architecture.md (3) a full iteration takes a perturbation v of the column
    potential to $\mathrm{diag}(b)^{-1} P^\top \mathrm{diag}(a)^{-1} P v$. Scaled by
    $\mathrm{diag}(b)^{1/2}$ this map is $A^\top A$, with eigenvalues $\sigma_k^2$ in
    [0, 1]. The first, 1, belongs to constants, which leave the plan as it is.

    Args:
        plan: A nonnegative plan of any magnitude, near the limit. The rate is that for
            the plan's own marginals: a plan far from its limit has the rate of another
            problem.
        where: True where a row counts. Rows and columns without mass are left out.

    Returns:
        A number from 0, for a plan of rank one or without mass, to 1, for a plan that
        consists of separate blocks, such as a permutation; convergence to such a plan
        is slower than linear. Where the second singular value is repeated, the gradient
        follows one of them; it is 0 in rows and columns without mass.

    Reference:
        Knight, The Sinkhorn-Knopp algorithm: convergence and applications, 2008.
    """
    plan, _ = prepare("plan", plan, where)
    # a and b may be beyond the range, or too far apart for products of theirs. So each
    # row and each column is first divided by a number near its largest entry. These
    # numbers cancel: derivatives may take them for constants.
    constant = jax.lax.stop_gradient(plan)
    row_scale, no_row = scale_near(constant.max(axis=-1, keepdims=True))
    col_scale, no_col = scale_near(constant.max(axis=-2, keepdims=True))
    scale, _ = scale_near(constant.max(axis=(-2, -1), keepdims=True))
    unit_rows = plan / row_scale
    a = unit_rows.sum(axis=-1, keepdims=True)  # [..., T, 1]
    b = (plan / col_scale).sum(axis=-2, keepdims=True)  # [..., 1, S]
    has_mass = ~(no_row | no_col)
    root_a, root_b = _root(a), _root(b)
    both = jnp.where(has_mass, root_a * root_b, 1.0)
    normalised = unit_rows * (jnp.sqrt(row_scale) / jnp.sqrt(col_scale)) / both
    # The first pair of singular vectors is known and subtracted. The second singular
    # value is then the largest, with a derivative also where it equals the first.
    total = (plan / scale).sum(axis=(-2, -1), keepdims=True)
    first_a = root_a * jnp.sqrt(row_scale / scale)
    first_b = root_b * jnp.sqrt(col_scale / scale)
    first = first_a * first_b / jnp.where(total > 0.0, total, 1.0)
    rest = jnp.where(has_mass, normalised - first, 0.0)
    # Only rounding can exceed 1.
    return jnp.minimum(jnp.square(jnp.linalg.svdvals(rest)[..., 0]), 1.0)


def remaining_error(
    rate: Float[Array, "*B"], num_iters: Int[Array, "*B"] | int
) -> Float[Array, "*B"]:
    r"""The fraction $rate^k$ of an error that is left after k full iterations.

    It holds near the fixed point, for the errors of the potentials and of the
    marginals. The relative error of the gradient with `Truncated(k)` is at most the
    same fraction: at the fixed point the gradient is $\sum_i (J^\top)^i g$, and
    `Truncated(k)` keeps the terms i < k. The sum of the others is $(J^\top)^k$ times
    the whole, and J is symmetric in some norm, with the eigenvalues of
    `convergence_rate`.

    Args:
        rate: From `convergence_rate`.
        num_iters: Full iterations, k.

    Returns:
        A number from 0 to 1.
    """
    rate = _floating("rate", rate)
    return jnp.power(rate, as_array("num_iters", num_iters).astype(rate.dtype))


def iterations_to_reduce(
    rate: Float[Array, "*B"], reduction: Float[Array, "*B"] | float
) -> Float[Array, "*B"]:
    r"""The number of full iterations that leave a given fraction of the error.

    The inverse of `remaining_error`: the least whole k with $rate^k \le reduction$.

    Args:
        rate: From `convergence_rate`.
        reduction: The fraction, tolerance over present error; above 0.

    Returns:
        A whole number; 0 for a fraction of at least 1, inf for a rate of 1. It is
        piecewise constant, so its gradient is 0.
    """
    rate = _floating("rate", rate)
    log_reduction = jnp.log(_floating("reduction", reduction).astype(rate.dtype))
    log_rate = jnp.log(jnp.clip(rate, float(jnp.finfo(rate.dtype).tiny), 1.0))
    is_slow = log_rate == 0.0
    # A quotient that is whole must not be rounded up to the next whole number.
    slack = 1.0 - 8.0 * float(jnp.finfo(rate.dtype).eps)
    count = jnp.ceil(log_reduction / jnp.where(is_slow, -1.0, log_rate) * slack)
    count = jnp.where(is_slow, jnp.inf, count)
    return jnp.where(log_reduction >= 0.0, 0.0, count)


def _floating(name, x):
    """The argument as a floating array; integers are converted."""
    x = as_array(name, x)
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.result_type(float))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a number or a floating array, got {x.dtype}: it is a "
            "fraction. Convert it first."
        )
    return x


def _root(x):
    is_positive = x > 0.0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1.0)), 0.0)
