"""A call of attention: its problem, its operands, and the table of implementations."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core.marginals import checked_tau
from .._core.options import Options
from .._core.precision import accum_dtype
from .._runtime.collectives import own_part
from .._runtime.dispatch import Implementation, in_terms_of_the_call, select
from .._runtime.partition import by_typed_part
from ._marginals import complete_marginals, to_unit_marginals, with_given_marginals
from ._pattern import check_segments, check_window
from ._problem import (
    AXES,
    RESULT_AXES,
    Attended,
    Dropout,
    GivenMarginals,
    GivenPattern,
    Operands,
    Problem,
    Valid,
    head_ids,
    part_of,
    valid_rows_and_cols,
    zero_padding,
)
from ._validate import (
    CAUSAL,
    WHY_WHOLE,
    broadcastable,
    check_arrays,
    check_dropout,
    check_pattern,
    check_scale,
    valid_tokens,
)

AttentionImplementation = Literal[
    "mosaic_gpu", "mosaic_tpu", "streaming", "scaling", "reference"
]

# In order of preference. "reference" runs everywhere and stays last. The kernels were
# compiled but not measured, so no platform takes them unasked. The tests and the
# benchmarks read this table. A new implementation is its module, a line here, its name
# in the Literal and its entry in the docstring.
IMPLEMENTATIONS: Final[Mapping[str, Implementation]] = MappingProxyType(
    {
        "mosaic_gpu": Implementation(
            "sinkhorn_jax.attention._mosaic_gpu.attend", platforms=(), device="gpu"
        ),
        "mosaic_tpu": Implementation(
            "sinkhorn_jax.attention._mosaic_tpu.attend", platforms=(), device="tpu"
        ),
        "streaming": Implementation("sinkhorn_jax.attention._streaming.attend"),
        "scaling": Implementation("sinkhorn_jax.attention._scaling"),
        "reference": Implementation("sinkhorn_jax.attention._reference"),
    }
)


def compute(
    parts,
    *,
    lengths,
    options,
    scale,
    is_causal,
    return_marginal_error,
    implementation,
    token_axis=None,
):
    """Output and, on request, marginal error, from arguments that it checks.

    `parts` are the arrays of `sinkhorn_attention`; the rest are its other arguments,
    and `token_axis` is that of `Problem`.
    """
    query, key, value, bias, mask, marginals, pattern, dropout = parts
    has_query_lengths = lengths[0] is not None
    check_pattern(query, key, bias, mask, has_query_lengths=has_query_lengths)
    problem, operands = prepare(
        (query, key, value, bias, mask),
        lengths,
        options=options,
        marginals=marginals,
        pattern=pattern,
        dropout=dropout,
        scale=scale,
        is_causal=is_causal,
        return_marginal_error=return_marginal_error,
        token_axis=token_axis,
    )
    out, error = attend(problem, operands, implementation)
    if query.ndim == 3:
        out, error = jax.tree.map(lambda x: x[0], (out, error))
    return out, error


def attend(
    problem: Problem, operands: Operands, implementation: AttentionImplementation | None
) -> Attended:
    """Output and, on request, marginal error, by the named implementation.

    What lies in padding, such as NaN, reaches neither an implementation nor, as a
    cotangent, its backward pass.
    """
    chosen = select(IMPLEMENTATIONS, implementation, problem)
    if problem.batch == 0:
        query, value = operands.query, operands.value
        out = jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
        error = jnp.zeros((0, problem.num_heads), accum_dtype(query.dtype))
        return out, error if problem.return_marginal_error else None

    def of_part(operands):
        part = part_of(problem, operands)
        operands, valid = without_padding(part, complete_marginals(part, operands))
        operands, unit = to_unit_marginals(part, operands)
        if unit is not None and part.dtype == jnp.float16:
            # An output in units of the marginals may be outside the range of float16.
            part = dataclasses.replace(part, dtype=jnp.dtype("float32"))
            query, key, value = (x.astype(part.dtype) for x in operands[:3])
            operands = operands._replace(query=query, key=key, value=value)
        with in_terms_of_the_call(IMPLEMENTATIONS, implementation):
            out, error = chosen.attend(part, operands)
        if unit is not None:
            out = out * jnp.swapaxes(unit, 1, 2)[..., None].astype(out.dtype)
            out = out.astype(problem.dtype)
        return out if valid is None else jnp.where(valid.rows, out, 0), error

    return by_typed_part(of_part, (AXES,), RESULT_AXES, operands, why_whole=WHY_WHOLE)


def without_padding(
    problem: Problem, operands: Operands
) -> tuple[Operands, Valid | None]:
    """The operands with zeros for padding, and where there is none."""
    can_exclude = operands.bias is not None or problem.window is not None
    if not can_exclude and not operands.masks():
        return operands, None
    return _without_padding(problem, operands)


@functools.partial(jax.jit, static_argnums=0)
def _without_padding(problem, operands):
    valid = valid_rows_and_cols(problem, operands)
    return zero_padding(problem, operands, valid), valid


def prepare(
    arrays: tuple[Array, Array, Array, Array | None, Array | None],
    lengths: tuple[Array | None, Array | None],
    *,
    options: Options,
    marginals: GivenMarginals = GivenMarginals(),  # noqa: B008 - immutable.
    pattern: GivenPattern = GivenPattern(),  # noqa: B008 - immutable.
    dropout: Dropout,
    scale: float | Array | None,
    is_causal: bool,
    return_marginal_error: bool,
    token_axis: str | None = None,
) -> tuple[Problem, Operands]:
    """The problem and the operands for an implementation, from arguments it checks.

    `arrays` are query, key, value, bias and mask; `lengths` those of queries and keys.
    `token_axis` is that of `Problem`.
    """
    if is_causal:
        raise ValueError(CAUSAL.format("is_causal=True"))
    query, key, value, bias, mask = arrays
    check_arrays(query, key, value)
    dropout_rate = check_dropout(dropout.rate, dropout.rng)
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    batch, t, num_heads, head_dim = query.shape
    tau = checked_tau(marginals.tau, (batch, num_heads), accum_dtype(query.dtype))
    scale = 1 / math.sqrt(head_dim) if scale is None else check_scale(scale)
    static, dynamic = (1.0, scale) if isinstance(scale, Array) else (scale, None)
    s, num_key_heads, value_dim = value.shape[1:]
    num_parts = 1 if token_axis is None else jax.lax.axis_size(token_axis)
    s = s * num_parts
    problem = Problem(
        batch=batch,
        t=t,
        s=s,
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=query.dtype,
        options=options,
        scale=static,
        dropout_rate=dropout_rate,
        broadcast_dropout=dropout.is_broadcast,
        return_marginal_error=return_marginal_error,
        has_bias=bias is not None,
        has_mask=mask is not None,
        has_marginals=marginals.query is not None or marginals.key is not None,
        has_tau=tau is not None,
        has_segments=pattern.query_ids is not None,
        window=check_window(pattern.window, t, s),
        token_axis=token_axis,
    )
    query_valid = valid_tokens("query_seq_lengths", lengths[0], batch, t * num_parts)
    if query_valid is not None:
        query_valid = own_part(token_axis, query_valid, 1)
    ids = dropout.ids
    if dropout_rate > 0 and ids is None:
        ids = head_ids(query)
    logits_shape = (batch, num_heads, t, s)
    operands = Operands(
        query,
        key,
        value,
        broadcastable("bias", bias, logits_shape),
        broadcastable("mask", mask, logits_shape),
        query_valid,
        valid_tokens("key_value_seq_lengths", lengths[1], batch, s),
        dropout.rng if dropout_rate > 0 else None,
        dynamic,
        tau=tau,
        segments=check_segments(pattern.query_ids, pattern.key_ids, batch, t, s),
        head_ids=ids if dropout_rate > 0 else None,
    )
    return problem, with_given_marginals(problem, operands, marginals)
