"""A program that can be timed: its call, its results, its memory."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, get_args

import jax
import numpy as np

from . import limits
from .cases import Case, Inputs

Mode = Literal["forward", "forward_backward"]
MODES: Final = get_args(Mode)


class Program(NamedTuple):
    """One implementation or peer, ready to run one case in one mode."""

    # Takes the prepared arguments and returns when the result is ready.
    call: Callable[..., Any]
    prepare: Callable[[Inputs], tuple[Any, ...]] = (
        tuple  # Converts the inputs, untimed.
    )
    # Turns the result of `call` into NumPy arrays (1, T, N, H): (out,) or
    # (out, (dq, dk, dv)).
    to_numpy: Callable[[Any], Any] = functools.partial(jax.tree.map, np.asarray)
    version: str = ""  # Package and version of a peer.
    compile_ms: float = 0.0
    temp_bytes: int | None = None
    ts_bytes_per_head: float | None = None  # The part that grows with T x S.
    memory_source: str = "compiled"
    # Measures the memory of a call in bytes, for programs that do not declare it.
    measure_peak: Callable[[Callable[[], Any]], int | None] | None = None


def compiled(
    attend: Callable[..., jax.Array],
    case: Case,
    mode: Mode,
    *,
    single_head: bool = False,
    **fields: Any,
) -> Program:
    """A program from a JAX function of query, key and value (1, T, N, H).

    With `single_head` it finds `ts_bytes_per_head` by two more compilations for a
    single head: its memory is x T S + y (T + S) H + vectors, and a second head
    dimension separates x from y. Other fields go to the `Program`.

    Raises:
        NotImplementedError: As in `compile_within_limits`.
    """
    fn = in_mode(attend, mode)
    executable, compile_ms = compile_within_limits(fn, *_shapes(case))
    per_head = None
    if single_head:
        whole, half = (
            temp_bytes(_compile(fn, *_shapes(case, heads=1, head_dim=head_dim)))
            for head_dim in (case.head_dim, case.head_dim // 2)
        )
        per_head = None if whole is None or half is None else 2 * half - whole
    return Program(
        call=lambda *args: jax.block_until_ready(executable(*args)),
        compile_ms=compile_ms,
        temp_bytes=temp_bytes(executable),
        ts_bytes_per_head=per_head,
        **fields,
    )


def in_mode(attend: Callable[..., jax.Array], mode: Mode) -> Callable[..., Any]:
    """The function of `Inputs` that is timed, from one of query, key and value.

    It returns (out,), or (out, (dq, dk, dv)) in the mode "forward_backward".
    """

    def forward(query, key, value, cotangent):
        del cotangent
        return (attend(query, key, value),)

    def forward_backward(query, key, value, cotangent):
        out, pull_back = jax.vjp(attend, query, key, value)
        return out, pull_back(cotangent)

    return {"forward": forward, "forward_backward": forward_backward}[mode]


def repeated(
    fn: Callable[..., Any], following: Callable[..., tuple[Any, ...]], calls: int
) -> Callable[..., tuple[Any, ...]]:
    """A program of several calls, so that starting it from Python costs little of it.

    `following` gives the arguments of the next call from the result and the arguments
    of the last one. The program returns the result of the first call, then whatever
    keeps the compiler from removing the others.
    """

    def program(*args):
        first = fn(*args)
        if calls == 1:
            return (first,)
        call = lambda _, args: following(fn(*args), *args)
        return first, jax.lax.fori_loop(1, calls, call, following(first, *args))

    return program


def compile_within_limits(
    fn: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
) -> tuple[jax.stages.Compiled, float]:
    """The executable, and the milliseconds that tracing and compiling took.

    Raises:
        NotImplementedError: The program needs too much memory, or a matrix product
            that this platform lacks.
    """
    start = time.perf_counter()
    executable = _compile(fn, *shapes)
    compile_ms = 1e3 * (time.perf_counter() - start)
    stats = executable.memory_analysis()
    if stats is not None:
        limits.check_memory(
            stats.temp_size_in_bytes
            + stats.argument_size_in_bytes
            + stats.output_size_in_bytes
        )
    return executable, compile_ms


def temp_bytes(executable: jax.stages.Compiled) -> int | None:
    """Temporary memory that the executable declares, or None if it does not."""
    stats = executable.memory_analysis()
    return None if stats is None else stats.temp_size_in_bytes


def _shapes(case, **changed):
    case = dataclasses.replace(case, **changed)
    return [jax.ShapeDtypeStruct(case.shape_btnh, case.dtype)] * len(Inputs._fields)


def _compile(fn, *shapes):
    try:
        return jax.jit(fn).lower(*shapes).compile()
    except ValueError as error:
        # For example float16 with accumulation in float32 on a CPU.
        if "is not supported by dot_general" not in str(error):
            raise
        raise NotImplementedError(str(error).splitlines()[0]) from error
