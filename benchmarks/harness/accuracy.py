"""Errors against float64."""

import functools
from typing import Any, Final

import numpy as np

from . import cases as _cases
from .cases import Case
from .oracle import Result, attention
from .program import Mode

# Entries of the logits that the float64 computation goes over for one case, in whole
# heads and at least one: seconds, and two minutes for a head of 16384 tokens.
CHECKED_ENTRIES: Final = 2**22


def checked_heads(case: Case) -> np.ndarray:
    """The heads whose error is measured, evenly spread and with the last one."""
    num = max(1, min(case.heads, CHECKED_ENTRIES // case.tokens**2))
    return np.linspace(case.heads - 1, 0, num).astype(int)[::-1]


# Both modes of a case use it, and all numbers of iterations the same softmax.
@functools.lru_cache(maxsize=4)
def expected(case: Case) -> tuple[Result, ...]:
    """The float64 results of the checked heads. Softmax is `num_iters` 0."""
    arrays = [np.asarray(x) for x in _cases.inputs(case)]
    return tuple(
        attention(*(x[0, :, head] for x in arrays), num_iters=case.num_iters)
        for head in checked_heads(case)
    )


def error(case: Case, mode: Mode, outputs: Any, results: tuple[Result, ...]) -> float:
    """`Row.max_abs_error` of what a program returned, over the checked heads."""
    want = [np.stack(x) for x in zip(*results, strict=True)]
    if mode == "forward":
        return float(_largest(_heads(outputs[0], case) - want[0]))
    errors = [
        _largest(_heads(got, case) - of_head) / _largest(of_head)
        for got, of_head in zip(outputs[1], want[1:], strict=True)
    ]
    return float(np.max(errors))  # Not `max`, which may drop a NaN.


def _heads(x, case):
    x = np.asarray(x).astype(np.float64)
    return np.moveaxis(x[0][:, checked_heads(case)], 1, 0)  # [checked, T, H]


def _largest(x):
    return np.abs(x).max()
