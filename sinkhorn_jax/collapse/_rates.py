"""How fast Sinkhorn's iteration approaches its limit."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._measures import prepare


def convergence_rate(
    plan: Float[Array, "*B T S"], where: Bool[Array, "*#B T"] | None = None
) -> Float[Array, "*B"]:
    r"""By what factor a full iteration shrinks the error, near the fixed point.

    With marginals $a = P\mathbf{1}$ and $b = P^\top\mathbf{1}$ it is the square of the
    second singular value of $A = \mathrm{diag}(a)^{-1/2} P \mathrm{diag}(b)^{-1/2}$.

    Proof sketch: perturb the column potential of a plan with the right marginals by
    $v$. To first order the row step moves the row potential by $-\mathrm{diag}(a)^{-1}
    P v$ and the column step moves the column potential to $\mathrm{diag}(b)^{-1} P^\top
    \mathrm{diag}(a)^{-1} P v$. Scaled by $\mathrm{diag}(b)^{1/2}$ this is $A^\top A$,
    symmetric, with eigenvalues $\sigma_k^2$ in [0, 1]. The first, 1, belongs to
    constants, which leave the plan as it is; the second is the rate.

    Args:
        plan: Nonnegative, and near the limit; any magnitude. What is returned holds
            for the plan's own marginals, so a plan far from its limit tells the rate of
            a neighbouring problem.
        where: True where a row counts. Rows and columns without mass are left out.

    Returns:
        From 0, for a plan of rank one, to 1, for one that falls apart into blocks such
        as a permutation, on which the iteration is not linear but slower. 0 without
        mass. Where the second singular value is repeated the gradient follows one of
        them; entries in rows and columns without mass get the gradient 0.

    Raises:
        TypeError, ValueError: A dtype or a shape does not fit.

    Reference:
        Knight, The Sinkhorn-Knopp algorithm: convergence and applications, 2008.
    """
    plan, _ = prepare("plan", plan, where)
    largest = plan.max(axis=(-2, -1), keepdims=True)
    plan = plan / jnp.where(largest > 0.0, largest, 1.0)
    a, b = plan.sum(axis=-1), plan.sum(axis=-2)  # [..., T], [..., S]
    total = a.sum(axis=-1)[..., None, None]
    root_a, root_b = _root(a)[..., :, None], _root(b)[..., None, :]
    scale = root_a * root_b
    has_mass = scale > 0.0
    normalised = plan / jnp.where(has_mass, scale, 1.0)
    # The first pair of singular vectors is known, so it is taken off: the second
    # value, then the largest, has a derivative also where it meets the first.
    first = scale / jnp.where(total > 0.0, total, 1.0)
    rest = jnp.where(has_mass, normalised - first, 0.0)
    # Rounding alone can exceed 1, and k iterations never worsen the error.
    return jnp.minimum(jnp.square(jnp.linalg.svdvals(rest)[..., 0]), 1.0)


def remaining_error(
    rate: Float[Array, "*B"], num_iters: Int[Array, "*B"] | int
) -> Float[Array, "*B"]:
    r"""What fraction of an error is left after some iterations: $rate^k$.

    The error of the potentials and, k full iterations later, of the marginals, both
    measured near the fixed point. The same fraction tells how wrong `Truncated(k)` is:
    at the fixed point the gradient is $\sum_i (J^\top)^i g$, of which it keeps the
    terms i < k; what it leaves out is $(J^\top)^k$ applied to the whole, and J has the
    eigenvalues of `convergence_rate`. So its relative error is at most $rate^k$ in the
    norm in which J is symmetric.

    Args:
        rate: From `convergence_rate`.
        num_iters: Full iterations, k.

    Returns:
        From 0 to 1.
    """
    return jnp.power(rate, jnp.asarray(num_iters).astype(rate.dtype))


def iterations_to_reduce(
    rate: Float[Array, "*B"], reduction: Float[Array, "*B"] | float
) -> Float[Array, "*B"]:
    r"""How many iterations leave a given fraction of the error.

    The inverse of `remaining_error`: the least whole k with $rate^k \le reduction$.

    Args:
        rate: From `convergence_rate`.
        reduction: The fraction to be left, as tolerance over present error; above 0.

    Returns:
        A whole number; 0 if nothing is to be reduced, inf if the rate is 1. Piecewise
        constant, so its gradient is 0.
    """
    log_reduction = jnp.log(jnp.asarray(reduction, rate.dtype))
    log_rate = jnp.log(jnp.clip(rate, float(jnp.finfo(rate.dtype).tiny), 1.0))
    is_slow = log_rate == 0.0
    # Halved and doubled exponents must not round up to the next whole number.
    slack = 1.0 - 8.0 * float(jnp.finfo(rate.dtype).eps)
    count = jnp.ceil(log_reduction / jnp.where(is_slow, -1.0, log_rate) * slack)
    count = jnp.where(is_slow, jnp.inf, count)
    return jnp.where(log_reduction >= 0.0, 0.0, count)


def _root(x):
    is_positive = x > 0.0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1.0)), 0.0)
