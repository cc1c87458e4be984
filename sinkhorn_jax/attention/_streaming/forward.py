"""The passes of `_streaming` that iterate on one head and apply its plan."""

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.gradient import kept_iterations
from ..._core.precision import dot
from ..._runtime.vmap import with_fallback
from .._problem import uniform_marginals
from .strips import Strips

# Natural logarithms. Entries below the least float32, exp(-87), are lost: in a column
# whose largest one is below exp(HIDDEN) they may be a share of the sum.
HIDDEN: Final = -40.0
# Beyond exp(MAX_DRIFT) scalings are taken up into the potentials. One more step makes
# them max(T, S) times larger at most, so that r c exp(-87) stays far below the eps of
# float32, and nothing that is lost matters.
MAX_DRIFT: Final = 20.0


class State(NamedTuple):
    """The plan exp(logits + f + g) r c; zeros for padding. A leading axis: of many."""

    f: Float[Array, "*K T"]
    g: Float[Array, "*K S"]
    r: Float[Array, "*K T"]
    c: Float[Array, "*K S"]


def forward(
    strips: Strips, value: Float[Array, "S D"]
) -> tuple[Float[Array, "T D"], Float[Array, ""] | None, State]:
    """Output, marginal error on request, and the states that the gradient needs.

    Those are the states after so many full iterations; with finish="columns" the last
    one has the row scaling of the one before, as the result. The first one is the
    softmax, exp(logits + f) r, and its g is already that of the column step after it.
    """
    problem = strips.heads.problem
    options = problem.options
    start, a, b, out, sums = _softmax(strips, value)
    if options.num_iters == 0:
        error = _defect(sums, b, a) if problem.return_marginal_error else None
        return out, error, _stack(start)

    def iterate(state, _):
        r, sums = _full_pass(strips, state)
        done = state._replace(r=r)
        return _taken_up(done._replace(c=_divide(b, sums))), done

    last, states = jax.lax.scan(iterate, start, None, length=options.num_iters - 1)
    out, r, row_sums, col_sums = _apply(strips, last, value)
    if not problem.return_marginal_error:
        error = None
    elif options.finish == "rows":
        error = _defect(last.c * col_sums, b, a)
    else:
        error = _defect(last.r * row_sums, a, a)
    history = jax.tree.map(
        lambda *x: jnp.concatenate(x),
        _stack(start),
        states,
        _stack(last._replace(r=r)),
    )
    kept = kept_iterations(options.gradient, options.num_iters)
    return out, error, jax.tree.map(lambda x: x[-kept - 1 :], history)


def _softmax(strips, value):
    """State before the first iteration, marginals; output and sums if it is the result.

    Under the row maxima a column can vanish as a whole. That is noticed, and its sum is
    made again under the column maxima too.
    """
    heads = strips.heads
    t, s, dtype = heads.problem.t, heads.problem.s, heads.dtype
    is_result = heads.problem.options.num_iters == 0
    lowest = jnp.finfo(dtype).min

    def first_pass(strip, carry):
        m, r, top, sums, out = carry
        logits = strip.logits()
        m_i = jnp.maximum(logits.max(axis=1), lowest)
        shifted = logits - m_i[:, None]
        kernel = jnp.exp(shifted)
        r_i = _divide(1, kernel.sum(axis=1))
        top = jnp.maximum(top, shifted.max(axis=0))
        sums = sums + strip.sum_rows(r_i, kernel)
        if is_result:
            out = strip.put(out, strip.apply(r_i, kernel, value))
        return strip.put(m, m_i), strip.put(r, r_i), top, sums, out

    zeros = jnp.zeros(t, dtype)
    out = jnp.zeros((t, value.shape[1]), dtype)
    top = jnp.full(s, -jnp.inf, dtype)
    m, r, top, sums, out = strips.fold(
        first_pass, (zeros, zeros, top, jnp.zeros(s, dtype), out)
    )
    rows, cols = r != 0, top != -jnp.inf
    a, b = uniform_marginals(rows, cols, dtype)
    # The maxima alone, for logits + f to be exact; with log r in it f is rounded.
    f = jnp.where(rows, -m, 0)
    start = State(f, jnp.zeros_like(b), r, cols.astype(dtype))
    if is_result:
        return start, a, b, out, sums
    top = jnp.where(cols, top, 0)

    def under_column_maxima():
        def again(strip, sums):
            return sums + strip.sum_rows(strip.take(r), strip.kernel(-m, -top))

        return strips.fold(again, jnp.zeros_like(sums)), top

    sums, shift = with_fallback(
        (sums, jnp.zeros_like(top)), (top >= HIDDEN).all(), under_column_maxima
    )
    g = jnp.log(jnp.where(cols, b, 1)) - jnp.log(jnp.where(cols, sums, 1)) - shift
    return start._replace(g=jnp.where(cols, g, 0)), a, b, out, sums


def _full_pass(strips, state):
    """The row scaling that follows, and the column sums without c under it."""

    def body(strip, carry):
        r, sums = carry
        kernel = strip.kernel(state.f, state.g)
        r_i = _divide(1, dot(kernel, state.c))
        return strip.put(r, r_i), sums + strip.sum_rows(r_i, kernel)

    return strips.fold(body, (jnp.zeros_like(state.r), jnp.zeros_like(state.c)))


def _apply(strips, state, value):
    """Output, its row scaling, and the sums that the marginal error needs.

    Like `_full_pass`, but the sums are made only if asked for.
    """
    problem = strips.heads.problem
    ends_on_rows = problem.options.finish == "rows"
    value = state.c[:, None] * value

    def body(strip, carry):
        out, r, row_sums, col_sums = carry
        kernel = strip.kernel(state.f, state.g)
        row_sums_i = dot(kernel, state.c)
        if ends_on_rows:
            r = strip.put(r, _divide(1, row_sums_i))
        out = strip.put(out, strip.apply(strip.take(r), kernel, value))
        if problem.return_marginal_error:
            row_sums = strip.put(row_sums, row_sums_i)
            col_sums = col_sums + strip.sum_rows(strip.take(r), kernel)
        return out, r, row_sums, col_sums

    out = jnp.zeros((problem.t, value.shape[1]), value.dtype)
    return strips.fold(
        body, (out, state.r, jnp.zeros_like(state.r), jnp.zeros_like(state.c))
    )


def _taken_up(state):
    """The same plan, its scalings in the potentials if they are far from 1."""
    r, c = (jnp.where(x == 0, 1, x) for x in (state.r, state.c))
    log_r, log_c = jnp.log(r), jnp.log(c)
    drift = jnp.maximum(jnp.abs(log_r).max(), jnp.abs(log_c).max())
    far = State(
        state.f + log_r,
        state.g + log_c,
        (state.r != 0).astype(r.dtype),
        (state.c != 0).astype(c.dtype),
    )
    return jax.tree.map(lambda x, y: jnp.where(drift > MAX_DRIFT, x, y), far, state)


def _defect(sums, target, a):
    total = a.sum()
    return jnp.abs(sums - target).sum() / jnp.where(total == 0, 1, total)


def _divide(x, y):
    """Quotient; 0 for padding, where y is.

    It is 0 nowhere else: a sum is that of a plan with one scaling left out, and
    `MAX_DRIFT` keeps those in range.
    """
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _stack(state):
    return jax.tree.map(lambda x: x[None], state)
