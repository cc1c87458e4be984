r"""Upper bounds on the residual after attention.

A layer of self-attention maps tokens X [T, D] to $\sum_h P_h X W_h$ with row-stochastic
plans $P_h$ and $W_h = W_V W_O$ of head h. Below, $R = residual(X)$ has spectral norm
r unless said otherwise, n = T, $A = W_Q W_K^\top$, d is the head dimension, C the
centring matrix, and c the column sums of a plan, which total n.

Bounds over depth decrease doubly exponentially, below every float, so they are
logarithms. All bounds are for exact arithmetic, without skips, MLPs and LayerNorm.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from .._runtime.arguments import as_array
from ._measures import prepare

Normaliser = Literal["softmax", "sinkhorn", "sinkhorn limit"]


def log_deviation(
    plan: Float[Array, "*B T S"], where: Bool[Array, "*#B T"] | None = None
) -> Float[Array, "*B"]:
    r"""Unevenness of a plan's rows, $\max_{ij} |\log (n P_{ij} / c_j)|$.

    Args:
        plan: Nonnegative attention weights whose rows sum to 1. Any T and S.
        where: True where a row counts. Columns without mass are left out.

    Returns:
        $\delta \ge 0$; 0 for equal rows, inf if a column has both zeros and mass. The
        gradient is that of the largest entry, and 0 where that is 0.
    """
    plan, where = prepare("plan", plan, where)
    count = where.sum(axis=-1).astype(plan.dtype)[..., None, None]
    mean = plan.sum(axis=-2, keepdims=True) / jnp.maximum(count, 1.0)
    counts = where[..., None] & (mean > 0.0)
    is_zero = counts & (plan <= 0.0)
    ratio = jnp.where(counts & ~is_zero, plan / jnp.where(mean > 0.0, mean, 1.0), 1.0)
    delta = jnp.abs(jnp.log(ratio)).max(axis=(-2, -1))
    return jnp.where(is_zero.any(axis=(-2, -1)), jnp.inf, delta)


def column_sum_bound(
    plan: Float[Array, "*B T S"],
    residual_norm: Float[Array, "*B"],
    value_norm: Float[Array, "*B"],
    where: Bool[Array, "*#B T"] | None = None,
) -> Float[Array, "*B"]:
    r"""Bound on one head's residual, from its plan's column sums and evenness of rows.

    $$\|res(P X W)\|_2 \le
    (e^\delta - 1) \frac{\|c\|_2}{\sqrt{n}} \|W\|_2 \|res(X)\|_2$$

    with $\delta$ from `log_deviation`. The only assumption is that the rows of P sum to
    1. Softmax and Sinkhorn differ in $\delta$ and in $\|c\|_2 / \sqrt{n}$, whose least
    value is 1, for a doubly stochastic plan.

    Proof: $P\mathbf{1} = \mathbf{1}$, so $res(P X W) = C P R W = C E R W$ with $E = P -
    \mathbf{1}c^\top / n$. Each $|E_{ij}| = (c_j / n) |n P_{ij} / c_j - 1| \le (c_j / n)
    (e^\delta - 1)$. Thus $\|E\|_2 \le \|E\|_F \le (e^\delta - 1) \|c\|_2 / \sqrt{n}$.

    Args:
        plan: The attention weights. T and S may differ.
        residual_norm: $\|res(X)\|_2$ of the tokens that are attended to.
        value_norm: $\|W\|_2$ of the product of all matrices applied to the values.
        where: True where a row counts.

    Returns:
        The bound on the spectral norm; inf if $\delta$ is inf.
    """
    delta = log_deviation(plan, where)
    plan, where = prepare("plan", plan, where)
    count = jnp.maximum(where.sum(axis=-1).astype(plan.dtype), 1.0)
    square = jnp.square(plan.sum(axis=-2)).sum(axis=-1) / count
    has_mass = square > 0.0
    column = jnp.where(has_mass, jnp.sqrt(jnp.where(has_mass, square, 1.0)), 0.0)
    return jnp.expm1(delta) * column * value_norm * residual_norm


def pure_attention_log_bound(
    log_residual: Float[Array, "*B"],
    qk_norm: Float[Array, "*#B L N"],
    value_norm: Float[Array, "*#B L N"],
    head_dim: int,
    num_tokens: int,
    normaliser: Normaliser,
    mean_norm: Float[Array, "*#B"] | None = None,
) -> Float[Array, "*B L+1"]:
    r"""Bound on the residual after each layer, from the norms of the weights.

    With $r_l$ the bound on the residual before layer l, summed over heads,

    $$r_{l+1} = \sum_h \min(e^{\delta_h} - 1, 1) \sqrt{b_h} \|W_h\|_2 r_l,
    \qquad \delta_h = 2 \|A_h\|_2 r_l^2 / \sqrt{d},$$

    where $b$ bounds the largest column sum: 1 for "sinkhorn limit", a doubly stochastic
    plan; $\min(n, e^\delta)$ for "sinkhorn", one iteration or more that ends on rows;
    and for "softmax" n, or with `mean_norm` $\min(n, \exp(\sqrt{2} \|A\|_2 (m_l + r_l)
    r_l / \sqrt{d}))$. While $\delta$ is small, $r_{l+1} \propto r_l^3$.

    Proof. (1) *Evenness.* Write $x_i = \bar{x} + r_i$. Up to constants in rows the
    logits are $u_j + M_{ij}$, $M = R A R^\top / \sqrt{d}$, and the plan of either
    normaliser is $P_{ij} = a_i K_{ij} b_j$ with $K = e^M$, as $e^{u_j}$ joins $b_j$.
    Rows sum to 1, so $a_i = 1 / \sum_l K_{il} b_l$ and $P_{ij} / P_{kj}$ is a weighted
    mean over l of $K_{ij} K_{kl} / (K_{kj} K_{il})$. The logarithm of each term is
    $(r_i - r_k)^\top A (r_j - r_l) / \sqrt{d}$, at most $\delta = 2 \|A\|_2 \|R\|_2^2 /
    \sqrt{d}$, because $\|r_i - r_k\| = \|R^\top (e_i - e_k)\| \le \sqrt{2} \|R\|_2$.
    Hence $e^{-\delta} \le n P_{ij} / c_j \le e^\delta$: no other term, softmax or not.
    (2) *Columns.* $\|c\|_2 / \sqrt{n} \le \sqrt{\max c}$, since c totals n; and
    $\max c \le n$. Before the last row step Sinkhorn's columns sum to 1, and the same
    argument with columns in place of rows gives row sums in $[e^{-\delta}, e^\delta]$,
    so after it $\max c \le e^\delta$. A row of the softmax spreads its logits by at
    most $\|x_i\| \|A\|_2 \sqrt{2} \|R\|_2 / \sqrt{d}$ and $\|x_i\| \le \|\bar{x}\| +
    \|R\|_2$; so $n P_{ij}$ is at most the exponential of that, and $\max c$ too. This
    term sees the mean: the softmax needs it, Sinkhorn's columns do not.
    (3) *A layer.* `column_sum_bound` gives $(e^\delta - 1) \sqrt{b}$. Also $\|C P R\|_2
    \le \|P\|_2 \|R\|_2 \le \sqrt{\|P\|_1 \|P\|_\infty} \|R\|_2 \le \sqrt{b} \|R\|_2$,
    hence the minimum with 1. (4) *The mean* of the next layer is that of $\sum_h P_h X
    W_h$: at most $m_{l+1} = \sum_h \|W_h\|_2 (m_l + \sqrt{b_h} r_l / \sqrt{n})$.
    The bound increases with $r_l$ and $m_l$, so it can be iterated.

    Args:
        log_residual: $\log \|res(X)\|_2$ of the first layer's input.
        qk_norm: $\|A_h\|_2$ of L layers and N heads.
        value_norm: $\|W_h\|_2$, values and output projection multiplied.
        head_dim: d. Logits are divided by its root.
        num_tokens: n.
        normaliser: The function from logits to plans. "sinkhorn limit" assumes exact
            columns; with few iterations or large logits they are not exact.
        mean_norm: $m_0 = \|\bar{x}\|$. None bounds the softmax's columns by n.

    Returns:
        Natural logarithms of the bounds on the input and after each layer; -inf where a
        norm is 0.
    """
    if normaliser not in (known := get_args(Normaliser)):
        raise ValueError(f"Unknown normaliser {normaliser!r}; expected one of {known}.")
    log_residual, qk_norm, value_norm = _norms(log_residual, qk_norm, value_norm)
    log_n = jnp.log(jnp.asarray(num_tokens, log_residual.dtype))
    log_delta_0 = jnp.log(2.0 * head_dim**-0.5 * qk_norm)
    log_value = jnp.log(value_norm)
    log_mean = jnp.zeros_like(log_residual)
    if mean_norm is not None:
        log_mean = jnp.broadcast_to(jnp.log(mean_norm), log_residual.shape)

    def layer(carry, norms):
        log_r, log_m = carry  # [..., 1]: heads broadcast.
        log_scale, log_v = norms  # [..., N]
        log_delta = log_scale + 2.0 * log_r
        if normaliser == "sinkhorn limit":
            log_b = jnp.zeros_like(log_delta)
        elif normaliser == "sinkhorn":
            log_b = _exp_below(log_delta, log_n)
        elif mean_norm is not None:
            # sqrt(2) (m + r) r |A| / sqrt(d).
            log_spread = log_scale + log_r - float(np.log(2.0)) / 2.0
            log_b = _exp_below(log_spread + jnp.logaddexp(log_m, log_r), log_n)
        else:
            log_b = jnp.broadcast_to(log_n, log_delta.shape)
        factor = _log_expm1_below_one(log_delta) + log_b / 2.0 + log_v
        mean = jnp.logaddexp(log_m, log_b / 2.0 + log_r - log_n / 2.0) + log_v
        sum_heads = lambda x: jax.nn.logsumexp(x, axis=-1, keepdims=True)
        carry = sum_heads(factor) + log_r, sum_heads(mean)
        return carry, carry[0][..., 0]

    first = log_residual[..., None], log_mean[..., None]
    layers = (jnp.moveaxis(log_delta_0, -2, 0), jnp.moveaxis(log_value, -2, 0))
    _, logs = lax.scan(layer, first, layers)
    return jnp.concatenate([first[0], jnp.moveaxis(logs, 0, -1)], axis=-1)


def dong_log_bound(
    log_residual: Float[Array, "*B"],
    qk_norm: Float[Array, "*#B L N"],
    value_norm: Float[Array, "*#B L N"],
    head_dim: int,
    gamma: float = 1.0,
) -> Float[Array, "*B L+1"]:
    r"""The bound of Dong et al. 2021 on the residual after each layer, for the softmax.

    In their norm $\|X\|_{1,\infty} = \sqrt{\|X\|_1 \|X\|_\infty}$,

    $$\|res(SAN(X))\| \le (4 \gamma H \beta / \sqrt{d})^{(3^L-1)/2} \|res(X)\|^{3^L}$$

    if $\|A\|_1 \|W\|_{1,\infty} \le \beta$ for H heads in L layers; here the sum over
    heads replaces $H\beta$, and each layer has its own. $\gamma$ depends on attention
    entries. The residual in the paper is the least over all $X - \mathbf{1}x^\top$: at
    most the one here, which subtracts the mean, and at least half of it.

    The bound assumes small logits, $o_i = \max_{jk} |E_{ij} - E_{ik}| \le 1.256$ with
    $E = R A R^\top / \sqrt{d}$. For larger logits or too small a $\gamma$ it may fail.

    With w the softmax of the part of the logits that is constant along columns, the
    proof needs $\gamma^2 = \max_j w_j \sum_i o_i / \max_i o_i$, at most $n \max_j w_j$,
    which is 1 where w is uniform. It holds for Sinkhorn that ends on rows too, with its
    column potential in w.

    Args:
        log_residual: As in `pure_attention_log_bound`, in the norm $1,\infty$.
        qk_norm: Likewise, in the norm 1: the largest absolute column sum.
        value_norm: Likewise, in the norm $1,\infty$.
        head_dim: d.
        gamma: $\gamma$.

    Returns:
        As in `pure_attention_log_bound`.

    Reference:
        Dong, Cordonnier and Loukas, 2021. https://arxiv.org/abs/2103.03404
    """
    return _cubic(log_residual, qk_norm, value_norm, 4.0 * head_dim**-0.5 * gamma)


def reported_log_bound(
    log_residual: Float[Array, "*B"],
    qk_norm: Float[Array, "*#B L N"],
    value_norm: Float[Array, "*#B L N"],
    head_dim: int,
    num_tokens: int,
    prefactor: float = 1.0,
) -> Float[Array, "*B L+1"]:
    r"""A bound for Sinkhorn attention, reported second-hand, of Lapenna et al. 2026.

    $$\|res(SA(X))\|_2 \le \lambda \beta (n^3 / d) \|res(X)\|_2^3$$

    for each head, added over heads and iterated over layers. *Second-hand and
    unverified*: the statement was not read in the paper, and no proof is given here.
    What $\lambda$ and $\beta$ mean was not reported; $\beta = \|A\|_2 \|W\|_2$ is this
    library's reading, and $\lambda$ is the parameter `prefactor`. The factor $n^3$,
    which the cubic law of small residuals lacks, makes the bound loose. It decreases
    with d, where logits decrease with $\sqrt{d}$, so it is smaller for large heads.

    Arguments and result are those of `pure_attention_log_bound`; `prefactor` is
    $\lambda$.

    Reference:
        Lapenna, Fioresi and Gharesifard, 2026. https://arxiv.org/abs/2604.07925
    """
    factor = prefactor * num_tokens**3 / head_dim
    return _cubic(log_residual, qk_norm, value_norm, factor)


def _cubic(log_residual, qk_norm, value_norm, factor):
    log_residual, qk_norm, value_norm = _norms(log_residual, qk_norm, value_norm)
    log_factor = jnp.log((factor * qk_norm * value_norm).sum(axis=-1))  # [..., L]

    def layer(log_r, log_k):
        log_r = log_k + 3.0 * log_r
        return log_r, log_r

    _, logs = lax.scan(layer, log_residual, jnp.moveaxis(log_factor, -1, 0))
    logs = jnp.moveaxis(logs, 0, -1)
    return jnp.concatenate([log_residual[..., None], logs], axis=-1)


def _norms(log_residual, qk_norm, value_norm):
    log_residual = as_array("log_residual", log_residual)
    qk_norm, value_norm = (
        as_array("qk_norm", qk_norm),
        as_array("value_norm", value_norm),
    )
    if qk_norm.ndim < 2 or qk_norm.shape != value_norm.shape:
        raise ValueError(
            "qk_norm and value_norm must both be (..., layers, heads), got shapes "
            f"{qk_norm.shape} and {value_norm.shape}: each head has one of each. For a "
            "single head add an axis, as norm[..., None]."
        )
    batch = jnp.broadcast_shapes(log_residual.shape, qk_norm.shape[:-2])
    shape = (*batch, *qk_norm.shape[-2:])
    qk_norm, value_norm = (jnp.broadcast_to(x, shape) for x in (qk_norm, value_norm))
    return jnp.broadcast_to(log_residual, batch), qk_norm, value_norm


def _log_expm1_below_one(log_delta):
    """The logarithm of min(exp(delta) - 1, 1), accurate for any small delta."""
    # For larger delta the minimum is 1, and exp would overflow.
    delta = jnp.exp(jnp.minimum(log_delta, 0.0))
    is_positive = delta > 0.0
    safe = jnp.where(is_positive, delta, 1.0)
    log_ratio = jnp.where(is_positive, jnp.log(jnp.expm1(safe) / safe), 0.0)
    return jnp.minimum(jnp.minimum(log_delta, 0.0) + log_ratio, 0.0)


def _exp_below(log_x, bound):
    """The smaller of x, given as its logarithm, and a bound."""
    log_bound = jnp.log(jnp.maximum(bound, float(jnp.finfo(bound.dtype).tiny)))
    return jnp.minimum(jnp.exp(jnp.minimum(log_x, log_bound)), bound)
