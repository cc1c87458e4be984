"""Forward TPU kernel of Sinkhorn attention.

With E the kernel matrix of `Head` and c the column scaling, a pass over the strips is

    r = 1 / (E c)      sums = r^T E      next c = b / sums

and the plan is r E c. E stays while c is near 1. Before c drifts out of range the base
of E takes it up, and E is made anew; as the marginals are uniform, no step after the
first changes a scaling by more than a factor max(T, S).

The first column step is special: under the row maxima of the softmax a column may be
lost as a whole. Its sums are accumulated under running column maxima too.
"""

import functools
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..._runtime.shard_map import kernel_result
from .._pallas_common import reciprocal
from .._problem import Problem
from .blocks import LANES, Blocks, vmem_limit
from .head import Head, Ref, col_sums, product, row_sums

# A natural logarithm. Entries below the least float32, exp(-87), are lost from E. With
# scalings between exp(-20) and exp(20) all of them together are far below its eps.
MAX_DRIFT: Final = 20.0


def _forward_kernel(
    num_rows_ref,
    num_cols_ref,
    query_ref,
    key_ref,
    value_ref,
    *rest: Ref,
    problem: Problem,
    blocks: Blocks,
):
    # In SMEM: num_rows, num_cols [B]. query [1, I or T, H], key [1, H, S], value
    # [1, D, S]; results out [1, I or T, D], error [1, 1, LANES], bases and scalings
    # [1, L, S]; scratch: kernel [I or T, S], sums, top [1, S], is_stale [1] in SMEM. I
    # rows of a strip while the grid goes through strips, T padded rows otherwise.
    num_iters, has_error = problem.options.num_iters, problem.return_marginal_error
    # What no pass uses is not there.
    refs: list[Ref] = list(rest)
    bases_ref: Ref
    scalings_ref: Ref
    out_ref = refs.pop(0)
    error_ref: Ref = refs.pop(0) if has_error else None
    bases_ref, scalings_ref = (refs.pop(0), refs.pop(0)) if num_iters else (None, None)
    kernel_ref, sums_ref, top_ref, is_stale_ref = refs
    b = jax.lax.div(pl.program_id(0), jnp.int32(problem.num_heads))
    head = Head(
        problem,
        blocks,
        num_rows_ref[b],
        num_cols_ref[b],
        query_ref,
        key_ref,
        kernel_ref,
    )
    valid = head.valid_cols()
    total = head.row_of(head.num_rows)
    share = total / head.row_of(jnp.maximum(head.num_cols, 1))

    def softmax(i):
        @pl.when(i == 0)
        def _():
            top_ref[...] = jnp.full_like(top_ref, jnp.finfo(jnp.float32).min)
            sums_ref[...] = jnp.zeros_like(sums_ref)

        z = head.logits(i)
        total = row_sums(jnp.exp(z))
        x = z - jnp.log(jnp.where(total == 0, 1.0, total))
        top = jnp.maximum(top_ref[...], jnp.max(x, axis=0, keepdims=True))
        sums_ref[...] = sums_ref[...] * jnp.exp(top_ref[...] - top) + col_sums(
            jnp.exp(x - top)
        )
        top_ref[...] = top

    def first_col_step():
        sums = jnp.where(valid, sums_ref[...], 1.0)
        base = jnp.log(jnp.where(valid, share, 1.0)) - jnp.log(sums) - top_ref[...]
        bases_ref[0, 0:1, :] = jnp.where(valid, base, 0.0)
        scalings_ref[0, 0:1, :] = valid.astype(jnp.float32)
        is_stale_ref[0] = 1

    def iterate(i, k):
        # From the state after k full iterations.
        @pl.when(i == 0)
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)

        base, c = (ref[0, pl.ds(k - 1, 1), :] for ref in (bases_ref, scalings_ref))
        kernel = head.kernel(i, base, is_stale_ref[0] == 0)
        r = reciprocal(row_sums(kernel * c))
        sums_ref[...] += col_sums(kernel * r)

    def col_step(k):
        base = bases_ref[0, pl.ds(k - 1, 1), :]
        c = share * reciprocal(sums_ref[...])
        log_c = jnp.log(jnp.where(valid, c, 1.0))
        is_far = jnp.max(jnp.abs(log_c)) > MAX_DRIFT
        bases_ref[0, pl.ds(k, 1), :] = jnp.where(is_far, base + log_c, base)
        scalings_ref[0, pl.ds(k, 1), :] = jnp.where(
            is_far, valid.astype(jnp.float32), c
        )
        is_stale_ref[0] = is_far.astype(jnp.int32)

    def apply(i):
        if num_iters:
            base, c = bases_ref[0, num_iters - 1 :, :], scalings_ref[0, num_iters - 1 :]
            kernel = head.kernel(i, base, is_stale_ref[0] == 0) * c
        else:
            kernel = jnp.exp(head.logits(i))
        r = reciprocal(row_sums(kernel))
        out = product(kernel.astype(value_ref.dtype), value_ref[0], (1, 1))
        out_ref[0, head.rows(i), :] = (r * out).astype(out_ref.dtype)
        if has_error:

            @pl.when(i == 0)
            def _():
                sums_ref[...] = jnp.zeros_like(sums_ref)

            sums_ref[...] += col_sums(kernel * r)

    def defect():
        if has_error:
            lack = jnp.abs(sums_ref[...] - jnp.where(valid, share, 0.0))
            error = row_sums(lack) / jnp.maximum(total[:, :1], 1.0)
            error_ref[0] = jnp.broadcast_to(error, (1, LANES))

    in_passes(
        blocks,
        [
            (0, min(1, num_iters), lambda i, _: softmax(i), lambda _: first_col_step()),
            (1, num_iters, iterate, col_step),
            (num_iters, num_iters + 1, lambda i, _: apply(i), lambda _: defect()),
        ],
    )


def in_passes(blocks: Blocks, phases: Sequence[tuple[int, int, Any, Any]]) -> None:
    """Run passes over all strips: inside the kernel, or one strip of one in its turn.

    Args:
        blocks: Gives the strips, and which of the two.
        phases: First pass and the one after the last, what a pass does with strip and
            pass, and what it does at its end.
    """
    if not blocks.is_resident:
        k, i = pl.program_id(1), pl.program_id(2)
        for start, stop, strip, end in phases:
            if start < stop:
                is_now = (k >= start) & (k < stop)
                pl.when(is_now)(functools.partial(strip, i, k))
                pl.when(is_now & (i == blocks.num_strips - 1))(
                    functools.partial(end, k)
                )
        return
    # Wider counters, which is what x64 makes of Python's, the TPU does not have.
    zero = jnp.int32(0)
    for start, stop, strip, end in phases:

        def one_pass(k, carry, strip=strip, end=end):
            def one_strip(i, carry):
                strip(i, k)
                return carry

            jax.lax.fori_loop(zero, jnp.int32(blocks.num_strips), one_strip, carry)
            end(k)
            return carry

        if start < stop:
            jax.lax.fori_loop(jnp.int32(start), jnp.int32(stop), one_pass, zero)


def forward(
    problem: Problem,
    blocks: Blocks,
    num_rows: Int[Array, " B"],
    num_cols: Int[Array, " B"],
    query: Float[Array, "BN T H"],
    key: Float[Array, "BK H S"],
    value: Float[Array, "BK D S"],
) -> tuple[
    Float[Array, "BN T D"],
    Float[Array, " BN"] | None,
    Float[Array, "BN L S"] | None,
    Float[Array, "BN L S"] | None,
]:
    """Output, marginal error on request, and the bases and scalings of iterations.

    Lengths are padded to those of the blocks; heads are flattened with the batch.
    """
    heads, t, h = query.shape
    d, s = value.shape[1:]
    num_iters = problem.options.num_iters
    grid, at_head, at_strip = grid_of(blocks, heads, num_iters + 1)
    held = blocks.padded_rows if blocks.is_resident else blocks.rows
    out_shape = [kernel_result(query, (heads, t, d), problem.dtype)]
    out_specs = [pl.BlockSpec((1, held, d), at_strip(last=num_iters))]
    if problem.return_marginal_error:
        out_shape.append(kernel_result(query, (heads, 1, LANES), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, LANES), at_head()))
    for _ in range(2 if num_iters else 0):
        out_shape.append(kernel_result(query, (heads, num_iters, s), jnp.float32))
        out_specs.append(pl.BlockSpec((1, num_iters, s), at_head()))
    groups = problem.num_heads // problem.num_key_heads
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((1, held, h), at_strip()),
        pl.BlockSpec((1, h, s), at_head(groups)),
        pl.BlockSpec((1, d, s), at_head(groups)),
    ]
    results = pl.pallas_call(
        functools.partial(_forward_kernel, problem=problem, blocks=blocks),
        out_shape=out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[
            pltpu.VMEM((held, s), jnp.float32),
            pltpu.VMEM((1, s), jnp.float32),
            pltpu.VMEM((1, s), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            # Heads are independent; passes and strips hand their sums on.
            dimension_semantics=("parallel", "arbitrary", "arbitrary")[: len(grid)],
            vmem_limit_bytes=vmem_limit(problem, blocks, "forward"),
        ),
        cost_estimate=_cost(problem, blocks, heads),
        name="sinkhorn_attention_forward",
    )(num_rows, num_cols, query, key, value)
    out, *rest = results
    error = rest.pop(0)[:, 0, 0] if problem.return_marginal_error else None
    bases, scalings = rest or (None, None)
    return out, error, bases, scalings


def grid_of(blocks: Blocks, heads: int, num_passes: int):
    """The grid, and makers of index maps for what belongs to a head and to a strip."""
    if blocks.is_resident:
        grid = (heads,)
    else:
        grid = (heads, num_passes, blocks.num_strips)

    def at_head(groups=1):
        # Not `//`, whose sign for negative numbers is asked of a TPU at hand.
        return lambda n, *_: (jax.lax.div(n, jnp.int32(groups)), 0, 0)

    def at_strip(last=None):
        if blocks.is_resident:
            return at_head()
        if last is None:
            return lambda n, k, i: (n, i, 0)
        # Written in that pass alone; a block must not be left and visited again.
        return lambda n, k, i: (n, jnp.where(k == last, i, 0), 0)

    return grid, at_head, at_strip


def _cost(problem, blocks, heads):
    entries = heads * blocks.padded_rows * blocks.cols
    num_iters = problem.options.num_iters
    if blocks.is_resident:
        # Of the softmax, and of the matrix that all later passes share.
        products, exps = 1 + (num_iters > 0), 1 + 2 * (num_iters > 0)
    else:
        products, exps = num_iters + 1, num_iters + 1 + (num_iters > 0)
    dims = products * problem.head_dim + problem.value_dim
    itemsize = problem.dtype.itemsize
    query_reads = num_iters + 1 if blocks.moves_strips else 1
    rows = query_reads * problem.head_dim + problem.value_dim
    cols = itemsize * (problem.head_dim + problem.value_dim) + 8 * num_iters
    return pl.CostEstimate(
        flops=2 * entries * dims,
        transcendentals=entries * exps,
        bytes_accessed=heads
        * (itemsize * blocks.padded_rows * rows + blocks.cols * cols),
    )
