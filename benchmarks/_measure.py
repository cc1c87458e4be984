"""Programs compiled ahead of time: their time, temporary memory and error."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

import jax
import numpy as np

from sinkhorn_jax import sinkhorn_attention

from ._cases import Case, Inputs
from ._oracle import Result, attention

Mode = Literal["forward", "forward_backward"]
MODES: Final = get_args(Mode)
SOFTMAX: Final = "softmax"

# Entries of the logits that the float64 computation goes over for one case, in whole
# heads and at least one: a few seconds.
CHECKED_ENTRIES: Final = 2**22
MAX_ROUNDS: Final = 1000


class Program(NamedTuple):
    """A compiled case."""

    call: Callable[..., Any]  # Of Inputs; gives (out,) or (out, (dq, dk, dv)).
    compile_ms: float
    temp_bytes: int | None
    one_head_bytes: int | None
    one_head_ts_bytes: int | None  # Without what is proportional to the head dimension.


def build(
    implementation: str, case: Case, dtype: str, num_iters: int, mode: Mode
) -> Program:
    """Compiles a case, and for its memory the same case with a single head.

    The memory of a head is x T S + y (T + S) H + vectors. A second head dimension gives
    x, which is what a head costs when tokens are many.

    Raises:
        NotImplementedError: The implementation cannot run the case.
    """
    fn = _function(implementation, num_iters, mode)
    start = time.perf_counter()
    compiled = _compile(fn, case, dtype)
    compile_ms = 1e3 * (time.perf_counter() - start)
    one_head, half_dim = (
        _temp_bytes(_compile(fn, Case(1, case.tokens, head_dim), dtype))
        for head_dim in (case.head_dim, case.head_dim // 2)
    )
    return Program(
        compiled,
        compile_ms,
        _temp_bytes(compiled),
        one_head,
        None if one_head is None or half_dim is None else 2 * half_dim - one_head,
    )


def time_in_turns(
    calls: Mapping[str, Callable[..., Any]],
    inputs: Inputs,
    repeats: int,
    budget_s: float,
) -> dict[str, list[float]]:
    """Milliseconds of each call, over rounds in which every one has its turn.

    So a drift of the machine hits all alike, and a ratio within a run hardly at all.
    Every other round goes backwards: nobody always follows the same neighbour.

    Args:
        calls: What to time. Each is called once before, untimed.
        inputs: Their arguments.
        repeats: At least this many rounds.
        budget_s: More of them until this many seconds have passed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call(*inputs))
    begin = time.perf_counter()
    for round_ in range(max(repeats, MAX_ROUNDS)):
        if round_ >= repeats and time.perf_counter() - begin > budget_s:
            break
        for name in reversed(calls) if round_ % 2 else calls:
            start = time.perf_counter()
            out = jax.block_until_ready(calls[name](*inputs))
            times[name].append(1e3 * (time.perf_counter() - start))
            del out  # Freed outside the timed span.
    return times


def checked_heads(case: Case) -> np.ndarray:
    """The heads whose error is measured, evenly spread and with the last one."""
    num = max(1, min(case.heads, CHECKED_ENTRIES // case.tokens**2))
    return np.linspace(case.heads - 1, 0, num).astype(int)[::-1]


def expected(case: Case, inputs: Inputs, num_iters: int) -> list[Result]:
    """The float64 results of the checked heads. Softmax is `num_iters` 0."""
    arrays = [np.asarray(x) for x in inputs]
    return [
        attention(*(x[0, :, head] for x in arrays), num_iters=num_iters)
        for head in checked_heads(case)
    ]


def error(case: Case, mode: Mode, outputs: Any, results: list[Result]) -> float:
    """`Row.max_abs_error` of what a program returned, over the checked heads."""
    want = [np.stack(x) for x in zip(*results, strict=True)]
    if mode == "forward":
        return float(_largest(_heads(outputs[0], case) - want[0]))
    errors = [
        _largest(_heads(got, case) - of_head) / _largest(of_head)
        for got, of_head in zip(outputs[1], want[1:], strict=True)
    ]
    return float(np.max(errors))  # Not `max`, which may drop a NaN.


def _function(implementation, num_iters, mode):
    if implementation == SOFTMAX:
        attend = _softmax
    else:
        attend = functools.partial(
            sinkhorn_attention, num_iters=num_iters, implementation=implementation
        )

    def forward(query, key, value, cotangent):
        del cotangent
        return (attend(query, key, value),)

    def forward_backward(query, key, value, cotangent):
        out, pull_back = jax.vjp(attend, query, key, value)
        return out, pull_back(cotangent)

    return {"forward": forward, "forward_backward": forward_backward}[mode]


def _softmax(query, key, value):
    # It mixes dtypes, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value)


def _compile(fn, case, dtype):
    array = jax.ShapeDtypeStruct(case.shape_btnh, dtype)
    return jax.jit(fn).lower(*[array] * len(Inputs._fields)).compile()


def _temp_bytes(compiled):
    stats = compiled.memory_analysis()
    return None if stats is None else stats.temp_size_in_bytes


def _heads(x, case):
    x = np.asarray(x).astype(np.float64)
    return np.moveaxis(x[0][:, checked_heads(case)], 1, 0)  # [checked, T, H]


def _largest(x):
    return np.abs(x).max()
