"""Sinkhorn and Sinkhorn attention in NumPy float64, written as plainly as possible.

The tests compare the package with it, so it imports nothing from the package.
"""

import numpy as np


def logsumexp(x, axis):
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis=axis)) + np.squeeze(top, axis)


def marginals(logits, a=None, b=None):
    """Both marginals, with defaults filled in and 0 for padding."""
    rows, cols = (logits > -np.inf).any(-1), (logits > -np.inf).any(-2)
    if a is None and b is None:
        a = np.ones(logits.shape[:-1])
    if a is not None:
        a = np.where(rows, np.broadcast_to(a, rows.shape), 0.0)
    if b is not None:
        b = np.where(cols, np.broadcast_to(b, cols.shape), 0.0)
    if a is None:
        a = rows * (b.sum(-1) / np.maximum(rows.sum(-1), 1))[..., None]
    if b is None:
        b = cols * (a.sum(-1) / np.maximum(cols.sum(-1), 1))[..., None]
    return a, b


def without_mass(logits, a, b):
    """-inf in rows and columns whose marginal is 0."""
    for marginal, axis in ((a, -1), (b, -2)):
        if marginal is not None:
            empty = np.expand_dims(np.asarray(marginal) == 0, axis)
            logits = np.where(empty, -np.inf, logits)
    return logits


def potentials(logits, num_iters, a=None, b=None, finish="rows", tau=1.0):
    """f, g and the marginal error of one matrix or a batch."""
    logits = without_mass(np.asarray(logits, np.float64), a, b)
    a, b = marginals(logits, a, b)
    rows, cols = (logits > -np.inf).any(-1), (logits > -np.inf).any(-2)

    def row_step(g):
        step = np.log(np.where(rows, a, 1)) - logsumexp(logits + g[..., None, :], -1)
        return np.where(rows, step, 0.0)

    def col_step(f):
        step = np.log(np.where(cols, b, 1)) - logsumexp(logits + f[..., :, None], -2)
        return np.where(cols, step, 0.0)

    g = np.zeros_like(b)
    f = before = row_step(g)
    for _ in range(num_iters):
        before, g = f, np.asarray(tau)[..., None] * col_step(f)
        f = row_step(g)
    if finish == "columns":
        f = before
    plan = np.exp(logits + f[..., :, None] + g[..., None, :])
    sums, target = (plan.sum(-2), b) if finish == "rows" else (plan.sum(-1), a)
    error = np.abs(sums - target).sum(-1) / np.maximum(a.sum(-1), 1e-300)
    return f, g, error


def sinkhorn(logits, num_iters, a=None, b=None, finish="rows", tau=1.0):
    logits = without_mass(np.asarray(logits, np.float64), a, b)
    f, g, _ = potentials(logits, num_iters, a, b, finish, tau)
    return np.exp(logits + f[..., :, None] + g[..., None, :])


def attention_logits(
    query, key, bias=None, mask=None, scale=None, lengths=(None, None)
):
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = np.einsum("btnh,bsnh->bnts", query, key) * scale
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    for length, axis in zip(lengths, (2, 3), strict=True):
        if length is not None:
            index = np.arange(logits.shape[axis]).reshape(-1, *[1] * (3 - axis))
            valid = index < np.asarray(length).reshape(-1, 1, 1, 1)
            logits = np.where(valid, logits, -np.inf)
    return logits


def sinkhorn_attention(
    query, key, value, num_iters=10, finish="rows", keep=1.0, sums=None, **options
):
    """The output (B, T, N, D).

    `keep` multiplies the plan, as dropout does; `sums` are a, b and tau.
    """
    logits = attention_logits(query, key, **options)
    plan = sinkhorn(logits, num_iters, finish=finish, **(sums or {})) * keep
    value = np.asarray(value, np.float64)
    value = np.repeat(value, np.shape(query)[2] // value.shape[2], axis=2)
    return np.einsum("bnts,bsnd->btnd", plan, value)
