"""The passes over one head that iterate, and that apply the plan."""

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.gradient import kept_iterations
from ..._core.marginals import Marginals
from ..._core.precision import dot
from ..._runtime.collectives import largest, total
from ..._runtime.vmap import with_fallback
from .query_blocks import QueryBlocks

# Natural logarithms. Entries below the least float32, exp(-87), are lost. They may be a
# noticeable part of the sum of a column whose largest entry is below exp(HIDDEN).
HIDDEN: Final = -40.0
# Beyond exp(MAX_DRIFT) the potentials absorb the scalings. One more step makes these
# max(T, S) times larger at most, so r c exp(-87) is far below the eps of float32, and
# the entries that are lost do not matter. For marginals that are not uniform, the
# factor is the spread, the total over the least of them, and what is lost must be small
# beside the least: spread^3 exp(2 drift - 87) < eps / 8, which is about exp(-18).
MAX_DRIFT: Final = 20.0


class PlanFactors(NamedTuple):
    """The plan diag(r) exp(Z + f + g) diag(c), with zeros for padding.

    A leading axis K is the plans of K states of the iteration. With a tau, g is near
    the whole column potential h, exp(h) = full_c exp(g), of which c exp(g) is
    exp(tau h). Then c underflows where a column has no weight, and full_c does not.
    """

    f: Float[Array, "*K T"]
    g: Float[Array, "*K S"]
    r: Float[Array, "*K T"]
    c: Float[Array, "*K S"]
    part_of: Float[Array, "*K S"] | None = None  # `full_c`; None where `c` is that.

    @property
    def full_c(self) -> Float[Array, "*K S"]:
        """The column scaling with which the columns have their sums."""
        return self.c if self.part_of is None else self.part_of

    def after_col_step(self, full_c, marginals: Marginals, max_drift) -> "PlanFactors":
        """The state after a column step, all of which would end in `full_c`.

        f absorbs r, and g full_c, if it is far from 1.
        """
        f, r = _absorb(self.f, self.r, max_drift)
        g, c = _absorb(self.g, full_c, max_drift)
        return PlanFactors(f, g, r, c).part_way(marginals.tau)

    def part_way(self, tau) -> "PlanFactors":
        """The state with the part `tau` of the column potential; None is all of it."""
        if tau is None:
            return self
        log_c = jnp.log(jnp.where(self.c == 0, 1, self.c))
        part = jnp.exp((tau - 1) * self.g + tau * log_c)
        return self._replace(c=jnp.where(self.c == 0, 0, part), part_of=self.c)


def forward(
    blocks: QueryBlocks, value: Float[Array, "S D"]
) -> tuple[tuple[Float[Array, "T D"], Float[Array, ""] | None], PlanFactors]:
    """(Output, marginal error on request), and the history for the backward pass.

    The history is the plan after each of the iterations that are differentiated and
    before the first of them. With finish="columns" the last one has the row scaling of
    its predecessor, like the result. If the history begins with the
    softmax, its plan is diag(r) exp(Z + f), although its g is that of column step 1.
    """
    problem = blocks.heads.problem
    options = problem.options
    start, marginals, out, sums = _softmax(blocks, value)
    a, b, _ = marginals
    axis, error = problem.token_axis, None
    if options.num_iters == 0:
        if problem.return_marginal_error:
            error = _over_total(jnp.abs(sums - b).sum(), total(axis, a.sum()))
        return (out, error), _stack(start)

    max_drift = _max_drift(blocks, marginals)

    def iterate(state, _):
        r, sums = _full_pass(blocks, state)
        done = state._replace(r=r)
        return done.after_col_step(_divide(b, sums), marginals, max_drift), done

    last, states = jax.lax.scan(iterate, start, None, length=options.num_iters - 1)
    out, r, row_sums, col_sums = _apply(blocks, last, value)
    end = last._replace(r=r)
    if problem.return_marginal_error:
        if options.finish == "rows":
            difference = jnp.abs(last.c * col_sums - b).sum()
        else:
            difference = total(axis, jnp.abs(last.r * row_sums - a).sum())
        error = _over_total(difference, total(axis, a.sum()))
    kept = kept_iterations(options.gradient, options.num_iters)
    history = jax.tree.map(
        lambda *x: jnp.concatenate(x)[-kept - 1 :], _stack(start), states, _stack(end)
    )
    return (out, error), history


def _softmax(blocks, value):
    """The softmax, its marginals, and its output and column sums if it is the result.

    Under the row maxima a column can vanish as a whole. Where one may have vanished,
    the sums are computed again under the column maxima too.
    """
    heads = blocks.heads
    t, s, dtype = heads.problem.t, heads.problem.s, heads.dtype
    axis = heads.problem.token_axis
    is_result = heads.problem.options.num_iters == 0
    has_values = is_result and axis is None
    lowest = jnp.finfo(dtype).min

    def first_pass(block, carry):
        m, r, top, sums, out = carry
        logits = block.logits()
        m_i = jnp.maximum(logits.max(axis=1), lowest)
        shifted = logits - m_i[:, None]
        kernel = jnp.exp(shifted)
        r_i = _row_scaling(block, kernel.sum(axis=1))
        top = block.add(top, shifted.max(axis=0), combine=jnp.maximum)
        sums = block.add_rows(sums, r_i, kernel)
        if has_values:
            out = block.put(out, block.apply(r_i, kernel, value))
        return block.put(m, m_i), block.put(r, r_i), top, sums, out

    zeros = lambda *shape: jnp.zeros(shape, dtype)
    top = jnp.full(s, -jnp.inf, dtype)
    init = zeros(t), zeros(t), top, zeros(s), zeros(t, value.shape[1])
    m, r, top, sums, out = blocks.fold(first_pass, init)
    top = largest(axis, top)
    rows, cols = r != 0, top != -jnp.inf
    # Without log r in f, logits + f is exact.
    f = jnp.where(rows, -m, 0)
    start = PlanFactors(f, jnp.zeros_like(sums), r, cols.astype(dtype))
    top = jnp.where(cols, top, 0)

    def under_column_maxima():
        def again(block, sums):
            return block.add_rows(sums, block.take(r), block.kernel(-m, -top))

        return blocks.fold(again, jnp.zeros_like(sums)), top

    shift = jnp.zeros_like(top)
    if not is_result:
        none_hidden = (top >= HIDDEN).all()
        sums, shift = with_fallback((sums, shift), none_hidden, under_column_maxima)
    sums, num_rows = heads.over_devices(sums, rows)
    marginals = heads.marginals(blocks.head, rows, cols, num_rows)
    if is_result:
        if not has_values:
            out, *_ = _apply(blocks, start, value)
        return start, marginals, out, sums
    b = marginals.b
    log_c = jnp.log(jnp.where(cols, b, 1)) - jnp.log(jnp.where(cols, sums, 1))
    g, rest = _add_exactly(jnp.where(cols, -shift, 0), log_c)
    c = jnp.where(cols, jnp.exp(rest), 0)
    start = start._replace(g=jnp.where(cols, g, 0), c=c)
    return start.part_way(marginals.tau), marginals, out, sums


def _full_pass(blocks, state):
    """The next row scaling r, and the column sums of diag(r) E."""

    def body(block, carry):
        r, sums = carry
        kernel = block.kernel(state.f, state.g)
        r_i = _row_scaling(block, dot(kernel, block.see(state.c)))
        return block.put(r, r_i), block.add_rows(sums, r_i, kernel)

    init = jnp.zeros_like(state.r), jnp.zeros_like(state.c)
    r, sums = blocks.fold(body, init)
    return r, total(blocks.heads.problem.token_axis, sums)


def _apply(blocks, state, value):
    """Output, row scaling, and the sums E c and r^T E for the marginal error."""
    problem = blocks.heads.problem
    ends_on_rows = problem.options.finish == "rows"
    if problem.token_axis is not None:
        return _apply_to_parts(blocks, state, value)
    value = state.c[:, None] * value

    def body(block, carry):
        out, r, row_sums, col_sums = carry
        kernel = block.kernel(state.f, state.g)
        row_sums_i = dot(kernel, block.see(state.c))
        if ends_on_rows:
            r = block.put(r, _row_scaling(block, row_sums_i))
        out = block.put(out, block.apply(block.take(r), kernel, value))
        if problem.return_marginal_error:
            row_sums = block.put(row_sums, row_sums_i)
            col_sums = block.add_rows(col_sums, block.take(r), kernel)
        return out, r, row_sums, col_sums

    out = jnp.zeros((problem.t, value.shape[1]), value.dtype)
    row_sums, col_sums = jnp.zeros_like(state.r), jnp.zeros_like(state.c)
    return blocks.fold(body, (out, state.r, row_sums, col_sums))


def _apply_to_parts(blocks, state, value):
    """The results of `_apply` where devices have parts of the values."""
    problem = blocks.heads.problem

    def add_part(blocks, value, carry):
        def body(block, carry):
            out, row_sums = carry
            kernel, c = block.kernel(state.f, state.g), block.see(state.c)
            out = block.put_sum(out, block.apply_unscaled(kernel, c[:, None] * value))
            return out, block.put_sum(row_sums, dot(kernel, c))

        return value, blocks.fold(body, carry)

    init = jnp.zeros((problem.t, value.shape[1]), value.dtype), jnp.zeros_like(state.r)
    _, (out, row_sums) = blocks.around(add_part, value, init)
    r, col_sums = state.r, jnp.zeros_like(state.c)
    if problem.options.finish == "rows":
        r = _row_scaling(blocks, row_sums)
        if problem.return_marginal_error and problem.options.num_iters > 0:
            _, col_sums = _full_pass(blocks, state)
    return r[:, None] * out, r, row_sums, col_sums


def _row_scaling(rows, sums):
    """What the sums of a query block, or of all, must be multiplied by to be `a`."""
    a = rows.row_marginal
    return _divide(1 if a is None else a, sums)


def _max_drift(blocks, marginals):
    if blocks.row_marginal is None:
        return MAX_DRIFT
    a, b, _ = marginals
    axis = blocks.heads.problem.token_axis
    most = jnp.maximum(total(axis, a.sum()), b.sum())
    least = [jnp.where(x == 0, most, x).min() for x in (a, b)]
    least = -largest(axis, -jnp.minimum(*least))
    log_spread = jnp.log(most) - jnp.log(least)
    limit = (-18.0 + 87.0 - 3 * log_spread) / 2
    return jnp.clip(limit, 0, MAX_DRIFT)


def _add_exactly(potential, log_scaling):
    """Their sum, and what is lost from the scaling to the rounding of a large sum."""
    moved = potential + log_scaling
    return moved, log_scaling - (moved - potential)


def _absorb(potential, scaling, max_drift):
    """The potential and the scaling, which the former absorbs if it is far from 1.

    What a large potential rounds off stays in the scaling, which is then not quite 1.
    """
    log_scaling = jnp.log(jnp.where(scaling == 0, 1, scaling))
    absorbed, rest = _add_exactly(potential, log_scaling)
    rest = jnp.where(scaling == 0, 0, jnp.exp(rest))
    is_far = jnp.abs(log_scaling).max() > max_drift
    return jnp.where(is_far, absorbed, potential), jnp.where(is_far, rest, scaling)


def _over_total(difference, mass):
    return difference / jnp.where(mass == 0, 1, mass)


def _divide(x, y):
    """The quotient; 0 for padding, where y is 0.

    No other sum is 0: y is a sum of the plan without one of its scalings, and
    `MAX_DRIFT` keeps these in range.
    """
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _stack(state):
    return jax.tree.map(lambda x: x[None], state)
