"""Backward TPU kernel of Sinkhorn attention: the exact gradient, in closed form.

The equations are those of docs/architecture.md. With E_k the kernel matrix of the
potentials after iteration k, the plans of the half steps are

    row step k:         diag(r_k) E_k diag(c_k)
    column step k + 1:  diag(r_k) E_k diag(c'_{k+1})

where c' is the column step's scaling relative to the base of E_k. The first pass
computes the seeds (6). A pass for each k from L - 1 to 1 undoes column step k + 1 and
row step k. The last pass computes the logits cotangent (7) from E_L and two further
exponentials, for row step 0 and column step 1, whose plans are far from the others.

While the base is the same for all k >= 1, one E serves all iterations, and the other
half steps are one correction (8) of rank 2 (L - 1). Otherwise the last pass computes
every E_k again.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from ..._runtime.shard_map import kernel_result, varying_like
from .._pallas_common import reciprocal
from .._problem import Problem
from .blocks import LANES, Blocks, correction_rank, groups_in_lanes
from .correction import Correction
from .head import Head, Ref, col_sums, product, row_sums
from .passes import Grid, Phase, run


@dataclasses.dataclass(frozen=True)
class _Passes:
    """What the passes of the backward kernel do with query block i of a head."""

    head: Head
    correction: Correction  # Its references are None with fewer than 2 iterations.
    shares_base: Bool[Array, ""]
    inverse_col_marginal: Float[Array, "1 S"]  # 1 / b.
    value_ref: Ref  # [1, D, S]
    dout_ref: Ref  # [1, rows held, D]
    bases_ref: Ref  # [1, L, S], None without iterations.
    scalings_ref: Ref  # [1, L, S]; likewise.
    dq_ref: Ref  # [1, rows held, H]
    dk_out_ref: Ref  # [BN, H, S] in HBM.
    dv_out_ref: Ref  # [BN, D, S] in HBM.
    dk_ref: Ref  # [H, S]
    dv_ref: Ref  # [D, S]
    dz_ref: Ref  # [I, S]
    dcols_ref: Ref  # [1, S]: the cotangent of the column potential.
    sums_ref: Ref  # [1, S]

    @property
    def _num_iters(self):
        return self.head.problem.options.num_iters

    def _base(self, k):
        return self.bases_ref[0, pl.ds(k - 1, 1), :]

    def _scaling(self, k):
        return self.scalings_ref[0, pl.ds(k - 1, 1), :]

    def _dplan(self, i):
        dout = self.dout_ref[0, self.head.rows(i), :]
        return product(dout, self.value_ref[0], (1, 0))

    def seed(self, i, _):
        num_iters = self._num_iters

        @pl.when(i == 0)
        def clear():
            self.sums_ref[...] = jnp.zeros_like(self.sums_ref)
            if num_iters > 1:
                self.correction.clear()

        kernel = self.head.kernel(i, self._base(num_iters), False)
        kernel = kernel * self._scaling(num_iters)
        plan = kernel * reciprocal(row_sums(kernel))
        moved = plan * self._dplan(i)
        # The last row step is undone here too.
        self.sums_ref[...] += col_sums(moved - plan * row_sums(moved))

    def end_seed(self, _):
        self.dcols_ref[...] = self.sums_ref[...]

    def undo(self, i, j):
        """Undoes column step k + 1 and row step k, with k = L - j."""
        k = self._num_iters - j
        half, right_ref = self.correction.half, self.correction.right_ref

        @pl.when(i == 0)
        def set_right():
            self.sums_ref[...] = jnp.zeros_like(self.sums_ref)
            # Where the base absorbed the scaling, c alone is not the whole step.
            moved = jnp.exp(self._base(k + 1) - self._base(k)) * self._scaling(k + 1)
            moved = moved * self.dcols_ref[...] * self.inverse_col_marginal
            right_ref[pl.ds(k - 1, 1), :] = moved
            right_ref[pl.ds(half + k - 1, 1), :] = self._scaling(k)

        kernel = self.head.kernel(i, self._base(k), self.shares_base)
        r = reciprocal(row_sums(kernel * self._scaling(k)))
        row_weight = -r * row_sums(kernel * right_ref[pl.ds(k - 1, 1), :])
        self.sums_ref[...] += col_sums(kernel * (r * row_weight))
        self.correction.put(i, k, r, row_weight)

    def end_undo(self, j):
        self.dcols_ref[...] = -self.sums_ref[...] * self._scaling(self._num_iters - j)

    def cotangents(self, i, _):
        """Adds up dK and dV, and writes dQ."""
        num_iters, head = self._num_iters, self.head

        @pl.when(i == 0)
        def clear():
            self.dk_ref[...] = jnp.zeros_like(self.dk_ref)
            self.dv_ref[...] = jnp.zeros_like(self.dv_ref)

        query = head.query_ref[0, head.rows(i), :]
        dout = self.dout_ref[0, head.rows(i), :]
        z = head.logits(i)
        if num_iters:
            kernel = head.kernel(i, self._base(num_iters), self.shares_base, z)
            plan = kernel * self._scaling(num_iters)
        else:
            plan = jnp.exp(z)
        plan = plan * reciprocal(row_sums(plan))
        moved = plan * self._dplan(i)
        self.dz_ref[...] = moved - plan * row_sums(moved)
        self.dv_ref[...] += product(dout, plan.astype(dout.dtype), (0, 0))
        if num_iters:
            self._correct_first_steps(z)
        if num_iters > 1:
            step_by_step = functools.partial(self._correct_step_by_step, i)
            pl.when(self.shares_base)(functools.partial(self._correct, i))
            pl.when(jnp.logical_not(self.shares_base))(step_by_step)
        scale = jnp.float32(head.problem.scale)
        dz = (self.dz_ref[...] * scale).astype(query.dtype)
        self.dq_ref[0, head.rows(i), :] = product(dz, head.key_ref[0], (1, 1))
        self.dk_ref[...] += product(query, dz, (0, 0))

    def end_cotangents(self, _):
        n = pl.program_id(0)
        pltpu.sync_copy(self.dk_ref, self.dk_out_ref.at[n])
        pltpu.sync_copy(self.dv_ref, self.dv_out_ref.at[n])

    def _correct_first_steps(self, z):
        """Subtracts the terms of row step 0 and column step 1 from dZ."""
        first = jnp.exp(z)
        r = reciprocal(row_sums(first))
        # The plan after column step 1, times its weight; no entry exceeds b.
        second = r * jnp.exp(z + self._base(1))
        second = second * (self.dcols_ref[...] * self.inverse_col_marginal)
        self.dz_ref[...] -= second - (first * r) * row_sums(second)

    def _correct(self, i):
        """Subtracts the terms of the other steps from dZ, as one low-rank product."""
        left, right_ref = self.correction.left(i), self.correction.right_ref
        kernel = self.head.kernel_ref[self.head.rows(i), :]
        self.dz_ref[...] -= kernel * product(left, right_ref[...], (1, 0))

    def _correct_step_by_step(self, i):
        """Subtracts the same terms, with the kernel matrix of each iteration."""

        def add(k, carry):
            kernel = self.head.kernel(i, self._base(k), False)
            right = self.correction.right_ref[pl.ds(k - 1, 1), :]
            plan = kernel * reciprocal(row_sums(kernel * self._scaling(k)))
            step = plan * right
            self.dz_ref[...] -= step - plan * self._scaling(k) * row_sums(step)
            return carry

        jax.lax.fori_loop(jnp.int32(1), jnp.int32(self._num_iters), add, jnp.int32(0))


def _backward_kernel(*refs: Ref, problem: Problem, blocks: Blocks):
    # In SMEM: num_rows, num_cols [B], shares_base [BN]. query [1, rows held, H], key
    # [1, H, S]; kernel [rows held, S]; other shapes as in `_Passes`. Rows held: see
    # `Blocks.held_rows`. dk and dv are in HBM: blocks of results are in VMEM twice.
    num_rows_ref, num_cols_ref, shares_base_ref, query_ref, key_ref, *rest = refs
    value_ref, dout_ref, history_refs, *results, dk_ref, dv_ref, kernel_ref = rest[:9]
    *scratch, factor_refs = rest[9:]
    lengths, num_iters = (num_rows_ref, num_cols_ref), problem.options.num_iters
    head = Head.of(problem, blocks, *lengths, query_ref, key_ref, kernel_ref)
    shares_base = shares_base_ref[pl.program_id(0)] == 1
    num_cols = head.row_of(head.num_cols)
    inverse_col_marginal = num_cols / head.row_of(jnp.maximum(head.num_rows, 1))
    none = None, None  # What no pass uses has no reference.
    correction = Correction(blocks, num_iters - 1, *(factor_refs or none))
    refs = value_ref, dout_ref, *(history_refs or none), *results
    refs = *refs, dk_ref, dv_ref, *scratch
    passes = _Passes(head, correction, shares_base, inverse_col_marginal, *refs)
    run(
        blocks,
        Phase(0, min(1, num_iters), passes.seed, passes.end_seed),
        Phase(1, num_iters, passes.undo, passes.end_undo),
        Phase(num_iters, num_iters + 1, passes.cotangents, passes.end_cotangents),
    )


def backward(
    problem: Problem, blocks: Blocks, num_rows, num_cols, *arrays: Array
) -> tuple[Float[Array, "BN T H"], Float[Array, "BN H S"], Float[Array, "BN D S"]]:
    """Cotangents of query, key and value in float32, for each query head by itself.

    `arrays` are query, key and value as in `forward`, dout like its output, and the
    bases and scalings from it.
    """
    query, key, value, dout, *history = arrays
    heads, t, h = query.shape
    d, s = value.shape[1:]
    num_iters = problem.options.num_iters
    if history:
        bases, _ = history
        shares_base = (bases == bases[:, -1:]).all(axis=(1, 2)).astype(jnp.int32)
    else:
        shares_base = varying_like(jnp.ones(heads, jnp.int32), query)
    grid = Grid(blocks, heads, num_iters + 1)
    # One buffer, not two: fetching ahead would hide little of a whole head's time.
    head_spec = functools.partial(grid.head_spec, buffers=1)
    result = lambda *shape: kernel_result(query, (heads, *shape), jnp.float32)
    vmem = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    rank = correction_rank(num_iters)
    factors = vmem(groups_in_lanes(blocks), rank, LANES), vmem(rank, s)
    return pl.pallas_call(
        functools.partial(_backward_kernel, problem=problem, blocks=blocks),
        out_shape=(result(t, h), result(h, s), result(d, s)),
        grid=grid.sizes,
        in_specs=[
            *3 * [pl.BlockSpec(memory_space=pltpu.SMEM)],
            grid.rows_spec(h),
            head_spec(h, s, groups=problem.groups),
            head_spec(d, s, groups=problem.groups),
            grid.rows_spec(d),
            len(history) * (head_spec(num_iters, s),),
        ],
        out_specs=(
            grid.rows_spec(h, is_result=True),
            *2 * [pl.BlockSpec(memory_space=pl.ANY)],
        ),
        scratch_shapes=[
            *(vmem(h, s), vmem(d, s), vmem(blocks.held_rows, s), vmem(blocks.rows, s)),
            *(vmem(1, s), vmem(1, s), factors if num_iters > 1 else ()),
        ],
        compiler_params=grid.compiler_params(problem, "backward"),
        name="sinkhorn_attention_backward",
    )(num_rows, num_cols, shares_base, query, key, value, dout, tuple(history))
