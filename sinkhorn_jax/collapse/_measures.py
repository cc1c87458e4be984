"""Measures of rank collapse and entropy collapse.

`where` marks the tokens that count and broadcasts against the batch axes. The result is
that of the array cropped to these tokens, whatever the rest contains, NaN and inf
included; it is 0 if no token counts. Gradients are finite for finite input; where there
is no derivative, the docstring says what takes its place. Magnitudes below the smallest
normal number count as 0.
"""

from typing import Final, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._runtime.arguments import as_array

Norm = Literal["fro", "spectral", "1inf"]
NORMS: Final[tuple[Norm, ...]] = get_args(Norm)


def residual(
    x: Float[Array, "*B T D"], where: Bool[Array, "*#B T"] | None = None
) -> Float[Array, "*B T D"]:
    r"""The tokens minus their mean over tokens.

    Equal tokens give exact zeros. Nearly equal tokens give accurate differences.

    Args:
        x: Tokens. B batch, T tokens, D features.
        where: True where a token counts.

    Returns:
        $x - \mathbf{1}\bar{x}^\top$, in x's units; 0 for tokens that do not count.
    """
    x, where = prepare("x", x, where)
    return _residual(x, where)


def relative_residual(
    x: Float[Array, "*B T D"],
    norm: Norm = "fro",
    where: Bool[Array, "*#B T"] | None = None,
) -> Float[Array, "*B"]:
    r"""The relative residual $\|residual(x)\| / \|x\|$, which is 0 for equal tokens.

    It does not depend on the scale of x, and is at most 1 in the Frobenius and the
    spectral norm.

    Args:
        x: Tokens. B batch, T tokens, D features.
        norm: "fro"; "spectral", the largest singular value; or "1inf", which is
            $\sqrt{\|x\|_1 \|x\|_\infty}$ of the largest absolute column and row sums.
        where: True where a token counts.

    Returns:
        The ratio. If all tokens are equal it is 0, and so is its gradient. Where the
        largest singular value or sum is repeated, the gradient is a subgradient.

    Reference:
        Dong et al., 2021. https://arxiv.org/abs/2103.03404
    """
    if norm not in NORMS:
        raise ValueError(f"Unknown norm {norm!r}; expected one of {NORMS}.")
    unit, res = _with_residual(x, where)
    needs_values = norm == "spectral"
    s, res_s = (_values(m) if needs_values else None for m in (unit, res))
    return _relative_residual(norm, unit, s, res, res_s)


def stable_rank(
    x: Float[Array, "*B T D"], where: Bool[Array, "*#B T"] | None = None
) -> Float[Array, "*B"]:
    r"""The stable rank $\|x\|_F^2 / \|x\|_2^2$.

    Small singular values hardly change it. The rank bounds it from above.

    Args:
        x: Matrices. B batch, T tokens, D features.
        where: True where a token counts.

    Returns:
        A number from 1 to min(T, D). If x is zero it is 0, and so is its gradient.
        Where the largest singular value is repeated, the gradient follows one of them.

    Reference:
        Rudelson and Vershynin, 2007. https://arxiv.org/abs/math/0503442
    """
    unit = _to_unit(prepare("x", x, where)[0])
    return _stable_rank(unit, _values(unit))


def effective_rank(
    x: Float[Array, "*B T D"], where: Bool[Array, "*#B T"] | None = None
) -> Float[Array, "*B"]:
    r"""The effective rank $\exp(-\sum_k p_k \log p_k)$, $p = \sigma / \sum_k \sigma_k$.

    It is n for n equal singular values $\sigma$, and decreases smoothly as some vanish.

    Args:
        x: Matrices. B batch, T tokens, D features.
        where: True where a token counts.

    Returns:
        A number from 1 to min(T, D). If x is zero it is 0, and so is its gradient. The
        slope at a singular value of 0 is infinite, so the gradient leaves out those
        that `numpy.linalg.matrix_rank` counts as 0.

    Reference:
        Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    unit = _to_unit(prepare("x", x, where)[0])
    return _effective_rank(unit, _values(unit))


def attention_entropy(
    plan: Float[Array, "*B T S"], where: Bool[Array, "*#B T"] | None = None
) -> Float[Array, "*B"]:
    r"""The entropy $-\sum_j p_j \log p_j$ in nats, averaged over the rows of a plan.

    It is $\log S$ for uniform attention and 0 for rows with a single entry.

    Args:
        plan: Nonnegative attention weights. B batch, T query length, S key length.
            Rows are rescaled to sum to 1; rows without mass are left out of the mean.
        where: True where a row counts.

    Returns:
        The mean entropy; 0 if no row has mass. The slope at an entry of 0 is infinite,
        so the gradient is 0 there.

    Reference:
        Zhai et al., 2023. https://arxiv.org/abs/2303.06296
    """
    plan, _ = prepare("plan", plan, where)
    # Each row is its own matrix [1, S], so that rows of any magnitude count alike.
    unit = _to_unit(plan[..., None, :])  # Excluded rows are zeros.
    p, is_empty = unit.x, unit.is_zero
    p = jnp.where(p == 0.0, 0.0, p)[..., 0, :]  # Cuts the gradient at zeros.
    entropy = jnp.where(is_empty, 0.0, _entropy(p / p.sum(axis=-1, keepdims=True)))
    num_rows = jnp.sum(~is_empty, axis=-1).astype(plan.dtype)
    return entropy.sum(axis=-1) / jnp.maximum(num_rows, 1.0)


def token_measures(
    x: Array, where: Array | None = None
) -> tuple[dict[Norm, Array], Array, Array]:
    """Relative residuals by norm, stable rank and effective rank.

    They need one SVD of x and one of its residual, which take nearly all of the time.
    """
    unit, res = _with_residual(x, where)
    s, res_s = _values(unit), _values(res)
    residuals: dict[Norm, Array] = {
        norm: _relative_residual(norm, unit, s, res, res_s) for norm in NORMS
    }
    return residuals, _stable_rank(unit, s), _effective_rank(unit, s)


def prepare(name, x, where):
    """The checked x, in its working dtype, 0 where tokens are excluded; and `where`."""
    x = as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be real and floating, got {x.dtype}: the measures are "
            f"fractions. Convert it, as {name}.astype(jnp.float32)."
        )
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(
            f"{name} must be (..., tokens, features) with neither axis empty, got "
            f"shape {x.shape}: the measures compare tokens. Use {name}[None] for one."
        )
    if jnp.finfo(x.dtype).bits < 32:
        x = x.astype(jnp.float32)
    if where is None:
        return x, jnp.ones(x.shape[:-1], bool)
    where = as_array("where", where)
    if where.dtype != jnp.bool_:
        raise TypeError(
            f"where must be boolean, got {where.dtype}: a token counts or does not. "
            "Compare it with a threshold, as where > 0."
        )
    # Backwards from the batch axis next to the tokens; the shorter shape is extended.
    batch_axes = zip(where.shape[-2::-1], x.shape[-3::-1], strict=False)
    is_batch = where.ndim < x.ndim and all(m in (1, n) for m, n in batch_axes)
    if not is_batch or where.shape[-1:] != x.shape[-2:-1]:
        raise ValueError(
            f"where must end in {x.shape[-2]} and broadcast to {x.shape[:-1]}, got "
            f"shape {where.shape}: it marks tokens. Give it no axis for features."
        )
    where = jnp.broadcast_to(where, x.shape[:-1])
    return jnp.where(where[..., None], x, 0.0), where


class _Unit(NamedTuple):
    """Matrices divided by a scale near their largest entry; ones where all are 0."""

    x: Array
    scale: Array
    is_zero: Array


def _with_residual(x, where):
    x, where = prepare("x", x, where)
    unit = _to_unit(x)
    return unit, _to_unit(_residual(unit.x, where))


def _residual(x, where):
    where = where[..., None]  # [..., T, 1]
    count = jnp.maximum(where.sum(axis=-2, keepdims=True), 1).astype(x.dtype)
    mean = lambda y: y.sum(axis=-2, keepdims=True) / count
    # Any constant may be subtracted first. With the rounded mean subtracted, the second
    # mean is exact to the size of the residual, not of x. The clip makes equal tokens
    # exact zeros.
    y = lax.stop_gradient(x)
    low = y.min(axis=-2, keepdims=True, where=where, initial=jnp.inf)
    high = y.max(axis=-2, keepdims=True, where=where, initial=-jnp.inf)
    x = jnp.where(where, x - jnp.clip(mean(y), low, high), 0.0)
    return jnp.where(where, x - mean(x), 0.0)


def _to_unit(x):
    # Squares of these entries neither overflow nor vanish. A power of two rounds
    # nothing, so equal tokens stay equal in every fusion. No result depends on the
    # scale, so derivatives may take it for a constant. Ones replace zero matrices, for
    # callers to divide and take roots, and to select another result afterwards.
    scale, is_zero = scale_near(jnp.abs(lax.stop_gradient(x)).max(axis=(-2, -1)))
    unit = jnp.where(is_zero[..., None, None], 1.0, x / scale[..., None, None])
    return _Unit(unit, scale, is_zero)


def scale_near(largest):
    """A power of two near a number that is not negative, or 1 for 0; whether it is 0.

    XLA may turn a quotient into a product with the reciprocal, so that is normal too.
    """
    info = jnp.finfo(largest.dtype)
    is_zero = largest < float(info.tiny)  # False for NaN, which is passed on.
    _, exponent = jnp.frexp(jnp.where(is_zero, 1.0, largest))
    # One less where 1 / scale would fall below the normal numbers.
    exponent = jnp.minimum(exponent, int(info.maxexp) - 1) - 1
    return jnp.ldexp(jnp.ones_like(largest), exponent), is_zero


# In the functions below s are the singular values. Only the spectral norm needs them.
def _relative_residual(norm, unit, s, res, res_s):
    ratio = res.scale * _norm(norm, res.x, res_s) / _norm(norm, unit.x, s)
    return jnp.where(unit.is_zero | res.is_zero, 0.0, ratio)


def _stable_rank(unit, s):
    ratio = jnp.square(_norm("fro", unit.x, s) / _norm("spectral", unit.x, s))
    return jnp.where(unit.is_zero, 0.0, ratio)


def _effective_rank(unit, s):
    # Only the gradient leaves out singular values below the floor. In float32 at
    # 256 x 256 those that are rounding add less than 1e-3 to the rank, and genuine ones
    # just below the floor up to 8%.
    floor = max(unit.x.shape[-2:]) * float(jnp.finfo(s.dtype).eps) * s[..., :1]
    s = jnp.where(s < floor, lax.stop_gradient(s), s)
    rank = jnp.exp(_entropy(s / s.sum(axis=-1, keepdims=True)))
    return jnp.where(unit.is_zero, 0.0, rank)


# The derivative of singular values is d sigma = diag(U^T dX V), without the
# 1 / (sigma_i^2 - sigma_j^2) of singular vectors. So it is finite at repeated and at
# zero values, and exact there for symmetric functions of them: the gradient is
# U diag(h'(sigma)) V^T. JAX's rule for svdvals is this one, and computes vectors only
# when differentiated. Eigenvalues of x^T x would square the condition number, and lose
# in float32 all singular values below 3e-4 of the largest.
def _values(unit):
    return jnp.linalg.svdvals(unit.x)  # [..., min(T, D)]


def _norm(norm, x, s):
    if norm == "spectral":
        return s[..., 0]
    if norm == "fro":
        return jnp.sqrt(jnp.square(x).sum(axis=(-2, -1)))
    size = jnp.abs(x)
    one = size.sum(axis=-2).max(axis=-1)
    inf = size.sum(axis=-1).max(axis=-1)
    return jnp.sqrt(one * inf)


def _entropy(p):
    log_p = jnp.log(jnp.where(p == 0.0, 1.0, p))  # 0 log 0 = 0.
    return -jnp.sum(p * log_p, axis=-1)
