"""The backward pass of one head: seeds, reverse sweep, cotangents of the operands.

The equations are those of docs/architecture.md. The plans of the half steps share the
kernel matrix E = exp(Z + f + g) of the potentials of iteration k - 1:

    row step k - 1:    diag(r) E diag(c)            row_weight
    column step k:     diag(r) E diag(col_c)        col_weight

where col_c is what the column step found. One pass computes E and undoes both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.marginals import Marginals
from ..._core.precision import dot
from ..._runtime.collectives import among_parts, own_part, total
from ..._runtime.shard_map import varying_like
from ..._runtime.vmap import with_fallback
from .._heads import HeadCotangents
from .forward import PlanFactors
from .query_blocks import QueryBlocks, over_row_marginal


class _Sweep(NamedTuple):
    """Weights and plans of the K column steps and of the row steps before them."""

    before: PlanFactors  # After row step k - 1, that is, before column step k.
    col_c: Float[Array, "K S"]  # The column step's scaling, relative to before.g.
    row_weight: Float[Array, "K T"]
    col_weight: Float[Array, "K S"]


def backward(
    blocks: QueryBlocks,
    query_t: Float[Array, "H T"],  # With scale.
    value_t: Float[Array, "D S"],
    do_t: Float[Array, "D T"],  # The cotangent of the output.
    df: Float[Array, " T"],  # The seed of docs/architecture.md (6).
    history: PlanFactors,  # From `forward`.
) -> tuple[HeadCotangents, Array | None]:
    """Cotangents of a head, and of its bias."""
    heads = blocks.heads
    ends_on_rows = heads.problem.options.finish == "rows"
    end = jax.tree.map(lambda x: x[-1], history)
    last_weight = jnp.zeros_like(df)
    if ends_on_rows:
        last_weight = over_row_marginal(df, blocks.row_marginal)
    rows, cols = end.r != 0, end.full_c != 0
    dv_t, dg = _seeds(blocks, end, value_t, do_t, last_weight)
    dg, num_rows = heads.over_devices(dg, rows)
    marginals = heads.marginals(blocks.head, rows, cols, num_rows)
    if ends_on_rows:
        dg, df = _with_total(dg, 0, marginals.b), jnp.zeros_like(df)
    sweep, dtau = _reverse_sweep(blocks, history, df, dg, marginals)
    dq, dk_t, dbias = _logits_pass(
        blocks, query_t, value_t, do_t, end, last_weight, sweep
    )
    da = last_weight + sweep.row_weight.sum(axis=0)
    given = heads.given_marginals(Marginals(da, sweep.col_weight.sum(axis=0), dtau))
    return HeadCotangents(dq, dk_t, dv_t, given), dbias


def _seeds(blocks, end, value_t, do_t, last_weight):
    """Cotangents of the values and, with the last row step undone, of the last g.

    The latter are sums over the rows of this device.
    """
    low, axis = blocks.heads.low, blocks.heads.problem.token_axis

    def add_part(blocks, dv_t, sums):
        def body(block, carry):
            dv_t, sums = carry
            kernel, keep = block.kernel(end.f, end.g), block.keep()
            kept = kernel if keep is None else kernel * keep
            part = dot(low(block.take_fresh(do_t * end.r[None])), low(kept))
            weight = block.take(last_weight * end.r)
            return block.add(dv_t, part), block.add_rows(sums, weight, kernel)

        return blocks.fold(body, (dv_t, sums))

    init = jnp.zeros_like(value_t), jnp.zeros_like(end.c)
    dv_t, sums = blocks.around(add_part, *init)
    dv_t = dv_t * own_part(axis, end.c, 0)[None]
    dg = among_parts(axis, (value_t * dv_t).sum(axis=0))
    return dv_t, dg - sums * end.c


def _reverse_sweep(blocks, history, df, dg, marginals):
    """Weights and plans of all kept iterations, by docs/architecture.md (4), (5).

    Then the cotangent of tau, None without one.
    """
    before = jax.tree.map(lambda x: x[:-1], history)
    after = jax.tree.map(lambda x: x[1:], history)
    # Where the potentials absorbed the scalings, c alone is not the whole step.
    col_c = after.full_c * jnp.exp(after.g - before.g)
    _, b, tau = marginals
    cols, axis = b != 0, blocks.heads.problem.token_axis
    # Of the cotangents of g after undoing an iteration. It is 0 for all but the first
    # of those that end on columns.
    total_dg = jnp.zeros((), df.dtype)
    if tau is not None:
        total_dg = tau * dg.sum() - total(axis, df.sum())

    def undo_full_iteration(carry, step, is_first=False):
        df, dg, total_dg = carry
        state, col_c = step
        full_dg = dg if tau is None else tau * dg
        col_weight = jnp.where(cols, full_dg / jnp.where(cols, b, 1), 0)
        dtau = None
        if tau is not None:
            dtau = jnp.vdot(dg, state.g + jnp.log(jnp.where(cols, col_c, 1)))

        def body(block, carry):
            row_weight, sums = carry
            kernel, r = block.kernel(state.f, state.g), block.take(state.r)
            moved = dot(kernel, block.see(col_c * col_weight))
            weight = block.take(df) - r * moved
            weight = over_row_marginal(weight, block.row_marginal)
            sums = block.add_rows(sums, weight * r, kernel)
            return block.put(row_weight, weight), sums

        row_weight, sums = blocks.fold(body, (jnp.zeros_like(df), jnp.zeros_like(dg)))
        # The cotangents from outside reach only the potentials of the result, and
        # nothing depends on g before the first iteration.
        if not is_first:
            dg = _with_total(-total(axis, sums) * state.c, total_dg, b)
        total_dg = total_dg if tau is None else tau * total_dg
        return (jnp.zeros_like(df), dg, total_dg), (row_weight, col_weight, dtau)

    init, steps = (df, dg, total_dg), (before, col_c)
    if axis is None or len(col_c) == 0:
        _, found = jax.lax.scan(undo_full_iteration, init, steps, reverse=True)
    else:  # A second copy of the loop's body spares a message.
        first = jax.tree.map(lambda x: x[0], steps)
        later = jax.tree.map(lambda x: x[1:], steps)
        init = varying_like(init, dg)
        carry, found = jax.lax.scan(undo_full_iteration, init, later, reverse=True)
        _, found_first = undo_full_iteration(carry, first, is_first=True)
        join = lambda x, y: jnp.concatenate([x[None], y])
        found = jax.tree.map(join, found_first, found)
    *weights, dtau = found
    dtau = None if dtau is None else dtau.sum()
    return _Sweep(before, col_c, *weights), dtau


def _with_total(dg, total_dg, b):
    """Cotangents of g whose total is what it is without rounding.

    A number added to f and taken off g changes no plan. No step of the sweep would make
    the error smaller, so it would add up over the iterations.
    """
    sum_b = b.sum()
    return dg - b * ((dg.sum() - total_dg) / jnp.where(sum_b == 0, 1, sum_b))


def _logits_pass(blocks, query_t, value_t, do_t, end, last_weight, sweep):
    """Cotangents of queries, keys and bias, from the logits cotangent of each block."""
    heads = blocks.heads
    low = heads.low
    # Row step 0 has g_0 = 0, but its state has a g that was absorbed for the next step:
    # its plan exp(Z + f_0) r_0 is no scaling of E, and is subtracted separately.
    options = heads.problem.options
    has_softmax = 0 < options.num_iters == len(sweep.col_weight)
    softmax_weight = sweep.row_weight[0] * sweep.before.r[0] if has_softmax else None
    if has_softmax:
        sweep = sweep._replace(row_weight=sweep.row_weight.at[0].set(0))
    own_c = own_part(heads.problem.token_axis, end.c, 0)
    left, right_t = (do_t * end.r[None]).T, low(value_t * own_c[None])

    def add_part(blocks, travelling, carry):
        right_t, dk_t = travelling
        part = end._replace(g=blocks.see(end.g), c=blocks.see(end.c))
        correction = _correction(blocks, part, last_weight, sweep)

        def body(block, carry):
            dq, dk_t, dbias = carry
            kernel, keep = block.kernel(part.f, part.g), block.keep()
            dplan = dot(low(block.take(left)), block.see(right_t))
            dz = kernel * (dplan if keep is None else dplan * keep)
            dz = dz - correction(block, kernel)
            if has_softmax:
                softmax = block.kernel(sweep.before.f[0], jnp.zeros_like(part.g))
                dz = dz - softmax * block.take(softmax_weight)[:, None]
            dq = block.put_sum(dq, dot(low(dz), block.key))
            dk_t = block.add(dk_t, dot(low(block.take_fresh(query_t)), low(dz)))
            return dq, dk_t, block.add_to_bias(dbias, dz)

        dq, dk_t, dbias = blocks.fold(body, (carry[0], dk_t, carry[1]))
        return (right_t, dk_t), (dq, dbias)

    size, num_keys = query_t.shape[0], value_t.shape[1]
    shapes = (heads.problem.t, size), (size, num_keys), heads.bias_shape
    dq, dk_t, dbias = (x if x is None else jnp.zeros(x, heads.dtype) for x in shapes)
    travelling, carry = blocks.around(add_part, (right_t, dk_t), (dq, dbias))
    return carry[0], travelling[1], carry[1]


def _correction(blocks, end, last_weight, sweep):
    """A function of a block and its kernel matrix that returns the correction there."""
    before = sweep.before
    before = before._replace(g=blocks.see(before.g), c=blocks.see(before.c))
    col_c, col_weight = blocks.see(sweep.col_c), blocks.see(sweep.col_weight)
    sweep = _Sweep(before, col_c, sweep.row_weight, col_weight)
    # Factors A and B of the correction, (8) for the iteration of the result.
    rho = before.r * jnp.exp(before.f - end.f[None])
    shift = jnp.exp(before.g - end.g[None])
    # Row step k - 1 and column step k, which nearly cancel, next to each other, and the
    # larger terms last: their rounding errors would be left of the smaller ones.
    left = _in_turns(rho * sweep.row_weight, rho), (end.r * last_weight)[None]
    right = _in_turns(before.c * shift, col_c * shift * col_weight)
    right = right, end.c[None]
    left, right = jnp.concatenate(left).T, jnp.concatenate(right)  # [T, K'], [K', S]
    # An entry of the result's kernel matrix below the least number is lost, and may not
    # be small in the plan of an earlier iteration.
    limits = jnp.finfo(end.r.dtype)
    gamma = shift * jnp.maximum(before.c, col_c)
    top = [jnp.max(x, initial=1) for x in (rho, gamma)]
    is_safe = top[0] * top[1] * limits.tiny <= limits.eps / 8

    def step_by_step(block, kernel):
        def add(total, step):
            state, col_c, row_weight, col_weight = step
            weights = block.take(row_weight)[:, None] * block.see(state.c)[None]
            weights = weights + block.see(col_c * col_weight)[None, :]
            kernel = block.kernel(state.f, state.g)
            return total + kernel * block.take(state.r)[:, None] * weights, None

        last = block.take(end.r * last_weight)[:, None] * block.see(end.c)[None]
        return jax.lax.scan(add, kernel * last, sweep)[0]

    def correction(block, kernel):
        low_rank = kernel * dot(block.take(left), block.see(right))
        return with_fallback(low_rank, is_safe, lambda: step_by_step(block, kernel))

    return correction


def _in_turns(rows, cols):
    return jnp.stack([rows, cols], axis=1).reshape(-1, rows.shape[1])
