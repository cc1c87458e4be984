"""Attention of sequences whose tokens are divided over devices, in `jax.shard_map`.

Heads are independent, so tokens are exchanged for heads: each device gets all tokens of
its part of the heads, attends as it would alone, and gives the outputs back to where
their queries are. That is one all-to-all for each of queries, keys, values and output,
whatever the number of iterations; as many in the backward pass.

Jacobs et al., DeepSpeed Ulysses, 2023. https://arxiv.org/abs/2309.14509
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._core.marginals import broadcast
from .._runtime.shard_map import varying_like
from ._problem import Dropout, GivenMarginals, GivenPattern, head_ids
from ._validate import check_arrays


class Parts(NamedTuple):
    """The arguments of a call on one device, which has a part of the tokens."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K D"]
    bias: Float[Array, "..."] | None
    mask: Bool[Array, "..."] | None
    marginals: GivenMarginals
    pattern: GivenPattern
    dropout: Dropout


def over_sequence(
    axis: str, compute: Callable[[Parts], Any], parts: Parts
) -> tuple[Float[Array, "*B T N D"], Float[Array, "*B N"] | None]:
    """Output of this device's tokens, and the marginal error of all heads.

    Args:
        axis: The axis of the `jax.shard_map` that divides the tokens.
        compute: Attends on one device.
        parts: What this device was given.
    """
    check_arrays(parts.query, parts.key, parts.value)
    _check_axis(axis, parts.query, parts.key)
    has_batch = parts.query.ndim == 4
    if not has_batch:
        query, key, value = (x[None] for x in parts[:3])
        parts = parts._replace(query=query, key=key, value=value)
    out, error = compute(_to_heads(axis, parts))
    out = jax.lax.all_to_all(out, axis, 1, 2, tiled=True)
    error = None if error is None else _of_all_heads(axis, error)
    if has_batch:
        return out, error
    return jax.tree.map(lambda x: x[0], (out, error))


def _check_axis(axis: Any, query: Array, key: Array) -> None:
    """Checks that the tokens can be exchanged for heads over the axis.

    Raises:
        TypeError: It is no name.
        ValueError: `jax.shard_map` is not manual over it, or it does not divide heads.
    """
    if not isinstance(axis, str):
        raise TypeError(
            f"sequence_axis must be the name of one mesh axis, got {axis!r}."
        )
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.manual_axes:
        raise ValueError(
            f"sequence_axis={axis!r} must be an axis of the jax.shard_map around the "
            f"call, whose axes are {list(mesh.manual_axes)}: each device then gives "
            "its own tokens. Without a jax.shard_map leave sequence_axis out."
        )
    size = mesh.shape[axis]
    for name, heads in (("query", query.shape[-2]), ("key", key.shape[-2])):
        if heads % size:
            raise ValueError(
                f"sequence_axis={axis!r} has {size} devices, which must divide the "
                f"heads, got {heads} {name} heads: each device attends for its part "
                "of them. Use fewer devices for the sequence, or repeat key heads."
            )


def _to_heads(axis: str, parts: Parts) -> Parts:
    """All tokens of this device's part of the heads, from its tokens of all heads."""
    size, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    batch, t, num_heads, _ = parts.query.shape
    s, part = parts.key.shape[1], num_heads // size

    def exchange(x, head_axis, token_axis):
        x = varying_like(x, (x, index))
        return jax.lax.all_to_all(x, axis, head_axis, token_axis, tiled=True)

    def own_heads(x, head_axis):
        return jax.lax.dynamic_slice_in_dim(x, index * part, part, head_axis)

    def of_logits(x):
        """A bias or mask of this device's heads, from one that has its queries."""
        if x is None:
            return None
        x = jnp.asarray(x)
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        if x.shape[2] == t:  # The same values on all devices may be gathered too.
            if x.shape[1] == num_heads:
                return exchange(x, 1, 2)
            return gather(x, 2)
        return own_heads(x, 1) if x.shape[1] == num_heads else x

    def gather(x, token_axis):
        x = varying_like(x, (x, index))
        return jax.lax.all_gather(x, axis, axis=token_axis, tiled=True)

    def of_marginal(name, x, length):
        if x is None:
            return None
        x = broadcast(name, jnp.asarray(x), (batch, num_heads, length))
        return exchange(x, 1, 2)

    def of_ids(name, x, length):
        if x is None:
            return None
        return gather(broadcast(name, jnp.asarray(x), (batch, length)), 1)

    marginals, pattern, tau = parts.marginals, parts.pattern, parts.marginals.tau
    if isinstance(tau, jax.Array) and tau.ndim > 0:
        tau = own_heads(broadcast("column_tau", tau, (batch, num_heads)), 1)
    query, key, value = (exchange(x, 2, 1) for x in parts[:3])
    ids = own_heads(head_ids(parts.query, axis), 1)
    return Parts(
        query,
        key,
        value,
        of_logits(parts.bias),
        of_logits(parts.mask),
        GivenMarginals(
            of_marginal("query_marginal", marginals.query, t),
            of_marginal("key_marginal", marginals.key, s),
            tau,
        ),
        GivenPattern(
            of_ids("query_segment_ids", pattern.query_ids, t),
            of_ids("key_segment_ids", pattern.key_ids, s),
            pattern.window,
        ),
        parts.dropout._replace(ids=ids),
    )


def _of_all_heads(axis: str, error: Float[Array, "B N"]) -> Float[Array, "B M"]:
    """The marginal errors of all heads, the same on all devices of the axis."""
    batch, part = error.shape
    index, size = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    everywhere = varying_like(jnp.zeros((batch, part * size), error.dtype), error)
    start = jnp.zeros_like(index), index * part
    return jax.lax.psum(jax.lax.dynamic_update_slice(everywhere, error, start), axis)
