"""Kernels and branches that survive `jax.vmap`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Shaped

from .shard_map import varying_like


def fold_vmap(fn: Callable[..., Any], *arrays: Array | None) -> Any:
    """Returns `fn(*arrays)`; under `vmap`, the mapped axis joins the leading axis.

    Each array and each result has a leading axis: over matrices, or over the batch
    elements, each of which may have several heads. Without this, `vmap` would put its
    axis in front of the grid of a Pallas kernel.

    Raises:
        NotImplementedError: It is differentiated. The callers define their own
            derivative with kernels, so this is an attempt at a second derivative.
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

        in_batched = tuple(in_batched)  # A list is another tree than `arrays`.
        if axis_size == 0:  # No kernel has an empty grid.
            out = jax.eval_shape(fn, *jax.tree.map(one, arrays, in_batched))
            out = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), out)
        else:
            arrays = jax.tree.map(fold, arrays, in_batched)
            out = jax.tree.map(unfold, fold_vmap(fn, *arrays))
        return out, jax.tree.map(lambda _: True, out)

    return once(*arrays)


@custom_vmap
def max_in_batch(x: Shaped[Array, ""]) -> Shaped[Array, ""]:
    """The largest of a number or flag, not negative, over all that `vmap` maps over.

    A `lax.cond` on the result stays a branch under `vmap`, and a `lax.while_loop` a
    loop. A batched predicate would become a select: of both sides of the branch, and of
    everything that the loop carries, in each iteration.
    """
    return x


@max_in_batch.def_vmap
def _max_in_batch_vmap(axis_size, in_batched, x):
    del axis_size
    largest = jnp.max(x, axis=0, initial=0) if in_batched[0] else x
    return max_in_batch(largest), False


def with_fallback(
    result: Any, is_right: Bool[Array, ""], instead: Callable[[], Any]
) -> Any:
    """Returns `result`, replaced by `instead()` where it is not right."""
    # A constant in the result, such as a number of iterations, does not vary over the
    # axes of `jax.shard_map`, and the choice of `fallback` does.
    result = varying_like(result, (result, is_right))

    def fallback():
        return jax.tree.map(functools.partial(jnp.where, is_right), result, instead())

    return jax.lax.cond(max_in_batch(~is_right), fallback, lambda: result)
