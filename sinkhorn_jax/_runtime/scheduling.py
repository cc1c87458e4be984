"""How many matrices are computed at once, and the loops over all of them."""

from collections.abc import Callable
from typing import Any, Final

import jax
from jaxtyping import Array, Int, Shaped

from .arguments import are_known
from .shard_map import varying_like

# On a CPU only few matrices are in flight, so that they stay in the cache during the
# iteration. Tiny matrices are bound by the overhead of the loop, so all of them are in
# flight. On an accelerator as many are in flight as fit.
CPU_BYTES_IN_FLIGHT: Final = 2**20
ACCELERATOR_BYTES_IN_FLIGHT: Final = 2**32
TINY_MATRIX_ENTRIES: Final = 32 * 32


def matrices_in_flight(batch: int, t: int, s: int, itemsize: int) -> int:
    """The number of (t, s) matrices in flight: a divisor of `batch`.

    Where `jax.export` has a symbol in place of a size, it is one on a CPU, and all on
    an accelerator, as under `jax.vmap`.
    """
    on_cpu = jax.default_backend() == "cpu"
    if not are_known(batch, t, s):
        is_tiny = are_known(t, s) and t * s <= TINY_MATRIX_ENTRIES
        return batch if is_tiny or not on_cpu else 1
    if batch <= 1:
        return 1
    if on_cpu:
        if t * s <= TINY_MATRIX_ENTRIES:
            return batch
        limit = CPU_BYTES_IN_FLIGHT // (t * s * itemsize)
    else:
        limit = ACCELERATOR_BYTES_IN_FLIGHT // (t * s * itemsize)
    # A divisor, because a remainder would be a second copy of the compiled loop body.
    return max(n for n in range(1, max(1, min(batch, limit)) + 1) if batch % n == 0)


def map_matrices(fn: Callable[..., Any], xs: Any, in_flight: int) -> Any:
    """`jax.vmap(fn)(xs)` for `in_flight` matrices at a time, a divisor of them all."""
    batch = jax.tree.leaves(xs)[0].shape[0]
    # An equality of symbols is decided, other comparisons may not be.
    known = are_known(batch, in_flight)
    if in_flight >= batch if known else in_flight == batch:
        return jax.vmap(fn)(xs)
    if in_flight == 1:
        return jax.lax.map(fn, xs)
    return jax.lax.map(fn, xs, batch_size=in_flight)


def map_and_add(
    fn: Callable[..., tuple[Any, Any]],
    xs: Any,
    total: Shaped[Array, "slots ..."],
    slots: Int[Array, " batch"],
    in_flight: int,
) -> tuple[Any, Shaped[Array, "slots ..."]]:
    """`map_matrices` where `fn` returns a pair, whose second part is added up.

    Returns the first parts, and `total` with each second part added at its slot.
    """
    batch, one_by_one = slots.shape[0], in_flight == 1
    total = varying_like(total, xs)

    def add(total, inputs):
        xs, slots = inputs
        out, addend = fn(xs) if one_by_one else jax.vmap(fn)(xs)
        return total.at[slots].add(addend), out

    if not one_by_one:
        xs, slots = jax.tree.map(
            lambda x: x.reshape(batch // in_flight, in_flight, *x.shape[1:]),
            (xs, slots),
        )
    total, out = jax.lax.scan(add, total, (xs, slots))
    if not one_by_one:
        out = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), out)
    return out, total
