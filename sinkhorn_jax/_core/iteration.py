"""The Sinkhorn iteration on one matrix, in either domain, with its history.

Entry k of a history is the state after k full iterations: `r[k]` and `c[k]`, where
`r[k]` is the row step on `c[k]`. With finish="columns" the result is (r[k - 1], c[k]).
Where column steps go a part of the way, `c[k]` is that part of `full_c[k]`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._runtime.shard_map import varying_like
from .._runtime.vmap import max_in_batch
from .domain import Domain, Linear
from .marginals import Marginals
from .options import Finish, Options
from .precision import in_range


class ScalingHistory(NamedTuple):
    """Scalings after 0, 1, ..., `num_iters` full iterations; then the last repeated."""

    r: Float[Array, "K T"]
    c: Float[Array, "K S"]
    stopped: Int[Array, ""] | None = None  # Where a tolerance stopped the iteration.
    # What the columns need to have their sums; None where `c` is that.
    part_of: Float[Array, "K S"] | None = None

    @property
    def full_c(self) -> Float[Array, "K S"]:
        """The column scalings with which the columns have their sums."""
        return self.c if self.part_of is None else self.part_of

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
        scalings, stopped = self._replace(stopped=None), self.stopped
        if stopped is None:
            return jax.tree.map(lambda x: x[-num_iters - 1 :], scalings)
        start = jnp.maximum(stopped - num_iters, 0)
        kept = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, num_iters + 1), scalings
        )
        return kept._replace(stopped=jnp.minimum(stopped, num_iters))


def iterate(domain: Domain, marginals: Marginals, options: Options) -> ScalingHistory:
    """Iterates from the softmax, as often as the options say."""
    a, b, tau = marginals
    c = domain.start()
    r = domain.row_step(c, a)
    # The start is any part of itself.
    start = ScalingHistory(r, c, part_of=None if tau is None else c)
    if options.tolerance is not None:
        return _iterate_until(domain, start, marginals, options)

    def full_iteration(r, _):
        full = domain.col_step(r, b)
        after = _after_col_step(domain, full, marginals)
        return after.r, after

    _, steps = jax.lax.scan(full_iteration, r, None, length=options.num_iters)
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), start, steps)


def _after_col_step(domain, full, marginals):
    """The state after a column step, all of which would end in `full`."""
    a, _, tau = marginals
    if tau is None:
        return ScalingHistory(domain.row_step(full, a), full)
    c = domain.part_way(full, tau)
    return ScalingHistory(domain.row_step(c, a), c, part_of=full)


def _iterate_until(domain, start, marginals, options):
    """The history of iterations until the tolerance is met, at most `num_iters`.

    All matrices that `vmap` maps over iterate until the last is done, and one that is
    done repeats its state. So they write to the same place of their histories.
    """
    limit, finish = options.num_iters, options.finish
    a, b, _ = marginals
    # The next column step also tells the column sums of the state before it, so testing
    # them costs nothing. Rows are exact until a result ends on columns.
    following = domain.col_step(start.r, b)
    error = relative_defect(domain, start.c, following, a, b)
    if finish == "columns":
        error = jnp.full_like(error, jnp.inf)

    def unfinished(state):
        i, is_done, *_ = state
        return (i < limit) & max_in_batch(~is_done)

    def full_iteration(state):
        i, is_done, k, following, history = state
        after = _after_col_step(domain, following, marginals)
        next_c = domain.col_step(after.r, b)
        if finish == "rows":
            error = relative_defect(domain, after.c, next_c, a, b)
        else:
            error = relative_defect(domain, history.r[i], after.r, a, a)
        stays = lambda new, old: jnp.where(is_done, old, new)
        history = jax.tree.map(
            lambda x, new: x.at[i + 1].set(stays(new, x[i])), history, after
        )
        k = stays(i + 1, k)
        # A NaN ends the iteration, as it ends a comparison.
        is_done = is_done | ~(error > options.tolerance)
        return i + 1, is_done, k, stays(next_c, following), history

    zero = jnp.int32(0)
    history = jax.tree.map(
        lambda x: jnp.zeros((limit + 1, *x.shape), x.dtype).at[0].set(x), start
    )
    init = zero, ~(error > options.tolerance), zero, following, history
    init = varying_like(init, init)
    i, _, k, _, history = jax.lax.while_loop(unfinished, full_iteration, init)
    # In log space the plan of the last r and of zeros as the next c could overflow, and
    # an infinity times a weight of 0 is NaN. The last state repeated has a finite plan.
    ran = jnp.arange(limit + 1, dtype=jnp.int32)[:, None] <= i
    history = jax.tree.map(lambda x: jnp.where(ran, x, x[i][None]), history)
    return history._replace(stopped=k)


def marginal_error(
    domain: Domain, history: ScalingHistory, marginals: Marginals, finish: Finish
) -> Float[Array, ""]:
    """Total absolute defect of the marginal that is not exact, relative to sum(a)."""
    (a, b, _), k = marginals, history.num_iters
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
    domain: Linear, history: ScalingHistory, marginals: Marginals
) -> Bool[Array, ""]:
    """Whether the linear domain lost nothing; where it did, its plan is silently wrong.

    A kernel entry below `tiny` is lost, and with it up to r_i c_j tiny of the mass
    a_i and b_j. A product r_i E_ij below `tiny` is lost too, from a sum of b_j / c_j.
    Neither may matter in the dtype's precision, at any step.
    """
    a, b, tau = marginals
    r, c = history.r, history.full_c
    tiny, eps = jnp.finfo(r.dtype).tiny, jnp.finfo(r.dtype).eps
    a, b = jnp.where(a == 0, 1, a), jnp.where(b == 0, 1, b)
    positive = jnp.where(domain.rows[None, :], r, 1).min(axis=1) >= tiny
    # c[0] may underflow: it only weighs the entries of the softmax, which then do too.
    # So may a part of a column scaling, and then the column has no weight in the plan.
    positive &= (jnp.where(domain.cols[None, :], c, 1).min(axis=1) >= tiny) | (
        jnp.arange(c.shape[0]) == 0
    )
    r_top, r_relative = r.max(axis=1), (r / a[None, :]).max(axis=1)
    c_top, c_relative = c.max(axis=1), (c / b[None, :]).max(axis=1)
    # The rows meet the parts.
    part_top = c_top if tau is None else history.c.max(axis=1)
    part_relative = c_relative if tau is None else (history.c / b[None, :]).max(axis=1)

    def harmless(row, col):
        lost = jnp.maximum(row, 1) * jnp.maximum(col, 1) * tiny
        return lost <= eps / 8

    ok = positive & harmless(r_relative, part_top) & harmless(r_top, part_relative)
    # Between two full iterations the new columns meet the old rows.
    between = harmless(r_relative[:-1], c_top[1:]) & harmless(
        r_top[:-1], c_relative[1:]
    )
    return ok.all() & between.all()
