"""Many matrices at once: how many in flight, and branches that survive `vmap`."""

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Shaped

# On a CPU a matrix that stays in cache while it is iterated on is several times faster
# than one read from memory, so few go at once; tiny ones are bound by the overhead of
# the loop instead and all go together. An accelerator takes as many as fit.
CPU_BYTES_IN_FLIGHT: Final = 2**20
ACCELERATOR_BYTES_IN_FLIGHT: Final = 2**32
TINY_MATRIX_ENTRIES: Final = 32 * 32


def matrices_in_flight(batch: int, t: int, s: int, itemsize: int) -> int:
    """How many (t, s) matrices to work on at once: a divisor of `batch`."""
    if batch <= 1:
        return 1
    if jax.default_backend() == "cpu":
        if t * s <= TINY_MATRIX_ENTRIES:
            return batch
        limit = CPU_BYTES_IN_FLIGHT // (t * s * itemsize)
    else:
        limit = ACCELERATOR_BYTES_IN_FLIGHT // (t * s * itemsize)
    # A divisor, because a remainder would be a second copy of the compiled loop body.
    return max(n for n in range(1, max(1, min(batch, limit)) + 1) if batch % n == 0)


def map_matrices(fn: Callable[..., Any], xs: Any, in_flight: int) -> Any:
    """`jax.vmap(fn)(xs)`, `in_flight` at a time; a divisor of the leading axis."""
    batch = jax.tree.leaves(xs)[0].shape[0]
    if in_flight == 1 and batch > 1:
        return jax.lax.map(fn, xs)
    if in_flight >= batch:
        return jax.vmap(fn)(xs)
    return jax.lax.map(fn, xs, batch_size=in_flight)


def map_and_add(
    fn: Callable[..., tuple[Any, Any]],
    xs: Any,
    total: Shaped[Array, "slots ..."],
    slots: Int[Array, " batch"],
    in_flight: int,
) -> tuple[Any, Shaped[Array, "slots ..."]]:
    """`map_matrices` of the first result of `fn`, the second added to its slot."""
    batch = slots.shape[0]

    total = varying_like(total, xs)

    def add(total, inputs):
        xs, slots = inputs
        out, addend = fn(xs) if in_flight == 1 else jax.vmap(fn)(xs)
        return total.at[slots].add(addend), out

    if in_flight > 1:
        xs, slots = jax.tree.map(
            lambda x: x.reshape(batch // in_flight, in_flight, *x.shape[1:]),
            (xs, slots),
        )
    total, out = jax.lax.scan(add, total, (xs, slots))
    if in_flight > 1:
        out = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), out)
    return out, total


def with_more_matrices(fn: Callable[..., Any], *arrays: Array | None) -> Any:
    """`fn(*arrays)`, where an axis of `vmap` is more of the leading axis.

    Each array and result has a leading axis, of matrices or of what they share, such as
    the elements of a batch that has several heads each. For Pallas kernels, which would
    get the axis of `vmap` in front of their grid instead.

    Raises:
        NotImplementedError: It is differentiated, which Pallas cannot: what calls it
            has its own derivative, and that is being differentiated again.
    """

    @jax.custom_jvp
    def once(*arrays):
        return call(*arrays)

    @once.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            "The derivative of a kernel cannot be differentiated again: it is a kernel "
            "too. For second derivatives use implementation='reference'."
        )

    @custom_vmap
    def call(*arrays):
        return fn(*arrays)

    @call.def_vmap
    def _(axis_size, in_batched, *arrays):
        def one(x, is_batched):
            return jax.ShapeDtypeStruct(x.shape[int(is_batched) :], x.dtype)

        def fold(x, is_batched):
            if not is_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        def unfold(x):
            return x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:])

        # None among the arrays is no leaf.
        in_batched = tuple(in_batched)
        if axis_size == 0:  # No kernel has an empty grid.
            out = jax.eval_shape(fn, *jax.tree.map(one, arrays, in_batched))
            out = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), out)
        else:
            arrays = jax.tree.map(fold, arrays, in_batched)
            out = jax.tree.map(unfold, with_more_matrices(fn, *arrays))
        return out, jax.tree.map(lambda _: True, out)

    return once(*arrays)


@custom_vmap
def any_in_batch(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether the flag is set for any matrix, over every axis that `vmap` hides.

    A `lax.cond` on it stays a branch under `vmap`, where a batched predicate would
    become a select that always pays for both sides.
    """
    return flag


@any_in_batch.def_vmap
def _any_in_batch_vmap(axis_size, in_batched, flag):
    del axis_size
    return any_in_batch(jnp.any(flag, axis=0) if in_batched[0] else flag), False


def mended(result: Any, is_right: Bool[Array, ""], instead: Callable[[], Any]) -> Any:
    """`result`, and what `instead` computes where that is not right."""

    def mend():
        return jax.tree.map(functools.partial(jnp.where, is_right), result, instead())

    return jax.lax.cond(any_in_batch(~is_right), mend, lambda: result)


def varying_like(xs: Any, others: Any) -> Any:
    """`xs`, varying over each axis of a `jax.shard_map` that one of `others` does.

    The carry of a loop has to vary from the start like what is added to it, and an
    operand like its cotangent. Elsewhere nothing happens.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return xs
    # A result varies like its operands, and XLA drops a choice between equals.
    firsts = [jnp.ravel(x)[0] for x in jax.tree.leaves(others)]
    flag = functools.reduce(jnp.logical_or, [x != x for x in firsts])
    return jax.tree.map(lambda x: jnp.where(flag, x, x), xs)


def result(
    operand: Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """Of a kernel, varying over the axes of a `jax.shard_map` as an operand does."""

    def make(x):
        return jnp.broadcast_to(jnp.ravel(x)[0].astype(dtype), shape)

    return jax.eval_shape(make, operand)
