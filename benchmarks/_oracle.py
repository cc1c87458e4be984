"""Sinkhorn attention of one head and its gradient in NumPy float64.

Imports nothing of the package. The gradient is reverse mode written out step by step,
not the closed form of the fast implementations, and no plan is stored: each is made
again from its potentials, so a head of 4096 tokens needs about 0.5 GiB.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Result(NamedTuple):
    """Output of attention and the gradients for one cotangent."""

    out: Float[np.ndarray, "T D"]
    dq: Float[np.ndarray, "T H"]
    dk: Float[np.ndarray, "S H"]
    dv: Float[np.ndarray, "S D"]


def attention(
    query: Float[np.ndarray, "T H"],
    key: Float[np.ndarray, "S H"],
    value: Float[np.ndarray, "S D"],
    cotangent: Float[np.ndarray, "T D"],
    num_iters: int,
) -> Result:
    """Softmax attention followed by `num_iters` column-then-row normalisations."""
    query, key, value, cotangent = (
        np.asarray(x).astype(np.float64) for x in (query, key, value, cotangent)
    )
    scale = query.shape[1] ** -0.5
    z = scale * query @ key.T
    t, s = z.shape
    plan = np.empty_like(z)  # The only other matrix of this size in the forward pass.

    def make_plan(f, g):
        np.add(z, f[:, None], out=plan)
        np.add(plan, g, out=plan)
        return np.exp(plan, out=plan)

    # Each step divides the current plan by its sums. Entries are at most 1 after a row
    # step, and the first one starts from the row maxima, so nothing overflows.
    f, g = -z.max(axis=1), np.zeros(s)
    f = f - np.log(make_plan(f, g).sum(axis=1))
    fs, gs = [f], [g]
    for _ in range(num_iters):
        g = g - np.log(make_plan(f, g).sum(axis=0) * (s / t))
        f = f - np.log(make_plan(f, g).sum(axis=1))
        fs.append(f)
        gs.append(g)
    make_plan(f, g)
    out, dv = plan @ value, plan.T @ cotangent

    dz = plan * (cotangent @ value.T)
    df, dg = dz.sum(axis=1), dz.sum(axis=0)
    for step in range(num_iters, -1, -1):
        # f = -log sum_j exp(z + g), so d f_i / d z_ij = -plan_ij; rows sum to 1.
        make_plan(fs[step], gs[step])
        dg = dg - df @ plan
        np.multiply(plan, df[:, None], out=plan)
        dz -= plan
        if step == 0:
            break
        # g = log(t / s) - log sum_i exp(z + f): the same of the columns, sums t / s.
        make_plan(fs[step - 1], gs[step])
        np.multiply(plan, dg * (s / t), out=plan)
        dz -= plan
        df, dg = -plan.sum(axis=1), np.zeros(s)
    return Result(out, scale * dz @ key, scale * dz.T @ query, dv)
