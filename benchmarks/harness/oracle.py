"""Sinkhorn attention of one head and its gradient in NumPy float64.

Imports nothing of the package. The gradient is reverse mode written out step by step,
not the closed form of the fast implementations. Nothing of size T x S is stored: each
pass makes the logits and plans again, in strips of rows that threads share, so a head
of 16384 tokens needs about half a GiB. Sums over strips are in their order, so the
numbers are the same in every run.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Float

STRIP_ENTRIES: Final = 2**21  # Of an array in a strip: 16 MiB, and a handful of them.


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
    query = query.shape[1] ** -0.5 * query
    (t, s), num_rows = (len(query), len(key)), max(1, STRIP_ENTRIES // len(key))
    strips = [slice(i, min(i + num_rows, t)) for i in range(0, t, num_rows)]
    with ThreadPoolExecutor(min(len(strips), os.cpu_count() or 1)) as pool:

        def each(strip_fn: Callable[[slice], Any]) -> Iterator[tuple[slice, Any]]:
            yield from zip(strips, pool.map(strip_fn, strips), strict=True)

        fs, gs = _potentials(query, key, num_iters, each)
        out = np.empty((t, value.shape[1]))
        dv, df, dg = np.zeros_like(value), np.empty(t), np.zeros(s)
        dq, dk = np.zeros_like(query), np.zeros_like(key)

        def end(rows):
            plan = _plan(query[rows], key, fs[-1][rows], gs[-1])
            dz = plan * (cotangent[rows] @ value.T)  # Of the logits, potentials fixed.
            sums = dz.sum(axis=1), dz.sum(axis=0)
            return (
                plan @ value,
                plan.T @ cotangent[rows],
                *sums,
                dz @ key,
                (dz.T @ query[rows]),
            )

        for rows, parts in each(end):
            out[rows], _, df[rows], _, dq[rows], _ = parts
            dv += parts[1]
            dg += parts[3]
            dk += parts[5]

        for step in range(num_iters, -1, -1):

            def row_step(rows, step=step):
                # f = -log sum_j exp(z + g), so d f_i / d z_ij = -plan_ij.
                plan = _plan(query[rows], key, fs[step][rows], gs[step])
                plan *= df[rows, None]
                return plan.sum(axis=0), plan @ key, plan.T @ query[rows]

            for rows, parts in each(row_step):
                dg -= parts[0]
                dq[rows] -= parts[1]
                dk -= parts[2]
            if step == 0:
                break

            def col_step(rows, step=step, dg=dg):
                # g = log(t / s) - log sum_i exp(z + f): columns sum to t / s.
                plan = _plan(query[rows], key, fs[step - 1][rows], gs[step])
                plan *= dg * (s / t)
                return plan.sum(axis=1), plan @ key, plan.T @ query[rows]

            for rows, parts in each(col_step):
                df[rows] = -parts[0]
                dq[rows] -= parts[1]
                dk -= parts[2]
            dg = np.zeros(s)
    return Result(out, query.shape[1] ** -0.5 * dq, dk, dv)


def _potentials(query, key, num_iters, each):
    # Each step divides the current plan by its sums. Entries are at most 1 after a row
    # step, and the first one starts from the row maxima, so nothing overflows. A pass
    # does a row step and, rows being complete in a strip, sums the columns after it.
    t, s = len(query), len(key)
    fs, gs = [], [np.zeros(s)]
    for step in range(num_iters + 1):

        def row_step(rows, step=step):
            if step == 0:
                f = -(query[rows] @ key.T).max(axis=1)
            else:
                f = fs[-1][rows]
            plan = _plan(query[rows], key, f, gs[-1])
            sums = plan.sum(axis=1)
            return f - np.log(sums), (1 / sums) @ plan

        f, column_sums = np.empty(t), np.zeros(s)
        for rows, parts in each(row_step):
            f[rows] = parts[0]
            column_sums += parts[1]
        fs.append(f)
        if step < num_iters:
            gs.append(gs[-1] - np.log(column_sums * (s / t)))
    return fs, gs


def _plan(query, key, f, g):
    plan = query @ key.T
    plan += f[:, None]
    plan += g
    return np.exp(plan, out=plan)
