"""`sinkhorn_attention`: signature, checks, and the table of implementations."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._core.checks import number
from .._core.gradient import Exact, Gradient
from .._core.iteration import Finish
from .._core.options import Options
from .._core.precision import accum_dtype
from .._runtime.dispatch import Implementation, select
from ._problem import Operands, Problem

AttentionImplementation = Literal[
    "mosaic_gpu", "mosaic_tpu", "streaming", "scaling", "reference"
]

# In order of preference. "reference" runs everywhere and stays last. The kernels were
# compiled but not measured, so no platform takes them unasked. The tests and the
# benchmarks read this table, so a new implementation is its module and a line here.
IMPLEMENTATIONS: Final[Mapping[str, Implementation]] = MappingProxyType(
    {
        "mosaic_gpu": Implementation(
            "sinkhorn_jax.attention._mosaic_gpu.attend", platforms=()
        ),
        "mosaic_tpu": Implementation(
            "sinkhorn_jax.attention._mosaic_tpu.attend", platforms=()
        ),
        "streaming": Implementation("sinkhorn_jax.attention._streaming.attend"),
        "scaling": Implementation("sinkhorn_jax.attention._scaling"),
        "reference": Implementation("sinkhorn_jax.attention._reference"),
    }
)

CAUSAL: Final = (
    "{} leaves the identity as the only doubly stochastic plan, so every "
    "token would attend to itself alone. For causal attention use "
    "jax.nn.dot_product_attention."
)


def sinkhorn_attention(
    query: Float[Array, "*B T N H"],  # *B is (B,) or ().
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    num_iters: int = 10,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integer[Array, " B"] | None = None,
    key_value_seq_lengths: Integer[Array, " B"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    implementation: AttentionImplementation | None = None,
    return_marginal_error: bool = False,
) -> Float[Array, "*B T N D"] | tuple[Float[Array, "*B T N D"], Float[Array, "*B N"]]:
    r"""Attention whose weights are doubly stochastic.

    Replaces the softmax by Sinkhorn's algorithm: with logits
    $Z = \mathrm{scale}\, QK^\top + \mathrm{bias}$, returns $PV$ where
    $P_{ij} = \exp(Z_{ij} + f_i + g_j)$, rows sum to 1 and columns to $T/S$.

    Starts from the softmax, then normalises columns and rows `num_iters` times. Rows
    are exact; columns approach $T/S$. At 0 it is `jax.nn.dot_product_attention`, except
    that a row without an allowed key gives zeros there.

    A row or column of the logits without an allowed entry is padding: it takes part in
    neither marginal, its output and gradients are zero, and the rest equals the result
    for the cropped inputs (columns then sum to valid rows / valid columns). Give *both*
    sequence lengths, or a mask that excludes padded queries as well as padded keys: a
    mask of the keys alone leaves padded queries in, which pour mass into the columns.

    Args:
        query: Queries. B batch (or no batch axis), T query length, N heads, H head
            dimension.
        key: Keys. S key length; K heads, a divisor of N.
        value: Values. D may differ from H.
        bias: Added to the logits; up to 4 axes, broadcasts to (B, N, T, S). -inf
            excludes an entry like the mask. A large negative number does not: in a
            whole column it cancels, and the column gets its full mass.
        mask: True where a query may attend to a key; boolean, shaped like `bias`. Where
            the allowed entries admit no doubly stochastic plan the iteration cannot
            converge, and the marginal error shows it.
        num_iters: Column-then-row normalisations, a Python integer. Time is linear in
            it.
        scale: Multiplies $QK^\top$; the inverse temperature, a Python number. Default
            $1/\sqrt{H}$. For a learnt or per-head temperature scale the query.
        is_causal: Must be False; accepted for the sake of the error that explains why.
        query_seq_lengths: Valid queries of each batch element; (1,) without batch axis.
            Given alone, all keys count as valid: nothing is guessed.
        key_value_seq_lengths: Valid keys, likewise.
        dropout_rate: Probability with which an entry of the plan is dropped, in [0, 1);
            the others are divided by 1 - rate. A Python number.
        dropout_rng: Key for the dropout. The mask depends on it and on the position of
            the entry alone, and is the same in every implementation.
        finish: "rows", or "columns" to drop the last row step: then the columns are
            exact and the rows approximate.
        gradient: `Exact`, `Truncated` or `Implicit`; see their docstrings.
        implementation: None takes "scaling", or "streaming" where five arrays (T, S) of
            the potentials' dtype are more than 1 GiB, whatever the device; "reference"
            if neither can run. All give the same result.
            "scaling" holds a few (T, S) arrays per head in flight and is the fastest.
            "streaming" holds nothing of size (T, S), forward or backward, unless `bias`
            or `mask` is of that size itself, and its gradient then too; one that
            broadcasts is never written out. It takes `Exact` and `Truncated`. Both
            have a closed-form gradient, reverse mode only.
            "reference" holds all logits and is plain JAX: use it for forward mode,
            Hessians and any other transform.
            "mosaic_gpu" are Pallas kernels for NVIDIA's Hopper GPUs, compiled for them
            (on others they do not compile) but not run on one, so only taken by name.
            They hold T S / 64 numbers a head, and take bfloat16 and float16, head
            dimensions to 128, 64 iterations, `Exact`, finish="rows" and sequence
            lengths, but no bias, mask or dropout; reverse mode only.
            "mosaic_tpu" are Pallas kernels for TPUs, compiled for them but not measured
            on one, so only taken by name. They take float32 and bfloat16, `Exact`,
            finish="rows" and sequence lengths, but no bias, mask or dropout; reverse
            mode only.
        return_marginal_error: Also return how far the other marginal is from exact.

    Returns:
        The attended values in the query's dtype; potentials and sums are kept in
        float32 at least. With `return_marginal_error` a pair of it and the marginal
        error (B, N) or (N,): Σ_j |Σ_i P_ij - b_j| / Σ_i a_i (of the rows for
        finish="columns") before dropout, between 0 and 2, not differentiated.

    Raises:
        TypeError: Wrong dtypes, or `num_iters`, `scale` or `dropout_rate` is not a
            Python number.
        ValueError: Shapes disagree or are empty, `is_causal`, a negative `num_iters`,
            an unknown `finish` or `implementation`, a dropout rate without a key.
        NotImplementedError: The named implementation cannot run this problem, or the
            TPU that "mosaic_tpu" is traced for has too little VMEM for it; in the
            backward pass, if only that needs more.

    `local_window_size` and `return_residual` of `jax.nn.dot_product_attention` are left
    out: a window rarely admits a doubly stochastic plan, and f and g are not one number
    per row.

    Reference:
        Sander et al., Sinkformers, 2022. https://arxiv.org/abs/2110.11773
    """
    out, error = attend(
        query,
        key,
        value,
        bias,
        mask,
        options=Options(num_iters, finish, gradient),
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        implementation=implementation,
        return_marginal_error=return_marginal_error,
    )
    return out if error is None else (out, error)


def attend(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    *,
    options: Options,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    broadcast_dropout: bool = False,
    implementation: AttentionImplementation | None = None,
    return_marginal_error: bool = False,
) -> tuple[Array, Array | None]:
    """`sinkhorn_attention` for the Flax hooks, whose dropout may be broadcast."""
    if is_causal:
        raise ValueError(CAUSAL.format("is_causal=True"))
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    _check_arrays(query, key, value)
    dropout_rate = number("dropout_rate", dropout_rate)
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}.")
    if dropout_rate > 0 and dropout_rng is None:
        raise ValueError(
            f"dropout_rate={dropout_rate} needs dropout_rng, got None: the mask is "
            "drawn from it. Pass a jax.random.key, or dropout_rate=0."
        )
    is_batched = query.ndim == 4
    if not is_batched:
        query, key, value = query[None], key[None], value[None]
    batch, t, num_heads, head_dim = query.shape
    s, num_key_heads, value_dim = value.shape[1:]
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
        scale=1 / math.sqrt(head_dim) if scale is None else check_scale(scale),
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        return_marginal_error=return_marginal_error,
        has_bias=bias is not None,
        has_mask=mask is not None,
    )
    logits_shape = (batch, num_heads, t, s)
    operands = Operands(
        query,
        key,
        value,
        _check_bias_or_mask("bias", bias, logits_shape),
        _check_bias_or_mask("mask", mask, logits_shape),
        _valid("query_seq_lengths", query_seq_lengths, batch, t),
        _valid("key_value_seq_lengths", key_value_seq_lengths, batch, s),
        dropout_rng if dropout_rate > 0 else None,
    )
    chosen = select(IMPLEMENTATIONS, implementation, problem)
    if batch == 0:
        out = jnp.zeros((0, t, num_heads, value_dim), query.dtype)
        error = jnp.zeros((0, num_heads), accum_dtype(query.dtype))
        return out, error if return_marginal_error else None
    out, error = chosen.attend(problem, operands)
    if not is_batched:
        out, error = jax.tree.map(lambda x: x[0], (out, error))
    return out, error


def _check_arrays(query, key, value):
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}. Cast it first.")
        if x.dtype != query.dtype:
            raise TypeError(
                "query, key and value must have one dtype, got "
                f"{query.dtype}, {key.dtype} and {value.dtype}. Cast them to one."
            )
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(
                "query, key and value must all be (batch, length, heads, dimension) or "
                f"all (length, heads, dimension), got shapes {query.shape}, "
                f"{key.shape} and {value.shape}."
            )
        if 0 in x.shape[-3:]:
            raise ValueError(
                f"{name} must not be empty, got shape {x.shape}: a plan without rows "
                "or columns has no marginals."
            )
    for what, ok in {
        "batch sizes B": query.shape[:-3] == key.shape[:-3] == value.shape[:-3],
        "head dimensions H of query and key": query.shape[-1] == key.shape[-1],
        "key lengths S of key and value": key.shape[-3] == value.shape[-3],
        "key heads K of key and value": key.shape[-2] == value.shape[-2],
    }.items():
        if not ok:
            raise ValueError(
                f"The {what} differ: got query {query.shape}, key {key.shape} and "
                f"value {value.shape}; expected query (B, T, N, H), key (B, S, K, H) "
                "and value (B, S, K, D)."
            )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"The {query.shape[-2]} query heads cannot share {key.shape[-2]} key heads "
            f"evenly: got query {query.shape} and key {key.shape}. The number of key "
            "heads must divide the number of query heads."
        )


def _check_bias_or_mask(name, x, logits_shape):
    if x is None:
        return None
    x = jnp.asarray(x)
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean, got {x.dtype}: True marks what a query may attend "
            "to. Use `mask != 0`, or pass an additive mask as bias."
        )
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"bias must be floating, got {x.dtype}: it is added to the logits. Pass a "
            "boolean mask as mask."
        )
    padded = (1,) * (4 - x.ndim) + x.shape
    if len(padded) > 4 or any(
        got not in (1, n) for got, n in zip(padded, logits_shape, strict=True)
    ):
        raise ValueError(
            f"{name} must broadcast to (batch, query heads, query length, key length) "
            f"= {logits_shape}, got shape {x.shape}."
        )
    return x.reshape(padded)


def _valid(name, lengths, batch, length):
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must be integer, got {lengths.dtype}.")
    if lengths.shape != (batch,):
        raise ValueError(
            f"{name} must have shape ({batch},), one length for each batch element, "
            f"got shape {lengths.shape}."
        )
    # In int32: positions need not fit the lengths' own type.
    return (
        jnp.arange(length, dtype=jnp.int32)[None, :]
        < lengths.astype(jnp.int32)[:, None]
    )


def check_scale(scale: float) -> float:
    """The scale as a finite Python float."""
    hint = "For a traced or per-head temperature multiply the query instead."
    if not math.isfinite(scale := number("scale", scale, hint)):
        raise ValueError(f"scale must be finite, got {scale}.")
    return scale
