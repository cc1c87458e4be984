"""What the half steps of Sinkhorn attention take off the cotangent of its logits.

Each takes off its plan times its weight: row step k the plan of f_k and g_k times the
cotangent of f_k, column step k + 1 that of f_k and g_{k+1} times the cotangent of
g_{k+1} over b. Around an iteration c of the same group, with E = exp(Z + f_c + g_c),

    row step k         E * (u df_k) v^T        u = exp(f_k - f_c), v = exp(g_k - g_c)
    column step k + 1  E * u (v' dg_{k+1} / b)^T            v' = exp(g_{k+1} - g_c)

so that a group takes one exponential of each entry, and one multiply-add for each step.
Row step 0 has a matrix of its own: g_0 = 0 may be far from all that follow.

From column step 1 on a row step takes f up by log S at most and down by log T, because
rows sum to 1 / S at least and to T at most before it, and a column step g up by log T
and down by log S, likewise (`_mosaic_gpu_resident`). So m iterations from c, on either
side, no entry of a plan is above (T S)^m E, or T times that in the column step ahead.
What float32 lost of E then is less than 1e-8 of a sum, or of the largest weight
(`max_period`). No u, no v and no product of two is above 1e30. Weights may take sums of
them out of range if they are above 1e6 themselves, in units of the largest cotangent of
the output times the largest value.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._problem import Problem
from .blocks import groups, num_terms
from .streamed.forward import History, Operands
from .tiles import kernel_of, less_outer, zero_tile


class Cotangents(NamedTuple):
    """Of f_0 to f_L, and of g_1 to g_L over what their columns sum to."""

    f: Float[Array, "K BN T"]
    g: Float[Array, "L BN S"]


class Correction(NamedTuple):
    """Kernel matrices exp(Z + f + g), and outer products that each of them multiplies.

    `num_terms` says how many belong to which. The first matrix is the plan of the
    result.
    """

    f: Float[Array, "BN M T"]
    g: Float[Array, "BN M S"]
    left: Float[Array, "BN R T"]
    right: Float[Array, "BN R S"]

    def transposed(self) -> "Correction":
        """With keys for rows and queries for columns."""
        return Correction(self.g, self.f, self.right, self.left)


def base_of(history: History, base: int) -> tuple[Array, Array]:
    """Potentials of a group's kernel matrix; g_0 is far from those of the steps."""
    return history.f[base], history.g[max(base, 1)]


def moved(
    x: Float[Array, "... I"], base: Float[Array, "... I"], valid: Bool[Array, "... I"]
) -> Float[Array, "... I"]:
    """exp(x - base), and 0 for padding, where both are -inf."""
    return jnp.where(valid, jnp.exp(jnp.where(valid, x - base, 0)), 0)


def correction(
    problem: Problem, operands: Operands, history: History, cotangents: Cotangents
) -> Correction:
    """Of all half steps."""
    num_iters = problem.options.num_iters
    rows, cols = operands.rows[None], operands.cols[None]
    fs, gs, left, right = [], [], [], []
    for base, first, last in groups(problem):
        base_f, base_g = base_of(history, base)
        col_steps = slice(first, min(last, num_iters - 1) + 1)
        next_g = history.g[first + 1 : col_steps.stop + 1]
        row_steps = slice(max(first, 1), last + 1)
        row_f, row_g = (x[row_steps] for x in history)
        fs, gs = [*fs, base_f], [*gs, base_g]
        left += [
            moved(history.f[col_steps], base_f[None], rows),
            moved(row_f, base_f[None], rows) * cotangents.f[row_steps],
        ]
        right += [
            moved(next_g, base_g[None], cols) * cotangents.g[col_steps],
            moved(row_g, base_g[None], cols),
        ]
    left, right = [*left, cotangents.f[:1]], [*right, cols.astype(jnp.float32)]
    result = Correction(
        jnp.stack([*fs, history.f[0]]),
        jnp.stack([*gs, history.g[0]]),
        jnp.concatenate(left),
        jnp.concatenate(right),
    )
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), result)


def dlogits(
    problem: Problem,
    products: Float[Array, "I J"],
    dplan: Float[Array, "I J"],
    potentials: Callable[[int], tuple[Float[Array, " I"], Float[Array, " J"]]],
    term: Callable[[Int[Array, ""]], tuple[Float[Array, " I"], Float[Array, " J"]]],
    take_plan: Callable[[Float[Array, "I J"]], None],
) -> Float[Array, "I J"]:
    """The cotangent of a tile of logits, in a kernel.

    Args:
        problem: Says which terms belong to which kernel matrix.
        products: Of queries and keys.
        dplan: The cotangent of the plan.
        potentials: Of a kernel matrix.
        term: Left and right vector of a term.
        take_plan: Is given the plan on the way, before more is in registers.
    """

    def kernel(i):
        return kernel_of(products, *potentials(i), problem.scale)

    def less_terms(x, first, count):
        first, last = jnp.int32(first), jnp.int32(first + count)
        return jax.lax.fori_loop(first, last, lambda k, x: less_outer(x, *term(k)), x)

    plan = kernel(0)
    take_plan(plan)
    first, *counts = num_terms(problem)
    dz = plan * less_terms(dplan, 0, first)
    for i, count in enumerate(counts, start=1):
        # Before there is another kernel, which takes as many registers as their sum.
        terms = less_terms(zero_tile(products.shape[0]), first, count)
        dz, first = dz + kernel(i) * terms, first + count
    return dz
