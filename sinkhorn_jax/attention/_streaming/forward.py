"""The passes over one head that iterate, and that apply the plan."""

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.gradient import kept_iterations
from ..._core.precision import dot
from ..._runtime.vmap import with_fallback
from .._problem import uniform_marginals
from .query_blocks import QueryBlocks

# Natural logarithms. Entries below the least float32, exp(-87), are lost. They may be a
# noticeable part of the sum of a column whose largest entry is below exp(HIDDEN).
HIDDEN: Final = -40.0
# Beyond exp(MAX_DRIFT) the potentials absorb the scalings. One more step makes these
# max(T, S) times larger at most, so r c exp(-87) is far below the eps of float32, and
# the entries that are lost do not matter.
MAX_DRIFT: Final = 20.0


class PlanFactors(NamedTuple):
    """The plan diag(r) exp(Z + f + g) diag(c), with zeros for padding.

    A leading axis K is the plans of K states of the iteration.
    """

    f: Float[Array, "*K T"]
    g: Float[Array, "*K S"]
    r: Float[Array, "*K T"]
    c: Float[Array, "*K S"]

    def absorb(self) -> "PlanFactors":
        """The same plan; f and g absorb r and c if these are far from 1.

        What large potentials round off stays in r and c, which are then not quite 1.
        """
        log_r, log_c = (jnp.log(jnp.where(x == 0, 1, x)) for x in (self.r, self.c))
        drift = jnp.maximum(jnp.abs(log_r).max(), jnp.abs(log_c).max())
        f, rest_of_r = _add_exactly(self.f, log_r)
        g, rest_of_c = _add_exactly(self.g, log_c)
        r = jnp.where(self.r == 0, 0, jnp.exp(rest_of_r))
        c = jnp.where(self.c == 0, 0, jnp.exp(rest_of_c))
        absorbed = PlanFactors(f, g, r, c)
        choose = lambda x, y: jnp.where(drift > MAX_DRIFT, x, y)
        return jax.tree.map(choose, absorbed, self)


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
    start, a, b, out, sums = _softmax(blocks, value)
    if options.num_iters == 0:
        error = _marginal_error(sums, b, a) if problem.return_marginal_error else None
        return (out, error), _stack(start)

    def iterate(state, _):
        r, sums = _full_pass(blocks, state)
        done = state._replace(r=r)
        return done._replace(c=_divide(b, sums)).absorb(), done

    last, states = jax.lax.scan(iterate, start, None, length=options.num_iters - 1)
    out, r, row_sums, col_sums = _apply(blocks, last, value)
    if not problem.return_marginal_error:
        error = None
    elif options.finish == "rows":
        error = _marginal_error(last.c * col_sums, b, a)
    else:
        error = _marginal_error(last.r * row_sums, a, a)
    end = last._replace(r=r)
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
    is_result = heads.problem.options.num_iters == 0
    lowest = jnp.finfo(dtype).min

    def first_pass(block, carry):
        m, r, top, sums, out = carry
        logits = block.logits()
        m_i = jnp.maximum(logits.max(axis=1), lowest)
        shifted = logits - m_i[:, None]
        kernel = jnp.exp(shifted)
        r_i = _divide(1, kernel.sum(axis=1))
        top = jnp.maximum(top, shifted.max(axis=0))
        sums = sums + block.sum_rows(r_i, kernel)
        if is_result:
            out = block.put(out, block.apply(r_i, kernel, value))
        return block.put(m, m_i), block.put(r, r_i), top, sums, out

    zeros = lambda *shape: jnp.zeros(shape, dtype)
    top = jnp.full(s, -jnp.inf, dtype)
    init = zeros(t), zeros(t), top, zeros(s), zeros(t, value.shape[1])
    m, r, top, sums, out = blocks.fold(first_pass, init)
    rows, cols = r != 0, top != -jnp.inf
    a, b = uniform_marginals(rows, cols, dtype)
    # Without log r in f, logits + f is exact.
    f = jnp.where(rows, -m, 0)
    start = PlanFactors(f, jnp.zeros_like(b), r, cols.astype(dtype))
    if is_result:
        return start, a, b, out, sums
    top = jnp.where(cols, top, 0)

    def under_column_maxima():
        def again(block, sums):
            return sums + block.sum_rows(block.take(r), block.kernel(-m, -top))

        return blocks.fold(again, jnp.zeros_like(sums)), top

    sums, shift = with_fallback(
        (sums, jnp.zeros_like(top)), (top >= HIDDEN).all(), under_column_maxima
    )
    log_c = jnp.log(jnp.where(cols, b, 1)) - jnp.log(jnp.where(cols, sums, 1))
    g, rest = _add_exactly(jnp.where(cols, -shift, 0), log_c)
    c = jnp.where(cols, jnp.exp(rest), 0)
    return start._replace(g=jnp.where(cols, g, 0), c=c), a, b, out, sums


def _full_pass(blocks, state):
    """The next row scaling r, and the column sums of diag(r) E."""

    def body(block, carry):
        r, sums = carry
        kernel = block.kernel(state.f, state.g)
        r_i = _divide(1, dot(kernel, state.c))
        return block.put(r, r_i), sums + block.sum_rows(r_i, kernel)

    return blocks.fold(body, (jnp.zeros_like(state.r), jnp.zeros_like(state.c)))


def _apply(blocks, state, value):
    """Output, row scaling, and the sums E c and r^T E for the marginal error."""
    problem = blocks.heads.problem
    ends_on_rows = problem.options.finish == "rows"
    value = state.c[:, None] * value

    def body(block, carry):
        out, r, row_sums, col_sums = carry
        kernel = block.kernel(state.f, state.g)
        row_sums_i = dot(kernel, state.c)
        if ends_on_rows:
            r = block.put(r, _divide(1, row_sums_i))
        out = block.put(out, block.apply(block.take(r), kernel, value))
        if problem.return_marginal_error:
            row_sums = block.put(row_sums, row_sums_i)
            col_sums = col_sums + block.sum_rows(block.take(r), kernel)
        return out, r, row_sums, col_sums

    out = jnp.zeros((problem.t, value.shape[1]), value.dtype)
    row_sums, col_sums = jnp.zeros_like(state.r), jnp.zeros_like(state.c)
    return blocks.fold(body, (out, state.r, row_sums, col_sums))


def _add_exactly(potential, log_scaling):
    """Their sum, and what is lost from the scaling to the rounding of a large sum."""
    total = potential + log_scaling
    return total, log_scaling - (total - potential)


def _marginal_error(sums, target, a):
    total = a.sum()
    return jnp.abs(sums - target).sum() / jnp.where(total == 0, 1, total)


def _divide(x, y):
    """The quotient; 0 for padding, where y is 0.

    No other sum is 0: y is a sum of the plan without one of its scalings, and
    `MAX_DRIFT` keeps these in range.
    """
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _stack(state):
    return jax.tree.map(lambda x: x[None], state)
