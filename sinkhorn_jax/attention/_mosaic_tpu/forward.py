"""Forward TPU kernel of Sinkhorn attention.

With E the kernel matrix of `Head` and c the column scaling, a full iteration is

    r = 1 / (E c)      sums = r^T E      next c = b / sums

and the plan is diag(r) E diag(c). E is kept while c is near 1. Before c drifts out of
range the base of E absorbs it, and E is computed again; as the marginals are uniform,
no step after the first changes a scaling by more than a factor max(T, S).

The first column step is special: under the row maxima of the softmax a column may
vanish as a whole. Its sums are accumulated under running column maxima too.
"""

import dataclasses
import functools
from typing import Final

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from ..._runtime.shard_map import kernel_result
from .._pallas_common import reciprocal
from .._problem import Problem
from .blocks import LANES, Blocks
from .head import Head, Ref, col_sums, product, row_sums
from .passes import Grid, Phase, run

# Natural logarithm. Entries of the kernel matrix below the least float32, exp(-87), are
# lost. With scalings between exp(-20) and exp(20) their sum is far below the eps of
# float32, relative to the sums that they are missing from.
MAX_DRIFT: Final = 20.0


@dataclasses.dataclass(frozen=True)
class _Passes:
    """What the passes of the forward kernel do with query block i of a head."""

    head: Head
    valid: Bool[Array, "1 S"]
    total: Float[Array, "1 S"]  # Number of valid rows.
    col_marginal: Float[Array, "1 S"]
    value_ref: Ref  # [1, D, S]
    out_ref: Ref  # [1, rows held, D]
    error_ref: Ref  # [1, 1, LANES]; None unless the marginal error is asked for.
    bases_ref: Ref  # [1, L, S] after every column step; None without iterations.
    scalings_ref: Ref  # [1, L, S]; likewise.
    sums_ref: Ref  # [1, S]
    top_ref: Ref  # [1, S]
    is_stale_ref: Ref  # [1] in SMEM: whether E must be computed again for a new base.

    def softmax(self, i, _):
        @pl.when(i == 0)
        def clear():
            lowest = jnp.finfo(jnp.float32).min
            self.top_ref[...] = jnp.full_like(self.top_ref, lowest)
            self.sums_ref[...] = jnp.zeros_like(self.sums_ref)

        z = self.head.logits(i)
        total = row_sums(jnp.exp(z))
        x = z - jnp.log(jnp.where(total == 0, 1.0, total))
        top = jnp.maximum(self.top_ref[...], jnp.max(x, axis=0, keepdims=True))
        moved = self.sums_ref[...] * jnp.exp(self.top_ref[...] - top)
        self.sums_ref[...] = moved + col_sums(jnp.exp(x - top))
        self.top_ref[...] = top

    def first_col_step(self, _):
        sums = jnp.where(self.valid, self.sums_ref[...], 1.0)
        log_marginal = jnp.log(jnp.where(self.valid, self.col_marginal, 1.0))
        base = log_marginal - jnp.log(sums) - self.top_ref[...]
        self.bases_ref[0, 0:1, :] = jnp.where(self.valid, base, 0.0)
        self.scalings_ref[0, 0:1, :] = self.valid.astype(jnp.float32)
        self.is_stale_ref[0] = 1

    def iterate(self, i, k):
        self._clear_sums(i)
        base = self.bases_ref[0, pl.ds(k - 1, 1), :]
        c = self.scalings_ref[0, pl.ds(k - 1, 1), :]
        kernel = self.head.kernel(i, base, self.is_stale_ref[0] == 0)
        r = reciprocal(row_sums(kernel * c))
        self.sums_ref[...] += col_sums(kernel * r)

    def col_step(self, k):
        base = self.bases_ref[0, pl.ds(k - 1, 1), :]
        c = self.col_marginal * reciprocal(self.sums_ref[...])
        log_c = jnp.log(jnp.where(self.valid, c, 1.0))
        is_far = jnp.max(jnp.abs(log_c)) > MAX_DRIFT
        self.bases_ref[0, pl.ds(k, 1), :] = jnp.where(is_far, base + log_c, base)
        c = jnp.where(is_far, self.valid.astype(jnp.float32), c)
        self.scalings_ref[0, pl.ds(k, 1), :] = c
        self.is_stale_ref[0] = is_far.astype(jnp.int32)

    def apply(self, i, _):
        if num_iters := self.head.problem.options.num_iters:
            base = self.bases_ref[0, num_iters - 1 :, :]
            c = self.scalings_ref[0, num_iters - 1 :]
            kernel = self.head.kernel(i, base, self.is_stale_ref[0] == 0) * c
        else:
            kernel = jnp.exp(self.head.logits(i))
        r = reciprocal(row_sums(kernel))
        out = product(kernel.astype(self.value_ref.dtype), self.value_ref[0], (1, 1))
        self.out_ref[0, self.head.rows(i), :] = (r * out).astype(self.out_ref.dtype)
        if self.error_ref is not None:
            self._clear_sums(i)
            self.sums_ref[...] += col_sums(kernel * r)

    def marginal_error(self, _):
        if self.error_ref is not None:
            sums = self.sums_ref[...]
            lack = jnp.abs(sums - jnp.where(self.valid, self.col_marginal, 0.0))
            error = row_sums(lack) / jnp.maximum(self.total[:, :1], 1.0)
            self.error_ref[0] = jnp.broadcast_to(error, (1, LANES))

    def _clear_sums(self, i):
        @pl.when(i == 0)
        def clear():
            self.sums_ref[...] = jnp.zeros_like(self.sums_ref)


def _forward_kernel(*refs: Ref, problem: Problem, blocks: Blocks):
    # In SMEM: num_rows, num_cols [B]. query [1, rows held, H], key [1, H, S]; results
    # that are not asked for are (); kernel [rows held, S]; other shapes as in
    # `_Passes`. For the rows held see `Blocks.held_rows`.
    num_rows_ref, num_cols_ref, query_ref, key_ref, value_ref, out_ref, *rest = refs
    error_refs, history_refs, kernel_ref, *scratch = rest
    lengths = num_rows_ref, num_cols_ref
    head = Head.of(problem, blocks, *lengths, query_ref, key_ref, kernel_ref)
    valid = head.valid_cols()
    total = head.row_of(head.num_rows)
    col_marginal = total / head.row_of(jnp.maximum(head.num_cols, 1))
    (error_ref,), history_refs = error_refs or (None,), history_refs or (None, None)
    refs = value_ref, out_ref, error_ref, *history_refs, *scratch
    passes = _Passes(head, valid, total, col_marginal, *refs)
    num_iters = problem.options.num_iters
    run(
        blocks,
        Phase(0, min(1, num_iters), passes.softmax, passes.first_col_step),
        Phase(1, num_iters, passes.iterate, passes.col_step),
        Phase(num_iters, num_iters + 1, passes.apply, passes.marginal_error),
    )


def forward(problem: Problem, blocks: Blocks, num_rows, num_cols, query, key, value):
    """Output, marginal error and history of all heads.

    `num_rows` and `num_cols` are [B], query [BN, T, H], key [BK, H, S], value [BK, D,
    S], with T and S padded to the blocks. The output is [BN, T, D]. The error is
    ([BN, 1, LANES],), or () if it is not asked for. The history is the bases and the
    scalings after each iteration, each [BN, L, S], or () without iterations.
    """
    heads, t, h = query.shape
    d, s = value.shape[1:]
    num_iters = problem.options.num_iters
    grid = Grid(blocks, heads, num_iters + 1)
    num_errors, num_histories = int(problem.return_marginal_error), 2 * (num_iters > 0)
    result = lambda *shape: kernel_result(query, (heads, *shape), jnp.float32)
    return pl.pallas_call(
        functools.partial(_forward_kernel, problem=problem, blocks=blocks),
        out_shape=(
            kernel_result(query, (heads, t, d), problem.dtype),
            num_errors * (result(1, LANES),),
            num_histories * (result(num_iters, s),),
        ),
        grid=grid.sizes,
        in_specs=[
            *2 * [pl.BlockSpec(memory_space=pltpu.SMEM)],
            grid.rows_spec(h),
            grid.head_spec(h, s, groups=problem.groups),
            grid.head_spec(d, s, groups=problem.groups),
        ],
        out_specs=(
            grid.rows_spec(d, is_result=True),
            num_errors * (grid.head_spec(1, LANES),),
            num_histories * (grid.head_spec(num_iters, s),),
        ),
        scratch_shapes=[
            pltpu.VMEM((blocks.held_rows, s), jnp.float32),
            *2 * [pltpu.VMEM((1, s), jnp.float32)],
            pltpu.SMEM((1,), jnp.int32),
        ],
        compiler_params=grid.compiler_params(problem, "forward"),
        name="sinkhorn_attention_forward",
    )(num_rows, num_cols, query, key, value)
