"""What the kernels for small matrices share: their limits, bodies and derivative."""

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._core.gradient import Exact
from ..._runtime.shard_map import varying_like
from ..._runtime.vmap import fold_vmap
from .._problem import Potentials, Problem
from . import tile as _tile
from .tile import Cotangents, Tile

# Rows and columns of a matrix. Beyond, one matrix has vectors long enough to work on.
MAX_SIZE: Final = 16

# A reference to memory inside a kernel. Pallas has no public type for one.
Ref = Any


class Kernels(NamedTuple):
    """The two calls of a platform, on a batch of matrices."""

    # (problem, has_plan, logits, a, b) -> (plan,), or f, g and marginal error.
    forward: Callable[..., tuple[Array, ...]]
    # (problem, logits, a, b, dplan or df, dg) -> dlogits, da, db.
    backward: Callable[..., tuple[Array, Array, Array]]


class Memory(NamedTuple):
    """How the kernels of a platform hold a vector over columns.

    `index` and `at` are tuples: what comes before the axis of columns of a reference,
    and where the lanes are after it.
    """

    read: Callable[[Ref, tuple, tuple], _tile.Cols]
    write: Callable[[Ref, tuple, tuple, _tile.Cols], None]
    keeps_dlogits: bool  # In registers while the sweep adds to it.


def why_not(problem: Problem, platform: str) -> str | None:
    """They take small matrices, a fixed number of iterations, the exact gradient."""
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return f"a {platform} kernel takes float32 and bfloat16, got {problem.dtype}"
    if max(problem.t, problem.s) > MAX_SIZE:
        return (
            f"it takes at most {MAX_SIZE} rows and columns, got {problem.t} x "
            f"{problem.s}"
        )
    if problem.options.tolerance is not None:
        return f"it takes no tolerance, got {problem.options.tolerance}"
    if not isinstance(problem.options.gradient, Exact):
        return f"it takes gradient=Exact(), got {problem.options.gradient}"
    return None


def plan(
    kernels: Kernels,
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> Float[Array, "M T S"]:
    """The plan of every matrix of a batch."""
    operands = varying_like((logits, a, b), (logits, a, b))
    out: Any = _solve(kernels, problem, True, *operands)
    return out[0]


def potentials(
    kernels: Kernels,
    problem: Problem,
    logits: Float[Array, "M T S"],
    a: Float[Array, "M T"],
    b: Float[Array, "M S"],
) -> Potentials:
    """The potentials of every matrix of a batch."""
    operands = varying_like((logits, a, b), (logits, a, b))
    out: Any = _solve(kernels, problem, False, *operands)
    f, g, error = out
    num_iters = jnp.full(error.shape, problem.options.num_iters, jnp.int32)
    return Potentials(f, g, error, num_iters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve(kernels, problem, has_plan, logits, a, b):
    return _solve_fwd(kernels, problem, has_plan, logits, a, b)[0]


def _solve_fwd(kernels, problem, has_plan, logits, a, b):
    forward = functools.partial(kernels.forward, problem, has_plan)
    return fold_vmap(forward, logits, a, b), (logits, a, b)


def _solve_bwd(kernels, problem, has_plan, residuals, cotangents):
    if not has_plan:
        cotangents = cotangents[:2]  # The marginal error is not differentiated.
    backward = functools.partial(kernels.backward, problem)
    return fold_vmap(backward, *residuals, *cotangents)


_solve.defvjp(_solve_fwd, _solve_bwd)


def solve_tile(
    memory: Memory, problem: Problem, operand_refs, out_refs, at: tuple
) -> None:
    """Forward, for the matrices in the lanes `at`.

    Args:
        memory: That of the platform.
        problem: Gives the options.
        operand_refs: Logits [T, S, lanes], a [T, lanes] and b [S, lanes].
        out_refs: The plan, like the logits; or f, like a, g, like b, error [lanes].
        at: Where.
    """
    options = problem.options
    tile = _load(memory, operand_refs, at)
    f, g, plan = _tile.solve(tile, options.num_iters, options.finish)
    if len(out_refs) == 1:
        _write_matrix(memory, out_refs[0], at, plan)
        return
    f_ref, g_ref, error_ref = out_refs
    f, g = tile.potentials(f, g)
    _write_rows(f_ref, at, f)
    memory.write(g_ref, (), at, g)
    error_ref[at] = _tile.marginal_error(tile, plan, options.finish)


class History(NamedTuple):
    """Column potentials for the sweep back.

    Those before each of the K iterations of one segment, and those before each of N
    segments, from which they are made again.
    """

    steps_ref: Ref  # [K, S, lanes]
    starts_ref: Ref | None  # [N, S, lanes]; None for a single segment.
    starts_at: tuple  # Where the lanes of `starts_ref` are.


def pull_back_tile(
    memory: Memory,
    problem: Problem,
    operand_refs,
    cotangent_refs,
    out_refs,
    history: History,
    at: tuple,
) -> None:
    """Backward, for the matrices in the lanes `at`.

    Args:
        memory: That of the platform.
        problem: Gives the options.
        operand_refs: As in `solve_tile`.
        cotangent_refs: Of the plan, like the logits; or of f, like a, and g, like b.
        out_refs: dlogits, da and db, like the operands.
        history: Scratch.
        at: Where.
    """
    num_iters, finish = problem.options.num_iters, problem.options.finish
    length = history.steps_ref.shape[0]
    num_segments = 1 if history.starts_ref is None else history.starts_ref.shape[0]
    dlogits_ref, da_ref, db_ref = out_refs
    tile = _load(memory, operand_refs, at)

    def keep_and_iterate(num_steps, g):
        def step(k, g):
            memory.write(history.steps_ref, (k,), (), g)
            return tile.col_step(tile.row_step(g))

        return _tile.loop(num_steps, step, g)

    def steps_of(segment):
        return jnp.minimum(num_iters - segment * length, length)

    def first_time(segment, g):
        if history.starts_ref is not None:
            memory.write(history.starts_ref, (segment,), history.starts_at, g)
        return keep_and_iterate(steps_of(segment), g)

    g = tile.start()
    if num_iters:
        g = _tile.loop(num_segments, first_time, g)
    if finish == "rows":
        _, unit = tile.softmax_of_rows(g)
        plan = tile.with_rows_of_a(unit)
    else:
        last = num_iters - (num_segments - 1) * length - 1  # Of the last segment.
        before = memory.read(history.steps_ref, (last,), ())
        _, unit = tile.softmax_of_cols(tile.row_step(before))
        plan = tile.with_cols_of_b(unit)
    dlogits, df, dg = _seeds(memory, tile, plan, cotangent_refs, at)
    if finish == "rows":
        moved, cotangents = _tile.undo_last_row_step(tile, unit, df, dg)
        dlogits = _tile.each_row(jnp.subtract, dlogits, moved)
    else:
        cotangents = Cotangents(df, dg, _tile.zeros(tile.a), _tile.zeros(tile.b))
    if not memory.keeps_dlogits:
        _write_matrix(memory, dlogits_ref, at, dlogits)
        dlogits = ()

    def undo_segment(i, carry):
        segment = num_segments - 1 - i
        num_steps = steps_of(segment)
        if history.starts_ref is not None:
            g = memory.read(history.starts_ref, (segment,), history.starts_at)
            # The last segment's steps are there from the way forward.
            keep_and_iterate(jnp.where(i == 0, 0, num_steps), g)

        def undo(j, carry):
            dlogits, cotangents = carry
            g = memory.read(history.steps_ref, (num_steps - 1 - j,), ())
            moved, cotangents = _tile.undo_full_iteration(tile, g, cotangents)
            if memory.keeps_dlogits:
                return _tile.each_row(jnp.subtract, dlogits, moved), cotangents
            before = _read_matrix(memory, dlogits_ref, at)
            dlogits = _tile.each_row(jnp.subtract, before, moved)
            _write_matrix(memory, dlogits_ref, at, dlogits)
            return (), cotangents

        return _tile.loop(num_steps, undo, carry)

    if num_iters:
        carry = dlogits, cotangents
        dlogits, cotangents = _tile.loop(num_segments, undo_segment, carry)
    if memory.keeps_dlogits:
        _write_matrix(memory, dlogits_ref, at, dlogits)
    da, db = _tile.of_marginals(tile, cotangents)
    _write_rows(da_ref, at, da)
    memory.write(db_ref, (), at, db)


def _seeds(memory, tile, plan, cotangent_refs, at):
    """Cotangents of the logits, directly, and of the potentials of the result."""
    if len(cotangent_refs) == 1:
        # d plan_ij = plan_ij (d logits_ij + d f_i + d g_j)
        dplan = _read_matrix(memory, cotangent_refs[0], at)
        moved = _tile.each_row(jnp.multiply, plan, dplan)
        df = tuple(_tile.over_cols(jnp.add, row) for row in moved)
        return moved, df, _tile.over_rows(jnp.add, moved)
    df_ref, dg_ref = cotangent_refs
    df = _tile.of_valid(tile.a, _read_rows(df_ref, at))
    dg = _tile.of_valid(tile.b, memory.read(dg_ref, (), at))
    return tuple(map(_tile.zeros, plan)), df, dg


def _load(memory, operand_refs, at):
    logits_ref, a_ref, b_ref = operand_refs
    logits = _read_matrix(memory, logits_ref, at)
    return Tile.of(logits, _read_rows(a_ref, at), memory.read(b_ref, (), at))


def _read_matrix(memory, ref, at):
    return tuple(memory.read(ref, (i,), at) for i in range(ref.shape[0]))


def _write_matrix(memory, ref, at, rows):
    for i, row in enumerate(rows):
        memory.write(ref, (i,), at, row)


def _read_rows(ref, at):
    return tuple(ref[(i, *at)] for i in range(ref.shape[0]))


def _write_rows(ref, at, rows):
    for i, x in enumerate(rows):
        ref[(i, *at)] = x
