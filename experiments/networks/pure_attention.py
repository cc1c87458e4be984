r"""The residual of pure self-attention, also where it is far below the least float64.

Write the tokens as $X = \mathbf{1}c^\top + e^s R$ with $\mathbf{1}^\top R = 0$ and
$\|R\| = 1$. Up to a constant in each row, which every normaliser cancels, the logits
are $\mathbf{1}u^\top + \varepsilon M$ with $\varepsilon = e^{2s}$,
$M = R W_{QK} R^\top / \sqrt{d}$ and $u$ of the order $e^s$. If $\varepsilon$ were 0,
all rows of the plan would equal one $w$, and the output would have no residual. So the
plan is written as
$P = (\mathbf{1}\mathbf{1}^\top + \varepsilon\Delta)\,\mathrm{diag}(w)$, and

    residual of P X W_V  =  e^{3s} C Delta diag(w) R W_V,    C the centring matrix.

Delta has a limit as $\varepsilon$ vanishes. Every step is computed without
cancellation, and the recursion carries s itself, so no digits are lost at any depth. In
the limit Delta is C M C for Sinkhorn, and M less its row means under w for softmax.
Therefore s becomes 3 s + const: doubly exponential decay, for both normalisers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Float

from .options import Network

# The largest deviation of a logit for which Delta is computed; above it the plan is.
# Any threshold from 1e-3 to 10 gives the same to 1e-12.
SMALL = 1.0


class Weights(NamedTuple):
    """Projections of all layers, without biases. N heads of dimension H."""

    query: Float[np.ndarray, "L D N H"]
    key: Float[np.ndarray, "L D N H"]
    value: Float[np.ndarray, "L D N H"]
    out: Float[np.ndarray, "L N H D"]

    @classmethod
    def of(cls, params: Any, seed: int) -> "Weights":
        """The weights of the attention in an encoder's parameters of several seeds."""
        kernels = params["layers"]["attention"]
        return cls(*(kernels[name]["kernel"][seed] for name in cls._fields))


class Tokens(NamedTuple):
    """Tokens as their mean, and the direction and size of their residual."""

    mean: Float[np.ndarray, " D"]  # c
    direction: Float[np.ndarray, "T D"]  # R
    log_scale: float  # s

    @property
    def log10_relative_residual(self) -> float:
        """Decimal logarithm of the relative residual in the Frobenius norm."""
        # The mean and the residual are orthogonal.
        log_mean = np.log(np.linalg.norm(self.mean) * len(self.direction) ** 0.5)
        log_whole = np.logaddexp(2 * log_mean, 2 * self.log_scale) / 2
        return (self.log_scale - log_whole) / np.log(10)


def log10_relative_residual(
    x: Float[np.ndarray, "T D"], weights: Weights, num_iters: int
) -> Float[np.ndarray, " L+1"]:
    """The relative residual of the input and after each layer, as `follow` finds it."""
    return np.array([t.log10_relative_residual for t in follow(x, weights, num_iters)])


def random_curves(
    network: Network, num_tokens: int, num_iters: int
) -> Float[np.ndarray, "S L+1"]:
    """`log10_relative_residual` of the `random_problem` of each seed of a network."""
    problems = (random_problem(seed, num_tokens, network) for seed in network.seeds)
    return np.array([log10_relative_residual(*each, num_iters) for each in problems])


def follow(
    x: Float[np.ndarray, "T D"], weights: Weights, num_iters: int
) -> Iterator[Tokens]:
    """Yields the tokens that enter a stack of attention layers, and after each layer.

    Args:
        x: Tokens that enter the first layer, without padding.
        weights: Projections of each layer. Logits are divided by the root of H.
        num_iters: Sinkhorn iterations; 0 is softmax.

    Raises:
        ValueError: All tokens are equal, so there is no residual to follow.
    """
    x = np.asarray(x, np.float64)
    if np.ptp(x, axis=0).max() == 0:
        raise ValueError(
            f"All {len(x)} tokens are equal: the residual is zero and stays so. Pass "
            "at least two different tokens."
        )
    weights = Weights(*(np.asarray(w, np.float64) for w in weights))
    tokens = _split(x.mean(axis=0), x - x.mean(axis=0), 0.0)
    yield tokens
    for layer in zip(*weights, strict=True):
        tokens = _layer(tokens, Weights(*layer), num_iters)
        yield tokens


def growth(log10_residual: Float[np.ndarray, " L+1"], fit_from: int) -> float:
    """The factor by which the logarithm of the residual grows from layer to layer.

    It is 3 for decay like 10^(-c 3^layer) and near to 1 for exponential decay. The fit
    is of the logarithms of the logarithms, least squares, from layer `fit_from` on.
    """
    late = np.arange(fit_from, len(log10_residual))
    slope, _ = np.polyfit(late, np.log(-log10_residual[late]), 1)
    return float(np.exp(slope))


def random_problem(
    seed: int, num_tokens: int, network: Network, token_scale: float = 1.0
) -> tuple[Float[np.ndarray, "T D"], Weights]:
    """Standard normal tokens times a scale, and weights that keep their variance."""
    depth, width, num_heads = network.depth, network.width, network.num_heads
    rng = np.random.default_rng(seed)
    into = (depth, width, num_heads, width // num_heads)
    shapes = (into, into, into, (depth, num_heads, width // num_heads, width))
    weights = Weights(*(rng.normal(size=s) * width**-0.5 for s in shapes))
    return rng.normal(size=(num_tokens, width)) * token_scale, weights


def _split(mean, residual, log_scale):
    residual = residual - residual.mean(axis=0)
    norm = np.linalg.norm(residual)
    if norm == 0:  # Exact collapse, as without queries.
        return Tokens(mean, residual, -np.inf)
    return Tokens(mean, residual / norm, log_scale + np.log(norm))


def _layer(tokens, weights, num_iters):
    c, r, s = tokens
    q = np.einsum("td,dnh->nth", r, weights.query) * weights.query.shape[-1] ** -0.5
    q_mean = np.einsum("d,dnh->nh", c, weights.query) * weights.query.shape[-1] ** -0.5
    k = np.einsum("td,dnh->nth", r, weights.key)
    v = np.einsum("td,dnh->nth", r, weights.value)
    m = np.einsum("nth,nsh->nts", q, k)
    u = np.exp(s) * np.einsum("nh,nth->nt", q_mean, k)[:, None, :]  # [N, 1, T]
    epsilon = np.exp(2 * s)  # 0 below the range of float64: the limit.
    if epsilon * np.abs(m).max() > SMALL:
        # Nothing cancels in large deviations, and logarithms do not overflow.
        mixed, log_gain = normalise(u + epsilon * m, num_iters) @ v, 0.0
        mean_gain = mixed.mean(axis=1)
    else:
        w, delta = _deviation(u, m, epsilon, num_iters)
        mixed, log_gain = (delta * w) @ v, 2 * s
        mean_gain = (w @ v)[:, 0] + epsilon * mixed.mean(axis=1)  # [N, H]
    value_mean = np.einsum("d,dnh->nh", c, weights.value)
    mean = np.einsum("nh,nhd->d", value_mean + np.exp(s) * mean_gain, weights.out)
    residual = np.einsum("nth,nhd->td", mixed, weights.out)
    return _split(mean, residual, s + log_gain)


def normalise(
    logits: Float[np.ndarray, "*B T T"], num_iters: int
) -> Float[np.ndarray, "*B T T"]:
    """The plan: the softmax over the last axis, then column and row steps."""
    log_plan = scipy.special.log_softmax(logits, axis=-1)
    for axis in (-2, -1) * num_iters:
        log_plan = scipy.special.log_softmax(log_plan, axis=axis)
    return np.exp(log_plan)


def _deviation(u, m, epsilon, num_iters):
    """Returns w and Delta of the plan (1 + epsilon Delta) diag(w) of u + epsilon m.

    Dividing 1 + epsilon Delta by its mean 1 + epsilon a, along rows or columns, leaves
    1 + epsilon (Delta - a) / (1 + epsilon a): a step never forms 1 + epsilon Delta.
    """
    w = scipy.special.softmax(u, axis=2)  # [N, 1, T]
    # (exp(z) - 1) / epsilon for z = epsilon m; m itself where z is 0.
    z = epsilon * m
    delta = m * np.divide(np.expm1(z), z, out=np.ones_like(z), where=z != 0)

    def divide(delta, mean):
        return (delta - mean) / (1 + epsilon * mean)

    delta = divide(delta, (delta * w).sum(axis=2, keepdims=True))
    if num_iters > 0:
        # The first column step also replaces w by equal weights.
        w = np.full_like(w, 1 / w.shape[2])
    for _ in range(num_iters):
        delta = divide(delta, delta.mean(axis=1, keepdims=True))
        delta = divide(delta, delta.mean(axis=2, keepdims=True))
    return w, delta
