"""Errors against `implementation="reference"` in float64."""

import functools
from typing import Any, Final

import jax
import numpy as np

from sinkhorn_jax import sinkhorn_attention

from .cases import Case, inputs
from .program import Mode, in_mode

# Entries of the logits that are recomputed in float64: whole heads, and at least one.
CHECKED_ENTRIES: Final = 2**22
# Beyond these tokens the gradient of "reference" in float64 takes more memory than
# machines have (26 T x S arrays). "streaming" stores none, and is expected there.
MOST_TOKENS: Final = 4096


def checked_heads(case: Case) -> np.ndarray:
    """Indices of the heads whose error is measured, evenly spread up to the last."""
    num = max(1, min(case.heads, CHECKED_ENTRIES // case.tokens**2))
    return np.linspace(case.heads - 1, 0, num).astype(int)[::-1]


# Both modes of a case use the result, and softmax's is shared by all `num_iters`.
@functools.lru_cache(maxsize=4)
def expected(case: Case) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Output and gradients (dq, dk, dv) of the checked heads in float64.

    Softmax attention is the case with `num_iters` 0.
    """
    attend = functools.partial(
        sinkhorn_attention,
        num_iters=case.num_iters,
        implementation="reference" if case.tokens <= MOST_TOKENS else "streaming",
    )
    with jax.enable_x64(True):
        arrays = (np.asarray(x)[:, :, checked_heads(case)] for x in inputs(case))
        results = jax.jit(in_mode(attend, "forward_backward"))(
            *(x.astype(np.float64) for x in arrays)
        )
        return jax.tree.map(np.asarray, results)


def error(case: Case, mode: Mode, outputs: Any, want: Any) -> float:
    """Largest error over the checked heads, as `Row.max_abs_error` defines it.

    `outputs` are the arrays of all heads that the program returned, `want` is what
    `expected` returned.
    """

    def largest_difference(got, exact):
        checked = np.asarray(got)[:, :, checked_heads(case)].astype(np.float64)
        return np.abs(checked - exact).max()

    if mode == "forward":
        return float(largest_difference(outputs[0], want[0]))
    errors = [
        largest_difference(got, exact) / np.abs(exact).max()
        for got, exact in zip(outputs[1], want[1], strict=True)
    ]
    return float(np.max(errors))  # The builtin `max` may drop a NaN.
