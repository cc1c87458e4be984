"""The programs that are timed, by name: softmax, our implementations, the peers."""

import functools
import math
from typing import Final

import jax
import jax.numpy as jnp

from sinkhorn_jax import sinkhorn_attention
from sinkhorn_jax._core.options import Options
from sinkhorn_jax._runtime.dispatch import preferred
from sinkhorn_jax.attention import IMPLEMENTATIONS
from sinkhorn_jax.attention._problem import Problem

from .harness import machine
from .harness.cases import Case
from .harness.program import Mode, Program, compiled
from .peers import PEERS

SOFTMAX: Final = "softmax"
NAMES: Final = (*IMPLEMENTATIONS, *PEERS)  # Softmax is measured in any case.


def build(name: str, case: Case, mode: Mode) -> Program:
    """The named program for a case, compiled if its framework compiles.

    Raises:
        NotImplementedError: The program cannot run the case here, is not installed, or
            needs too much memory. The text is the reason.
    """
    if name in PEERS:
        peer = PEERS[name]
        reason = peer.why_not(case, mode)
        if reason is not None:
            raise NotImplementedError(reason)
        return peer.build(case, mode)
    # Two compilations more, which take minutes for a GPU.
    single_head = jax.default_backend() == "cpu"
    if name == SOFTMAX:
        return compiled(_softmax, case, mode, single_head=single_head)
    machine.require_kernel(name)
    attend = functools.partial(
        sinkhorn_attention, num_iters=case.num_iters, implementation=name
    )
    return compiled(attend, case, mode, single_head=single_head)


def is_sinkhorn(name: str) -> bool:
    """Whether the program computes Sinkhorn attention rather than softmax attention."""
    if name in PEERS:
        return PEERS[name].is_sinkhorn
    return name != SOFTMAX


def is_default(name: str, case: Case) -> bool:
    """Whether `implementation=None` selects the program for the case here."""
    return name == preferred(IMPLEMENTATIONS, problem(case))


def problem(case: Case) -> Problem:
    """The `Problem` that `sinkhorn_attention` makes of the case."""
    batch, tokens, heads, head_dim = case.shape_btnh
    return Problem(
        batch=batch,
        t=tokens,
        s=tokens,
        num_heads=heads,
        num_key_heads=heads,
        head_dim=head_dim,
        value_dim=head_dim,
        dtype=jnp.dtype(case.dtype),
        options=Options(num_iters=case.num_iters),
        scale=1 / math.sqrt(head_dim),
    )


def _softmax(query, key, value):
    # It mixes dtypes, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value)
