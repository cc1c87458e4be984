"""The bodies of the kernels for small matrices, for TPUs and GPUs alike."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from .._problem import Problem
from . import tile as tiles
from .tile import SweepState, Tile

# A reference to memory inside a kernel. Pallas has no public type for one.
Ref = Any


class Memory(NamedTuple):
    """How the kernels of a platform read and write a vector over columns.

    `index` and `at` are tuples: the indices before the column axis of a reference, and
    the lanes after it.
    """

    read: Callable[[Ref, tuple, tuple], tiles.Cols]
    write: Callable[[Ref, tuple, tuple, tiles.Cols], None]
    keeps_dlogits: bool  # In registers while the sweep adds to it.


class SegmentedHistory(NamedTuple):
    """Memory for the column potentials that the reverse sweep needs.

    The iterations are cut into N segments of K. `steps_ref` keeps the potentials before
    each iteration of one segment. For every earlier segment they are computed again,
    from its first potential in `starts_ref`.
    """

    steps_ref: Ref  # [K, S, lanes]
    starts_ref: Ref | None  # [N, S, lanes]; None for a single segment.
    starts_at: tuple  # The lanes of `starts_ref`.


def forward_tile(
    memory: Memory, problem: Problem, operand_refs, out_refs, at: tuple
) -> None:
    """Solves the matrices in the lanes `at`.

    Args:
        memory: That of the platform.
        problem: Gives the options.
        operand_refs: Logits [T, S, lanes], a [T, lanes] and b [S, lanes].
        out_refs: The plan, like the logits; or f, like a, g, like b, error [lanes].
        at: The lanes.
    """
    options = problem.options
    tile = _load(memory, operand_refs, at)
    f, g, plan = tiles.solve(tile, options.num_iters, options.finish)
    if len(out_refs) == 1:
        _write_matrix(memory, out_refs[0], at, plan)
        return
    f_ref, g_ref, error_ref = out_refs
    f, g = tile.potentials(f, g)
    _write_rows(f_ref, at, f)
    memory.write(g_ref, (), at, g)
    error_ref[at] = tiles.marginal_error(tile, plan, options.finish)


def backward_tile(
    memory: Memory,
    problem: Problem,
    operand_refs,
    cotangent_refs,
    out_refs,
    history: SegmentedHistory,
    at: tuple,
) -> None:
    """Writes the gradient for the matrices in the lanes `at`.

    Args:
        memory: That of the platform.
        problem: Gives the options.
        operand_refs: As in `forward_tile`.
        cotangent_refs: Of the plan, like the logits; or of f, like a, and g, like b.
        out_refs: dlogits, da and db, like the operands.
        history: Scratch memory.
        at: The lanes.
    """
    num_iters, finish = problem.options.num_iters, problem.options.finish
    length = history.steps_ref.shape[0]
    num_segments = 1 if history.starts_ref is None else history.starts_ref.shape[0]
    dlogits_ref, da_ref, db_ref = out_refs
    tile = _load(memory, operand_refs, at)

    def steps_of(segment):
        return jnp.minimum(num_iters - segment * length, length)

    def keep_and_iterate(num_steps, g):
        def step(k, g):
            memory.write(history.steps_ref, (k,), (), g)
            return tile.col_step(tile.row_step(g))

        return tiles.loop(num_steps, step, g)

    def first_time(segment, g):
        if history.starts_ref is not None:
            memory.write(history.starts_ref, (segment,), history.starts_at, g)
        return keep_and_iterate(steps_of(segment), g)

    g = tile.start()
    if num_iters:
        g = tiles.loop(num_segments, first_time, g)
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
        correction, state = tiles.undo_last_row_step(tile, unit, df, dg)
        dlogits = tiles.each_row(jnp.subtract, dlogits, correction)
    else:
        state = SweepState(df, dg, tiles.zeros(tile.a), tiles.zeros(tile.b))
    if not memory.keeps_dlogits:
        _write_matrix(memory, dlogits_ref, at, dlogits)
        dlogits = ()

    def undo_segment(i, carry):
        segment = num_segments - 1 - i
        num_steps = steps_of(segment)
        if history.starts_ref is not None:
            g = memory.read(history.starts_ref, (segment,), history.starts_at)
            # The forward loop has left those of the last segment in `steps_ref`.
            keep_and_iterate(jnp.where(i == 0, 0, num_steps), g)

        def undo(j, carry):
            dlogits, state = carry
            g = memory.read(history.steps_ref, (num_steps - 1 - j,), ())
            correction, state = tiles.undo_full_iteration(tile, g, state)
            if memory.keeps_dlogits:
                return tiles.each_row(jnp.subtract, dlogits, correction), state
            before = _read_matrix(memory, dlogits_ref, at)
            dlogits = tiles.each_row(jnp.subtract, before, correction)
            _write_matrix(memory, dlogits_ref, at, dlogits)
            return (), state

        return tiles.loop(num_steps, undo, carry)

    if num_iters:
        dlogits, state = tiles.loop(num_segments, undo_segment, (dlogits, state))
    if memory.keeps_dlogits:
        _write_matrix(memory, dlogits_ref, at, dlogits)
    da, db = tiles.marginal_cotangents(tile, state)
    _write_rows(da_ref, at, da)
    memory.write(db_ref, (), at, db)


def _seeds(memory, tile, plan, cotangent_refs, at):
    """Plan * dplan, which starts the logits cotangent, and the seeds of the sweep."""
    if len(cotangent_refs) == 1:
        # d plan_ij = plan_ij (d logits_ij + d f_i + d g_j)
        dplan = _read_matrix(memory, cotangent_refs[0], at)
        direct = tiles.each_row(jnp.multiply, plan, dplan)
        df = tuple(tiles.over_cols(jnp.add, row) for row in direct)
        return direct, df, tiles.over_rows(jnp.add, direct)
    df_ref, dg_ref = cotangent_refs
    df = tiles.only_valid(tile.a, _read_rows(df_ref, at))
    dg = tiles.only_valid(tile.b, memory.read(dg_ref, (), at))
    return tuple(map(tiles.zeros, plan)), df, dg


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
