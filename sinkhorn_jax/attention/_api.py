"""`sinkhorn_attention`: its signature, and the table of implementations."""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._core.gradient import Exact, Gradient
from .._core.marginals import checked_tau
from .._core.options import Finish, Options
from .._core.precision import accum_dtype
from .._runtime.arguments import as_array
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
from ._sequence import Parts, SequenceStrategy, over_sequence
from ._validate import (
    CAUSAL,
    WHY_WHOLE,
    broadcastable,
    check_arrays,
    check_dropout,
    check_pattern,
    check_scale,
    checked_tolerance,
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


# For type checkers: the result is a pair only where `return_marginal_error` is True,
# and either where its value is not known to them.
# fmt: off
@overload
def sinkhorn_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None,
    mask: Array | None = None, *, num_iters: int = 10,
    scale: float | Array | None = None,
    is_causal: bool = False, query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None, query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_marginal: Array | None = None,
    key_marginal: Array | None = None, column_tau: float | Array = 1.0,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None,
    sequence_axis: str | None = None, sequence_strategy: SequenceStrategy = "auto",
    finish: Finish = "rows",
    gradient: Gradient = ..., tolerance: float | None = None,
    implementation: AttentionImplementation | None = None,
    return_marginal_error: Literal[False] = False,
) -> Array: ...
@overload
def sinkhorn_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None,
    mask: Array | None = None, *, num_iters: int = 10,
    scale: float | Array | None = None,
    is_causal: bool = False, query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None, query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_marginal: Array | None = None,
    key_marginal: Array | None = None, column_tau: float | Array = 1.0,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None,
    sequence_axis: str | None = None, sequence_strategy: SequenceStrategy = "auto",
    finish: Finish = "rows",
    gradient: Gradient = ..., tolerance: float | None = None,
    implementation: AttentionImplementation | None = None,
    return_marginal_error: Literal[True],
) -> tuple[Array, Array]: ...
@overload
def sinkhorn_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None,
    mask: Array | None = None, *, num_iters: int = 10,
    scale: float | Array | None = None,
    is_causal: bool = False, query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None, query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_marginal: Array | None = None,
    key_marginal: Array | None = None, column_tau: float | Array = 1.0,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None,
    sequence_axis: str | None = None, sequence_strategy: SequenceStrategy = "auto",
    finish: Finish = "rows",
    gradient: Gradient = ..., tolerance: float | None = None,
    implementation: AttentionImplementation | None = None, return_marginal_error: bool,
) -> Array | tuple[Array, Array]: ...
# fmt: on
def sinkhorn_attention(
    query: Float[Array, "*B T N H"],  # *B is (B,) or ().
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    num_iters: int = 10,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integer[Array, "..."] | None = None,  # (B,) or ().
    key_value_seq_lengths: Integer[Array, "..."] | None = None,
    query_segment_ids: Integer[Array, "..."] | None = None,  # (B, T) or (T,).
    key_segment_ids: Integer[Array, "..."] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_marginal: Float[Array, "..."] | None = None,
    key_marginal: Float[Array, "..."] | None = None,
    column_tau: float | Float[Array, "..."] = 1.0,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    sequence_axis: str | None = None,
    sequence_strategy: SequenceStrategy = "auto",
    finish: Finish = "rows",
    gradient: Gradient = Exact(),  # noqa: B008 - frozen.
    tolerance: float | None = None,
    implementation: AttentionImplementation | None = None,
    return_marginal_error: bool = False,
) -> Float[Array, "*B T N D"] | tuple[Float[Array, "*B T N D"], Float[Array, "*B N"]]:
    r"""Attention whose weights are doubly stochastic.

    Replaces the softmax by Sinkhorn's algorithm: with logits
    $Z = \mathrm{scale}\, QK^\top + \mathrm{bias}$, returns $PV$ where
    $P_{ij} = \exp(Z_{ij} + f_i + g_j)$, rows sum to 1 and columns to $T/S$.

    The iteration starts from the softmax and then normalises columns and rows
    `num_iters` times. Rows are exact; columns approach $T/S$. With `num_iters=0` this
    is `jax.nn.dot_product_attention`, except that a row without an allowed key gives
    zeros here and an average of the values there.

    A row or column of the logits without an allowed entry is padding: it takes part in
    neither marginal, its output and gradients are zero, and the rest equals the result
    for the cropped inputs (columns then sum to valid rows / valid columns), whatever
    lies in padding, NaN and infinity included. Give *both* sequence lengths, or a mask
    that excludes padded queries as well as padded keys: a mask of the keys alone leaves
    padded queries in, which pour mass into the columns.

    Args:
        query: Queries. B batch (or no batch axis), T query length, N heads, H head
            dimension.
        key: Keys. S key length; K heads, a divisor of N.
        value: Values. D may differ from H.
        bias: Added to the logits; up to 4 axes, broadcasts to (B, N, T, S). -inf
            excludes an entry like the mask, and so does every number of at most half of
            `jnp.finfo(bias.dtype).min`. Another large negative number, such as -1e9,
            does not: in a whole column it cancels, and the column gets its full mass.
            Where the values are known, such a bias warns.
        mask: True where a query may attend to a key; boolean, shaped like `bias`. Where
            the allowed entries admit no doubly stochastic plan the iteration cannot
            converge, and the marginal error shows it. A causal mask is an error where
            its values are known. **Under `jit` they are not**, neither of an argument
            nor of a mask made there: it then passes in silence, the plan goes towards
            the identity, and until it is there later tokens leak into earlier ones
            through the column sums. Make the mask with NumPy, or outside, to have it
            checked, or use `traced_checks`, which finds this, lengths out of range, and
            a causal bias.
        num_iters: Column-then-row normalisations, a Python integer. Time is linear in
            it.
        scale: Multiplies $QK^\top$; the inverse temperature. Default $1/\sqrt{H}$. Each
            value of a Python number is compiled by itself. A scalar array is an operand
            like the query, with a gradient, for a temperature that is learnt or swept;
            kernels multiply it into the query, which rounds in 16 bits. For a
            temperature of each head multiply the query.
        is_causal: Must be False; accepted for the sake of the error that explains why.
        query_seq_lengths: Valid queries of each batch element, or one number for all;
            from 0 to T, which is checked where the values are known. If only this one
            is given, all keys count as valid: nothing is guessed.
        key_value_seq_lengths: Valid keys of each batch element; likewise.
        query_segment_ids: The segment of each query, integers that broadcast to (B, T);
            0 and below is padding. A query attends to the keys of its own segment, and
            each segment is a problem of its own, as in a call of its own: columns sum
            to its valid rows / its valid columns.
        key_segment_ids: The segment of each key, (B, S). Both are given or neither.
        local_window_size: Query i attends to the keys from i - left to i + right; a
            number is both. At least 1 to either side: a one-sided window, like a causal
            mask, leaves the identity alone. A narrow window converges slowly, and the
            marginal error tells. "streaming" computes only the part of the logits that
            the window allows.
        query_marginal: Row sums of the plan, floating, broadcasts to (B, N, T), or
            (N, T) without a batch axis. Default: 1, or if only `key_marginal` is given,
            uniform with its total. The output is $PV$ as it is: divide it by
            `query_marginal` for averages of the values. 0 makes a query padding, and
            marginals of padding are ignored. Checks are those of `sinkhorn`.
        key_marginal: Column sums, broadcasts to (B, N, S), with the total of the row
            sums; likewise. Default: uniform.
        column_tau: How strictly columns have their sums: 1 is doubly stochastic
            attention, 0 softmax attention for any `num_iters`, and a number between
            them sets $g = \tau\,(\log b - \mathrm{logsumexp}_i(Z + f))$ in each column
            step. It converges to transport with a penalty
            $\tau / (1 - \tau)\,\mathrm{KL}$ on the columns, so the marginal error does
            not go to 0, and the totals of the marginals need not agree. A number in
            [0, 1], or a floating array that broadcasts to (B, N), with a gradient.
        dropout_rate: Probability with which an entry of the plan is dropped, in [0, 1);
            the entries that remain are divided by 1 - rate. A Python number.
        dropout_rng: Key for the dropout. The dropout mask is a function of this key and
            of the entry's position, and is the same in every implementation. The parts
            of a `jax.shard_map` count on in the batch, so they have different masks;
            with `check_vma=False` they cannot be told apart, and need keys of their
            own.
        sequence_axis: The axis of a `jax.shard_map` around the call over which tokens
            are divided: T and S are then numbers of this device's tokens, in `bias`,
            `mask`, marginals and segment ids as well, where S stays the whole in `bias`
            and `mask`. Lengths, window and positions are those of the whole sequence,
            and are the same on all devices. The result is that of one device.
        sequence_strategy: How the devices of `sequence_axis` work together. "ulysses":
            they exchange tokens for heads, each attends for its part of the heads, and
            so they must divide N and K. "mixed": each attends for its queries to all
            keys, and the column sums are added up over devices in each iteration; that
            is "streaming", without a window. "auto" is "ulysses" where devices divide
            the heads, else "mixed".
        finish: "rows", or "columns" to drop the last row step: then the columns are
            exact and the rows approximate.
        gradient: `Exact`, `Truncated` or `Implicit`; see their docstrings.
        tolerance: The marginal error at which a head stops, each by itself; `num_iters`
            is then the limit. As in `sinkhorn_potentials`.
        implementation: One of the names below, which agree up to rounding. None takes
            "scaling", or "streaming" where five (T, S) arrays of the potentials' dtype
            exceed 1 GiB and it can run, on every device.
        return_marginal_error: Also return how far the other marginal is from exact.

    Implementations:
        "scaling": Allocates a few (T, S) arrays for each head in flight. The fastest
            for num_iters of 1 or more, measured on CPUs only. Takes every argument.
            Reverse mode only, any number of times: `jax.jacrev(jax.grad(f))` is the
            exact Hessian.
        "streaming": Holds nothing of size (T, S), forward or backward, unless `bias` or
            `mask` has that size itself (then the gradient of the bias has it too).
            Takes `Exact` and `Truncated`, and no tolerance. Reverse mode only,
            likewise.
        "reference": Plain JAX on all logits at once. Takes every argument and every
            transform; forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) needs it.
        "mosaic_gpu": Pallas kernels for NVIDIA's Hopper GPUs, compiled for them but not
            run on one; only taken by name. Holds T S / 64 numbers for each head. Takes
            bfloat16 and float16, H and D up to 128, up to 64 iterations,
            `Exact`, finish="rows" and sequence lengths, but no bias, mask, segments,
            window, dropout, marginals, `column_tau` below 1 or tolerance. Reverse mode
            only.
        "mosaic_tpu": Pallas kernels for TPUs, compiled for them but not measured on
            one; only taken by name. Takes float32 and bfloat16, and otherwise what
            "mosaic_gpu" takes. Reverse mode only. To lower or export it without a TPU,
            name one as in docs/usage.md.

    Returns:
        The attended values in the query's dtype; potentials and sums are kept in
        float32 at least. With `return_marginal_error` a pair: these values, and the
        marginal error (B, N) or (N,), Σ_j |Σ_i P_ij - b_j| / Σ_i a_i (of the rows for
        finish="columns") before dropout, between 0 and 2, not differentiated.

    Raises:
        TypeError: Wrong dtypes, `num_iters`, `scale` or `dropout_rate` is not a number,
            `dropout_rng` is no key, or an implementation other than "reference" is
            differentiated in forward mode.
        ValueError: Shapes disagree or are empty, `is_causal` or a causal mask or bias,
            a negative `num_iters`, lengths out of range, an unknown `finish` or
            `implementation`, a dropout rate without a key, `column_tau` outside [0, 1],
            marginals that are negative, not finite, or of different totals, segment
            ids of one side alone, a one-sided window, or tokens or features that an
            Explicit mesh axis divides.
        NotImplementedError: The named implementation cannot run this problem, its
            kernels are for another platform (under `jit` that is an error of Pallas),
            or the TPU that "mosaic_tpu" is traced for has too little VMEM for its
            forward kernel; the backward pass raises it for the backward kernel.

    `return_residual` of `jax.nn.dot_product_attention` is not offered.

    Batch and heads may be divided over devices: each device computes its own. Tokens
    and features may not. docs/usage.md has examples and limits.

    Reference:
        Sander et al., Sinkformers, 2022. https://arxiv.org/abs/2110.11773
    """
    names = "query", "key", "value"
    query, key, value = map(as_array, names, (query, key, value))
    parts = Parts(
        query,
        key,
        value,
        bias,
        mask,
        GivenMarginals(query_marginal, key_marginal, column_tau),
        GivenPattern(query_segment_ids, key_segment_ids, local_window_size),
        Dropout(dropout_rate, dropout_rng),
    )
    lengths = query_seq_lengths, key_value_seq_lengths
    compute = functools.partial(
        _compute,
        lengths=lengths,
        options=Options(num_iters, finish, gradient, checked_tolerance(tolerance)),
        scale=scale,
        is_causal=is_causal,
        return_marginal_error=return_marginal_error,
    )
    if sequence_axis is None:
        out, error = compute(parts, implementation=implementation)
    else:
        out, error = over_sequence(
            sequence_axis, sequence_strategy, compute, parts, implementation
        )
    return out if error is None else (out, error)


def _compute(
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
        with in_terms_of_the_call(IMPLEMENTATIONS, implementation):
            out, error = chosen.attend(part, operands)
        if unit is not None:
            out = out * jnp.swapaxes(unit, 1, 2)[..., None].astype(out.dtype)
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
