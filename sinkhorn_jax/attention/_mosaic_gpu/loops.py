"""Loops of a kernel over counts, and the start of copies to shared memory."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from .types import Ref

Carry = TypeVar("Carry")


def fold(
    count: int | Int[Array, ""], step: Callable[..., Carry], carry: Carry
) -> Carry:
    """The last carry of `carry = step(i, carry)` for i below `count`."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)


def for_each(count: int | Int[Array, ""], do: Callable[..., None]) -> None:
    """Calls `do(i)` for each i below `count`."""

    def step(i, nothing):
        do(i)
        return nothing

    fold(count, step, jnp.int32(0))


def always(do: Callable[[], None]) -> None:
    """Calls `do()`, where `pl.when` would do so under a condition."""
    do()


def start(barrier_ref: Ref, copies: Sequence[tuple[Ref, Ref]]) -> None:
    """Starts copies to shared memory. Each arrives at the barrier when it is done."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier_ref)


def load(barrier_ref: Ref, copies: Sequence[tuple[Ref, Ref]]) -> None:
    """Copies to shared memory, and waits for the copies at the barrier."""
    start(barrier_ref, copies)
    plgpu.barrier_wait(barrier_ref)
