"""Attention of sequences whose tokens are divided over devices, in `jax.shard_map`.

"ulysses": heads are independent, so tokens are exchanged for heads. Each device gets
all tokens of its part of the heads, attends as it would alone, and gives the outputs
back to where their queries are. That is one all-to-all for each of queries, keys,
values and output, whatever the number of iterations; as many in the backward pass.
Jacobs et al., DeepSpeed Ulysses, 2023. https://arxiv.org/abs/2309.14509

"mixed": a row step needs the keys of all devices and a column step the queries of all.
Keys are gathered once, and each column step adds up the column sums of the devices, S
numbers for each head. Values, and the cotangents of keys and values, go round the ring
of devices, in one trip each. The passes are those of `_streaming`.
"""

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._core.marginals import broadcast
from .._runtime.collectives import among_parts, gathered, own_part
from .._runtime.shard_map import varying_like
from ._problem import Dropout, GivenMarginals, GivenPattern, head_ids
from ._validate import check_arrays

SequenceStrategy = Literal["auto", "ulysses", "mixed"]
STRATEGIES: Final = get_args(SequenceStrategy)


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
    axis: str,
    strategy: SequenceStrategy,
    compute: Callable[..., Any],
    parts: Parts,
    implementation: str | None,
) -> tuple[Float[Array, "*B T N D"], Float[Array, "*B N"] | None]:
    """Output of this device's tokens, and the marginal error of all heads.

    Args:
        axis: The axis of the `jax.shard_map` that divides the tokens.
        strategy: How the devices work together.
        compute: Attends, with the keywords `implementation` and, for tokens that are
            divided, `token_axis`.
        parts: What this device was given.
        implementation: The caller's choice.
    """
    check_arrays(parts.query, parts.key, parts.value)
    chosen = _checked(axis, strategy, parts, implementation)
    has_batch = parts.query.ndim == 4
    if not has_batch:
        query, key, value = (x[None] for x in parts[:3])
        parts = parts._replace(query=query, key=key, value=value)
    if chosen == "ulysses":
        out, error = compute(_to_heads(axis, parts), implementation=implementation)
        out = jax.lax.all_to_all(out, axis, 1, 2, tiled=True)
        if error is not None:
            error = jax.lax.psum(among_parts(axis, error), axis)
    else:
        parts = _with_all_keys(axis, parts)
        out, error = compute(parts, implementation="streaming", token_axis=axis)
        # All devices have the same; now JAX knows it.
        if error is not None:
            error = jax.lax.pmax(jax.lax.stop_gradient(error), axis)
    if has_batch:
        return out, error
    return jax.tree.map(lambda x: x[0], (out, error))


def _checked(axis: Any, strategy: Any, parts: Parts, implementation: Any) -> str:
    """The strategy, "ulysses" or "mixed".

    Raises:
        TypeError: The axis is no name.
        ValueError: `jax.shard_map` is not manual over it, the strategy is unknown, or
            its condition fails.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"sequence_strategy must be one of {', '.join(map(repr, STRATEGIES))}, got "
            f"{strategy!r}."
        )
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
    num_heads, num_key_heads = parts.query.shape[-2], parts.key.shape[-2]
    divides = num_heads % size == 0 == num_key_heads % size
    if strategy == "ulysses" and not divides:
        raise ValueError(
            f"sequence_strategy='ulysses' needs devices that divide the heads, got "
            f"{num_heads} query heads and {num_key_heads} key heads for the {size} "
            f"devices of sequence_axis={axis!r}: each device attends for its part of "
            "them. Use fewer devices for the sequence, repeat key heads, or use "
            "sequence_strategy='mixed'."
        )
    if strategy == "ulysses" or (strategy == "auto" and divides):
        return "ulysses"
    if implementation not in (None, "streaming"):
        raise ValueError(
            f"implementation={implementation!r} cannot attend to keys of other "
            f"devices, and the {size} devices of sequence_axis={axis!r} do not divide "
            f"{num_heads} query heads and {num_key_heads} key heads, or "
            "sequence_strategy='mixed' was asked for. Use implementation='streaming'."
        )
    return "mixed"


def _with_all_keys(axis: str, parts: Parts) -> Parts:
    """The parts with what other devices have of the keys, but for keys and values."""
    batch, s, _, _ = parts.key.shape
    num_heads = parts.query.shape[2]
    marginals, pattern = parts.marginals, parts.pattern
    if marginals.key is not None:
        shape = batch, num_heads, s
        marginal = broadcast("key_marginal", jnp.asarray(marginals.key), shape)
        marginals = marginals._replace(key=gathered(axis, marginal, -1))
    if pattern.key_ids is not None:
        ids = broadcast("key_segment_ids", jnp.asarray(pattern.key_ids), (batch, s))
        pattern = pattern._replace(key_ids=gathered(axis, ids, -1))
    dropout = parts.dropout._replace(ids=head_ids(parts.query, axis))
    return parts._replace(marginals=marginals, pattern=pattern, dropout=dropout)


def _to_heads(axis: str, parts: Parts) -> Parts:
    """All tokens of this device's part of the heads, from its tokens of all heads."""
    batch, t, num_heads, _ = parts.query.shape
    s = parts.key.shape[1]

    def exchange(x, head_axis, token_axis):
        x = varying_like(x, (x, jax.lax.axis_index(axis)))
        return jax.lax.all_to_all(x, axis, head_axis, token_axis, tiled=True)

    def of_logits(x):
        """A bias or mask of this device's heads, from one that has its queries."""
        if x is None:
            return None
        x = jnp.asarray(x)
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        if x.shape[2] == t:  # The same values on all devices may be gathered too.
            if x.shape[1] == num_heads:
                return exchange(x, 1, 2)
            return gathered(axis, x, 2)
        return own_part(axis, x, 1) if x.shape[1] == num_heads else x

    def of_marginal(name, x, length):
        if x is None:
            return None
        x = broadcast(name, jnp.asarray(x), (batch, num_heads, length))
        return exchange(x, 1, 2)

    def of_ids(name, x, length):
        if x is None:
            return None
        return gathered(axis, broadcast(name, jnp.asarray(x), (batch, length)), 1)

    marginals, pattern, tau = parts.marginals, parts.pattern, parts.marginals.tau
    if isinstance(tau, jax.Array) and tau.ndim > 0:
        tau = own_part(axis, broadcast("column_tau", tau, (batch, num_heads)), 1)
    query, key, value = (exchange(x, 2, 1) for x in parts[:3])
    ids = own_part(axis, head_ids(parts.query, axis), 1)
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
