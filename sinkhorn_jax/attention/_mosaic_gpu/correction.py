"""The correction of the logits cotangent (docs/architecture.md (7), (8)) in groups.

Each half step takes its plan times its weight off the logits cotangent. Iterations of a
refresh group share the kernel matrix E = exp(Z + f_base + g_base). With r_k = exp(f_k -
f_base), c_k = exp(g_k - g_base) and a = 1, the half steps near it take off

    row step k           E * (r_k lambda_k) c_k^T
    column step k + 1    E * r_k (c_{k+1} mu_{k+1} / b)^T

so that a group costs one exponential for each entry, and a half step one multiply-add.
Row step 0 has a kernel matrix of its own, because g_0 = 0 may be far from all g that
follow.

What float32 lost of E is less than 1e-8 of a sum, or of the largest weight
(`refresh_groups`). No r_k, no c_k and no product of two is above 1e30. Weights may take
their sums out of range if they are above 1e6 themselves, in units of the largest
cotangent of the output times the largest value.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._problem import Problem
from .refresh_groups import refresh_groups, terms_per_matrix
from .tiles import kernel_of, less_outer, zero_tile
from .types import (
    CorrectionTerms,
    PaddedOperands,
    PotentialCotangents,
    PotentialHistory,
)


def base_potentials(history: PotentialHistory, base: int) -> tuple[Array, Array]:
    """Potentials of the kernel matrix of iteration `base`; g_1 instead of g_0."""
    return history.f[base], history.g[max(base, 1)]


def potential_ratio(
    x: Float[Array, "... I"], base: Float[Array, "... I"], valid: Bool[Array, "... I"]
) -> Float[Array, "... I"]:
    """exp(x - base), and 0 for padding, where both are -inf."""
    return jnp.where(valid, jnp.exp(jnp.where(valid, x - base, 0)), 0)


def correction_terms(
    problem: Problem,
    operands: PaddedOperands,
    history: PotentialHistory,
    cotangents: PotentialCotangents,
) -> CorrectionTerms:
    """The kernel matrices and outer products of all half steps."""
    num_iters = problem.options.num_iters
    rows, cols = operands.rows[None], operands.cols[None]
    fs, gs, left, right = [], [], [], []
    for base, first, last in refresh_groups(problem):
        base_f, base_g = base_potentials(history, base)
        col_steps = slice(first, min(last, num_iters - 1) + 1)
        next_g = history.g[first + 1 : col_steps.stop + 1]
        row_steps = slice(max(first, 1), last + 1)
        row_f, row_g = (x[row_steps] for x in history)
        fs, gs = [*fs, base_f], [*gs, base_g]
        left += [
            potential_ratio(history.f[col_steps], base_f[None], rows),
            potential_ratio(row_f, base_f[None], rows) * cotangents.f[row_steps],
        ]
        right += [
            potential_ratio(next_g, base_g[None], cols) * cotangents.g[col_steps],
            potential_ratio(row_g, base_g[None], cols),
        ]
    left, right = [*left, cotangents.f[:1]], [*right, cols.astype(jnp.float32)]
    result = CorrectionTerms(
        jnp.stack([*fs, history.f[0]]),
        jnp.stack([*gs, history.g[0]]),
        jnp.concatenate(left),
        jnp.concatenate(right),
    )
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), result)


def logits_cotangent(
    problem: Problem,
    products: Float[Array, "I J"],
    dplan: Float[Array, "I J"],
    potentials: Callable[[int], tuple[Float[Array, " I"], Float[Array, " J"]]],
    term: Callable[[Int[Array, ""]], tuple[Float[Array, " I"], Float[Array, " J"]]],
    use_plan: Callable[[Float[Array, "I J"]], None],
) -> Float[Array, "I J"]:
    """A tile of dZ, in a kernel, from the same tile of Q K^T and of dP.

    Both may be transposed. `potentials(m)` are f and g of kernel matrix m, and
    `term(k)` the left and right factors of term k. `use_plan` is called with the plan,
    before the registers are needed for more.
    """

    def kernel(m):
        return kernel_of(products, *potentials(m), problem.scale)

    def less_terms(x, first, count):
        first, last = jnp.int32(first), jnp.int32(first + count)
        return jax.lax.fori_loop(first, last, lambda k, x: less_outer(x, *term(k)), x)

    plan = kernel(0)
    use_plan(plan)
    first, *counts = terms_per_matrix(problem)
    dz = plan * less_terms(dplan, 0, first)
    for m, count in enumerate(counts, start=1):
        # The sum of terms comes first: it needs as many registers as a kernel matrix.
        terms = less_terms(zero_tile(), first, count)
        dz, first = dz + kernel(m) * terms, first + count
    return dz
