"""Measures of rank and entropy collapse in NumPy float64, by their definitions."""

import numpy as np


def entropy(p):
    p = p[p > 0] / p.sum()
    return -(p * np.log(p)).sum()


def relative_residuals(x):
    """The relative residual of one matrix of tokens, by norm."""
    x = np.asarray(x, np.float64)
    fro, spectral, one, inf = (
        np.linalg.norm(x - x.mean(axis=0), order) / np.linalg.norm(x, order)
        for order in ("fro", 2, 1, np.inf)
    )
    return {"fro": fro, "spectral": spectral, "1inf": np.sqrt(one * inf)}


def ranks(x):
    """Stable rank and effective rank of one matrix."""
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return (s**2).sum() / s[0] ** 2, np.exp(entropy(s))


def attention_entropy(plan):
    return np.mean([entropy(row) for row in np.asarray(plan, np.float64)])
