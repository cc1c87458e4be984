"""Everything that is timed, by name: softmax, the implementations, the peers."""

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

from .harness import machine as _machine
from .harness.cases import Case
from .harness.program import Mode, Program, compiled
from .peers import PEERS

SOFTMAX: Final = "softmax"


def names() -> tuple[str, ...]:
    """What can be named; softmax always runs and is not."""
    return (*IMPLEMENTATIONS, *PEERS)


def build(name: str, case: Case, mode: Mode, *, single_head: bool = True) -> Program:
    """A program, compiled if its framework compiles.

    Args:
        name: Which.
        case: What for.
        mode: Whether with gradients.
        single_head: Whether it is also compiled for a head alone, for its memory.

    Raises:
        NotImplementedError: It cannot run the case, is not installed, or needs too much
            memory. The text is the reason.
    """
    if name == SOFTMAX:
        precision = jax.config.jax_default_matmul_precision or "default"
        return compiled(
            _softmax, case, mode, single_head=single_head, matmul_precision=precision
        )
    if name in PEERS:
        peer = PEERS[name]
        reason = peer.why_not(case, mode)
        if reason is not None:
            raise NotImplementedError(reason)
        return peer.build(case, mode)
    reason = _machine.why_not_kernel(name)
    if reason is not None:
        raise NotImplementedError(reason)
    attend = functools.partial(
        sinkhorn_attention, num_iters=case.num_iters, implementation=name
    )
    return compiled(attend, case, mode, single_head=single_head)


def is_sinkhorn(name: str) -> bool:
    """Whether it computes Sinkhorn attention rather than softmax attention."""
    if name in PEERS:
        return PEERS[name].is_sinkhorn
    return name != SOFTMAX


def is_default(name: str, case: Case) -> bool:
    """Whether `implementation=None` takes it for the case, on the platform in use."""
    if name not in IMPLEMENTATIONS:
        return False
    return preferred(IMPLEMENTATIONS, problem(case)) == name


def problem(case: Case) -> Problem:
    """What `sinkhorn_attention` makes of the case."""
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
