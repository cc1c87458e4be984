"""The Sinkhorn iteration on one matrix, in either domain, with its history.

Entry k of a history is the state after k full iterations: `r[k]` and `c[k]`, where
`r[k]` is the row step on `c[k]`. With finish="columns" the result is (r[k - 1], c[k]).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._runtime.shard_map import varying_like
from .._runtime.vmap import max_in_batch
from .domain import Domain, Linear
from .options import Finish, Options
from .precision import in_range


class ScalingHistory(NamedTuple):
    """Scalings after 0, 1, ..., `num_iters` full iterations; then the last repeated."""

    r: Float[Array, "K T"]
    c: Float[Array, "K S"]
    stopped: Int[Array, ""] | None = None  # Where a tolerance stopped the iteration.

    @property
    def num_iters(self) -> int | Array:
        """Full iterations that ran; a Python int unless a tolerance decided it."""
        return self.r.shape[0] - 1 if self.stopped is None else self.stopped

    def end(self, finish: Finish):
        """The scalings of the result."""
        k = self.num_iters
        return self.r[k if finish == "rows" else k - 1], self.c[k]

    def tail(self, num_iters: int) -> "ScalingHistory":
        """The last `num_iters` full iterations and the state before them."""
        if num_iters >= self.r.shape[0] - 1:
            return self
        if self.stopped is None:
            return ScalingHistory(self.r[-num_iters - 1 :], self.c[-num_iters - 1 :])
        start = jnp.maximum(self.stopped - num_iters, 0)
        r, c = (
            jax.lax.dynamic_slice_in_dim(x, start, num_iters + 1)
            for x in (self.r, self.c)
        )
        return ScalingHistory(r, c, jnp.minimum(self.stopped, num_iters))


def iterate(domain: Domain, a, b, options: Options) -> ScalingHistory:
    """Iterates from the softmax, as often as the options say."""
    start = domain.start()
    first = domain.row_step(start, a)
    if options.tolerance is not None:
        return _iterate_until(domain, start, first, a, b, options)

    def full_iteration(r, _):
        c = domain.col_step(r, b)
        r = domain.row_step(c, a)
        return r, (r, c)

    _, (r, c) = jax.lax.scan(full_iteration, first, None, length=options.num_iters)
    return ScalingHistory(
        jnp.concatenate([first[None], r]), jnp.concatenate([start[None], c])
    )


def _iterate_until(domain, start, first, a, b, options):
    """The history of iterations until the tolerance is met, at most `num_iters`.

    All matrices that `vmap` maps over iterate until the last is done, and one that is
    done repeats its state. So they write to the same place of their histories.
    """
    limit, finish = options.num_iters, options.finish
    # The next column step also tells the column sums of the state before it, so testing
    # them costs nothing. Rows are exact until a result ends on columns.
    following = domain.col_step(first, b)
    error = relative_defect(domain, start, following, a, b)
    if finish == "columns":
        error = jnp.full_like(error, jnp.inf)

    def unfinished(state):
        i, is_done, *_ = state
        return (i < limit) & max_in_batch(~is_done)

    def full_iteration(state):
        i, is_done, k, following, r, c = state
        c_k = following
        r_k = domain.row_step(c_k, a)
        next_c = domain.col_step(r_k, b)
        if finish == "rows":
            error = relative_defect(domain, c_k, next_c, a, b)
        else:
            error = relative_defect(domain, r[i], r_k, a, a)
        stays = lambda new, old: jnp.where(is_done, old, new)
        r = r.at[i + 1].set(stays(r_k, r[i]))
        c = c.at[i + 1].set(stays(c_k, c[i]))
        k = stays(i + 1, k)
        # A NaN ends the iteration, as it ends a comparison.
        is_done = is_done | ~(error > options.tolerance)
        return i + 1, is_done, k, stays(next_c, following), r, c

    zero = jnp.int32(0)
    r, c = (
        jnp.zeros((limit + 1, *x.shape), x.dtype).at[0].set(x) for x in (first, start)
    )
    init = zero, ~(error > options.tolerance), zero, following, r, c
    init = varying_like(init, init)
    i, _, k, _, r, c = jax.lax.while_loop(unfinished, full_iteration, init)
    # In log space the plan of the last r and of zeros as the next c could overflow, and
    # an infinity times a weight of 0 is NaN. The last state repeated has a finite plan.
    ran = jnp.arange(limit + 1, dtype=jnp.int32)[:, None] <= i
    r, c = jnp.where(ran, r, r[i][None]), jnp.where(ran, c, c[i][None])
    return ScalingHistory(r, c, k)


def marginal_error(domain: Domain, history: ScalingHistory, a, b, finish: Finish):
    """Total absolute defect of the marginal that is not exact, relative to sum(a)."""
    k = history.num_iters
    if finish == "rows":
        after = domain.col_step(history.r[k], b)
        return relative_defect(domain, history.c[k], after, a, b)
    return relative_defect(domain, history.r[k - 1], history.r[k], a, a)


def relative_defect(domain: Domain, scaling, after, a, target):
    """Total absolute defect of the sums, from the step that would make them `target`.

    The step multiplies a scaling by target / sum, so sum = target * scaling / after.
    """
    scale = in_range(a.max())
    total = (a * scale).sum()
    defect = target * scale * jnp.abs(domain.ratio(scaling, after) - 1)
    return defect.sum() / jnp.where(total == 0, 1, total)


def is_representable(
    domain: Linear, history: ScalingHistory, a: Array, b: Array
) -> Bool[Array, ""]:
    """Whether the linear domain lost nothing; where it did, its plan is silently wrong.

    A kernel entry below `tiny` is lost, and with it up to r_i c_j tiny of the mass
    a_i and b_j. A product r_i E_ij below `tiny` is lost too, from a sum of b_j / c_j.
    Neither may matter in the dtype's precision, at any step.
    """
    r, c = history.r, history.c
    tiny, eps = jnp.finfo(r.dtype).tiny, jnp.finfo(r.dtype).eps
    a, b = jnp.where(a == 0, 1, a), jnp.where(b == 0, 1, b)
    positive = jnp.where(domain.rows[None, :], r, 1).min(axis=1) >= tiny
    # c[0] may underflow: it only weighs the entries of the softmax, which then do too.
    positive &= (jnp.where(domain.cols[None, :], c, 1).min(axis=1) >= tiny) | (
        jnp.arange(c.shape[0]) == 0
    )
    r_top, r_relative = r.max(axis=1), (r / a[None, :]).max(axis=1)
    c_top, c_relative = c.max(axis=1), (c / b[None, :]).max(axis=1)

    def harmless(row, col):
        lost = jnp.maximum(row, 1) * jnp.maximum(col, 1) * tiny
        return lost <= eps / 8

    ok = positive & harmless(r_relative, c_top) & harmless(r_top, c_relative)
    # Between two full iterations the new columns meet the old rows.
    between = harmless(r_relative[:-1], c_top[1:]) & harmless(
        r_top[:-1], c_relative[1:]
    )
    return ok.all() & between.all()
