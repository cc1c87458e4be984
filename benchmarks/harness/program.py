"""A program that can be timed: what it is given and gives, its time and memory."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, get_args

import jax
import numpy as np

from . import limits as _limits
from .cases import Case, Inputs

Mode = Literal["forward", "forward_backward"]
MODES: Final = get_args(Mode)


class Program(NamedTuple):
    """One implementation or peer, ready for one case and mode."""

    # Of the prepared arguments; returns when the result is there.
    call: Callable[..., Any]
    prepare: Callable[[Inputs], tuple[Any, ...]] = tuple  # Untimed: converts, copies.
    # (out,) or (out, (dq, dk, dv)) as NumPy arrays (1, T, N, H), from what `call` gave.
    to_numpy: Callable[[Any], Any] = functools.partial(jax.tree.map, np.asarray)
    matmul_precision: str = "highest"
    version: str = ""  # Of a peer's package.
    compile_ms: float = 0.0
    temp_bytes: int | None = None
    one_head_bytes: int | None = None
    one_head_ts_bytes: int | None = None  # Without what is proportional to H.
    memory_source: str = "compiled"
    # Where memory is not declared but measured: bytes, from a thunk that calls once.
    measure_peak: Callable[[Callable[[], Any]], int | None] | None = None


def compiled(
    attend: Callable[..., jax.Array],
    case: Case,
    mode: Mode,
    *,
    single_head: bool = True,
    **fields: Any,
) -> Program:
    """Compiles a JAX function, and for its memory the same with a single head.

    The memory of a head is x T S + y (T + S) H + vectors. A second head dimension gives
    x, which is what a head costs when tokens are many.

    Args:
        attend: Of query, key and value (1, T, N, H).
        case: Gives shapes and dtype.
        mode: Whether gradients are computed as well.
        single_head: False saves two compilations and leaves that memory unknown.
        **fields: Of the `Program`.

    Raises:
        NotImplementedError: It needs more memory than it may have, or a product of
            matrices that this platform lacks.
    """
    fn = in_mode(attend, mode)
    executable, compile_ms = compile_within_limits(fn, *_shapes(case))
    one_head = half_dim = None
    if single_head:
        one_head, half_dim = (
            temp_bytes(_compile(fn, *_shapes(case, heads=1, head_dim=head_dim)))
            for head_dim in (case.head_dim, case.head_dim // 2)
        )
    return Program(
        call=lambda *args: jax.block_until_ready(executable(*args)),
        compile_ms=compile_ms,
        temp_bytes=temp_bytes(executable),
        one_head_bytes=one_head,
        one_head_ts_bytes=(
            None if one_head is None or half_dim is None else 2 * half_dim - one_head
        ),
        **fields,
    )


def in_mode(attend: Callable[..., jax.Array], mode: Mode) -> Callable[..., Any]:
    """The function of `Inputs` that is timed, from one of query, key and value."""

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
    """A program of several calls, of whose time the start from Python is little.

    Args:
        fn: What is called.
        following: From the result and the arguments of a call, those of the next one.
        calls: How many, one after another.

    Returns:
        A function of the arguments of the first call. Its first result is that of the
        first call, any other what keeps the compiler from leaving the others out.
    """

    def program(*args):
        first = fn(*args)
        if calls == 1:
            return (first,)

        def call(_, args):
            return following(fn(*args), *args)

        rest = jax.lax.fori_loop(1, calls, call, following(first, *args))
        return first, rest

    return program


def compile_within_limits(
    fn: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
) -> tuple[jax.stages.Compiled, float]:
    """The executable, and the milliseconds that it took to get it.

    Raises:
        NotImplementedError: It needs more memory than it may have, or a product of
            matrices that this platform lacks.
    """
    start = time.perf_counter()
    executable = _compile(fn, *shapes)
    compile_ms = 1e3 * (time.perf_counter() - start)
    stats = executable.memory_analysis()
    if stats is not None:
        _limits.check_memory(
            stats.temp_size_in_bytes
            + stats.argument_size_in_bytes
            + stats.output_size_in_bytes
        )
    return executable, compile_ms


def _shapes(case, **changed):
    case = dataclasses.replace(case, **changed)
    return [jax.ShapeDtypeStruct(case.shape_btnh, case.dtype)] * len(Inputs._fields)


def _compile(fn, *shapes):
    try:
        return jax.jit(fn).lower(*shapes).compile()
    except ValueError as error:
        # Such as float16 with accumulation in float32 on a CPU.
        if "is not supported by dot_general" not in str(error):
            raise
        raise NotImplementedError(str(error).splitlines()[0]) from error


def temp_bytes(executable: jax.stages.Compiled) -> int | None:
    """What the executable declares as temporary memory."""
    stats = executable.memory_analysis()
    return None if stats is None else stats.temp_size_in_bytes
