"""The gradient of one head in strips: seeds, reverse sweep, cotangents of the logits.

In terms of E = exp(Z + f + g) with the potentials of iteration k - 1, diag omitted,

    row step k - 1:    plan r E c            weight w, the cotangent of f_{k-1}
    column step k:     plan r E c_k          weight y, the cotangent of g_k over b

where c_k is what the column step found. Each adds minus its plan times its weight to
the cotangent of Z, as in `_gradient`, and both come from one pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.precision import dot
from ..._runtime.vmap import with_fallback
from .._problem import uniform_marginals
from .forward import State
from .strips import Strips


class _Sweep(NamedTuple):
    """Weights of the half steps that are differentiated, and what they multiply."""

    before: State  # Of the iterations before each column step; c is the row step's.
    col_c: Float[Array, "K S"]  # The column step's scaling, for the potentials before.
    row_weight: Float[Array, "K T"]  # Of the row steps before the column steps.
    col_weight: Float[Array, "K S"]


def backward(
    strips: Strips,
    query_t: Float[Array, "H T"],
    value_t: Float[Array, "D S"],
    do_t: Float[Array, "D T"],
    df: Float[Array, " T"],
    history: State,
) -> tuple[
    tuple[Float[Array, "T H"], Float[Array, "H S"], Float[Array, "D S"]],
    Float[Array, "..."] | None,
]:
    """Cotangents of query, key and value, the last two transposed, and of the bias.

    Args:
        strips: The head.
        query_t: Its queries with scale.
        value_t: Its values.
        do_t: Cotangent of the output.
        df: Cotangent of the row potential of the result.
        history: What `forward` kept.
    """
    ends_on_rows = strips.heads.problem.options.finish == "rows"
    end = jax.tree.map(lambda x: x[-1], history)
    last_weight = df if ends_on_rows else jnp.zeros_like(df)
    dv_t, dg = _seeds(strips, end, value_t, do_t, last_weight)
    df = jnp.zeros_like(df) if ends_on_rows else df
    sweep = _reverse_sweep(strips, history, df, dg)
    dq, dk_t, dbias = _pull_back(
        strips, query_t, value_t, do_t, end, last_weight, sweep
    )
    return (dq, dk_t, dv_t), dbias


def _seeds(strips, end, value_t, do_t, last_weight):
    """Cotangents of the values and, past the last row step, of the column potential."""
    low = strips.heads.low

    def body(strip, carry):
        dv_t, sums = carry
        kernel, keep = strip.kernel(end.f, end.g), strip.keep()
        kept = kernel if keep is None else kernel * keep
        dv_t = dv_t + dot(low(strip.take_fresh(do_t * end.r[None])), low(kept))
        weight = strip.take(last_weight * end.r)
        return dv_t, sums + strip.sum_rows(weight, kernel)

    dv_t, sums = strips.fold(body, (jnp.zeros_like(value_t), jnp.zeros_like(end.c)))
    dv_t = dv_t * end.c[None]
    return dv_t, (value_t * dv_t).sum(axis=0) - sums * end.c


def _reverse_sweep(strips, history, df, dg):
    before, after = (
        jax.tree.map(lambda x, cut=cut: x[cut], history)
        for cut in (slice(None, -1), slice(1, None))
    )
    # Where potentials took the scalings up in between, c alone is not the whole step.
    col_c = after.c * jnp.exp(after.g - before.g)
    _, b = uniform_marginals(history.r[-1] != 0, history.c[-1] != 0, df.dtype)
    cols = b != 0

    def undo_full_iteration(carry, step):
        df, dg = carry
        state, col_c = step
        col_weight = jnp.where(cols, dg / jnp.where(cols, b, 1), 0)

        def body(strip, carry):
            row_weight, sums = carry
            kernel, r = strip.kernel(state.f, state.g), strip.take(state.r)
            weight = strip.take(df) - r * dot(kernel, col_c * col_weight)
            sums = sums + strip.sum_rows(weight * r, kernel)
            return strip.put(row_weight, weight), sums

        row_weight, sums = strips.fold(body, (jnp.zeros_like(df), jnp.zeros_like(dg)))
        # The cotangents from outside reach only the potentials of the result.
        return (jnp.zeros_like(df), -sums * state.c), (row_weight, col_weight)

    _, weights = jax.lax.scan(
        undo_full_iteration, (df, dg), (before, col_c), reverse=True
    )
    return _Sweep(before, col_c, *weights)


def _pull_back(strips, query_t, value_t, do_t, end, last_weight, sweep):
    """Cotangents of queries, keys and bias: plan * dplan, and the correction."""
    heads = strips.heads
    low, key = heads.low, heads.key(strips.head)
    # The softmax is exp(logits + f) r: the g beside it is not in its plan.
    options = heads.problem.options
    has_softmax = 0 < options.num_iters == len(sweep.col_weight)
    softmax_weight = sweep.row_weight[0] * sweep.before.r[0] if has_softmax else None
    if has_softmax:
        sweep = sweep._replace(row_weight=sweep.row_weight.at[0].set(0))
    correction = _correction(strips, end, last_weight, sweep)
    left, right_t = (do_t * end.r[None]).T, low(value_t * end.c[None])

    def body(strip, carry):
        dq, dk_t, dbias = carry
        kernel, keep = strip.kernel(end.f, end.g), strip.keep()
        dplan = dot(low(strip.take(left)), right_t)
        dz = kernel * (dplan if keep is None else dplan * keep)
        dz = dz - correction(strip, kernel)
        if has_softmax:
            softmax = strip.kernel(sweep.before.f[0], jnp.zeros_like(end.g))
            dz = dz - softmax * strip.take(softmax_weight)[:, None]
        dq = strip.put(dq, dot(low(dz), low(key)))
        dk_t = dk_t + dot(low(strip.take_fresh(query_t)), low(dz))
        return dq, dk_t, strip.add_to_bias(dbias, dz)

    shape = heads.bias_shape
    return strips.fold(
        body,
        (
            jnp.zeros((heads.problem.t, key.shape[1]), heads.dtype),
            jnp.zeros(key.shape[::-1], heads.dtype),
            None if shape is None else jnp.zeros(shape, heads.dtype),
        ),
    )


def _correction(strips, end, last_weight, sweep):
    """What the half steps add to the cotangent of a strip's logits, negated."""
    before = sweep.before
    # All relative to the plan of the result, at rank 2 K + 1.
    rho = before.r * jnp.exp(before.f - end.f[None])
    shift = jnp.exp(before.g - end.g[None])
    left = [rho * sweep.row_weight, rho, (end.r * last_weight)[None]]
    right = [before.c * shift, sweep.col_c * shift * sweep.col_weight, end.c[None]]
    left, right = jnp.concatenate(left).T, jnp.concatenate(right)  # [T, K'], [K', S]
    # An entry of the result's kernel may be lost, below the least number, that is not
    # small in the plan of an earlier iteration.
    limits = jnp.finfo(end.r.dtype)
    gamma = shift * jnp.maximum(before.c, sweep.col_c)
    top = [jnp.max(x, initial=1) for x in (rho, gamma)]
    is_safe = top[0] * top[1] * limits.tiny <= limits.eps / 8

    def step_by_step(strip, kernel):
        def add(total, step):
            state, col_c, row_weight, col_weight = step
            weights = strip.take(row_weight)[:, None] * state.c[None]
            weights = weights + (col_c * col_weight)[None, :]
            kernel = strip.kernel(state.f, state.g)
            return total + kernel * strip.take(state.r)[:, None] * weights, None

        last = strip.take(end.r * last_weight)[:, None] * end.c[None]
        return jax.lax.scan(add, kernel * last, sweep)[0]

    def correction(strip, kernel):
        return with_fallback(
            kernel * dot(strip.take(left), right),
            is_safe,
            lambda: step_by_step(strip, kernel),
        )

    return correction
